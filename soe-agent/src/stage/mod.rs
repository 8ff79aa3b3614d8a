//! Pre-staging: scoring, admission, copying, coherent reads.

pub mod area;

pub mod chosen;

pub mod score;
