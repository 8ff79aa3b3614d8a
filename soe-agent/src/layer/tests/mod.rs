//! Tests of the store as a whole, mostly on the simulated disk.
