//! The demo on real devices.

use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::agent::{Agent, GROUP, Home, MAX_PAUSE, RPO};
use super::process;
use super::status::{Layer, Layers, Restored};
use super::stop;
use super::summary::{self, Proof, Report};
use super::view::{Screen, millis, size};
use super::volumes::{SlowOrigin, VOLUME_BYTES, Volume, tool};
use super::watch::{self, Seen};
use super::workload::{self, Workload};

const CALL_LIMIT: Duration = Duration::from_secs(30);
const CAPTURE_LIMIT: Duration = Duration::from_secs(90);
const RESTORE_LIMIT: Duration = Duration::from_secs(90);
const HASH_LIMIT: Duration = Duration::from_secs(60);

fn say(text: &str) {
    println!("demo: {text}");
}

/// Runs it; whether everything came back as it was.
pub fn run(soe: &Path, history: Option<&Path>, total: Duration) -> Result<bool> {
    let began = Instant::now();
    // Dropped in the opposite order: first what uses, then what is used.
    let home = Home::make(history)?;
    let mut volumes = Vec::new();
    for name in ["tables", "log"] {
        volumes.push(Volume::make(name, home.path())?);
    }
    workload::fill(&volumes)?;
    let origin = SlowOrigin::make(&volumes);
    let devices: Vec<&str> = volumes.iter().map(|v| v.device.as_str()).collect();
    say(&format!(
        "{} with ext4, {} each; origin {}",
        devices.join(" and "),
        size(VOLUME_BYTES),
        origin.described
    ));
    let stage = if home.stage_in_memory {
        "in memory"
    } else {
        "on the same disk as the volumes"
    };
    say(&format!("staging file {} ({stage})", home.stage.display()));

    let mut agent = Agent::new(soe, &home)?;
    let ready = agent.start(&origin)?;
    create_group(&agent, &volumes)?;
    say(&format!(
        "the agent was ready after {:.1} s; group {GROUP}: RPO {} s, pause budget {} ms; bursts of about {} s every {} s",
        ready.as_secs_f64(),
        RPO.as_secs(),
        MAX_PAUSE.as_millis(),
        workload::BURST.as_secs(),
        workload::PERIOD.as_secs()
    ));

    let fio_log = home.path().join("fio.log");
    let mut workload = Workload::start(&volumes, &origin, &fio_log)?;
    let mut screen = Screen::new(format!("origin {}", origin.described));
    let mut seen = Seen::default();
    let watched = watch::watch(
        &agent,
        &volumes,
        &origin,
        &mut workload,
        &mut screen,
        total,
        &mut seen,
    );
    let bursts = workload.bursts();
    workload.stop();
    println!();

    let mut proofs = Vec::new();
    let proven =
        watched.and_then(|()| prove(&mut agent, &home, &origin, &mut volumes, &mut proofs));
    stop::check()?;
    let (layers, verified, ended, failure) = match proven {
        Ok(proven) => (proven.layers, proven.verified, proven.ended, None),
        Err(error) => (
            watch::list(&agent).unwrap_or_default(),
            verify(&agent),
            agent.end(),
            Some(format!("{error:#}")),
        ),
    };

    let report = Report {
        took: began.elapsed(),
        bursts,
        seen: &seen,
        layers: &layers,
        proofs: &proofs,
        verified: &verified,
        ended: ended.and_then(|status| status.code()),
        warnings: agent.warnings(),
        failure,
    };
    println!("{}", summary::table(&report));
    summary::history(soe, history);
    Ok(report.good())
}

/// What came of capturing for the last time, losing a volume and restoring.
struct Proven {
    layers: Vec<Layer>,
    verified: Result<String>,
    ended: Option<ExitStatus>,
}

