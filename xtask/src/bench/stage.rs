//! What a benchmark puts up and takes down again, on every exit path: a device in memory, an agent
//! that watches it, a rival tool, the kernel's bookkeeping of BPF programs.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{place, run};

const QUICK: Duration = Duration::from_secs(60);
/// How long an agent may take to answer.
const START: Duration = Duration::from_secs(20);
/// Units a second of the times in /proc; the same on every x86 kernel.
const USER_HZ: u64 = 100;
const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";

const BUILD_LIMIT: Duration = Duration::from_secs(3000);

/// Builds the `soe` of this checkout.
pub(super) fn build() -> Result<PathBuf> {
    let mut cargo = Command::new("cargo");
    cargo
        .args(["build", "--quiet", "--package", "soe-agent", "--bins"])
        .current_dir(place::root());
    run::check(&mut cargo, BUILD_LIMIT)?;
    Ok(place::target().join("debug/soe"))
}

/// A loop device over a file of its own.
pub(super) struct Device {
    pub(super) node: String,
    file: PathBuf,
}

impl Device {
    /// Over a file in memory: no disk's latency hides the cost of a program, and its requests pass the
    /// block layer as a disk's do.
    pub(super) fn in_memory(mib: u64) -> Result<Self> {
        Self::over(Path::new("/dev/shm"), mib, &[])
    }

    /// Over a file on the disk of `folder`, past the page cache.
    pub(super) fn on_disk(folder: &Path, mib: u64) -> Result<Self> {
        Self::over(folder, mib, &["--direct-io=on"])
    }

    fn over(folder: &Path, mib: u64, options: &[&str]) -> Result<Self> {
        let file = folder.join(format!("soe-bench-{}", std::process::id()));
        let path = file.display().to_string();
        let made = run::check(
            Command::new("dd")
                .args(["if=/dev/zero", "bs=1M", "status=none", "conv=fsync"])
                .arg(format!("of={path}"))
                .arg(format!("count={mib}")),
            QUICK,
        )
        .and_then(|()| {
            let mut losetup = Command::new("losetup");
            losetup.args(["-f", "--show"]).args(options).arg(&path);
            run::output(&mut losetup, QUICK)
        });
        match made {
            Ok(node) => Ok(Self {
                node: node.trim().to_owned(),
                file,
            }),
            Err(error) => {
                let _ = std::fs::remove_file(&file);
                Err(error)
            }
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = run::check(Command::new("losetup").args(["-d", &self.node]), QUICK);
        let _ = std::fs::remove_file(&self.file);
    }
}

/// The kernel's count of each program's runs and their time, switched on until dropped.
pub(super) struct Bookkeeping(String);

impl Bookkeeping {
    pub(super) fn on() -> Result<Self> {
        let before =
            std::fs::read_to_string(SWITCH).with_context(|| format!("reading {SWITCH}"))?;
        std::fs::write(SWITCH, "1").with_context(|| format!("writing {SWITCH}"))?;
        Ok(Self(before))
    }
}

impl Drop for Bookkeeping {
    fn drop(&mut self) {
        let _ = std::fs::write(SWITCH, self.0.trim());
    }
}

/// A process that is ended on drop.
pub(super) struct Running(Child);

impl Running {
    pub(super) fn start(command: &mut Command) -> Result<Self> {
        Self::spawn(command.stdout(Stdio::null()).stderr(Stdio::null()))
    }

    /// Starts it with all its output in the file `log`.
    pub(super) fn logged(command: &mut Command, log: &Path) -> Result<Self> {
        let out = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| log.display().to_string())?;
        let err = out.try_clone().context("log")?;
        Self::spawn(command.stdout(out).stderr(err))
    }

