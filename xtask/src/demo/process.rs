//! Programs the demo runs: short ones to their end under a hard limit, long ones until they are
//! ended by their own process id.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use super::stop;
use crate::run;

const TICK: Duration = Duration::from_millis(20);

/// Runs `command` to its end and returns its standard output. It is killed at `limit`, and when
/// the demo is asked to end.
pub fn output(command: &mut Command, limit: Duration) -> Result<String> {
    finish(command, limit, true)
}

/// As [`output`], but a request to end the demo does not stop it: for cleaning up.
pub fn output_regardless(command: &mut Command, limit: Duration) -> Result<String> {
    finish(command, limit, false)
}

fn finish(command: &mut Command, limit: Duration, heed: bool) -> Result<String> {
    let mut out = tempfile::tempfile().context("cannot make a temporary file")?;
    let mut err = tempfile::tempfile().context("cannot make a temporary file")?;
    let name = run::show(command);
    let mut process = Process::start(command, &out, &err)?;
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = process.ended()? {
            break status;
        }
        if heed && stop::asked() {
            process.kill();
            bail!("stopped on request");
        }
        if Instant::now() >= deadline {
            process.kill();
            bail!(
                "{name}: killed at its limit of {} s; {}",
                limit.as_secs(),
                text(&mut err)?.trim()
            );
        }
        std::thread::sleep(TICK);
    };
    if !status.success() {
        bail!("{name}: {status}; {}", text(&mut err)?.trim());
    }
    text(&mut out)
}

fn text(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind().context("a temporary file")?;
    file.read_to_end(&mut bytes).context("a temporary file")?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A running child in a process group of its own; killed with the whole group when dropped.
pub struct Process {
    child: Child,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` with its outputs in two files.
    pub fn start(command: &mut Command, out: &File, err: &File) -> Result<Self> {
        command
            .stdout(out.try_clone().context("a file")?)
            .stderr(err.try_clone().context("a file")?);
        Self::spawn(command)
    }

    /// Starts `command` with both outputs appended to the file `log`.
    pub fn logged(command: &mut Command, log: &Path) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot open {}", log.display()))?;
        Self::start(command, &file, &file)
    }

    /// Starts `command` with its standard output in a pipe, which is returned.
    pub fn piped(command: &mut Command) -> Result<(Self, std::process::ChildStdout)> {
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = Self::spawn(command)?;
        let pipe = process.child.stdout.take().context("no standard output")?;
        Ok((process, pipe))
    }

    fn spawn(command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null()).process_group(0);
        // SAFETY: between fork and exec only the async-signal-safe prctl(2) is called. The child
        // then ends with this process even when this process is killed.
        unsafe {
            command.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(Signal::TERM))
                    .map_err(std::io::Error::from)
            });
        }
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", run::show(command)))?;
        Ok(Self {
            child,
            status: None,
        })
    }

    /// Its exit status, once it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait().context("waiting for a child")?;
        }
        Ok(self.status)
    }

    /// Sends `signal` to the child alone, not to its group.
    pub fn signal(&self, signal: Signal) {
        if self.status.is_none() {
            // It may have ended already, which is no failure; its id is ours until it is waited for.
            let _ = kill_process(Pid::from_child(&self.child), signal);
        }
    }

    /// Waits until it has ended by itself; `None` at `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + limit;
        while self.ended()?.is_none() && Instant::now() < deadline {
            std::thread::sleep(TICK);
        }
        Ok(self.status)
    }

    /// Kills its whole group.
    pub fn kill(&mut self) {
        if self.status.is_none() {
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
            self.status = self.child.wait().ok();
        }
    }

    /// Asks it to end; kills its group when it has not ended after `limit`.
    pub fn end(&mut self, limit: Duration) -> Option<ExitStatus> {
        self.signal(Signal::TERM);
        let ended = self.wait(limit).ok().flatten();
        self.kill();
        ended
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_is_returned_and_failure_carries_the_words() {
        let limit = Duration::from_secs(20);
        assert_eq!(output(&mut shell("echo yes"), limit).unwrap(), "yes\n");
        let error = output(&mut shell("echo why >&2; exit 3"), limit).unwrap_err();
        assert!(error.to_string().contains("why"), "{error}");
    }

    #[test]
    fn a_hanging_program_is_killed_at_its_limit() {
        let began = Instant::now();
        let error = output(&mut shell("sleep 100"), Duration::from_millis(200)).unwrap_err();
        assert!(error.to_string().contains("limit"), "{error}");
        assert!(began.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn dropping_a_process_ends_its_children_too() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let process = Process::logged(&mut shell("sleep 100 & echo $!; wait"), &log).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let pid: u32 = loop {
            let text = std::fs::read_to_string(&log).unwrap();
            if let Ok(pid) = text.trim().parse() {
                break pid;
            }
            assert!(Instant::now() < deadline, "the shell said nothing");
            std::thread::sleep(TICK);
        };
        drop(process);
        let stat = format!("/proc/{pid}/stat");
        while std::fs::read_to_string(&stat).is_ok_and(|s| !s.contains(") Z ")) {
            assert!(Instant::now() < deadline, "process {pid} still runs");
            std::thread::sleep(TICK);
        }
    }
}
