//! `cargo xtask test`: every check and test there is, in the order in which they fail fastest.
//!
//! The last line is `N passed, N failed, N skipped`; each skip is listed with its reason, each
//! failure with the log that shows it.

mod ledger;
mod libtest;
mod targets;

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;

use self::ledger::Ledger;
use self::targets::{Class, Target};
use crate::vm::{self, Verdict};
use crate::{ebpf, place, run, setup};

/// The model of the mark/cut protocol, which is a workspace of its own.
const MODEL: &str = "tests/loom/Cargo.toml";
const FORMAT_LIMIT: Duration = Duration::from_secs(120);
const LINT_LIMIT: Duration = Duration::from_secs(1800);
/// A cold build of everything, with margin for a slow machine.
const BUILD_LIMIT: Duration = Duration::from_secs(3000);
const DOCTEST_LIMIT: Duration = Duration::from_secs(900);
/// One test program on this machine.
const PROGRAM_LIMIT: Duration = Duration::from_secs(1200);
/// One boot of another kernel. Emulation is some twenty times slower than this machine.
const BOOT_LIMIT: Duration = Duration::from_secs(1800);

#[derive(clap::Args)]
pub struct Args {
    /// Leave out what takes long: model checks, kernel tests, other kernels
    #[arg(long)]
    fast: bool,
    /// Do not boot other kernels
    #[arg(long)]
    no_vm: bool,
}

/// Runs the command.
pub fn command(args: &Args) -> Result<i32> {
    let began = Instant::now();
    let with_vm = !args.fast && !args.no_vm;
    let mut ledger = Ledger::new(place::target().join("xtask-logs"))?;

    ledger.step("setup", || setup::install(with_vm));
    ledger.step("eBPF object", || ebpf::build().map(drop));
    ledger.step("format", || {
        cargo(&["fmt", "--all", "--check", "--", "-l"], FORMAT_LIMIT)
    });
    ledger.step("format of soe-ebpf", || {
        cargo(
            &[
                "fmt",
                "--manifest-path",
                "soe-ebpf/Cargo.toml",
                "--check",
                "--",
                "-l",
            ],
            FORMAT_LIMIT,
        )
    });
    ledger.step("format of the model", || {
        cargo(
            &["fmt", "--manifest-path", MODEL, "--check", "--", "-l"],
            FORMAT_LIMIT,
        )
    });
    ledger.step("lints", || {
        cargo(
            &[
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ],
            LINT_LIMIT,
        )
    });

    let mut targets = Vec::new();
    let built = ledger.step("build of the tests", || {
        // Tests of the whole agent run the program that lies beside them.
        cargo(
            &["build", "--quiet", "--package", "soe-agent", "--bins"],
            BUILD_LIMIT,
        )?;
        targets = targets::build(&["--workspace"])?;
        Ok(())
    });
    ledger.step("build of the model", || {
        let place = place::target().join("loom").display().to_string();
        targets.extend(targets::build(&[
            "--manifest-path",
            MODEL,
            "--target-dir",
            &place,
        ])?);
        Ok(())
    });
    if built {
        ledger.step("documentation tests", || {
            cargo(&["test", "--quiet", "--workspace", "--doc"], DOCTEST_LIMIT)
        });
    } else {
        ledger.skip("tests of the workspace", "they could not be built");
    }
    run_targets(&mut ledger, &targets, args);
    Ok(ledger.close(began.elapsed()))
}

/// Builds the tests that need a kernel and returns their programs, for a guest to run.
pub fn build_kernel_targets() -> Result<Vec<PathBuf>> {
    ebpf::build()?;
    let targets = targets::build(&["--package", "soe-tests"])?;
    Ok(targets
        .into_iter()
        .filter(Target::runs_in_guest)
        .map(|target| target.program)
        .collect())
}

fn run_targets(ledger: &mut Ledger, targets: &[Target], args: &Args) {
    let of = |class: Class| targets.iter().filter(move |target| target.class() == class);
    for target in of(Class::Plain) {
        ledger.program(target, &["--show-output"], false);
    }
    for target in of(Class::Model) {
        if args.fast {
            ledger.skip(&target.label, "--fast");
        } else {
            ledger.program(target, &["--show-output"], false);
        }
    }
    for target in of(Class::Host) {
        let obstacle = if args.fast {
            Some("--fast".to_owned())
        } else {
            kernel_obstacle()
        };
        match obstacle {
            Some(reason) => ledger.skip(&target.label, &reason),
            // With these rights nothing is left to excuse a skipped test.
            None => ledger.program(target, &["--test-threads=1", "--nocapture"], true),
        }
    }
    let programs: Vec<PathBuf> = targets
        .iter()
        .filter(|target| target.runs_in_guest())
        .map(|target| target.program.clone())
        .collect();
    for series in vm::SERIES {
        let name = format!("kernel tests on Linux {series}");
        let obstacle = if args.fast {
            Some("--fast".to_owned())
        } else if args.no_vm {
            Some("--no-vm".to_owned())
        } else if programs.is_empty() {
            Some("there are none".to_owned())
        } else {
            vm::obstacle(series)
        };
        match obstacle {
            Some(reason) => ledger.skip(&name, &reason),
            None => ledger.guest(&name, |reader, log| {
                let mut boot = vm::Boot::new(series, BOOT_LIMIT);
                boot.run_tests(&programs, None);
                let verdict = boot.start(reader)?;
                if let Verdict::NoMarker(_) = verdict {
                    log.push_str(&vm::tail(&boot.console));
                }
                Ok(verdict)
            }),
        }
    }
}

/// Why the kernel tests cannot run on this machine, if so.
fn kernel_obstacle() -> Option<String> {
    if !place::is_root() {
        return Some("loading BPF programs and making devices needs root".to_owned());
    }
    if !std::path::Path::new("/sys/kernel/btf/vmlinux").is_file() {
        return Some("this kernel has no type information (/sys/kernel/btf/vmlinux)".to_owned());
    }
    None
}

fn cargo(args: &[&str], limit: Duration) -> Result<()> {
    run::check(
        Command::new("cargo").args(args).current_dir(place::root()),
        limit,
    )
}
