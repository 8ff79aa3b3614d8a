//! `cargo xtask build-ebpf`: the kernel half, compiled by whichever BPF toolchain is there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::toolchain::{self, Compiler, TARGET};
use crate::{place, run};

/// A cold build takes about half a minute on two cores.
const LIMIT: Duration = Duration::from_secs(600);

/// Runs the command.
pub fn command() -> Result<i32> {
    let (object, changed) = build()?;
    println!(
        "{} {}",
        object.display(),
        if changed { "built" } else { "is up to date" }
    );
    Ok(0)
}

/// Builds the object and returns where it is and whether it is another than before.
pub fn build() -> Result<(PathBuf, bool)> {
    let object = place::ebpf_object();
    let changed = build_crate(
        &place::root().join("soe-ebpf"),
        &place::target().join("bpf-build"),
        "soe-ebpf",
        &object,
    )?;
    Ok((object, changed))
}

fn build_crate(package: &Path, target_dir: &Path, name: &str, object: &Path) -> Result<bool> {
    let Some(compiler) = toolchain::compiler() else {
        bail!(
            "cannot build the eBPF object: no Rust compiler with a core library for {TARGET} was found; run `cargo xtask setup`"
        );
    };
    let Some(linker) = toolchain::linker() else {
        bail!(
            "cannot build the eBPF object: bpf-linker was found neither in PATH nor where cargo installs programs; run `cargo xtask setup`"
        );
    };
    let mut cargo = match &compiler {
        Compiler::Ready { rustc, cargo } => {
            let mut command = toolchain::clean(Command::new(cargo));
            // The released compiler takes the unstable features of a BPF program only when told so.
            command
                .env("RUSTC_BOOTSTRAP", "1")
                .env("RUSTC", rustc)
                .arg("build");
            command
        }
        Compiler::Nightly { toolchain } => {
            let mut command = toolchain::clean(Command::new("rustup"));
            command.args(["run", toolchain, "cargo", "build", "-Z", "build-std=core"]);
            command
        }
    };
    cargo
        .current_dir(package)
        .args(["--release", "--target", TARGET, "--target-dir"])
        .arg(target_dir)
        .arg("--config")
        .arg(format!(
            "target.{TARGET}.linker={:?}",
            linker.display().to_string()
        ))
        .arg("--config")
        .arg(format!(
            r#"target.{TARGET}.rustflags=["-Clink-arg=--btf","-Cdebuginfo=2","-Ctarget-cpu=v3"]"#
        ));
    let end = run::inherit(&mut cargo, LIMIT)?;
    if !end.success() {
        bail!(
            "cannot build the eBPF object with {} and {}: {}",
            compiler.describe(),
            linker.display(),
            end.describe(LIMIT)
        );
    }
    let built = target_dir.join(TARGET).join("release").join(name);
    publish(&built, object)
}

/// Copies the object where `soe-agent` looks for it, unless the same bytes are there already: a
/// fresh modification time would rebuild everything that embeds it.
fn publish(built: &Path, object: &Path) -> Result<bool> {
    let bytes = fs::read(built)
        .with_context(|| format!("cannot read the eBPF object {}", built.display()))?;
    if fs::read(object).is_ok_and(|old| old == bytes) {
        return Ok(false);
    }
    let dir = object
        .parent()
        .context("the eBPF object has no directory")?;
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let partial = object.with_extension("partial");
    fs::write(&partial, &bytes)
        .and_then(|()| fs::rename(&partial, object))
        .with_context(|| format!("cannot write {}", object.display()))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A whole BPF program from source to object, by the same recipe as the real one: an ELF file
    /// for BPF (machine 247) that has type information.
    #[test]
    fn the_recipe_makes_a_bpf_object() {
        if toolchain::compiler().is_none() || toolchain::linker().is_none() {
            println!("SKIPPED: this machine has no BPF toolchain");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("src")).unwrap();
        fs::write(
            dir.path().join("Cargo.toml"),
            "[package]\nname = \"probe\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\
             [profile.release]\nlto = true\npanic = \"abort\"\ncodegen-units = 1\n[workspace]\n",
        )
        .unwrap();
        fs::write(
            dir.path().join("src/main.rs"),
            "#![no_std]\n#![no_main]\n\
             #[unsafe(no_mangle)]\n#[unsafe(link_section = \"license\")]\nstatic LICENSE: [u8; 4] = *b\"GPL\\0\";\n\
             #[unsafe(no_mangle)]\n#[unsafe(link_section = \"socket\")]\nextern \"C\" fn probe(_ctx: *mut u8) -> i32 { 0 }\n\
             #[panic_handler]\nfn panic(_: &core::panic::PanicInfo<'_>) -> ! { loop {} }\n",
        )
        .unwrap();
        let object = dir.path().join("out/probe.o");
        let build = || build_crate(dir.path(), &dir.path().join("target"), "probe", &object);
        assert!(build().unwrap(), "the first build makes the object");
        assert!(!build().unwrap(), "the second build has nothing to do");
        let bytes = fs::read(&object).unwrap();
        assert_eq!(&bytes[..4], b"\x7fELF");
        assert_eq!(u16::from_le_bytes([bytes[18], bytes[19]]), 247);
        assert!(bytes.windows(4).any(|name| name == b".BTF"));
    }
}
