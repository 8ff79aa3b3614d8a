//! The workload: fio jobs. A trickle of small writes all the time, and every so often a burst: random
//! reads of a set of hot files beside appends to a log. When exactly a burst begins varies a little.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::process::{self, Process};
use super::volumes::{SlowOrigin, Volume};
use crate::place;

/// From burst to burst, on average.
pub const PERIOD: Duration = Duration::from_secs(18);
const FIRST: Duration = Duration::from_secs(12);
/// How long a burst lasts.
pub const BURST: Duration = Duration::from_secs(5);
/// How much earlier or later than on average a burst may begin.
const JITTER_MS: u64 = 600;
const FILL_LIMIT: Duration = Duration::from_secs(60);

/// Fills the volumes: tables of which a quarter is hot, and a log.
pub fn fill(volumes: &[Volume]) -> Result<()> {
    for volume in volumes {
        let mut fio = Command::new(program()?);
        common(&mut fio, &volume.mount);
        fio.args(["--rw=write", "--bs=1m", "--end_fsync=1"]);
        for (name, size) in [
            ("hot", "24m"),
            ("cold", "48m"),
            ("small", "16m"),
            ("log", "16m"),
        ] {
            fio.arg(format!("--name={name}"))
                .arg(format!("--filename={name}"))
                .arg(format!("--size={size}"));
        }
        process::output(&mut fio, FILL_LIMIT)?;
    }
    Ok(())
}

fn program() -> Result<PathBuf> {
    place::program("fio").context("fio was not found; run `cargo xtask setup`")
}

fn common(fio: &mut Command, dir: &Path) {
    fio.arg(format!("--directory={}", dir.display())).args([
        "--thread",
        "--output-format=terse",
        "--randrepeat=0",
    ]);
}

/// The running workload.
pub struct Workload {
    began: Instant,
    trickle: Vec<Process>,
    burst: Vec<Process>,
    bursts: u32,
    /// Where the outputs of fio go.
    log: PathBuf,
}

impl Workload {
    /// Starts the trickle; the bursts follow as [`Workload::tick`] is called.
    pub fn start(volumes: &[Volume], origin: &SlowOrigin, log: &Path) -> Result<Self> {
        let mut trickle = Vec::new();
        for volume in volumes {
            let mut fio = job(origin, volume, "trickle")?;
            fio.args([
                "--filename=small",
                "--size=16m",
                "--rw=randwrite",
                "--bs=4k",
            ])
            .args(["--thinktime=900ms", "--thinktime_blocks=5"])
            .args(["--time_based", "--runtime=600"]);
            trickle.push(Process::logged(&mut fio, log)?);
        }
        Ok(Self {
            began: Instant::now(),
            trickle,
            burst: Vec::new(),
            bursts: 0,
            log: log.to_path_buf(),
        })
    }

    /// How long it has been running.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// How many bursts have begun.
    pub fn bursts(&self) -> u32 {
        self.bursts
    }

    /// Whether a burst is under way.
    pub fn bursting(&self) -> bool {
        !self.burst.is_empty()
    }

    /// Starts a burst when its time has come. Whether one began.
    pub fn tick(&mut self, volumes: &[Volume], origin: &SlowOrigin) -> Result<bool> {
        let mut running = Vec::new();
        for mut process in self.burst.drain(..) {
            if process.ended()?.is_none() {
                running.push(process);
            }
        }
        self.burst = running;
        if self.bursting() || self.elapsed() < start_of(self.bursts) {
            return Ok(false);
        }
        self.bursts += 1;
        let runtime = format!("--runtime={}", BURST.as_secs());
        for (volume, depth) in volumes.iter().zip([8, 2]) {
            let mut reads = job(origin, volume, "reads")?;
            reads
                .args(["--filename=hot", "--size=24m", "--rw=randread", "--bs=32k"])
                .args(["--ioengine=libaio", "--time_based", &runtime])
                .arg(format!("--iodepth={depth}"));
            self.burst.push(Process::logged(&mut reads, &self.log)?);
        }
        if let Some(volume) = volumes.last() {
            let mut appends = job(origin, volume, "appends")?;
            appends
                .args(["--filename=log", "--size=16m", "--rw=write", "--bs=32k"])
                .args(["--rate=3m", "--time_based", &runtime]);
            self.burst.push(Process::logged(&mut appends, &self.log)?);
        }
        Ok(true)
    }

    /// Ends all jobs.
    pub fn stop(mut self) {
        for process in self.burst.iter_mut().chain(&mut self.trickle) {
            process.end(Duration::from_secs(5));
        }
    }
}

fn job(origin: &SlowOrigin, volume: &Volume, name: &str) -> Result<Command> {
    let mut fio = origin.command(&program()?);
    common(&mut fio, &volume.mount);
    fio.args(["--direct=1", "--allow_file_create=0"])
        .arg(format!("--name={name}"));
    Ok(fio)
}

/// When burst `n` begins, counted from the start of the workload.
fn start_of(n: u32) -> Duration {
    // Multiplicative hashing: irregular, but the same in every run.
    let noise = u64::from(n.wrapping_mul(2_654_435_761) >> 8) % (2 * JITTER_MS);
    FIRST + PERIOD * n + Duration::from_millis(noise) - Duration::from_millis(JITTER_MS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bursts_are_a_period_apart_give_or_take_the_jitter() {
        let jitter = Duration::from_millis(2 * JITTER_MS);
        let starts: Vec<Duration> = (0..8).map(start_of).collect();
        for pair in starts.windows(2) {
            let apart = pair[1] - pair[0];
            assert!(
                apart + jitter >= PERIOD && apart <= PERIOD + jitter,
                "{apart:?}"
            );
        }
        assert!(
            starts.windows(3).any(|w| w[1] - w[0] != w[2] - w[1]),
            "no jitter"
        );
    }
}
