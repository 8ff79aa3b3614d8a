//! Forecasts, the models behind them, and the decisions taken from them.

use serde::{Deserialize, Serialize};

use super::rfc3339;
use crate::seam::UnixNanos;

/// A span of time, `start` included, `end` not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeWindow {
    /// First instant.
    #[serde(with = "rfc3339")]
    pub start: UnixNanos,
    /// The first instant after it.
    #[serde(with = "rfc3339")]
    pub end: UnixNanos,
}

/// What is predicted of a volume. Everything is `None` until the first forecast.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Bytes read and written per second in the last complete window.
    pub load_now: Option<f64>,
    /// When the next burst is expected; `None` when none is within the horizon.
    #[serde(with = "rfc3339::option")]
    pub next_burst_at: Option<UnixNanos>,
    /// Probability of a burst within the horizon, 0 to 1.
    pub burst_probability: Option<f64>,
    /// The quietest window within the horizon.
    pub next_low_window: Option<TimeWindow>,
    /// The member that serves this volume.
    pub model: Option<String>,
    /// Why that member was chosen.
    pub model_reason: Option<String>,
}

/// What the planner decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// When.
    #[serde(with = "rfc3339")]
    pub at: UnixNanos,
    /// `capture`, `stage` or `wait`.
    pub action: String,
    /// Why.
    pub reason: String,
}

/// Quantiles of the mean of bytes read and written per second over one bin.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ForecastPoint {
    /// The bin's first instant.
    #[serde(with = "rfc3339")]
    pub start: UnixNanos,
    /// 10 % quantile.
    pub q10: f64,
    /// Median.
    pub q50: f64,
    /// 80 % quantile.
    pub q80: f64,
    /// 90 % quantile.
    pub q90: f64,
    /// 95 % quantile.
    pub q95: f64,
    /// 99 % quantile.
    pub q99: f64,
    /// That a burst begins in the bin, 0 to 1.
    #[serde(default)]
    pub burst_probability: f64,
}

/// What happened in a bin.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoadPoint {
    /// When it started.
    #[serde(with = "rfc3339")]
    pub start: UnixNanos,
    /// Bytes read and written per second; `None` if it was not measured.
    pub load: Option<f64>,
}

/// A forecast of one volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ForecastReport {
    /// The volume.
    pub volume: String,
    /// The end of the last bin known when it was made.
    #[serde(with = "rfc3339")]
    pub issued_at: UnixNanos,
    /// Length of a bin, seconds.
    pub bin_s: u64,
    /// The summary that status shows too.
    pub predicted: Prediction,
    /// One point a bin, ascending.
    pub points: Vec<ForecastPoint>,
    /// What was before, as many bins as are forecast, ascending.
    #[serde(default)]
    pub history: Vec<LoadPoint>,
}

/// How well one member did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemberScore {
    /// The member.
    pub member: String,
    /// Weighted quantile loss over the matured forecasts; smaller is better.
    pub quantile_loss: Option<f64>,
    /// Forecasts that have matured.
    pub matured: u64,
}

/// The model of a volume, or the one all volumes share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelReport {
    /// The volume; `None` for the shared model.
    pub volume: Option<String>,
    /// The member that serves.
    pub serving: String,
    /// Why.
    pub reason: String,
    /// Every member's score.
    pub members: Vec<MemberScore>,
    /// When the network was last trained.
    #[serde(with = "rfc3339::option")]
    pub trained_at: Option<UnixNanos>,
    /// The history it was trained on.
    pub trained_on: Option<TimeWindow>,
    /// Samples it was trained on.
    pub training_samples: u64,
    /// The seed of that training.
    pub seed: Option<u64>,
    /// Weights of the network.
    pub parameters: Option<u64>,
    /// What events do to the volume.
    #[serde(default)]
    pub effects: Vec<EventEffect>,
    /// Who says when captures begin in which the volume takes part.
    #[serde(default)]
    pub starts: Vec<StartScore>,
    /// The networks there are to go back to, oldest first; the one that ships comes first.
    #[serde(default)]
    pub versions: Vec<ModelVersion>,
}

/// Who says when captures of some volumes begin, and how well each one did there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StartScore {
    /// The volumes that are captured together.
    pub volumes: Vec<String>,
    /// Who says when: `network` or `rule`.
    pub by: String,
    /// Intervals judged; older ones count less.
    pub intervals: f64,
    /// Regret of the network: 0 is the quietest start of every interval, 1 a random one.
    pub network_regret: Option<f64>,
    /// The same of the rule.
    pub rule_regret: Option<f64>,
}

/// A network that serves, or that can be gone back to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelVersion {
    /// Its number; `None` for the network that ships.
    pub version: Option<u64>,
    /// Whether it serves.
    pub serving: bool,
    /// When it was trained.
    #[serde(with = "rfc3339::option")]
    pub trained_at: Option<UnixNanos>,
    /// Samples it was trained on.
    pub training_samples: u64,
    /// Its loss relative to that of the weighted mean when it was trained; below 1 is better.
    pub score: Option<f64>,
    /// The same over the history since the newest of them was trained, if that was asked for.
    #[serde(default)]
    pub backtest: Option<f64>,
    /// Why it cannot serve, if it cannot.
    #[serde(default)]
    pub unusable: Option<String>,
}

/// What a kind of event does to a volume, as far as it has been learnt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EventEffect {
    /// The kind.
    #[serde(rename = "type")]
    pub kind: String,
    /// The subject, if it is about one.
    pub subject: Option<String>,
    /// Events learnt from; older ones count less.
    pub events: f64,
    /// The greatest factor by which the load changes.
    pub factor: f64,
    /// How long after the event that is, in seconds.
    pub after_s: u64,
    /// The probability that a burst follows.
    pub burst_probability: f64,
    /// Whether forecasts are moved by it.
    pub believed: bool,
}
