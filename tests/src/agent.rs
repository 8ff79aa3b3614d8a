//! A real `soe` agent with a folder, a socket and pins of its own. It is ended on drop, also when
//! the test panics.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde_json::Value;

/// How long a start or a stop may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// Seconds after which a client command is killed.
const COMMAND_LIMIT: &str = "120";

/// The `soe` that was built beside this test program.
///
/// # Panics
/// When it was not built: a test must not pass with another program than that of this checkout.
pub fn binary() -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    let soe = test
        .parent()
        .and_then(Path::parent)
        .map(|dir| dir.join("soe"))
        .expect("a test program lies in a build directory");
    assert!(
        soe.is_file(),
        "{} is missing; build it with `cargo build -p soe-agent --bins`",
        soe.display()
    );
    soe
}

/// A loopback port that nobody listened on a moment ago.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    listener.local_addr().expect("its number").port()
}

/// What a listener on the loopback address answers to a GET, head and body.
pub fn http_get(port: u16, path: &str) -> String {
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).expect("a listener");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n"
    )
    .expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

/// What a command said and how it ended.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code; 128 and the signal's number when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Outcome {
    fn of(command: &mut Command) -> Self {
        let done = command.output().expect("the program starts");
        Self {
            code: code_of(done.status),
            out: String::from_utf8_lossy(&done.stdout).into_owned(),
            err: String::from_utf8_lossy(&done.stderr).into_owned(),
        }
    }

    /// The standard output of a command that succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.out
    }

    /// The JSON document of a command that succeeded.
    #[track_caller]
    pub fn json(self) -> Value {
        let text = self.ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:?}"))
    }

    /// The one sentence on standard error of a command that failed with `code`.
    #[track_caller]
    pub fn refused(self, code: i32) -> String {
        assert_eq!(self.code, code, "{self:?}");
        no_panic(&self.err);
        let sentences: Vec<&str> = self
            .err
            .lines()
            .filter_map(|line| line.strip_prefix("soe: "))
            .collect();
        assert_eq!(sentences.len(), 1, "one sentence is wanted: {self:?}");
        assert!(sentences[0].len() > 20, "a sentence says why: {self:?}");
        sentences[0].to_owned()
    }
}

fn code_of(status: std::process::ExitStatus) -> i32 {
    status
        .code()
        .or(status.signal().map(|signal| 128 + signal))
        .unwrap_or(-1)
}

#[track_caller]
fn no_panic(text: &str) {
    for word in ["panicked", "backtrace", "RUST_BACKTRACE", "Error {"] {
        assert!(!text.contains(word), "{word:?} in: {text}");
    }
}

/// An agent and its folder. The folder outlives a stop, so that it can be started again.
pub struct Soe {
    /// State, store, history and logs lie in it.
    pub dir: tempfile::TempDir,
    binary: PathBuf,
    pins: PathBuf,
    log: File,
    child: Option<Child>,
}

impl Soe {
    /// A configured agent that does not run yet. `name` makes its pins distinct; `more` is TOML that
    /// is put behind the tables `[agent]` and `[api]`.
    pub fn new(name: &str, more: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("soe-agent-")
            .tempdir()
            .expect("folder");
        let log = File::create(dir.path().join("log")).expect("log");
        let pins = PathBuf::from(format!(
            "/sys/fs/bpf/soe-test-{}-{name}",
            std::process::id()
        ));
        let soe = Self {
            binary: binary(),
            pins,
            log,
            child: None,
            dir,
        };
        soe.configure(more);
        soe
    }

    /// Writes the configuration anew.
    pub fn configure(&self, more: &str) {
        let text = format!(
            "[agent]\nstate_dir = \"{}\"\nlog = \"info\"\n[api]\nlisten = \"unix:{}\"\nhttp = \"off\"\n{more}\n",
            self.state().display(),
            self.socket().display()
        );
        std::fs::write(self.config(), text).expect("configuration");
    }

