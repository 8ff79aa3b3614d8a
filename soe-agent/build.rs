//! Compiles the service definition. `protox` is a protobuf compiler in Rust, so no `protoc` has to be installed.

use std::error::Error;
use std::path::PathBuf;

use prost::Message;

const PROTO_ROOT: &str = "proto";
const PROTO: &str = "proto/soe/v1/snapshot_orchestration.proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={PROTO}");
    let files = protox::compile([PROTO], [PROTO_ROOT])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    // What reflection serves.
    std::fs::write(out.join("soe_descriptor.bin"), files.encode_to_vec())?;
    tonic_prost_build::configure().emit_rerun_if_changed(false).compile_fds(files)?;
    Ok(())
}
