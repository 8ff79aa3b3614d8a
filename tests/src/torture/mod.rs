//! Captures under fire: writers whose every sector says who wrote it and when, a history of what was
//! issued and acknowledged, and the oracle that holds every layer against it.

pub mod history;

pub mod oracle;

pub mod load;

pub mod devices;

pub mod rig;

pub mod lies;

pub mod books;

pub mod hunt;