    /// Writes the configuration anew, with an HTTP listener.
    pub fn configure_http(&self, port: u16, more: &str) {
        self.configure(more);
        let text = std::fs::read_to_string(self.config()).expect("configuration");
        let text = text.replace("http = \"off\"", &format!("http = \"127.0.0.1:{port}\""));
        std::fs::write(self.config(), text).expect("configuration");
    }

    /// The configuration file.
    pub fn config(&self) -> PathBuf {
        self.dir.path().join("soe.toml")
    }

    /// The state directory.
    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("soe.sock")
    }

    /// Where the kernel half of this agent is pinned.
    pub fn pins(&self) -> &Path {
        &self.pins
    }

    /// `soe` with the environment of this agent.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["-s", "KILL", COMMAND_LIMIT])
            .arg(&self.binary)
            .args(arguments)
            .env("SOE_ENDPOINT", format!("unix:{}", self.socket().display()))
            .env("SOE_PIN_ROOT", &self.pins)
            .env_remove("STATE_DIRECTORY")
            .env_remove("RUST_BACKTRACE")
            .stdin(Stdio::null());
        command
    }

    /// Runs a client command to its end.
    pub fn run(&self, arguments: &[&str]) -> Outcome {
        Outcome::of(&mut self.command(arguments))
    }

    /// Starts a client command and goes on.
    pub fn spawn(&self, arguments: &[&str]) -> Child {
        self.command(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program starts")
    }

    /// Starts the agent and waits until it answers.
    ///
    /// # Panics
    /// When it ends instead, with what it logged.
    #[track_caller]
    pub fn start(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        let mut command = Command::new(&self.binary);
        command
            .args(["agent", "--config"])
            .arg(self.config())
            .env("SOE_PIN_ROOT", &self.pins)
            .env_remove("STATE_DIRECTORY")
            .env_remove("NOTIFY_SOCKET")
            .env_remove("RUST_BACKTRACE")
            .stdin(Stdio::null())
            .stdout(Stdio::from(self.log.try_clone().expect("log")))
            .stderr(Stdio::from(self.log.try_clone().expect("log")));
        // SAFETY: between fork and exec only the async-signal-safe prctl(2) is called; the agent
        // ends with the test even when that is killed.
        unsafe {
            command.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
                    .map_err(std::io::Error::from)
            });
        }
        self.child = Some(command.spawn().expect("the agent starts"));
        let deadline = Instant::now() + PATIENCE;
        while self.run(&["group", "list"]).code != 0 {
            let child = self.child.as_mut().expect("started above");
            if let Some(status) = child.try_wait().expect("wait") {
                self.child = None;
                panic!("the agent ended with {status}: {}", self.log());
            }
            assert!(
                Instant::now() < deadline,
                "the agent does not answer: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Runs the agent where it is expected to end by itself.
    pub fn start_in_vain(&self) -> Outcome {
        let config = self.config().display().to_string();
        self.run(&["agent", "--config", &config])
    }

    /// Process id of the running agent.
    pub fn pid(&self) -> Pid {
        Pid::from_child(self.child.as_ref().expect("the agent runs"))
    }

    /// Process ids of the agent's children: its freeze guard.
    pub fn children(&self) -> Vec<Pid> {
        let pid = self.pid().as_raw_nonzero();
        let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
            return Vec::new();
        };
        threads
            .flatten()
            .filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok())
            .flat_map(|text| {
                text.split_whitespace()
                    .filter_map(|id| id.parse().ok().and_then(Pid::from_raw))
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    /// Asks the agent to stop and returns its exit code.
    ///
    /// # Panics
    /// When it does not stop in time, or panicked.
    #[track_caller]
    pub fn terminate(&mut self) -> i32 {
        rustix::process::kill_process(self.pid(), Signal::TERM).expect("signal");
        let deadline = Instant::now() + PATIENCE;
        let mut child = self.child.take().expect("the agent runs");
        loop {
            if let Some(status) = child.try_wait().expect("wait") {
                no_panic(&self.log());
                return code_of(status);
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                panic!("the agent does not stop: {}", self.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills the agent without a warning.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// What the agent logged, of all its runs.
    pub fn log(&self) -> String {
        let mut text = String::new();
        let mut log = File::open(self.dir.path().join("log")).expect("log");
        log.seek(SeekFrom::Start(0)).expect("seek");
        let mut bytes = Vec::new();
        log.read_to_end(&mut bytes).expect("read");
        text.push_str(&String::from_utf8_lossy(&bytes));
        text
    }

    /// Forgets what was logged so far.
    pub fn clear_log(&mut self) {
        self.log = File::create(self.dir.path().join("log")).expect("log");
    }

    /// Makes a group, as a precondition of a test.
    #[track_caller]
    pub fn group(&self, name: &str, volumes: &[&str]) {
        let mut arguments = vec!["group", "create", name, "--rpo", "1d", "--volume"];
        arguments.extend(volumes);
        self.run(&arguments).ok();
    }

    /// Captures a group and returns its new layers.
    #[track_caller]
    pub fn capture(&self, group: &str) -> Vec<Value> {
        let document = self.run(&["layer", "capture", group, "--json"]).json();
        document["layers"].as_array().expect("layers").clone()
    }

    /// The state of a group's volume, as `soe group status --json` tells it.
    #[track_caller]
    pub fn volume(&self, group: &str, volume: &str) -> Value {
        let status = self.run(&["group", "status", group, "--json"]).json();
        let volumes = status["volumes"].as_array().expect("volumes");
        volumes
            .iter()
            .find(|entry| entry["volume"] == volume)
            .unwrap_or_else(|| panic!("no {volume} in {status}"))
            .clone()
    }

    /// Restores the newest layer and returns the first byte at which it is not the device's content.
    #[track_caller]
    pub fn restored_differs(&self, group: &str, volume: &str, device: &Path) -> Option<u64> {
        let file = self.dir.path().join("restored.img");
        let _ = std::fs::remove_file(&file);
        let to = file.display().to_string();
        self.run(&["restore", group, "--volume", volume, "--to", &to])
            .ok();
        difference(&file, device).expect("compare")
    }
}

impl Drop for Soe {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            // The log would be gone with the folder.
            let _ = writeln!(std::io::stderr(), "the agent's log:\n{}", self.log());
        }
        let _ = std::fs::remove_dir_all(&self.pins);
    }
}

/// Offset of the first byte at which two files or devices differ; where one ends before the other
/// is a difference, too.
pub fn difference(a: &Path, b: &Path) -> std::io::Result<Option<u64>> {
    let (mut a, mut b) = (File::open(a)?, File::open(b)?);
    let size = |file: &mut File| -> std::io::Result<u64> {
        let end = file.seek(SeekFrom::End(0))?;
        file.rewind()?;
        Ok(end)
    };
    let (left_end, right_end) = (size(&mut a)?, size(&mut b)?);
    let bytes = left_end.min(right_end);
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < bytes {
        let take = usize::try_from((bytes - at).min(1 << 20)).unwrap_or(1 << 20);
        a.read_exact(&mut left[..take])?;
        b.read_exact(&mut right[..take])?;
        let same = left[..take].iter().zip(&right[..take]);
        let same = same.take_while(|(l, r)| l == r).count();
        if same < take {
            return Ok(Some(at + same as u64));
        }
        at += take as u64;
    }
    Ok((left_end != right_end).then_some(bytes))
}

/// Whether a write to a mounted filesystem comes back within `limit`; it does not while the
/// filesystem is frozen.
pub fn accepts_writes(mount: &Path, limit: Duration) -> bool {
    let file = mount.join("alive");
    let seconds = limit.as_secs().max(1).to_string();
    Command::new("timeout")
        .args(["-s", "KILL", &seconds, "dd", "if=/dev/urandom", "bs=4k"])
        .args(["count=1", "conv=fsync", "status=none"])
        .arg(format!("of={}", file.display()))
        .status()
        .is_ok_and(|status| status.success())
}
