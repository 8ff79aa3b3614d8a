//! `cargo xtask vm`: another kernel in an emulated machine, with the kernel tests in it.
//!
//! The machine is QEMU's software emulation (no KVM is needed, or used) with a Debian cloud kernel
//! and an initial file system made on the spot: a shell, the modules and tools the tests use, and
//! the programs to run with their shared libraries. The guest reports its command's exit code in a
//! marker line; a boot that ends without one has failed.

mod cpio;
mod guest;
mod kernel;
mod modules;
mod qemu;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::verifier::{self, Table};
use crate::{place, run, test};

pub use kernel::{SERIES, download, missing as missing_kernels};
pub use qemu::Verdict;

#[derive(clap::Args)]
pub struct Args {
    /// The kernel series to boot
    #[arg(long, value_parser = kernel::SERIES)]
    kernel: String,
    /// Another host file to take along (a program brings its shared libraries); may be repeated
    #[arg(long, value_name = "FILE")]
    file: Vec<PathBuf>,
    /// Only kernel tests whose name contains this
    #[arg(long, value_name = "TEXT", conflicts_with = "command")]
    filter: Option<String>,
    /// Seconds after which the machine is switched off
    #[arg(long, default_value_t = 900)]
    limit: u64,
    /// Where the kernel's own messages go
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// The command to run in the guest; without one, the kernel tests
    #[arg(last = true)]
    command: Vec<String>,
}

/// Runs the command.
pub fn command(args: &Args) -> Result<i32> {
    let mut boot = Boot::new(&args.kernel, Duration::from_secs(args.limit));
    boot.files.extend(args.file.iter().cloned());
    if let Some(console) = &args.console {
        boot.console.clone_from(console);
    }
    if args.command.is_empty() {
        let targets = test::build_kernel_targets()?;
        if targets.is_empty() {
            bail!("there are no kernel tests to run in a guest");
        }
        boot.run_tests(&targets, args.filter.as_deref());
    } else {
        boot.run_command(&args.command);
    }
    let mut table = Table::default();
    let verdict = boot.start(&mut |line| {
        table.read(line);
        println!("{line}");
    })?;
    if table.keep()? {
        println!(
            "what the verifier said is in {}",
            verifier::path().display()
        );
    }
    match verdict {
        Verdict::Code(code) => Ok(code),
        Verdict::NoMarker(why) => {
            eprint!("{}", tail(&boot.console));
            bail!(
                "Linux {} gave no exit code: {why}; its console is in {}",
                args.kernel,
                boot.console.display()
            )
        }
    }
}

/// One boot, as it is put together.
pub struct Boot {
    series: String,
    limit: Duration,
    /// Host files to take along.
    pub files: Vec<PathBuf>,
    /// The shell script the guest runs.
    script: String,
    /// Where the kernel's messages go.
    pub console: PathBuf,
}

impl Boot {
    /// A boot of the newest kernel of `series`, ended after `limit`.
    pub fn new(series: &str, limit: Duration) -> Self {
        Self {
            series: series.to_owned(),
            limit,
            files: Vec::new(),
            script: String::new(),
            console: place::target().join(format!("vm/console-{series}.log")),
        }
    }

    /// Runs every test program in turn, single-threaded, and fails if one of them does.
    pub fn run_tests(&mut self, programs: &[PathBuf], filter: Option<&str>) {
        self.script.push_str("status=0\n");
        for program in programs {
            self.files.push(program.clone());
            let filter = filter.map(quote).unwrap_or_default();
            self.script.push_str(&format!(
                "{} --test-threads=1 --nocapture {filter} || status=$?\n",
                quote(&guest::place_of(program))
            ));
        }
        self.script.push_str("exit $status\n");
    }

    /// Runs one command; when it names a program of the host, the program is taken along.
    pub fn run_command(&mut self, command: &[String]) {
        let mut words: Vec<String> = command.iter().map(|word| quote(word)).collect();
        if let (Some(name), Some(first)) = (command.first(), words.first_mut())
            && name.contains('/')
            && Path::new(name).is_file()
        {
            self.files.push(PathBuf::from(name));
            *first = quote(&guest::place_of(Path::new(name)));
        }
        self.script.push_str(&format!("exec {}\n", words.join(" ")));
    }

    /// Boots the machine and hands every line of the command's output to `reader`.
    pub fn start(&self, reader: &mut dyn FnMut(&str)) -> Result<Verdict> {
        let kernel = kernel::unpacked(&self.series)?;
        let dir = tempfile::Builder::new()
            .prefix("soe-vm-")
            .tempdir()
            .context("cannot create a directory for the guest")?;
        let initrd = dir.path().join("initrd");
        guest::write_initrd(&initrd, &kernel, &self.files, &self.script)?;
        if let Some(parent) = self.console.parent() {
            std::fs::create_dir_all(parent)
                .with_context(|| format!("cannot create {}", parent.display()))?;
        }
        qemu::boot(
            &kernel.image,
            &initrd,
            dir.path(),
            &self.console,
            self.limit,
            reader,
        )
    }
}

/// Why no guest can be booted here, if so.
pub fn obstacle(series: &str) -> Option<String> {
    for program in ["qemu-system-x86_64", "busybox"] {
        if place::program(program).is_none() {
            return Some(format!(
                "{program} is not installed (`cargo xtask setup --vm` installs it)"
            ));
        }
    }
    if cfg!(not(target_arch = "x86_64")) {
        return Some(
            "the guest is an x86-64 machine and runs this machine's own binaries".to_owned(),
        );
    }
    kernel::unpacked(series)
        .err()
        .map(|error| format!("{error:#}"))
}

/// The last lines of a console log.
pub fn tail(console: &Path) -> String {
    let text = std::fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).replace('\r', "");
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(40);
    lines
        .get(from..)
        .unwrap_or_default()
        .iter()
        .map(|line| format!("  {line}\n"))
        .collect()
}

fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Runs a host program and returns its output; used while a guest is put together.
fn ask(program: &str, args: &[&std::ffi::OsStr]) -> Result<String> {
    let path = place::program(program).with_context(|| format!("{program} is not installed"))?;
    run::output(
        std::process::Command::new(path).args(args),
        Duration::from_secs(120),
    )
}
