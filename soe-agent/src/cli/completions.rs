//! `soe completions` and `soe man`: made from the same definitions as the verbs.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Command;
use clap_complete::Shell;

use super::error::CliError;

/// Print shell completions
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub(super) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Write man pages
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub(super) struct ManArgs {
    /// The folder to write them to; created when missing
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub(super) fn run(args: CompletionsArgs, mut command: Command) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "soe", &mut script);
    io::stdout()
        .lock()
        .write_all(&script)
        .map_err(CliError::io("standard output"))
}

pub(super) fn man(args: ManArgs, command: Command) -> Result<(), CliError> {
    fs::create_dir_all(&args.out)
        .map_err(CliError::io(format!("folder {}", args.out.display())))?;
    let mut command = command;
    command.build();
    write_pages(&command, "soe", &args.out)
}

fn write_pages(command: &Command, name: &str, out: &Path) -> Result<(), CliError> {
    let path = out.join(format!("{name}.1"));
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone().name(name.to_owned()))
        .render(&mut page)
        .and_then(|()| fs::write(&path, page))
        .map_err(CliError::io(format!("man page {}", path.display())))?;
    for verb in command
        .get_subcommands()
        .filter(|v| !v.is_hide_set() && v.get_name() != "help")
    {
        write_pages(verb, &format!("{name}-{}", verb.get_name()), out)?;
    }
    Ok(())
}
