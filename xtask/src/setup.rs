//! `cargo xtask setup`: what a bare Debian 12 with cargo lacks, installed; on other machines, what
//! is there found out and what is missing said.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::toolchain::{self, Compiler};
use crate::{place, run, vm};

/// Installing packages depends on the network more than on this machine.
const APT_LIMIT: Duration = Duration::from_secs(1200);
/// Building bpf-linker takes about 80 s on two cores.
const CARGO_LIMIT: Duration = Duration::from_secs(1800);
const QUICK: Duration = Duration::from_secs(60);

/// The version the recipe was proven with.
const BPF_LINKER: &str = "0.13.0";
/// LLVM of Debian's rustc-web; the linker must read what that compiler writes.
const LLVM: &str = "22";
/// Debian packages of the BPF compiler and of what bpf-linker is built against.
const COMPILER_PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"];
const LINKER_PACKAGES: [&str; 4] = [
    "llvm-22-dev",
    "libpolly-22-dev",
    "libzstd-dev",
    "zlib1g-dev",
];

/// A program the tests use: its name, Debian's package, what it is for.
struct Tool {
    program: &'static str,
    package: &'static str,
    purpose: &'static str,
}

const fn tool(program: &'static str, package: &'static str, purpose: &'static str) -> Tool {
    Tool {
        program,
        package,
        purpose,
    }
}

const TOOLS: [Tool; 11] = [
    tool("cc", "build-essential", "linking Rust programs"),
    tool("fio", "fio", "workloads"),
    tool("mkfs.ext4", "e2fsprogs", "test filesystems"),
    tool("mkfs.xfs", "xfsprogs", "test filesystems"),
    tool("mkfs.btrfs", "btrfs-progs", "test filesystems"),
    tool("losetup", "mount", "test volumes"),
    tool("sfdisk", "fdisk", "test partitions"),
    tool("fstrim", "util-linux", "discards"),
    tool("dmsetup", "dmsetup", "device-mapper volumes"),
    tool(
        "cpio",
        "cpio",
        "checking the archives that guests boot from",
    ),
    tool(
        "bpftool",
        "bpftool",
        "what the verifier says of each program",
    ),
];

const VM_TOOLS: [Tool; 4] = [
    tool(
        "qemu-system-x86_64",
        "qemu-system-x86",
        "booting other kernels",
    ),
    tool("busybox", "busybox-static", "the guest's shell"),
    tool("xz", "xz-utils", "kernel modules"),
    tool("ldd", "libc-bin", "the guest's shared libraries"),
];

#[derive(clap::Args)]
pub struct Args {
    /// Only say what is missing; exit code 1 when something is
    #[arg(long)]
    check: bool,
    /// Also what booting other kernels needs: the emulator and the kernels themselves
    #[arg(long)]
    vm: bool,
}

/// Runs the command.
pub fn command(args: &Args) -> Result<i32> {
    if args.check {
        let missing = missing(args.vm);
        for lack in &missing {
            println!("missing: {lack}");
        }
        if missing.is_empty() {
            println!("setup: everything is there");
        }
        return Ok(i32::from(!missing.is_empty()));
    }
    install(args.vm)?;
    Ok(0)
}

/// What is missing, in words.
fn missing(with_vm: bool) -> Vec<String> {
    let mut lacks = Vec::new();
    for component in ["fmt", "clippy"] {
        if !has_component(component) {
            lacks.push(format!("cargo {component} (checks of the source)"));
        }
    }
    for tool in absent(with_vm) {
        lacks.push(format!(
            "{} ({}, Debian package {})",
            tool.program, tool.purpose, tool.package
        ));
    }
    if toolchain::compiler().is_none() {
        lacks.push(format!(
            "a Rust compiler with a core library for {}",
            toolchain::TARGET
        ));
    }
    if toolchain::linker().is_none() {
        lacks.push("bpf-linker".to_owned());
    }
    if with_vm {
        lacks.extend(
            vm::missing_kernels()
                .into_iter()
                .map(|series| format!("Linux {series} to boot")),
        );
    }
    lacks
}

fn absent(with_vm: bool) -> impl Iterator<Item = &'static Tool> {
    let vm_tools: &'static [Tool] = if with_vm { &VM_TOOLS } else { &[] };
    TOOLS
        .iter()
        .chain(vm_tools)
        .filter(|tool| place::program(tool.program).is_none())
}

