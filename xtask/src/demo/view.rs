//! What the reader sees while the demo runs: a picture that is redrawn on a terminal, lines elsewhere.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::status::{Layer, View, VolumeStatus, captures, seconds};

/// Seconds of load shown.
const PAST: usize = 40;
/// Captures and events shown.
const ROWS: usize = 7;
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Between two lines of status where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(6);

/// What is known at one moment, apart from what the agent says.
pub struct Moment<'a> {
    /// Since the workload began.
    pub elapsed: Duration,
    /// How long it lasts.
    pub total: Duration,
    /// The burst under way, if there is one.
    pub burst: Option<u32>,
    /// What the demo calls each device.
    pub names: &'a BTreeMap<String, &'static str>,
    /// The layers so far.
    pub layers: &'a [Layer],
    /// Medians expected of the next seconds, by device.
    pub forecasts: &'a BTreeMap<String, Vec<f64>>,
}

/// The screen, or the lines instead of it.
pub struct Screen {
    drawn: bool,
    live: bool,
    title: String,
    past: BTreeMap<String, VecDeque<f64>>,
    events: VecDeque<String>,
    last_line: Option<Duration>,
}

impl Screen {
    /// A screen with `title` above everything; lines when standard output is no terminal.
    pub fn new(title: String) -> Self {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty())
            || std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        Self {
            drawn: false,
            live: io::stdout().is_terminal() && !plain,
            title,
            past: BTreeMap::new(),
            events: VecDeque::new(),
            last_line: None,
        }
    }

    /// Whether it is redrawn.
    pub fn live(&self) -> bool {
        self.live
    }

    /// Something happened.
    pub fn event(&mut self, elapsed: Duration, text: &str) {
        let line = format!("{} {text}", clock(elapsed));
        if self.live {
            self.events.push_back(line);
            while self.events.len() > ROWS {
                self.events.pop_front();
            }
        } else {
            emit(&format!("{line}\n"));
        }
    }

    /// Shows a new view.
    pub fn show(&mut self, view: &View, moment: &Moment<'_>) {
        for volume in view.groups.iter().flat_map(|group| &group.volumes) {
            let past = self.past.entry(volume.volume.clone()).or_default();
            past.push_back(load(view, &volume.volume));
            while past.len() > PAST {
                past.pop_front();
            }
        }
        if self.live {
            let picture = self.picture(view, moment);
            let start = if self.drawn {
                "\x1b[H"
            } else {
                "\x1b[2J\x1b[H"
            };
            self.drawn = true;
            emit(&format!(
                "{start}{}\x1b[J",
                picture.replace('\n', "\x1b[K\n")
            ));
        } else if self
            .last_line
            .is_none_or(|at| moment.elapsed >= at + LINE_EVERY)
        {
            self.last_line = Some(moment.elapsed);
            for volume in view.groups.iter().flat_map(|group| &group.volumes) {
                emit(&format!(
                    "{} {}: load {}, {}, {} staged, {} layers\n",
                    clock(moment.elapsed),
                    name(moment, &volume.volume),
                    rate(load(view, &volume.volume)),
                    predicted(volume),
                    size(volume.staging.valid_bytes),
                    volume.layers
                ));
            }
        }
    }

    fn picture(&self, view: &View, moment: &Moment<'_>) -> String {
        let mut out = String::new();
        let workload = match moment.burst {
            Some(n) => format!("\x1b[1;33mburst {n}\x1b[0m"),
            None => "quiet".to_owned(),
        };
        let _ = writeln!(
            out,
            "\x1b[1mSOE demo\x1b[0m  {} of {}   workload: {workload}\n{}\n",
            clock(moment.elapsed),
            clock(moment.total),
            self.title
        );
        for volume in view.groups.iter().flat_map(|group| &group.volumes) {
            self.volume(&mut out, view, volume, moment);
        }
        let _ = writeln!(out, "\x1b[1mlayers\x1b[0m  {LAYER_HEAD}");
        let captures = captures(moment.layers);
        for (sequence, layers) in captures.iter().skip(captures.len().saturating_sub(ROWS)) {
            let _ = writeln!(out, "        {}", capture_line(*sequence, layers));
        }
        let _ = writeln!(out, "\n\x1b[1mevents\x1b[0m");
        for event in &self.events {
            let _ = writeln!(out, "  {}", cut(event, 110));
        }
        out
    }

    fn volume(&self, out: &mut String, view: &View, volume: &VolumeStatus, moment: &Moment<'_>) {
        let empty = VecDeque::new();
        let past = self.past.get(&volume.volume).unwrap_or(&empty);
        let expected = moment
            .forecasts
            .get(&volume.volume)
            .map_or(&[][..], Vec::as_slice);
        let top = past.iter().chain(expected).copied().fold(1.0, f64::max);
        let _ = writeln!(
            out,
            "\x1b[1m{}\x1b[0m {}\n  load      \x1b[36m{:>PAST$}\x1b[0m|\x1b[35m{}\x1b[0m  {} (right: median forecast)",
            name(moment, &volume.volume),
            volume.volume,
            bars(past.iter().copied(), top),
            bars(expected.iter().copied(), top),
            rate(load(view, &volume.volume)),
        );
        let _ = writeln!(out, "  forecast  {}", cut(&predicted(volume), 100));
        let staging = &volume.staging;
        let _ = writeln!(
            out,
            "  staging   {} valid of {} staged, {} of it read since, hit ratio {}",
            size(staging.valid_bytes),
            size(staging.staged_bytes),
            size(staging.used_bytes),
            staging
                .hit_ratio
                .map_or("-".to_owned(), |h| format!("{h:.2}")),
        );
        let pending = volume
            .changed_blocks_pending
            .map_or("?".to_owned(), |n| n.to_string());
        let decision = volume.last_decision.as_ref();
        let decision = decision.map_or(String::new(), |d| format!("{}: {}", d.action, d.reason));
        let _ = writeln!(
            out,
            "  planner   {}\n",
            cut(&format!("{pending} blocks changed; {decision}"), 100)
        );
    }
}

