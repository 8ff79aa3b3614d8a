//! What goes into the brain and what comes out of it.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::burst::BurstRule;
use crate::model::name::Name;
use crate::model::{Happening, Judgement, LoadBin, Pace, QuantileForecast, TimeScale, VolumeName};
use crate::seam::UnixNanos;
use crate::window::EventRow;

/// The name of a snapshot group.
pub type GroupName = Name;

/// How much a group matters when budgets are short.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Criticality {
    /// Served last.
    Low,
    /// The default.
    #[default]
    Normal,
    /// Served before the others.
    High,
    /// Served first.
    Critical,
}

impl Criticality {
    /// Its share of a budget that is short, relative to the others'.
    pub fn weight(self) -> f64 {
        match self {
            Self::Low => 1.0,
            Self::Normal => 2.0,
            Self::High => 4.0,
            Self::Critical => 8.0,
        }
    }
}

/// What the user asked for when creating a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupSpec {
    /// The group's name.
    pub name: GroupName,
    /// Its volumes, cut at one instant.
    pub volumes: Vec<VolumeName>,
    /// Whether captures follow the forecast; otherwise they keep to the RPO schedule.
    pub prediction_enabled: bool,
    /// The greatest age the newest layer may reach (recovery point objective).
    pub rpo: Duration,
    /// The longest pause a capture may cause.
    pub max_pause: Duration,
    /// The foreground latency (p99) captures must keep, if given.
    pub p99_target: Option<Duration>,
    /// The application that uses the volumes, such as `postgres`.
    pub app: Option<String>,
    /// How much the group matters.
    pub criticality: Criticality,
}

/// The kind of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CaptureKind {
    /// Every block.
    Baseline,
    /// The blocks changed since the layer before.
    Differential,
}

/// What a capture should keep to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaptureHints {
    /// The longest pause allowed.
    pub max_pause: Duration,
    /// The foreground latency (p99) to keep, if given.
    pub p99_target: Option<Duration>,
    /// The deadline presses: do not keep trying for a cut without a pause.
    pub urgent: bool,
}

/// What a decision led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// A capture was started.
    Capture,
    /// Staging was started.
    Stage,
    /// Nothing was done yet.
    Wait,
}

/// A row of `decisions`: what was decided about one volume, when and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// When it was decided.
    pub at: UnixNanos,
    /// The group, for captures.
    pub group: Option<GroupName>,
    /// The volume.
    pub volume: VolumeName,
    /// What follows from it.
    pub action: Action,
    /// Start of the window that was chosen, if one was.
    pub window_start: Option<UnixNanos>,
    /// Its end.
    pub window_end: Option<UnixNanos>,
    /// Why, in words.
    pub reason: String,
}

/// An event from outside, such as a deployment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExternalEvent {
    /// Its identifier.
    pub id: String,
    /// Its type, such as `com.example.deployment`.
    pub kind: String,
    /// What it is about.
    pub subject: Option<String>,
    /// When it happened.
    pub at: UnixNanos,
    /// The volumes it is about; empty for all.
    pub volumes: Vec<VolumeName>,
    /// When a burst is announced by it, if it announces one.
    pub burst_expected_at: Option<UnixNanos>,
}

impl ExternalEvent {
    /// What of it concerns forecasts.
    pub fn happening(&self) -> Happening {
        Happening {
            kind: self.kind.clone(),
            subject: self.subject.clone(),
            volumes: self.volumes.clone(),
            at: self.burst_expected_at.unwrap_or(self.at),
        }
    }
}

impl From<EventRow> for ExternalEvent {
    fn from(row: EventRow) -> Self {
        // That a timer elapses announces no burst; what it does to the load is learnt.
        let announces = row.source != crate::sources::SYSTEMD;
        Self {
            id: row.id,
            kind: row.kind,
            subject: row.subject,
            at: row.expected.unwrap_or(row.ts),
            volumes: row.volumes.iter().map(|v| VolumeName::from(&**v)).collect(),
            burst_expected_at: row.expected.filter(|_| announces),
        }
    }
}

