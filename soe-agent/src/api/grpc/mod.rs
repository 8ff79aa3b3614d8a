//! The gRPC service: checks the caller and the arguments, converts, calls the engine, converts back,
//! and keeps the audit.

mod service;
mod span;
mod status;

pub use service::Service;
pub use status::{KIND_TRAILER, check_peer, from_status, to_status};
