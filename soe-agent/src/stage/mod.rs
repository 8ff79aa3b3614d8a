//! Pre-staging: scoring, admission, copying, coherent reads.