/// Installs what is missing. Tools that only some tests need are no error when they cannot be had:
/// those tests then say so. A BPF toolchain is.
pub fn install(with_vm: bool) -> Result<()> {
    let mut done = Vec::new();
    let apt = Apt::find();

    for (component, package) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        if !has_component(component) {
            let mut rustup = Command::new("rustup");
            rustup.args(["component", "add", package]);
            match run::check(&mut rustup, CARGO_LIMIT) {
                Ok(()) => done.push(format!("installed {package}")),
                Err(error) => {
                    println!("setup: cargo {component} is missing and cannot be added: {error:#}")
                }
            }
        }
    }

    let packages: Vec<&str> = absent(with_vm).map(|tool| tool.package).collect();
    if !packages.is_empty() {
        match apt.install(&packages) {
            Ok(()) => done.push(format!("installed {}", packages.join(", "))),
            Err(error) => {
                for tool in absent(with_vm) {
                    println!(
                        "setup: {} is missing ({}): {error:#}",
                        tool.program, tool.purpose
                    );
                }
            }
        }
    }

    let compiler = match toolchain::compiler() {
        Some(compiler) => compiler,
        None => install_compiler(&apt, &mut done)?,
    };
    if toolchain::linker().is_none() {
        install_linker(&apt, &compiler, &mut done)?;
    }

    if with_vm {
        for series in vm::missing_kernels() {
            match vm::download(series) {
                Ok(name) => done.push(format!("downloaded {name}")),
                Err(error) => println!("setup: Linux {series} cannot be had: {error:#}"),
            }
        }
    }

    for deed in &done {
        println!("setup: {deed}");
    }
    if done.is_empty() {
        println!(
            "setup: nothing to do; eBPF is built by {}",
            compiler.describe()
        );
    } else {
        println!("setup: done; eBPF is built by {}", compiler.describe());
    }
    Ok(())
}

fn install_compiler(apt: &Apt, done: &mut Vec<String>) -> Result<Compiler> {
    let mut reasons = Vec::new();
    match apt.install(&COMPILER_PACKAGES) {
        Ok(()) => done.push(format!("installed {}", COMPILER_PACKAGES.join(", "))),
        Err(error) => reasons.push(format!("{error:#}")),
    }
    if toolchain::compiler().is_none() {
        let mut rustup = Command::new("rustup");
        rustup.args([
            "toolchain",
            "install",
            "nightly",
            "--profile",
            "minimal",
            "--component",
            "rust-src",
        ]);
        match run::check(&mut rustup, CARGO_LIMIT) {
            Ok(()) => done.push("installed a nightly toolchain with rust-src".to_owned()),
            Err(error) => reasons.push(format!("{error:#}")),
        }
    }
    match toolchain::compiler() {
        Some(compiler) => Ok(compiler),
        None => bail!(
            "no Rust compiler with a core library for {} can be had: install Debian's {} or a nightly toolchain with rust-src ({})",
            toolchain::TARGET,
            COMPILER_PACKAGES.join(", "),
            reasons.join("; ")
        ),
    }
}

fn install_linker(apt: &Apt, compiler: &Compiler, done: &mut Vec<String>) -> Result<()> {
    let mut reasons = Vec::new();
    // The linker must understand the bitcode of the compiler's LLVM; Debian's route is known to match.
    let mut cargo = Command::new("cargo");
    cargo.args(["install", "bpf-linker", "--locked"]);
    match compiler {
        Compiler::Ready { .. } => {
            if let Err(error) = apt.install(&LINKER_PACKAGES) {
                reasons.push(format!("{error:#}"));
            }
            let llvm = format!("/usr/lib/llvm-{LLVM}");
            let path = std::env::var("PATH").unwrap_or_default();
            cargo
                .args([
                    "--version",
                    BPF_LINKER,
                    "--no-default-features",
                    "--features",
                ])
                .arg(format!("llvm-{LLVM}"))
                .env(format!("LLVM_SYS_{LLVM}1_PREFIX"), &llvm)
                .env("PATH", format!("{llvm}/bin:{path}"));
        }
        Compiler::Nightly { .. } => {}
    }
    for name in [
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_TARGET_DIR",
        "CARGO_BUILD_TARGET",
    ] {
        cargo.env_remove(name);
    }
    if let Err(error) = run::check(&mut cargo, CARGO_LIMIT) {
        reasons.push(format!("{error:#}"));
    }
    if toolchain::linker().is_none() {
        bail!(
            "bpf-linker cannot be installed ({}): install LLVM {LLVM} with its headers and run `cargo install bpf-linker`, \
             or put a released bpf-linker binary into PATH",
            reasons.join("; ")
        );
    }
    done.push("installed bpf-linker".to_owned());
    Ok(())
}

fn has_component(name: &str) -> bool {
    run::output(Command::new("cargo").args([name, "--version"]), QUICK).is_ok()
}

/// The package manager, if it is Debian's.
struct Apt {
    found: bool,
}

impl Apt {
    fn find() -> Self {
        Self {
            found: place::program("apt-get").is_some(),
        }
    }

    fn install(&self, packages: &[&str]) -> Result<()> {
        let list = packages.join(" ");
        if !self.found {
            bail!(
                "this is no Debian-like system; install what provides {list} by its own package manager"
            );
        }
        if !place::is_root() {
            bail!(
                "installing packages needs root; run `apt-get install --no-install-recommends {list}` as root"
            );
        }
        if self.get("install", packages).is_err() {
            // The lists may be absent (fresh image) or older than the archive.
            self.get("update", &[])?;
            self.get("install", packages)?;
        }
        Ok(())
    }

    fn get(&self, verb: &str, packages: &[&str]) -> Result<()> {
        let mut apt = Command::new("apt-get");
        apt.args([
            "-qq",
            "-o",
            "Dpkg::Use-Pty=0",
            "-o",
            "DPkg::Lock::Timeout=300",
            verb,
        ]);
        if verb == "install" {
            apt.args(["-y", "--no-install-recommends"]).args(packages);
        }
        run::check(apt.env("DEBIAN_FRONTEND", "noninteractive"), APT_LIMIT)
    }
}
