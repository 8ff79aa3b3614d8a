//! Records that cross the kernel boundary.
