//! Finds the eBPF object that the binary embeds, and compiles the service definition. `protox` is a
//! protobuf compiler in Rust, so no `protoc` has to be installed.

use std::error::Error;
use std::path::{Path, PathBuf};

use prost::Message;

const PROTO_ROOT: &str = "proto";
const PROTO: &str = "proto/soe/v1/snapshot_orchestration.proto";

fn main() -> Result<(), Box<dyn Error>> {
    let manifest = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    find_object(&manifest);
    compile_service(&out)
}

fn find_object(manifest: &Path) {
    let object = manifest.join("../target/bpf/soe-ebpf.o");
    println!("cargo::rerun-if-changed={}", object.display());
    if !object.exists() {
        println!(
            "cargo::error=the eBPF object target/bpf/soe-ebpf.o is missing; run `cargo xtask build-ebpf` first"
        );
    }
    println!("cargo::rustc-env=SOE_EBPF_OBJECT={}", object.display());
}

fn compile_service(out: &Path) -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={PROTO}");
    let files = protox::compile([PROTO], [PROTO_ROOT])?;
    // What reflection serves.
    std::fs::write(out.join("soe_descriptor.bin"), files.encode_to_vec())?;
    tonic_prost_build::configure()
        .emit_rerun_if_changed(false)
        .compile_fds(files)?;
    Ok(())
}
