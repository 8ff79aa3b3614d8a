//! The agent under demonstration: its configuration, its life, and the calls of its client.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use serde::de::DeserializeOwned;

use super::process::{self, Process};
use super::stop;
use super::volumes::SlowOrigin;

/// The group's name.
pub const GROUP: &str = "demo";
/// Age that the newest layer should not exceed.
pub const RPO: Duration = Duration::from_secs(16);
/// Longest pause of writes that a cut may cause.
pub const MAX_PAUSE: Duration = Duration::from_millis(100);
const READY_LIMIT: Duration = Duration::from_secs(30);
const CALL_LIMIT: Duration = Duration::from_secs(20);
/// How much may be staged.
const STAGING_BUDGET_MIB: u64 = 64;

/// Everything of the demo that is not a volume: a folder, pins, the staging file.
pub struct Home {
    dir: tempfile::TempDir,
    /// Where the agent pins its programs.
    pins: PathBuf,
    /// The fast staging file.
    pub stage: PathBuf,
    /// Whether the staging file lies in memory.
    pub stage_in_memory: bool,
    /// Where the Parquet history lies.
    pub history: PathBuf,
}

impl Home {
    /// Makes the folder; the history goes to `history`, or into the folder as well.
    pub fn make(history: Option<&Path>) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("soe-demo-")
            .tempdir()
            .context("cannot make a temporary folder")?;
        let id = std::process::id();
        let memory = Path::new("/dev/shm");
        let stage_in_memory = is_tmpfs(memory);
        let stage = if stage_in_memory {
            memory.join(format!("soe-demo-{id}.stage"))
        } else {
            dir.path().join("stage")
        };
        Ok(Self {
            pins: PathBuf::from(format!("/sys/fs/bpf/soe-demo-{id}")),
            stage,
            stage_in_memory,
            history: history.map_or_else(|| dir.path().join("history"), Path::to_path_buf),
            dir,
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

fn is_tmpfs(dir: &Path) -> bool {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    rustix::fs::statfs(dir).is_ok_and(|fs| fs.f_type == TMPFS_MAGIC)
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.stage);
        if self.pins.exists()
            && let Err(error) = fs::remove_dir_all(&self.pins)
        {
            eprintln!("demo: cannot remove {}: {error}", self.pins.display());
        }
    }
}

/// What the agent is told: the product's ordinary settings with short periods.
fn configuration(home: &Home) -> String {
    let dir = home.path().display();
    format!(
        r#"# Days compressed to seconds: load repeats after 18 s instead of a day.
[agent]
state_dir = "{dir}/state"
[api]
listen = "unix:{dir}/soe.sock"
http = "off"
[history]
dir = "{history}"
interval = "500ms"
region_interval = "1s"
[store]
min_free = "64MiB"
[staging]
path = "{stage}"
budget = "{budget}MiB"
[model]
bin = "500ms"
season = "18s"
train_after = "72s"
train_every = "36s"
[plan]
tick = "250ms"
rpo = "{rpo}s"
max_pause = "{pause}ms"
"#,
        history = home.history.display(),
        stage = home.stage.display(),
        budget = STAGING_BUDGET_MIB,
        rpo = RPO.as_secs(),
        pause = MAX_PAUSE.as_millis(),
    )
}

/// The agent.
pub struct Agent {
    soe: PathBuf,
    config: PathBuf,
    endpoint: String,
    pins: PathBuf,
    log: PathBuf,
    process: Option<Process>,
}

impl Agent {
    /// Writes the configuration for the program `soe` and has it checked.
    pub fn new(soe: &Path, home: &Home) -> Result<Self> {
        let agent = Self {
            soe: soe.to_path_buf(),
            config: home.path().join("soe.toml"),
            endpoint: format!("unix:{}/soe.sock", home.path().display()),
            pins: home.pins.clone(),
            log: home.path().join("agent.log"),
            process: None,
        };
        fs::write(&agent.config, configuration(home))
            .with_context(|| format!("cannot write {}", agent.config.display()))?;
        let mut check = agent.client(&["agent", "--check-config", "--config"]);
        process::output(check.arg(&agent.config), CALL_LIMIT)?;
        Ok(agent)
    }

    /// A command of `soe` that finds this agent.
    pub fn client(&self, args: &[&str]) -> Command {
        self.environment(Command::new(&self.soe), args)
    }

    fn environment(&self, mut command: Command, args: &[&str]) -> Command {
        command
            .args(args)
            .env("SOE_ENDPOINT", &self.endpoint)
            .env("SOE_PIN_ROOT", &self.pins)
            .env_remove("STATE_DIRECTORY");
        command
    }

    /// Calls the agent and reads the last JSON document it answers with.
    pub fn ask<T: DeserializeOwned>(&self, args: &[&str], limit: Duration) -> Result<T> {
        let text = process::output(&mut self.client(args), limit)?;
        let mut last = None;
        for document in serde_json::Deserializer::from_str(&text).into_iter::<serde_json::Value>() {
            last = Some(document.with_context(|| format!("soe {}", args.join(" ")))?);
        }
        let last = last.with_context(|| format!("soe {}: no answer", args.join(" ")))?;
        serde_json::from_value(last)
            .with_context(|| format!("soe {}: an unexpected answer", args.join(" ")))
    }

    /// Starts it on the slow origin and waits until it answers. Returns how long that took.
    pub fn start(&mut self, origin: &SlowOrigin) -> Result<Duration> {
        let began = Instant::now();
        let mut command = self.environment(origin.command(&self.soe), &["agent", "--config"]);
        command.arg(&self.config);
        let mut process = Process::logged(&mut command, &self.log)?;
        loop {
            stop::check()?;
            if let Some(status) = process.ended()? {
                bail!("the agent ended at once ({status}): {}", self.last_words());
            }
            if process::output(&mut self.client(&["group", "list", "--json"]), CALL_LIMIT).is_ok() {
                self.process = Some(process);
                return Ok(began.elapsed());
            }
            if began.elapsed() > READY_LIMIT {
                bail!(
                    "the agent did not answer within {} s: {}",
                    READY_LIMIT.as_secs(),
                    self.last_words()
                );
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Kills it with SIGKILL, without warning; the processes it started are left to notice.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            process.signal(Signal::KILL);
            process.wait(CALL_LIMIT)?;
        }
        Ok(())
    }

    /// Ends it with SIGTERM; `None` when it did not end in time.
    pub fn end(&mut self) -> Option<ExitStatus> {
        self.process.take()?.end(CALL_LIMIT)
    }

    /// The last lines of its log.
    pub fn last_words(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(6);
        lines.get(from..).unwrap_or_default().join("\n  ")
    }

    /// Lines of its log that warn.
    pub fn warnings(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        text.lines()
            .filter(|line| line.contains(" WARN ") || line.contains(" ERROR "))
            .map(str::to_owned)
            .collect()
    }
}

impl Drop for Agent {
    /// Politely, so that it takes away what it keeps outside of its folder.
    fn drop(&mut self) {
        self.end();
    }
}
