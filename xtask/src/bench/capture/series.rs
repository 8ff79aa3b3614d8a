//! A series of captures by the agent, and what came of each.

use std::io::{Read, Seek, SeekFrom};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::super::figures::Durations;
use super::super::stage::Agent;
use super::ground::Noise;
use crate::demo::stop;
use crate::run;

/// The group under measurement.
pub(super) const GROUP: &str = "bench";
const CAPTURE: Duration = Duration::from_secs(180);

/// A layer, as far as it matters here.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub(super) id: String,
    pub(super) method: String,
    pub(super) pause: Duration,
    pub(super) bytes_stored: u64,
}

/// Asks for a capture. The inner error is the agent's, in its words.
pub(super) fn capture(agent: &Agent, kind: &str) -> Result<Result<Layer, String>> {
    let arguments = ["layer", "capture", GROUP, "--kind", kind, "--json"];
    let mut text = String::new();
    let end = run::lines(&mut agent.client(&arguments), CAPTURE, &mut |line| {
        text.push_str(line);
        text.push('\n');
        run::Reader::Continue
    })?;
    if !end.success() {
        let words = text.lines().last().unwrap_or("no answer");
        return Ok(Err(words.trim_start_matches("soe: ").to_owned()));
    }
    let answer: Value = serde_json::from_str(&text).context("the answer of a capture")?;
    let layer = &answer["layers"][0];
    let number = |key: &str| layer[key].as_u64().unwrap_or(0);
    Ok(Ok(Layer {
        id: layer["id"].as_str().unwrap_or_default().to_owned(),
        method: layer["method"].as_str().unwrap_or_default().to_owned(),
        pause: Duration::from_micros(number("pause_us")),
        bytes_stored: number("bytes_stored"),
    }))
}

/// What came of many captures.
#[derive(Clone, Debug, Default)]
pub(super) struct Series {
    pub(super) layers: Vec<Layer>,
    /// Reasons, in the agent's words.
    pub(super) failed: Vec<String>,
    /// Tries of each capture, by the agent's log.
    pub(super) tries: Vec<u64>,
    /// Windows in which the device stood still.
    pub(super) windows: Vec<Duration>,
    /// Every time writers were held, also where it led to no layer, by the agent's log.
    pub(super) held: Vec<Duration>,
    /// From the call to the answer.
    pub(super) took: Vec<Duration>,
}

impl Series {
    /// `count` captures, irregularly spaced by half a second on average.
    pub(super) fn run(agent: &Agent, count: u32) -> Result<Self> {
        let mut series = Self::default();
        let mut noise = Noise(u64::from(count));
        let log = std::fs::metadata(agent.log()).map_or(0, |meta| meta.len());
        for _ in 0..count {
            stop::check()?;
            std::thread::sleep(Duration::from_millis(200 + noise.next() % 600));
            let began = Instant::now();
            match capture(agent, "differential")? {
                Ok(layer) => {
                    series.took.push(began.elapsed());
                    series.layers.push(layer);
                }
                Err(reason) => series.failed.push(reason),
            }
        }
        series.read_log(agent, log)?;
        Ok(series)
    }

    fn read_log(&mut self, agent: &Agent, from: u64) -> Result<()> {
        let mut file = std::fs::File::open(agent.log()).context("the agent's log")?;
        let mut text = String::new();
        file.seek(SeekFrom::Start(from))
            .and_then(|_| file.read_to_string(&mut text))
            .context("the agent's log")?;
        for line in text.lines() {
            let number = |key: &str| {
                line.split_whitespace()
                    .find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
                    .unwrap_or(0u64)
            };
            if line.contains(" INFO writers were held ") {
                self.held.push(Duration::from_micros(number("pause_us")));
            }
            if !line.contains(" INFO captured ") {
                continue;
            }
            self.tries.push(number("tries"));
            self.windows
                .push(Duration::from_micros(number("window_us")));
        }
        Ok(())
    }

    /// Captures that held nobody.
    pub(super) fn optimistic(&self) -> usize {
        let free = |layer: &&Layer| layer.method == "optimistic" && layer.pause.is_zero();
        self.layers.iter().filter(free).count()
    }

    /// How long writers were held, each time.
    pub(super) fn pauses(&self) -> Durations {
        Durations::new(self.held.clone())
    }

    /// Each reason for a failure and how often it was given, most frequent first.
    pub(super) fn reasons(&self) -> Vec<(String, usize)> {
        let mut reasons: Vec<(String, usize)> = Vec::new();
        for reason in &self.failed {
            // The numbers in it differ from case to case.
            let reason: String = reason
                .chars()
                .map(|c| if c.is_ascii_digit() { '#' } else { c })
                .collect();
            match reasons.iter_mut().find(|(known, _)| *known == reason) {
                Some((_, count)) => *count += 1,
                None => reasons.push((reason, 1)),
            }
        }
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        reasons
    }

    /// How many tries captures took: mean and greatest.
    pub(super) fn tries_shown(&self) -> String {
        let sum: u64 = self.tries.iter().sum();
        let mean = sum as f64 / self.tries.len().max(1) as f64;
        let max = self.tries.iter().max().copied().unwrap_or(0);
        format!("{mean:.1} on average, {max} at most")
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "captures": self.layers.len() + self.failed.len(),
            "done": self.layers.len(),
            "optimistic": self.optimistic(),
            "pauses": self.pauses().json(),
            "pauses_above_budget": self.pauses().above(super::BUDGET),
            "windows": Durations::new(self.windows.clone()).json(),
            "tries": self.tries,
            "took": Durations::new(self.took.clone()).json(),
            "failed": self.failed,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_counted_whatever_their_numbers() {
        let series = Series {
            failed: vec!["3 tries".into(), "busy".into(), "4 tries".into()],
            ..Series::default()
        };
        assert_eq!(
            series.reasons(),
            [("# tries".to_owned(), 2), ("busy".to_owned(), 1)]
        );
    }
}