    fn spawn(command: &mut Command) -> Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", run::show(command)))?;
        Ok(Self(child))
    }

    /// Asks it to end with `signal` and waits for that.
    pub(super) fn interrupt(&mut self, signal: rustix::process::Signal) -> Result<()> {
        if let Some(pid) = rustix::process::Pid::from_raw(self.0.id().cast_signed())
            && !self.ended()
        {
            rustix::process::kill_process(pid, signal).context("signal")?;
        }
        let deadline = Instant::now() + QUICK;
        while !self.ended() {
            if Instant::now() > deadline {
                bail!("process {} does not end", self.0.id());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// CPU time of the process so far, its own and the kernel's for it.
    pub(super) fn cpu(&self) -> Result<Duration> {
        let path = format!("/proc/{}/stat", self.0.id());
        let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        // Behind the name, which may hold blanks: state, ..., utime and stime are the 14th and 15th
        // of all fields.
        let fields = text.rsplit_once(')').map_or("", |(_, rest)| rest);
        let ticks: u64 = fields
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<u64>().ok())
            .sum();
        Ok(Duration::from_millis(ticks * 1000 / USER_HZ))
    }

    /// The ids of the BPF programs that the process holds, itself or through a link.
    pub(super) fn programs(&self) -> Result<Vec<u64>> {
        let folder = format!("/proc/{}/fdinfo", self.0.id());
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&folder)
            .with_context(|| folder.clone())?
            .flatten()
        {
            // A descriptor may be closed while we look.
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            let id = text.lines().find_map(|line| line.strip_prefix("prog_id:"));
            ids.extend(id.and_then(|id| id.trim().parse::<u64>().ok()));
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    pub(super) fn ended(&mut self) -> bool {
        !matches!(self.0.try_wait(), Ok(None))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.0.id().cast_signed())
            && !self.ended()
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let deadline = Instant::now() + START;
        while Instant::now() < deadline && !self.ended() {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An agent with a folder and pins of its own. Its group keeps the device tracked.
pub(super) struct Agent {
    binary: PathBuf,
    folder: tempfile::TempDir,
    pins: PathBuf,
    running: Option<Running>,
}

impl Agent {
    pub(super) fn new(binary: PathBuf) -> Result<Self> {
        let folder = tempfile::tempdir().context("folder of the agent")?;
        let path = folder.path().display();
        let config = format!(
            "[agent]\nstate_dir = \"{path}/state\"\n[api]\nlisten = \"unix:{path}/soe.sock\"\nhttp = \"off\"\n"
        );
        std::fs::write(folder.path().join("soe.toml"), config).context("configuration")?;
        let pins = PathBuf::from(format!("/sys/fs/bpf/soe-bench-{}", std::process::id()));
        Ok(Self {
            binary,
            folder,
            pins,
            running: None,
        })
    }

    /// A client command of this agent.
    pub(super) fn client(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        let socket = self.folder.path().join("soe.sock");
        command
            .args(arguments)
            .env("SOE_ENDPOINT", format!("unix:{}", socket.display()));
        command
    }

    /// Starts it and waits until it answers.
    pub(super) fn start(&mut self) -> Result<()> {
        let mut command = Command::new(&self.binary);
        command
            .args(["agent", "--config"])
            .arg(self.folder.path().join("soe.toml"))
            .env("SOE_PIN_ROOT", &self.pins);
        let mut running = Running::logged(&mut command, &self.log())?;
        let deadline = Instant::now() + START;
        while run::output(&mut self.client(&["group", "list"]), QUICK).is_err() {
            if running.ended() || Instant::now() > deadline {
                bail!("the agent does not answer: {}", self.last_words());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        self.running = Some(running);
        Ok(())
    }

    /// Makes a group of the device and captures it once, so that nothing is due during a measurement.
    pub(super) fn watch(&self, group: &str, device: &str) -> Result<()> {
        let create = [
            "group",
            "create",
            group,
            "--prediction",
            "off",
            "--rpo",
            "1d",
            "--volume",
            device,
        ];
        run::output(&mut self.client(&create), QUICK)?;
        run::output(&mut self.client(&["layer", "capture", group]), QUICK)?;
        Ok(())
    }

    /// The ids of its programs.
    pub(super) fn programs(&self) -> Result<Vec<u64>> {
        self.running
            .as_ref()
            .context("the agent does not run")?
            .programs()
    }

    /// Where its log lies.
    pub(super) fn log(&self) -> PathBuf {
        self.folder.path().join("agent.log")
    }

    /// The last line of its log.
    pub(super) fn last_words(&self) -> String {
        let text = std::fs::read_to_string(self.log()).unwrap_or_default();
        text.lines()
            .last()
            .unwrap_or("it logged nothing")
            .to_owned()
    }

    /// Its CPU time so far.
    pub(super) fn cpu(&self) -> Result<Duration> {
        self.running
            .as_ref()
            .context("the agent does not run")?
            .cpu()
    }

    /// Stops it and takes its programs out of the kernel.
    pub(super) fn stop(&mut self) {
        self.running = None;
        let _ = std::fs::remove_dir_all(&self.pins);
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What one program did so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Account {
    pub(super) name: String,
    pub(super) runs: u64,
    pub(super) ns: u64,
}

/// The accounts of the programs `ids`.
pub(super) fn accounts(ids: &[u64]) -> Result<BTreeMap<u64, Account>> {
    let text = run::output(Command::new("bpftool").args(["prog", "show", "-j"]), QUICK)?;
    let all: Vec<Value> = serde_json::from_str(&text).context("what bpftool says")?;
    Ok(all
        .iter()
        .filter_map(|program| Some((program["id"].as_u64()?, program)))
        .filter(|(id, _)| ids.contains(id))
        .map(|(id, program)| {
            let name = program["name"].as_str().unwrap_or("?").to_owned();
            let number = |key: &str| program[key].as_u64().unwrap_or(0);
            (
                id,
                Account {
                    name,
                    runs: number("run_cnt"),
                    ns: number("run_time_ns"),
                },
            )
        })
        .collect())
}

/// What fio did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) ios: u64,
    pub(super) iops: f64,
}

/// Runs fio's `pattern` of 4 KiB on a device for some seconds.
pub(super) fn fio(device: &Path, pattern: &str, seconds: u64) -> Result<Load> {
    let mut command = Command::new("fio");
    command.args([
        "--name=bench",
        "--ioengine=libaio",
        "--direct=1",
        "--bs=4k",
        "--iodepth=16",
        "--time_based",
    ]);
    command.args(["--output-format=json", "--randseed=1", "--norandommap"]);
    command
        .arg(format!("--rw={pattern}"))
        .arg(format!("--runtime={seconds}"));
    command.arg(format!("--filename={}", device.display()));
    let text = run::output(&mut command, Duration::from_secs(seconds) + QUICK)?;
    // fio may print notes before its JSON.
    let json = text
        .find('{')
        .and_then(|at| text.get(at..))
        .unwrap_or_default();
    let report: Value = serde_json::from_str(json).context("what fio says")?;
    let job = &report["jobs"][0];
    let sum = |key: &str| {
        ["read", "write"]
            .iter()
            .map(|d| job[*d][key].as_f64().unwrap_or(0.0))
            .sum::<f64>()
    };
    if sum("total_ios") < 1.0 {
        bail!("{} did no IO", run::show(&command));
    }
    Ok(Load {
        ios: sum("total_ios") as u64,
        iops: sum("iops"),
    })
}