/// Captures once more, takes checksums, kills the agent, loses a volume, restores both.
fn prove(
    agent: &mut Agent,
    home: &Home,
    origin: &SlowOrigin,
    volumes: &mut [Volume],
    proofs: &mut Vec<Proof>,
) -> Result<Proven> {
    for volume in volumes.iter_mut() {
        let how = volume.still()?;
        say(&format!("the workload is over; {} is {how}", volume.name));
    }
    let last: Layers = agent.ask(&["layer", "capture", GROUP, "--json"], CAPTURE_LIMIT)?;
    for volume in volumes.iter() {
        let layer = layer_of(&last.layers, &volume.device)?;
        say(&format!(
            "last layer of {}: {} by {}, pause {}, {} blocks",
            volume.name,
            layer.id,
            layer.method,
            millis(layer.pause_us),
            layer.changed_blocks
        ));
        proofs.push(Proof {
            volume: volume.name,
            device: volume.device.clone(),
            layer: layer.id.clone(),
            before: sha256(Path::new(&volume.device))?,
            after: String::new(),
            filesystem: String::new(),
            restored: Restored::default(),
            took: Duration::ZERO,
        });
    }
    let layers = watch::list(agent)?;

    agent.kill()?;
    say("the agent was killed with SIGKILL");
    if let Some(lost) = volumes.first_mut() {
        lost.lose()?;
        say(&format!(
            "{} is lost: {} detached, the file behind it overwritten with garbage",
            lost.name, lost.device
        ));
    }
    let restarted = agent.start(origin)?;
    say(&format!(
        "a new agent was ready after {:.1} s",
        restarted.as_secs_f64()
    ));
    for proof in proofs.iter_mut() {
        restore(agent, home, proof)?;
    }
    Ok(Proven {
        layers,
        verified: verify(agent),
        ended: agent.end(),
    })
}

fn create_group(agent: &Agent, volumes: &[Volume]) -> Result<()> {
    let mut create = agent.client(&["group", "create", GROUP, "--prediction", "on"]);
    for volume in volumes {
        create.args(["--volume", &volume.device]);
    }
    create
        .arg("--rpo")
        .arg(format!("{}s", RPO.as_secs()))
        .arg("--max-pause")
        .arg(format!("{}ms", MAX_PAUSE.as_millis()));
    process::output(&mut create, CALL_LIMIT)?;
    Ok(())
}

fn layer_of<'a>(layers: &'a [Layer], device: &str) -> Result<&'a Layer> {
    layers
        .iter()
        .rev()
        .find(|layer| layer.volume == device)
        .with_context(|| format!("the capture has no layer of {device}"))
}

fn sha256(path: &Path) -> Result<String> {
    let text = process::output(tool("sha256sum").arg(path), HASH_LIMIT)?;
    let sum = text.split_whitespace().next();
    Ok(sum.context("sha256sum printed nothing")?.to_owned())
}

/// Restores the layer of `proof` into a fresh file, and fills in what came of it.
fn restore(agent: &Agent, home: &Home, proof: &mut Proof) -> Result<()> {
    let file = home.path().join(format!("{}.restored", proof.volume));
    let to = file.to_string_lossy();
    let args = [
        "restore",
        GROUP,
        "--volume",
        &proof.device,
        "--layer",
        &proof.layer,
        "--to",
        &to,
        "--json",
    ];
    let began = Instant::now();
    proof.restored = agent.ask(&args, RESTORE_LIMIT)?;
    proof.took = began.elapsed();
    proof.after = sha256(&file)?;
    let mut check: Command = tool("e2fsck");
    check.args(["-f", "-n"]).arg(&file);
    proof.filesystem = match process::output(&mut check, HASH_LIMIT) {
        Ok(_) => "clean".to_owned(),
        Err(error) => format!("e2fsck complains: {error:#}"),
    };
    stop::check()?;
    let equal = if proof.equal() { "equal" } else { "DIFFERENT" };
    say(&format!(
        "{} restored in {:.1} s, checksum {equal}, filesystem {}",
        proof.volume,
        proof.took.as_secs_f64(),
        proof.filesystem
    ));
    Ok(())
}

/// Has all layers checked; the agent's words, or the complaint.
fn verify(agent: &Agent) -> Result<String> {
    let mut verify = agent.client(&["layer", "verify", GROUP]);
    let text = process::output(&mut verify, RESTORE_LIMIT)?;
    Ok(text.trim().lines().last().unwrap_or_default().to_owned())
}
