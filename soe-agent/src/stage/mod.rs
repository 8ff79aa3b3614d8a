//! Pre-staging: scoring, admission, copying, coherent reads.

pub mod area;

pub mod cache;

pub mod chosen;

pub mod hash;

pub mod heat;

pub mod score;
