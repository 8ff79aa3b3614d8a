//! Helpers of the tests that need a kernel: devices that a test makes itself and removes on every
//! exit path, and writes whose content says who wrote them.

pub mod device;

pub mod torture;
