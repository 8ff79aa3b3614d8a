//! gRPC and HTTP; converts at the edge.