/// The columns of [`capture_line`].
pub const LAYER_HEAD: &str = "  #  kind          method       pause     blocks      read    stored";

/// One capture in a line: all its volumes together.
pub fn capture_line(sequence: u64, layers: &[&Layer]) -> String {
    let sum = |of: fn(&Layer) -> u64| layers.iter().map(|layer| of(layer)).sum::<u64>();
    let first = layers.first();
    format!(
        "{sequence:>3}  {:<12}  {:<10} {:>8}  {:>8}  {:>9} {:>9}",
        first.map_or("", |l| l.kind.as_str()),
        first.map_or("", |l| l.method.as_str()),
        millis(layers.iter().map(|l| l.pause_us).max().unwrap_or(0)),
        sum(|l| l.changed_blocks),
        size(sum(|l| l.bytes_read)),
        size(sum(|l| l.bytes_stored)),
    )
}

/// The load of `device` in the last window, bytes a second.
pub fn load(view: &View, device: &str) -> f64 {
    view.load
        .iter()
        .find(|load| load.volume == device)
        .map_or(0.0, |load| {
            let bytes = load.read_bytes.saturating_add(load.write_bytes);
            bytes as f64 * 1000.0 / load.interval_ms.max(1) as f64
        })
}

/// Seconds from now until an RFC 3339 time.
pub fn until(at: Option<&String>) -> Option<f64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    Some(seconds(at?)? - now.as_secs_f64())
}

fn predicted(volume: &VolumeStatus) -> String {
    let p = &volume.predicted;
    let burst = until(p.next_burst_at.as_ref()).map_or("no burst foreseen".to_owned(), |s| {
        format!("burst in {s:.0} s")
    });
    let quiet = until(p.next_low_window.as_ref().map(|w| &w.start))
        .map_or(String::new(), |s| format!(", quietest in {s:.0} s"));
    format!(
        "{burst} (p {:.2}){quiet}, by {}",
        p.burst_probability.unwrap_or(0.0),
        p.model.as_deref().unwrap_or("nobody yet")
    )
}

fn name<'a>(moment: &Moment<'a>, device: &'a str) -> &'a str {
    moment.names.get(device).copied().unwrap_or(device)
}

fn bars(values: impl Iterator<Item = f64>, top: f64) -> String {
    values
        .map(|value| {
            let step = (value / top * 7.0).round().clamp(0.0, 7.0) as usize;
            BARS.get(step).copied().unwrap_or(' ')
        })
        .collect()
}

fn cut(text: &str, columns: usize) -> String {
    text.chars().take(columns).collect()
}

fn clock(at: Duration) -> String {
    format!("{:02}:{:02}", at.as_secs() / 60, at.as_secs() % 60)
}

/// Bytes, for people.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..=1023 => format!("{bytes} B"),
        1024..=1_048_575 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}

/// Microseconds, for people.
pub fn millis(us: u64) -> String {
    if us == 0 {
        "0 ms".to_owned()
    } else {
        format!("{:.1} ms", us as f64 / 1000.0)
    }
}

fn rate(bytes_per_second: f64) -> String {
    format!("{}/s", size(bytes_per_second as u64))
}

/// A reader that has gone away is no reason to fail.
fn emit(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_reach_from_the_least_to_the_greatest() {
        assert_eq!(bars([0.0, 5.0, 10.0, 20.0].into_iter(), 10.0), "▁▅██");
    }

    #[test]
    fn sizes_are_written_for_people() {
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1024), "1.0 KiB");
        assert_eq!(size(3 << 20), "3.0 MiB");
        assert_eq!(millis(0), "0 ms");
        assert_eq!(millis(1500), "1.5 ms");
    }
}
