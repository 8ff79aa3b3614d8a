//! Tests of the store as a whole, mostly on the simulated disk.

pub(crate) mod support;

mod oracle;

mod power_cut;

mod faults;

mod damage;

mod rules;

mod lies;
mod manual;
