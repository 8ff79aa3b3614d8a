//! `soe backtest`: a recorded history through the forecasters, and what they said as Parquet.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::simulation;
use crate::cli::error::CliError;
use crate::history::{FlatColumn, FlatTable, write_flat};
use crate::model::burst::BurstRule;
use crate::model::mixture::{Mixture, MixtureConfig};
use crate::model::{QuantileForecast, TimeScale, VolumeName};
use crate::plan::backtest::{self, Course};
use crate::plan::simulate::Trainer;
use crate::seam::UnixNanos;

const DAY: Duration = Duration::from_secs(86_400);

/// What is asked.
pub(in crate::cli) enum Job {
    /// Quantiles of the load.
    Load {
        /// How far ahead.
        horizon: Duration,
        /// Time between two forecasts.
        every: Duration,
    },
    /// The probability of a burst.
    Bursts {
        /// Time that must be left before it.
        lead: Duration,
        /// Time after the lead in which it may begin.
        window: Duration,
        /// Probability from which on it is an alarm.
        alarm: f64,
    },
    /// Windows for captures.
    Windows {
        /// The interval in which one is made.
        interval: Duration,
        /// How long it takes.
        length: Duration,
    },
}

/// A back-test.
pub(in crate::cli) struct Request {
    /// The history's folder.
    pub(in crate::cli) history: PathBuf,
    /// Width of a bin.
    pub(in crate::cli) bin: Duration,
    /// The first moment of which an output is wanted.
    pub(in crate::cli) from: Option<UnixNanos>,
    /// Time between two trainings; `None` trains never.
    pub(in crate::cli) train_every: Option<Duration>,
    /// What is asked.
    pub(in crate::cli) job: Job,
    /// The file to write.
    pub(in crate::cli) out: PathBuf,
}

/// What was written.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct Answer {
    /// Volumes in the history.
    pub(in crate::cli) volumes: usize,
    /// Rows written.
    pub(in crate::cli) rows: usize,
    /// The file.
    pub(in crate::cli) file: String,
}

/// Runs the back-test and writes its file.
pub(in crate::cli) fn run(request: &Request) -> Result<Answer, CliError> {
    let usage = |why: String| CliError::Usage(why);
    let bin = request.bin;
    if bin.is_zero() || !DAY.as_nanos().is_multiple_of(bin.as_nanos()) {
        return Err(usage(format!(
            "a bin of {bin:?} does not divide a day; use 5m for example"
        )));
    }
    let season = usize::try_from(DAY.as_nanos() / bin.as_nanos()).unwrap_or(usize::MAX);
    let scale = TimeScale::new(bin, season).map_err(|e| usage(e.to_string()))?;
    request.job.check(bin).map_err(usage)?;
    let history = simulation::read(&request.history, scale)?;
    let first = history.volumes.iter().map(|v| v.start).min().unwrap_or(0);
    // The definition by which published figures are computed.
    let mut forecaster = Mixture::new(MixtureConfig {
        burst: BurstRule::STRICT,
        ..MixtureConfig::new(scale)
    });
    let trainer = trainer();
    let course = Course {
        scale,
        from: request.from.unwrap_or(first),
        trainer: request.train_every.and(trainer.as_deref()),
        train_every: request.train_every.unwrap_or(DAY),
    };
    let volumes = &history.volumes;
    let table = match request.job {
        Job::Load { horizon, every } => {
            let mut rows = LoadRows::default();
            let take = &mut |volume: &VolumeName, forecast| rows.take(volume, &forecast);
            backtest::load(volumes, course, &mut forecaster, horizon, every, take);
            rows.table()
        }
        Job::Bursts {
            lead,
            window,
            alarm,
        } => {
            let mut answers = Vec::new();
            let take = &mut |answer| answers.push(answer);
            backtest::bursts(volumes, course, &mut forecaster, lead, window, take);
            FlatTable::default()
                .column(
                    "volume",
                    FlatColumn::Text(answers.iter().map(|a| a.volume.to_string()).collect()),
                )
                .column(
                    "issued_at",
                    FlatColumn::Time(answers.iter().map(|a| a.issued_at).collect()),
                )
                .column(
                    "probability",
                    FlatColumn::Number(answers.iter().map(|a| a.probability).collect()),
                )
                .column(
                    "alarm",
                    FlatColumn::Truth(answers.iter().map(|a| a.probability >= alarm).collect()),
                )
        }
        Job::Windows { interval, length } => {
            let mut answers = Vec::new();
            let take = &mut |answer| answers.push(answer);
            backtest::windows(volumes, course, &mut forecaster, interval, length, take);
            FlatTable::default()
                .column(
                    "volume",
                    FlatColumn::Text(answers.iter().map(|a| a.volume.to_string()).collect()),
                )
                .column(
                    "interval_start",
                    FlatColumn::Time(answers.iter().map(|a| a.interval_start).collect()),
                )
                .column(
                    "window_start",
                    FlatColumn::Time(answers.iter().map(|a| a.window_start).collect()),
                )
                .column(
                    "member",
                    FlatColumn::Text(answers.into_iter().map(|a| a.member).collect()),
                )
        }
    };
    write_flat(&request.out, &table)?;
    Ok(Answer {
        volumes: volumes.len(),
        rows: table.rows(),
        file: request.out.display().to_string(),
    })
}

