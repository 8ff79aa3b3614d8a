//! The books of one test run: what passed, failed and was skipped, how long each step took, and
//! where its log is.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::PROGRAM_LIMIT;
use super::libtest::Tally;
use super::targets::Target;
use crate::run::{self, Reader};
use crate::verifier::{self, Table};
use crate::vm::Verdict;

/// Lines of a failed program's log that are shown.
const SHOWN: usize = 60;

/// The books of one run.
pub struct Ledger {
    logs: PathBuf,
    passed: u64,
    failures: Vec<String>,
    skips: Vec<String>,
    timings: Vec<(String, Duration)>,
    verifier: Table,
}

impl Ledger {
    /// Opens the books; logs go to the directory `logs`.
    pub fn new(logs: PathBuf) -> Result<Self> {
        fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
        Ok(Self {
            logs,
            passed: 0,
            failures: Vec::new(),
            skips: Vec::new(),
            timings: Vec::new(),
            verifier: Table::default(),
        })
    }

    /// Runs a check that passes or fails as a whole.
    pub fn step(&mut self, name: &str, body: impl FnOnce() -> Result<()>) -> bool {
        println!("== {name}");
        let began = Instant::now();
        let result = body();
        self.timings.push((name.to_owned(), began.elapsed()));
        match result {
            Ok(()) => {
                self.passed += 1;
                true
            }
            Err(error) => {
                println!("FAILED {name}: {error:#}");
                self.failures.push(format!("{name}: {error:#}"));
                false
            }
        }
    }

    /// Notes what is not run at all.
    pub fn skip(&mut self, name: &str, reason: &str) {
        println!("== {name}: skipped ({reason})");
        self.skips.push(format!("{name}: {reason}"));
    }

    /// Runs one test program. With `strict`, a test that skips itself has failed.
    pub fn program(&mut self, target: &Target, args: &[&str], strict: bool) {
        let mut command = Command::new(&target.program);
        command
            .args(args)
            .current_dir(&target.directory)
            .env("CARGO_MANIFEST_DIR", &target.directory)
            .env_remove("SOE_VM");
        self.tests(&target.label, strict, |reader, _| {
            let end = run::lines(&mut command, PROGRAM_LIMIT, &mut |line| {
                reader(line);
                Reader::Continue
            })?;
            Ok(if end.success() {
                Ok(())
            } else {
                Err(end.describe(PROGRAM_LIMIT))
            })
        });
    }

    /// Runs test programs in a guest. The guest has all they need, so none may skip itself.
    pub fn guest(
        &mut self,
        name: &str,
        body: impl FnOnce(&mut dyn FnMut(&str), &mut String) -> Result<Verdict>,
    ) {
        self.tests(name, true, |reader, log| {
            Ok(match body(reader, log)? {
                Verdict::Code(0) => Ok(()),
                Verdict::Code(code) => Err(format!("exit code {code}")),
                Verdict::NoMarker(why) => Err(why),
            })
        });
    }

    fn tests(
        &mut self,
        name: &str,
        strict: bool,
        body: impl FnOnce(&mut dyn FnMut(&str), &mut String) -> Result<Result<(), String>>,
    ) {
        println!("== {name}");
        let began = Instant::now();
        let mut tally = Tally::default();
        let mut log = String::new();
        let mut extra = String::new();
        let verifier = &mut self.verifier;
        let outcome = body(
            &mut |line| {
                tally.read(line);
                verifier.read(line);
                log.push_str(line);
                log.push('\n');
            },
            &mut extra,
        );
        log.push_str(&extra);
        let took = began.elapsed();
        self.timings.push((name.to_owned(), took));
        let tally = tally.settle();
        println!(
            "   {} passed, {} failed, {} skipped in {:.1} s",
            tally.passed,
            tally.failed,
            tally.skipped.len(),
            took.as_secs_f64()
        );
        self.passed += tally.passed;
        let mut failures: Vec<String> = Vec::new();
        match outcome {
            Ok(Ok(())) if tally.complete => {}
            Ok(Ok(())) => failures.push("it gave no result".to_owned()),
            Ok(Err(why)) if tally.failed == 0 => failures.push(why),
            Ok(Err(_)) => {}
            Err(error) => failures.push(format!("{error:#}")),
        }
        for line in log
            .lines()
            .filter(|line| line.starts_with("test ") && line.ends_with("... FAILED"))
        {
            failures.push(
                line.trim_start_matches("test ")
                    .trim_end_matches(" ... FAILED")
                    .to_owned(),
            );
        }
        // Without captured output the harness's line is torn apart by the test's own: count what it counted.
        while (failures.len() as u64) < tally.failed {
            failures.push("a test (see the log)".to_owned());
        }
        for skip in &tally.skipped {
            if strict {
                failures.push(format!(
                    "{skip} (no test may be skipped where everything it needs is there)"
                ));
            } else {
                self.skips.push(format!("{name}: {skip}"));
            }
        }
        self.keep_log(name, &log, &failures);
        self.failures.extend(
            failures
                .into_iter()
                .map(|failure| format!("{name}: {failure}")),
        );
    }

    fn keep_log(&self, name: &str, log: &str, failures: &[String]) {
        let path = self
            .logs
            .join(format!("{}.log", name.replace(['/', ' '], "-")));
        if let Err(error) = fs::write(&path, log) {
            println!("   cannot write {}: {error}", path.display());
        }
        if failures.is_empty() {
            return;
        }
        let lines: Vec<&str> = log.lines().collect();
        for line in lines
            .get(lines.len().saturating_sub(SHOWN)..)
            .unwrap_or_default()
        {
            println!("   | {line}");
        }
        for failure in failures {
            println!("FAILED {name}: {failure}");
        }
        println!("   the whole log is in {}", path.display());
    }

    /// Prints the sums and returns the exit code.
    pub fn close(self, took: Duration) -> i32 {
        println!("== timings");
        for (name, took) in &self.timings {
            println!("   {:7.1} s  {name}", took.as_secs_f64());
        }
        println!("   {:7.1} s  in all", took.as_secs_f64());
        match self.verifier.keep() {
            Ok(true) => println!("what the verifier said: {}", verifier::path().display()),
            Ok(false) => {}
            Err(error) => println!("{error:#}"),
        }
        for skip in &self.skips {
            println!("skipped: {skip}");
        }
        for failure in &self.failures {
            println!("failed: {failure}");
        }
        println!(
            "{} passed, {} failed, {} skipped",
            self.passed,
            self.failures.len(),
            self.skips.len()
        );
        i32::from(!self.failures.is_empty())
    }
}
