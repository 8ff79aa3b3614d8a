//! Running other programs, each in a process group of its own and with a wall-clock limit at which
//! the whole group is ended.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};

/// How long a group may take to clean up after SIGTERM before it gets SIGKILL.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How often a running child is looked at.
const TICK: Duration = Duration::from_millis(50);

/// How a child ended.
#[derive(Debug)]
pub enum End {
    /// By itself.
    Exited(ExitStatus),
    /// At its limit, or because the reader of its output said so.
    Stopped(Stop),
}

/// Why a child was ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Its time was up.
    Limit,
    /// The reader of its lines had seen enough.
    Reader,
}

impl End {
    /// Whether the child exited with code 0.
    pub fn success(&self) -> bool {
        matches!(self, End::Exited(status) if status.success())
    }

    /// In words, for a message.
    pub fn describe(&self, limit: Duration) -> String {
        match self {
            End::Exited(status) => status.to_string(),
            End::Stopped(Stop::Limit) => format!("ended at its limit of {} s", limit.as_secs()),
            End::Stopped(Stop::Reader) => "ended early".to_owned(),
        }
    }
}

/// What the reader of a child's lines wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// More lines.
    Continue,
    /// No more lines: end the child.
    Stop,
}

/// Runs `command` with inherited output.
pub fn inherit(command: &mut Command, limit: Duration) -> Result<End> {
    let child = start(command)?;
    wait(child, limit)
}

/// Runs `command` and fails unless it exits with code 0.
pub fn check(command: &mut Command, limit: Duration) -> Result<()> {
    let end = inherit(command, limit)?;
    if !end.success() {
        bail!("{}: {}", show(command), end.describe(limit));
    }
    Ok(())
}

/// Runs `command` and returns what it wrote to standard output, or why there is nothing.
pub fn output(command: &mut Command, limit: Duration) -> Result<String> {
    let mut text = String::new();
    command.stderr(Stdio::null());
    let end = lines_of_stdout(command, limit, &mut |line| {
        text.push_str(line);
        text.push('\n');
        Reader::Continue
    })?;
    if !end.success() {
        bail!("{}: {}", show(command), end.describe(limit));
    }
    Ok(text)
}

/// Runs `command` and hands every line of its standard output and standard error, in the order in
/// which they were written, to `reader`.
pub fn lines(
    command: &mut Command,
    limit: Duration,
    reader: &mut dyn FnMut(&str) -> Reader,
) -> Result<End> {
    let (output, input) = std::io::pipe().context("pipe")?;
    command
        .stderr(Stdio::from(input.try_clone().context("pipe")?))
        .stdout(Stdio::from(input));
    let child = start(command)?;
    // The command still holds the write ends of the pipe: without this the reader would never see its end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    pump(child, output, limit, reader)
}

/// Runs `command` and hands every line of its standard output to `reader`.
pub fn lines_of_stdout(
    command: &mut Command,
    limit: Duration,
    reader: &mut dyn FnMut(&str) -> Reader,
) -> Result<End> {
    let mut child = start(command.stdout(Stdio::piped()))?;
    let output = child
        .stdout
        .take()
        .context("the child has no standard output")?;
    pump(child, output, limit, reader)
}

fn pump(
    mut child: Child,
    output: impl std::io::Read + Send + 'static,
    limit: Duration,
    reader: &mut dyn FnMut(&str) -> Reader,
) -> Result<End> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&line)
                .trim_end_matches(['\n', '\r'])
                .to_owned();
            line.clear();
            if sender.send(text).is_err() {
                break;
            }
        }
    });
    let deadline = Instant::now() + limit;
    loop {
        match receiver.recv_timeout(TICK) {
            Ok(line) => {
                if reader(&line) == Reader::Stop {
                    stop(&mut child)?;
                    return Ok(End::Stopped(Stop::Reader));
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return wait(child, deadline.saturating_duration_since(Instant::now()));
            }
        }
        if Instant::now() >= deadline {
            stop(&mut child)?;
            return Ok(End::Stopped(Stop::Limit));
        }
        if let Some(status) = child.try_wait().context("waiting for a child")? {
            // A grandchild may hold the pipe open for ever: take what is there, then go.
            while let Ok(line) = receiver.recv_timeout(TICK * 4) {
                reader(&line);
            }
            signal(&child, Signal::KILL);
            return Ok(End::Exited(status));
        }
    }
}

fn start(command: &mut Command) -> Result<Child> {
    command.stdin(Stdio::null()).process_group(0);
    // SAFETY: between fork and exec only the async-signal-safe prctl(2) is called. It makes the child
    // end with this process, which a process group of its own would otherwise prevent on Ctrl-C.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(Signal::TERM))
                .map_err(std::io::Error::from)
        });
    }
    command
        .spawn()
        .with_context(|| format!("cannot start {}", show(command)))
}

fn wait(mut child: Child, limit: Duration) -> Result<End> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().context("waiting for a child")? {
            return Ok(End::Exited(status));
        }
        if Instant::now() >= deadline {
            stop(&mut child)?;
            return Ok(End::Stopped(Stop::Limit));
        }
        std::thread::sleep(TICK);
    }
}

/// Ends the child's whole process group: politely, then not.
fn stop(child: &mut Child) -> Result<()> {
    signal(child, Signal::TERM);
    let deadline = Instant::now() + LAST_WORDS;
    while Instant::now() < deadline && child.try_wait().context("waiting for a child")?.is_none() {
        std::thread::sleep(TICK);
    }
    signal(child, Signal::KILL);
    child.wait().context("waiting for a child")?;
    Ok(())
}

fn signal(child: &Child, signal: Signal) {
    // The group may be gone already, which is what is wanted.
    let _ = kill_process_group(Pid::from_child(child), signal);
}

/// The command as a person would type it.
pub fn show(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_hangs_is_ended_with_all_its_children() {
        let began = Instant::now();
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1000 & echo started; wait"]);
        let mut seen = Vec::new();
        let end = lines(&mut command, Duration::from_millis(300), &mut |line| {
            seen.push(line.to_owned());
            Reader::Continue
        })
        .unwrap();
        assert!(matches!(end, End::Stopped(Stop::Limit)));
        assert_eq!(seen, ["started"]);
        assert!(began.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_grandchild_that_holds_the_pipe_does_not_hold_us() {
        let began = Instant::now();
        let mut command = Command::new("sh");
        command.args(["-c", "setsid sleep 3 & echo done"]);
        let end = lines(&mut command, Duration::from_secs(60), &mut |_| {
            Reader::Continue
        })
        .unwrap();
        assert!(end.success());
        assert!(began.elapsed() < Duration::from_secs(3));
    }

    #[test]
    fn both_outputs_arrive_in_order() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo a; echo b >&2; echo c; exit 3"]);
        let mut seen = String::new();
        let end = lines(&mut command, Duration::from_secs(60), &mut |line| {
            seen.push_str(line);
            Reader::Continue
        })
        .unwrap();
        assert_eq!(seen, "abc");
        assert!(!end.success());
    }
}
