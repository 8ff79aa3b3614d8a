//! Helpers of the tests that need a kernel: devices that a test makes itself and removes on every
//! exit path, and a real agent with a folder of its own.

pub mod agent;
pub mod device;
pub mod guest;
pub mod kernel;
pub mod passthrough;
pub mod torture;
pub mod uring;
pub mod venv;
