//! Finds the eBPF object that the binary embeds.

use std::path::PathBuf;

fn main() {
    let manifest = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let object = manifest.join("../target/bpf/soe-ebpf.o");
    println!("cargo::rerun-if-changed={}", object.display());
    if !object.exists() {
        println!(
            "cargo::error=the eBPF object target/bpf/soe-ebpf.o is missing; run `cargo xtask build-ebpf` first"
        );
    }
    println!("cargo::rustc-env=SOE_EBPF_OBJECT={}", object.display());
}