/// Everything that can happen to the brain.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Time has passed; to be sent at least every [`PlannerConfig::tick`].
    Tick,
    /// A bin of a volume is complete; `None` if what happened in it is unknown.
    WindowClosed {
        /// The volume.
        volume: VolumeName,
        /// When the bin started.
        start: UnixNanos,
        /// Its totals.
        load: Option<LoadBin>,
    },
    /// The load of the last minute or so, finer than a bin: the last check before a capture.
    LoadSampled {
        /// The volume.
        volume: VolumeName,
        /// Its load in bytes per second.
        bytes_per_second: f64,
    },
    /// How much a differential of a volume would hold if it were cut now.
    ChangesCounted {
        /// The volume.
        volume: VolumeName,
        /// In bytes.
        bytes: u64,
    },
    /// What [`Command::Judge`] asked for.
    Judged {
        /// The group.
        group: GroupName,
        /// Whether to begin now; `None` where nothing can be said.
        begin: Option<Judgement>,
    },
    /// A forecast that was asked for.
    ForecastReady {
        /// The volume.
        volume: VolumeName,
        /// The forecast.
        forecast: Arc<QuantileForecast>,
    },
    /// A group was created.
    GroupCreated {
        /// What was asked for.
        spec: GroupSpec,
        /// The cut of its newest layer, if it has layers from before a restart.
        last_capture: Option<UnixNanos>,
        /// The cut of its newest baseline.
        last_baseline: Option<UnixNanos>,
    },
    /// A group's parameters changed.
    GroupUpdated {
        /// The new parameters.
        spec: GroupSpec,
    },
    /// A group was deleted.
    GroupDeleted {
        /// Its name.
        group: GroupName,
    },
    /// A user asks for a capture now; `None` leaves the kind to the brain.
    CaptureRequested {
        /// The group.
        group: GroupName,
        /// The kind of layer.
        kind: Option<CaptureKind>,
    },
    /// A capture has begun.
    CaptureStarted {
        /// The group.
        group: GroupName,
    },
    /// A capture is durable.
    CaptureFinished {
        /// The group.
        group: GroupName,
        /// The kind that was made; a differential may have had to become a baseline.
        kind: CaptureKind,
        /// When the cut was.
        cut_at: UnixNanos,
    },
    /// A capture failed and left nothing behind.
    CaptureFailed {
        /// The group.
        group: GroupName,
        /// Why.
        reason: String,
    },
    /// Staging ended.
    StagingFinished {
        /// The volume.
        volume: VolumeName,
        /// Bytes copied, or why it failed.
        outcome: Result<u64, String>,
    },
    /// What [`Command::JudgeStaging`] asked for.
    StagingJudged {
        /// The volume.
        volume: VolumeName,
        /// Bytes that were chosen for staging.
        chosen: u64,
        /// Bytes of them that were read until it was asked.
        used: u64,
    },
    /// On which physical disks a volume lies; none if that is not known.
    VolumePlaced {
        /// The volume.
        volume: VolumeName,
        /// The disks at the bottom of the stack below it.
        disks: Vec<Name>,
    },
    /// An event from outside arrived.
    EventReceived(ExternalEvent),
    /// A training ended; what came of it, in words.
    TrainingFinished {
        /// The promotion's reason, or why it failed.
        outcome: Result<String, String>,
    },
    /// The planner's settings changed. The time scale stays: it is fixed when the agent starts.
    Reconfigured {
        /// The new settings.
        config: Box<PlannerConfig>,
    },
    /// A volume is gone.
    VolumeGone {
        /// The volume.
        volume: VolumeName,
    },
}

