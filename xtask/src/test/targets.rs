//! The test programs of the workspace: built by cargo, run by us, so that each has its own limit and
//! its results can be counted.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::Value;

use crate::place;
use crate::run::{self, Reader};

/// A cold build of everything, with margin for a slow machine.
const BUILD_LIMIT: Duration = Duration::from_secs(3000);

/// What a test program needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Nothing but a user's rights.
    Plain,
    /// Time: it explores all interleavings of a model.
    Model,
    /// A kernel with BPF, and root.
    Host,
    /// A guest's devices.
    Guest,
}

/// One test program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Package and target, for people.
    pub label: String,
    /// The executable.
    pub program: PathBuf,
    /// Where cargo would run it.
    pub directory: PathBuf,
    name: String,
}

impl Target {
    /// What it needs, which its name tells.
    pub fn class(&self) -> Class {
        let name = self.name.as_str();
        if name.ends_with("_loom") {
            Class::Model
        } else if name.starts_with("host_") || name.ends_with("_host") {
            Class::Host
        } else if name.starts_with("vm_") || name.ends_with("_vm") {
            Class::Guest
        } else {
            Class::Plain
        }
    }

    /// Whether a guest runs it: what is made for guests, and the tests of the kernel's behaviour.
    pub fn runs_in_guest(&self) -> bool {
        self.class() == Class::Guest
            || (self.class() == Class::Host && self.name.starts_with("kernel_"))
    }
}

/// Builds the test programs that `selection` names.
pub fn build(selection: &[&str]) -> Result<Vec<Target>> {
    let mut cargo = Command::new("cargo");
    cargo
        .current_dir(place::root())
        .args([
            "test",
            "--no-run",
            "--message-format=json-render-diagnostics",
        ])
        .args(selection);
    let mut targets = Vec::new();
    let end = run::lines_of_stdout(&mut cargo, BUILD_LIMIT, &mut |line| {
        targets.extend(parse(line));
        Reader::Continue
    })?;
    if !end.success() {
        bail!("cargo test --no-run: {}", end.describe(BUILD_LIMIT));
    }
    targets.sort_by(|a, b| a.label.cmp(&b.label));
    Ok(targets)
}

/// The test program that a line of cargo's messages is about, if it is about one.
fn parse(line: &str) -> Option<Target> {
    let message: Value = serde_json::from_str(line).ok()?;
    if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
        return None;
    }
    let program = PathBuf::from(message["executable"].as_str()?);
    let directory = Path::new(message["manifest_path"].as_str()?)
        .parent()?
        .to_path_buf();
    let name = message["target"]["name"].as_str()?.to_owned();
    let kind = message["target"]["kind"][0].as_str()?;
    let package = directory.file_name()?.to_str()?;
    Some(Target {
        label: format!("{package}/{kind}/{name}"),
        program,
        directory,
        name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> Target {
        Target {
            label: String::new(),
            program: PathBuf::new(),
            directory: PathBuf::new(),
            name: name.to_owned(),
        }
    }

    #[test]
    fn a_name_tells_what_a_test_needs() {
        assert_eq!(named("protocol_loom").class(), Class::Model);
        assert_eq!(named("kernel_host").class(), Class::Host);
        assert!(named("kernel_host").runs_in_guest());
        assert_eq!(named("torture_host").class(), Class::Host);
        assert!(!named("torture_host").runs_in_guest());
        assert!(named("vm_mapper").runs_in_guest());
        assert_eq!(named("tidy").class(), Class::Plain);
    }

    #[test]
    fn only_test_programs_are_taken() {
        let line = r#"{"reason":"compiler-artifact","manifest_path":"/x/tests/Cargo.toml","target":{"kind":["test"],"name":"tidy"},"profile":{"test":true},"executable":"/t/tidy-1"}"#;
        let target = parse(line).unwrap();
        assert_eq!(target.label, "tests/test/tidy");
        assert_eq!(target.directory, Path::new("/x/tests"));
        assert!(parse(&line.replace("\"test\":true", "\"test\":false")).is_none());
        assert!(parse("warning: not json").is_none());
    }
}