impl Job {
    fn check(&self, bin: Duration) -> Result<(), String> {
        let whole = |name: &str, value: Duration, least: Duration| {
            if value < least || !value.as_nanos().is_multiple_of(bin.as_nanos()) {
                return Err(format!(
                    "--{name} of {value:?} is no multiple of the bin of {bin:?}; use whole bins"
                ));
            }
            Ok(())
        };
        match *self {
            Job::Load { horizon, every } => {
                whole("horizon", horizon, bin)?;
                whole("every", every, bin)
            }
            Job::Bursts {
                lead,
                window,
                alarm,
            } => {
                whole("lead", lead, Duration::ZERO)?;
                whole("window", window, bin)?;
                if !(0.0..=1.0).contains(&alarm) {
                    return Err(format!("--alarm {alarm} is no probability; use 0 to 1"));
                }
                Ok(())
            }
            Job::Windows { interval, length } => {
                whole("interval", interval, bin)?;
                whole("length", length, bin)?;
                if length > interval {
                    return Err(format!(
                        "a capture of {length:?} does not fit into an interval of {interval:?}"
                    ));
                }
                Ok(())
            }
        }
    }
}

/// Trains as the agent does, bounded by steps alone, so that the result does not depend on the machine.
#[cfg(feature = "model")]
fn trainer() -> Option<Box<Trainer<'static>>> {
    use crate::model::net::{Budget, train};
    Some(Box::new(|data| {
        let budget = Budget {
            max_cpu: None,
            ..Budget::default()
        };
        let never = std::sync::atomic::AtomicBool::new(false);
        train(data, budget, 1, None, &never)
    }))
}

#[cfg(not(feature = "model"))]
fn trainer() -> Option<Box<Trainer<'static>>> {
    None
}

#[derive(Default)]
struct LoadRows {
    volumes: Vec<String>,
    issued: Vec<UnixNanos>,
    starts: Vec<UnixNanos>,
    quantiles: [Vec<f64>; 6],
    members: Vec<String>,
}

impl LoadRows {
    fn take(&mut self, volume: &VolumeName, forecast: &QuantileForecast) {
        for (h, row) in forecast.rows.iter().enumerate() {
            self.volumes.push(volume.to_string());
            self.issued.push(forecast.issued_at);
            self.starts.push(forecast.start_of(h));
            for (column, value) in self.quantiles.iter_mut().zip(row) {
                column.push(f64::from(*value));
            }
            self.members.push(forecast.member.to_string());
        }
    }

    fn table(self) -> FlatTable {
        let mut table = FlatTable::default()
            .column("volume", FlatColumn::Text(self.volumes))
            .column("issued_at", FlatColumn::Time(self.issued))
            .column("target_start", FlatColumn::Time(self.starts));
        for (name, values) in ["q10", "q50", "q80", "q90", "q95", "q99"]
            .into_iter()
            .zip(self.quantiles)
        {
            table = table.column(name, FlatColumn::Number(values));
        }
        table.column("member", FlatColumn::Text(self.members))
    }
}
