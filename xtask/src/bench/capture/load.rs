//! Who writes while captures are made: fio, a light writer, and a probe that times every write.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::Signal;
use serde_json::Value;

use super::super::figures::Durations;
use super::super::stage::Running;
use crate::run;

/// How large the file is that fio writes to.
const FILE_MIB: u64 = 256;
const FILL: Duration = Duration::from_secs(300);
/// Between two writes of the probe.
const PROBE_EVERY: Duration = Duration::from_millis(1);

/// What fio does.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pattern {
    /// What the tables call it.
    pub(super) name: &'static str,
    args: &'static [&'static str],
}

/// Random writes of 4 KiB past the page cache: few, as many as go, and each made durable.
pub(super) const PATTERNS: [Pattern; 3] = [
    Pattern {
        name: "500 a second",
        args: &["--ioengine=libaio", "--iodepth=4", "--rate_iops=500"],
    },
    Pattern {
        name: "unthrottled, depth 16",
        args: &["--ioengine=libaio", "--iodepth=16"],
    },
    Pattern {
        name: "unthrottled, fsync each",
        args: &["--ioengine=psync", "--fsync=1"],
    },
];

fn fio(mount: &Path) -> Command {
    let mut command = Command::new("fio");
    // The folder comes first: fio joins it to the names that follow, not to those before.
    command
        .arg(format!("--directory={}", mount.display()))
        .args(["--name=writes", "--filename=writes", "--bs=4k", "--thread"])
        .arg(format!("--size={FILE_MIB}m"));
    command
}

/// Writes the file out, so that random writes to it allocate nothing.
pub(super) fn lay_out(mount: &Path) -> Result<()> {
    let mut command = fio(mount);
    command.args([
        "--rw=write",
        "--bs=1m",
        "--end_fsync=1",
        "--output=/dev/null",
    ]);
    run::check(&mut command, FILL)?;
    // A benchmark that writes elsewhere measures nothing.
    let file = mount.join("writes");
    let laid_out = std::fs::metadata(&file).is_ok_and(|meta| meta.len() == FILE_MIB << 20);
    if !laid_out {
        bail!("fio did not write {}", file.display());
    }
    Ok(())
}

/// A fio that writes until it is stopped.
pub(super) struct Fio {
    running: Running,
    report: PathBuf,
}

/// What fio did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Written {
    pub(super) iops: f64,
    /// The longest time one write took, its fsync included where it does one.
    pub(super) longest: Duration,
}

impl Fio {
    pub(super) fn start(mount: &Path, pattern: Pattern, report: &Path) -> Result<Self> {
        let _ = std::fs::remove_file(report);
        let mut command = fio(mount);
        command
            .args([
                "--rw=randwrite",
                "--direct=1",
                "--norandommap",
                "--randseed=1",
            ])
            .args(["--time_based", "--runtime=36000", "--output-format=json"])
            .arg(format!("--output={}", report.display()))
            .args(pattern.args);
        Ok(Self {
            running: Running::start(&mut command)?,
            report: report.to_owned(),
        })
    }

    pub(super) fn stop(mut self) -> Result<Written> {
        if self.running.ended() {
            bail!("fio ended before it was told to");
        }
        self.running.interrupt(Signal::INT)?;
        let text = std::fs::read_to_string(&self.report).context("what fio says")?;
        // fio may print notes before its JSON.
        let json = text.find('{').and_then(|at| text.get(at..));
        let report: Value =
            serde_json::from_str(json.unwrap_or_default()).context("what fio says")?;
        let job = &report["jobs"][0];
        let ns = |value: &Value| Duration::from_nanos(value.as_u64().unwrap_or(0));
        let iops = job["write"]["iops"].as_f64().unwrap_or(0.0);
        if iops <= 0.0 {
            bail!("fio wrote nothing");
        }
        Ok(Written {
            iops,
            longest: ns(&job["write"]["lat_ns"]["max"]).max(ns(&job["sync"]["lat_ns"]["max"])),
        })
    }
}

/// A thread that works until it is dropped or asked for its result.
pub(super) struct Worker<T> {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<T>>>,
}

impl<T: Send + 'static> Worker<T> {
    fn start(work: impl FnOnce(&AtomicBool) -> Result<T> + Send + 'static) -> Self {
        let ends = Arc::new(AtomicBool::new(false));
        let told = ends.clone();
        Self {
            ends,
            thread: Some(std::thread::spawn(move || work(&told))),
        }
    }

    pub(super) fn stop(mut self) -> Result<T> {
        self.ends.store(true, Ordering::SeqCst);
        let thread = self.thread.take().context("it was stopped before")?;
        thread.join().map_err(|_| anyhow!("a writer panicked"))?
    }
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // Its result, or its error, is of no interest any more.
            let _ = thread.join();
        }
    }
}

/// Appends a little to a file every millisecond and makes it durable; the result is how long each
/// of these writes took: what a client sees.
pub(super) fn probe(mount: &Path) -> Result<Worker<Durations>> {
    let path = mount.join("probe");
    let mut file = File::create(&path).with_context(|| path.display().to_string())?;
    Ok(Worker::start(move |ends| {
        let mut seen = Vec::new();
        let mut next = Instant::now();
        while !ends.load(Ordering::SeqCst) {
            let began = Instant::now();
            file.write_all(&[7; 512])
                .and_then(|()| file.sync_data())
                .context("the probe's write")?;
            let now = Instant::now();
            seen.push(now - began);
            next = (next + PROBE_EVERY).max(now);
            std::thread::sleep(next - now);
        }
        Ok(Durations::new(seen))
    }))
}

/// Writes a few small files every second and makes them durable: a lightly used filesystem.
pub(super) fn light(mount: &Path) -> Worker<u64> {
    let dir = mount.to_owned();
    Worker::start(move |ends| {
        let mut rounds = 0u64;
        while !ends.load(Ordering::SeqCst) {
            for number in 0..3u64 {
                let path = dir.join(format!("note-{}", (rounds * 3 + number) % 60));
                let mut file = File::create(&path).context("a small file")?;
                file.write_all(&vec![rounds as u8; 2000 * (number as usize + 1)])
                    .and_then(|()| file.sync_all())
                    .context("a small file")?;
            }
            rounds += 1;
            let until = Instant::now() + Duration::from_millis(970);
            while Instant::now() < until && !ends.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(rounds)
    })
}
