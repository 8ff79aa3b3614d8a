//! Tests of whole restores.
