//! What this kernel and host can do.

pub mod btf;
pub mod support;
