//! Watching the agent while the workload runs.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::Duration;

use anyhow::{Result, bail};

use super::agent::{Agent, GROUP};
use super::process::Process;
use super::status::{Decision, Forecast, Layer, Layers, View};
use super::stop;
use super::view::{self, Moment, Screen};
use super::volumes::{SlowOrigin, Volume};
use super::workload::Workload;

const CALL_LIMIT: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(100);
/// Forecasts are asked for at every so many views.
const FORECAST_EVERY: u64 = 3;
/// A forecast counts as right when the burst came within this of the time foretold.
pub const FORETOLD_WITHIN_S: f64 = 2.0;

/// What the agent had prepared on one volume at the moment a burst began.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The burst.
    pub burst: u32,
    /// The volume.
    pub volume: &'static str,
    /// Seconds from the burst's beginning to the time foretold just before; `None` when none was.
    pub foretold_s: Option<f64>,
    /// Staged and valid at that moment.
    pub staged_bytes: u64,
}

impl Prepared {
    /// Whether the burst was foretold.
    pub fn foretold(&self) -> bool {
        self.foretold_s
            .is_some_and(|s| s.abs() <= FORETOLD_WITHIN_S)
    }
}

/// What was seen in all.
#[derive(Default)]
pub struct Seen {
    /// At each burst and volume.
    pub prepared: Vec<Prepared>,
    /// The most that was staged and valid at once, all volumes together.
    pub staged_most: u64,
    /// Views in which each member served, all volumes together.
    pub members: BTreeMap<String, u64>,
    /// Decisions to stage.
    pub stagings: u64,
    /// The last view.
    pub last: View,
}

/// `soe top --json` in a process of its own, read by a thread.
struct Views {
    _process: Process,
    views: Receiver<View>,
}

impl Views {
    fn open(agent: &Agent) -> Result<Self> {
        let (process, pipe) =
            Process::piped(&mut agent.client(&["top", "--json", "--interval", "1s"]))?;
        let (sender, views) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                // A line that cannot be read shows as a picture that stands still, then as a silence.
                if let Ok(view) = serde_json::from_str(&line)
                    && sender.send(view).is_err()
                {
                    break;
                }
            }
        });
        Ok(Self {
            _process: process,
            views,
        })
    }
}

/// Longest time without a view.
const SILENCE: Duration = Duration::from_secs(20);

/// Runs the workload for `total`, shows what the agent makes of it, and takes it down in `seen`.
pub fn watch(
    agent: &Agent,
    volumes: &[Volume],
    origin: &SlowOrigin,
    workload: &mut Workload,
    screen: &mut Screen,
    total: Duration,
    seen: &mut Seen,
) -> Result<()> {
    let views = Views::open(agent)?;
    let names: BTreeMap<String, &'static str> =
        volumes.iter().map(|v| (v.device.clone(), v.name)).collect();
    let mut layers: Vec<Layer> = Vec::new();
    let mut forecasts = BTreeMap::new();
    let mut decided: BTreeMap<String, Decision> = BTreeMap::new();
    let mut count = 0u64;
    let mut heard = workload.elapsed();
    while workload.elapsed() < total {
        stop::check()?;
        if workload.tick(volumes, origin)? {
            let burst = workload.bursts();
            screen.event(
                workload.elapsed(),
                &format!("burst {burst} of the workload begins"),
            );
            for text in prepare(seen, burst, &names) {
                screen.event(workload.elapsed(), &text);
            }
        }
        let view = match views.views.try_recv() {
            Ok(view) => view,
            Err(TryRecvError::Empty) if workload.elapsed() < heard + SILENCE => {
                std::thread::sleep(TICK);
                continue;
            }
            Err(_) => bail!("the agent says nothing any more: {}", agent.last_words()),
        };
        heard = workload.elapsed();
        count += 1;
        note(seen, &view);
        for volume in view.groups.iter().flat_map(|group| &group.volumes) {
            let Some(decision) = &volume.last_decision else {
                continue;
            };
            if decided.get(&volume.volume) != Some(decision) {
                decided.insert(volume.volume.clone(), decision.clone());
                if decision.action == "stage" {
                    seen.stagings += 1;
                }
                if decision.action != "wait" {
                    let name = names.get(&volume.volume).copied().unwrap_or_default();
                    let text = format!("{name}: {}: {}", decision.action, decision.reason);
                    screen.event(heard, &text);
                }
            }
        }
        let durable: u64 = view
            .groups
            .iter()
            .flat_map(|g| &g.volumes)
            .map(|v| v.layers)
            .sum();
        if durable != layers.len() as u64 {
            for line in new_layers(agent, &mut layers)? {
                screen.event(heard, &line);
            }
        }
        if screen.live() && count.is_multiple_of(FORECAST_EVERY) {
            for volume in volumes {
                let ask = ["forecast", &volume.device, "--horizon", "12s", "--json"];
                // There is none before the first bins are complete.
                if let Ok(forecast) = agent.ask::<Forecast>(&ask, CALL_LIMIT) {
                    let medians = forecast.points.iter().map(|p| p.q50).collect();
                    forecasts.insert(volume.device.clone(), medians);
                }
            }
        }
        let moment = Moment {
            elapsed: heard,
            total,
            burst: workload.bursting().then(|| workload.bursts()),
            names: &names,
            layers: &layers,
            forecasts: &forecasts,
        };
        screen.show(&view, &moment);
        seen.last = view;
    }
    Ok(())
}

/// Takes down what the last view before a burst said, and puts it in words.
fn prepare(seen: &mut Seen, burst: u32, names: &BTreeMap<String, &'static str>) -> Vec<String> {
    let mut lines = Vec::new();
    for volume in seen.last.groups.iter().flat_map(|group| &group.volumes) {
        let prepared = Prepared {
            burst,
            volume: names.get(&volume.volume).copied().unwrap_or_default(),
            foretold_s: view::until(volume.predicted.next_burst_at.as_ref()),
            staged_bytes: volume.staging.valid_bytes,
        };
        let foretold = match prepared.foretold_s {
            Some(s) => format!(
                "foretold for {:.1} s {}",
                s.abs(),
                if s < 0.0 { "ago" } else { "from now" }
            ),
            None => "not foretold".to_owned(),
        };
        lines.push(format!(
            "{}: {foretold}, {} staged ahead of it",
            prepared.volume,
            view::size(prepared.staged_bytes)
        ));
        seen.prepared.push(prepared);
    }
    lines
}

fn note(seen: &mut Seen, view: &View) {
    let volumes = || view.groups.iter().flat_map(|group| &group.volumes);
    let staged = volumes().map(|v| v.staging.valid_bytes).sum();
    seen.staged_most = seen.staged_most.max(staged);
    for member in volumes().filter_map(|v| v.predicted.model.clone()) {
        *seen.members.entry(member).or_default() += 1;
    }
}

/// Fetches the list and puts what is new in words.
fn new_layers(agent: &Agent, layers: &mut Vec<Layer>) -> Result<Vec<String>> {
    let known = layers.last().map_or(0, |layer| layer.sequence);
    *layers = list(agent)?;
    Ok(super::status::captures(layers)
        .range(known + 1..)
        .map(|(sequence, of)| {
            format!(
                "captured {}",
                view::capture_line(*sequence, of).trim_start()
            )
        })
        .collect())
}

/// All layers of the group.
pub fn list(agent: &Agent) -> Result<Vec<Layer>> {
    let list: Layers = agent.ask(&["layer", "list", GROUP, "--json"], CALL_LIMIT)?;
    Ok(list.layers)
}
