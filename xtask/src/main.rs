//! What a checkout of SOE can do besides `cargo build`: set a machine up, build the eBPF object,
//! run every test there is, and boot other kernels. One file per command.

use anyhow::Result;
use clap::{Parser, Subcommand};

mod bench;
mod demo;
mod ebpf;
mod place;
mod run;
mod setup;
mod test;
mod tidy;
mod toolchain;
mod verifier;
mod vm;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Builds and tests SOE",
    disable_help_subcommand = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Installs what building and testing need and this machine lacks; does nothing when all is there
    Setup(setup::Args),
    /// Builds the eBPF object that `soe` embeds
    BuildEbpf,
    /// Shows the whole loop on real devices in a few minutes: load, forecasts, layers, staging, loss, restore
    Demo(demo::Args),
    /// Runs every check and test: format, lints, unit, model, this kernel, other kernels
    Test(test::Args),
    /// Boots another kernel in an emulated machine and runs a command or the kernel tests in it
    Vm(vm::Args),
    /// Measures on this machine and prints figures
    Bench(bench::Args),
    /// Train the network that ships with SOE on a trace
    TrainPrior(bench::forecast::TrainArgs),
    /// Checks the rules of the source tree: which room may name what, file sizes, unsafe code
    Tidy,
}

fn main() {
    let outcome = match Cli::parse().command {
        Command::Setup(args) => setup::command(&args),
        Command::BuildEbpf => ebpf::command(),
        Command::Demo(args) => demo::command(&args),
        Command::Test(args) => test::command(&args),
        Command::Vm(args) => vm::command(&args),
        Command::Bench(args) => bench::command(&args),
        Command::TrainPrior(args) => bench::forecast::train_prior(&args),
        Command::Tidy => tidy_command(),
    };
    match outcome {
        Ok(code) => std::process::exit(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::exit(1);
        }
    }
}

fn tidy_command() -> Result<i32> {
    let complaints = tidy::check(&place::root())
        .map_err(|error| anyhow::anyhow!("cannot read the source tree: {error}"))?;
    for complaint in &complaints {
        println!("{complaint}");
    }
    println!("tidy: {} complaints", complaints.len());
    Ok(i32::from(!complaints.is_empty()))
}
