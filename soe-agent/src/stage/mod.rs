//! Pre-staging: scoring, admission, copying, coherent reads.

pub mod score;
