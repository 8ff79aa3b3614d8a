//! The surface that programs talk to: gRPC over a unix socket, HTTP on loopback.
//!
//! [`engine`] is what the daemon implements, in plain Rust types ([`types`]); protobuf exists only in
//! [`convert`] and [`grpc`], HTTP only in [`http`]. Command-line JSON and HTTP JSON are the same types
//! through `serde`, so their field names cannot drift apart.

pub mod types;

pub mod engine;

pub mod validate;

pub mod cloudevents;

pub mod audit;

pub mod socket;

pub mod convert;

pub mod grpc;

pub mod http;

pub mod server;

/// What `prost` and `tonic` generate from `proto/soe/v1`.
#[allow(missing_docs, clippy::all)]
pub mod pb {
    tonic::include_proto!("soe.v1");

    /// The encoded descriptor set, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/soe_descriptor.bin"));
}