/// Everything the brain can ask for.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Capture a layer of every volume of the group at one instant.
    StartCapture {
        /// The group.
        group: GroupName,
        /// The kind of layer.
        kind: CaptureKind,
        /// What to keep to.
        hints: CaptureHints,
        /// Why, in words.
        reason: String,
    },
    /// A requested capture is not possible now.
    RefuseCapture {
        /// The group.
        group: GroupName,
        /// Why, in words.
        reason: String,
    },
    /// Copy the blocks likely to be read to fast storage.
    StartStaging {
        /// The volume.
        volume: VolumeName,
        /// When the burst is expected; staging must be over by then.
        before: UnixNanos,
        /// How many bytes it may take.
        budget_bytes: u64,
        /// Whether to copy them; otherwise they are only chosen, to be judged.
        copy: bool,
        /// Why, in words.
        reason: String,
    },
    /// Say how much of what was chosen last was read; to be answered by [`Event::StagingJudged`] at once,
    /// unless nothing was chosen.
    JudgeStaging {
        /// The volume.
        volume: VolumeName,
    },
    /// Stop copying; what is staged stays.
    CancelStaging {
        /// The volume.
        volume: VolumeName,
        /// Why, in words.
        reason: String,
    },
    /// Forecast a volume's load.
    Forecast {
        /// The volume.
        volume: VolumeName,
        /// Bins ahead.
        horizon: usize,
    },
    /// Say whether to begin a capture now ([`crate::model::Forecaster::begin`]); to be answered by
    /// [`Event::Judged`] at once.
    Judge {
        /// The group.
        group: GroupName,
        /// Its volumes.
        volumes: Vec<VolumeName>,
        /// Other volumes on the same disks.
        neighbours: Vec<VolumeName>,
        /// How its interval stands.
        pace: Pace,
    },
    /// Train the network in the background.
    Train {
        /// Why, in words.
        reason: String,
    },
    /// Keep a decision in the history.
    RecordDecision(Decision),
}

/// How staging is planned.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StagingConfig {
    /// Whether to stage at all.
    pub enabled: bool,
    /// The probability of a burst from which on it is worth staging, 0 to 1.
    pub alarm: f64,
    /// How fast blocks may be copied, in bytes per second.
    pub rate: f64,
    /// How many bytes all volumes may stage together; shared by [`Criticality::weight`].
    pub budget_bytes: u64,
    /// A volume of which less than this share of what was chosen is read is not staged, 0 to 1.
    pub least_precision: f64,
}

/// How the brain plans. Durations that follow from the time scale are set by
/// [`PlannerConfig::new`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannerConfig {
    /// Bin and season of forecasts.
    pub scale: TimeScale,
    /// What a burst is.
    pub burst: BurstRule,
    /// The longest time between two events the brain is given.
    pub tick: Duration,
    /// The share of the RPO before which no new layer is taken, 0 to 1.
    pub earliest_share: f64,
    /// Waiting for a quieter window must lower the expected load by this share.
    pub waiting_pays: f64,
    /// A capture is put off if the observed load exceeds this multiple of the forecast's.
    pub load_check: f64,
    /// Below this load a volume counts as idle whatever the forecast, in bytes per second.
    pub idle: f64,
    /// How long a capture is taken to last before one was seen.
    pub capture_duration: Duration,
    /// How long to wait after a first failure; doubles with every further one.
    pub backoff: Duration,
    /// The age at which the baseline is renewed in a long quiet time.
    pub baseline_every: Duration,
    /// History needed before the first training.
    pub train_after: Duration,
    /// Time between trainings.
    pub train_every: Duration,
    /// Staging.
    pub staging: StagingConfig,
}

impl PlannerConfig {
    /// The defaults for a time scale.
    pub fn new(scale: TimeScale) -> Self {
        let season = scale.season();
        Self {
            scale,
            burst: BurstRule::default(),
            tick: (scale.bin() / 5).clamp(Duration::from_millis(100), Duration::from_secs(60)),
            earliest_share: 0.5,
            waiting_pays: 0.05,
            load_check: 1.5,
            idle: 64.0 * 1024.0,
            capture_duration: scale.bin().min(Duration::from_secs(30)),
            backoff: scale.bin().min(Duration::from_secs(10)),
            baseline_every: season * 7,
            train_after: season * 2,
            train_every: season,
            staging: StagingConfig {
                enabled: true,
                alarm: 0.5,
                rate: 64.0 * 1024.0 * 1024.0,
                budget_bytes: 1 << 30,
                least_precision: 0.05,
            },
        }
    }
}

/// A duration in nanoseconds, saturating at the end of time.
pub(crate) fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}
