//! The command line: one file per verb. Verbs are clients of the daemon, except those that work on
//! files.
//!
//! Results go to standard output, as a table or with `--json` as one JSON document; progress and
//! errors go to standard error. An error is one sentence. Exit codes: 0 done, 1 failed, 2 wrong
//! usage, 3 no daemon, 4 refused, 5 integrity failure.

mod agent;
mod args;
mod audit;
mod backtest;
mod client;
mod completions;
mod doctor;
mod error;
mod events;
mod forecast;
mod group;
mod layer;
pub mod logging;
mod model;
mod offline;
mod output;
mod progress;
mod restore;
mod simulate;
mod sql;
mod stage;
mod top;
mod trace;
mod volumes;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use client::Client;
use error::CliError;
use output::Output;

/// Watches block devices, forecasts their load, and captures, stages and restores layered snapshots.
#[derive(Debug, Parser)]
#[command(
    name = "soe",
    version,
    propagate_version = true,
    max_term_width = 100,
    arg_required_else_help = true
)]
struct Cli {
    /// Where the agent listens
    #[arg(long, global = true, env = "SOE_ENDPOINT", value_name = "unix:PATH", default_value = client::DEFAULT_ENDPOINT, hide_env_values = true)]
    endpoint: String,

    /// Print one JSON document instead of a table
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Agent(agent::Args),
    Doctor(doctor::Args),
    Volumes(volumes::Args),
    Top(top::Args),
    Group(group::Args),
    Layer(layer::Args),
    Restore(restore::Args),
    Stage(stage::Args),
    Forecast(forecast::Args),
    Model(model::Args),
    Events(events::Args),
    Sql(sql::Args),
    Trace(trace::Args),
    Simulate(simulate::Args),
    Backtest(backtest::Args),
    Audit(audit::Args),
    Completions(completions::CompletionsArgs),
    Man(completions::ManArgs),
    /// Freezes and thaws filesystems for the agent, which starts it
    #[command(name = "freeze-guard", hide = true)]
    FreezeGuard,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let matches = match Cli::command().try_get_matches() {
        Ok(matches) => matches,
        Err(error) => return usage(&error),
    };
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    if matches!(cli.verb, Verb::FreezeGuard) {
        return offline::freeze_guard();
    }
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error.tell();
            ExitCode::from(error.exit_code())
        }
    }
}

fn usage(error: &clap::Error) -> ExitCode {
    // Printing fails only when nobody reads.
    let _ = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

fn run(cli: Cli) -> Result<(), CliError> {
    let out = Output::stdout(cli.json);
    let endpoint = cli.endpoint;
    let client = || Client::new(&endpoint);
    match cli.verb {
        Verb::Agent(args) => agent::run(args),
        Verb::Doctor(args) => doctor::run(args, out),
        Verb::Volumes(args) => volumes::run(args, &client()?, out),
        Verb::Top(args) => top::run(args, &client()?, out),
        Verb::Group(args) => group::run(args, &client()?, out),
        Verb::Layer(args) => layer::run(args, client, out),
        Verb::Restore(args) => restore::run(args, &client()?, out),
        Verb::Stage(args) => stage::run(args, &client()?, out),
        Verb::Forecast(args) => forecast::run(args, &client()?, out),
        Verb::Model(args) => model::run(args, &client()?, out),
        Verb::Events(args) => events::run(args, &client()?, out),
        Verb::Sql(args) => sql::run(args, out),
        Verb::Trace(args) => trace::run(args, client, out),
        Verb::Simulate(args) => simulate::run(args, out),
        Verb::Backtest(args) => backtest::run(args, out),
        Verb::Audit(args) => audit::run(args, out),
        Verb::Completions(args) => completions::run(args, Cli::command()),
        Verb::Man(args) => completions::man(args, Cli::command()),
        Verb::FreezeGuard => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definitions_are_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_and_argument_is_explained() {
        fn check(command: &clap::Command, path: &str) {
            let name = format!("{path} {}", command.get_name());
            assert!(
                command.get_about().is_some(),
                "{name} says nothing of itself"
            );
            for argument in command.get_arguments() {
                let id = argument.get_id();
                assert!(
                    argument.get_help().is_some() || id == "help" || id == "version",
                    "{name}: {id} is not explained"
                );
            }
            command.get_subcommands().for_each(|c| check(c, &name));
        }
        check(&Cli::command(), "");
    }
}
