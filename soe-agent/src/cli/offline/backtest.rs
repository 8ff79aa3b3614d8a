//! `soe backtest`: a recorded history through the forecasters, and what they said as Parquet.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::simulation;
use crate::cli::error::CliError;
use crate::history::{FlatColumn, FlatTable, write_flat};
use crate::model::burst::BurstRule;
use crate::model::mixture::{Mixture, MixtureConfig};
use crate::model::weights::{self, ModelError, TrainedInfo};
use crate::model::{QuantileForecast, TimeScale, Trained, VolumeName};
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
    /// The network to begin with, instead of the one that ships.
    pub(in crate::cli) prior: Option<PathBuf>,
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
    let prior = match &request.prior {
        Some(path) => Trained::load(path),
        None => weights::prior(),
    };
    let prior = match prior {
        Ok(prior) => forecaster.set_prior(&prior).map(|()| prior),
        Err(error) => Err(error),
    };
    let prior = match (prior, &request.prior) {
        (Ok(prior), _) => Some(prior),
        // A build without a network forecasts without.
        (Err(ModelError::NotBuilt), None) => None,
        (Err(error), _) => return Err(CliError::Failed(error.to_string())),
    };
    let trainer = trainer(prior);
    let course = Course {
        scale,
        from: request.from.unwrap_or(first),
        trainer: request.train_every.and(trainer.as_deref()),
        train_every: request.train_every.unwrap_or(DAY),
        events: &history.events,
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
                    FlatColumn::Text(answers.iter().map(|a| a.member.to_owned()).collect()),
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
fn trainer(prior: Option<Trained>) -> Option<Box<Trainer<'static>>> {
    use crate::model::net::{Budget, train};
    Some(Box::new(move |data| {
        let budget = Budget {
            max_cpu: None,
            max_samples: Budget::BACKGROUND_SAMPLES,
            ..Budget::default()
        };
        let never = std::sync::atomic::AtomicBool::new(false);
        train(data, budget, 1, prior.as_ref(), &never)
    }))
}

#[cfg(not(feature = "model"))]
fn trainer(_: Option<Trained>) -> Option<Box<Trainer<'static>>> {
    None
}

/// What `soe backtest prior` is asked for.
pub(in crate::cli) struct PriorRequest {
    /// The history's folder.
    pub(in crate::cli) history: PathBuf,
    /// Width of a bin.
    pub(in crate::cli) bin: Duration,
    /// Nothing from here on is looked at.
    pub(in crate::cli) until: Option<UnixNanos>,
    /// Of so many folds of the volumes, the one that is left out.
    pub(in crate::cli) leave_out: Option<(usize, usize)>,
    /// The seed.
    pub(in crate::cli) seed: u64,
    /// The file to write.
    pub(in crate::cli) out: PathBuf,
}

/// Trains a network on a whole history and writes it.
#[cfg(feature = "model")]
pub(in crate::cli) fn train_prior(request: &PriorRequest) -> Result<TrainedInfo, CliError> {
    use crate::model::dataset::Dataset;
    use crate::model::net::{Budget, train, train_windows};
    use crate::model::series::Series;
    let season = usize::try_from(DAY.as_nanos() / request.bin.as_nanos().max(1)).unwrap_or(0);
    let scale = TimeScale::new(request.bin, season).map_err(|e| CliError::Usage(e.to_string()))?;
    let history = simulation::read(&request.history, scale)?;
    let mut dataset = Dataset {
        scale,
        series: Vec::new(),
    };
    for (number, volume) in history.volumes.iter().enumerate() {
        if request
            .leave_out
            .is_some_and(|(fold, folds)| number % folds.max(1) == fold)
        {
            continue;
        }
        let seasons = volume.bins.len() / season + 1;
        let mut series = Series::new(scale, BurstRule::STRICT, seasons);
        for (index, load) in volume.bins.iter().enumerate() {
            let start = scale.start_of(scale.index_of(volume.start) + index as i64);
            if request.until.is_some_and(|until| start >= until) {
                break;
            }
            // A value that is no load is left out, as in the agent.
            let _ = series.push(start, *load);
        }
        dataset.series.push((volume.name.clone(), series));
    }
    let budget = Budget {
        max_cpu: None,
        held_back: 0.05,
        judged: 0.0,
        ..Budget::default()
    };
    let never = std::sync::atomic::AtomicBool::new(false);
    let mut trained = train(&dataset, budget, request.seed, None, &never)
        .map_err(|e| CliError::Failed(e.to_string()))?;
    train_windows(&dataset, request.seed, &mut trained, &never)
        .map_err(|e| CliError::Failed(e.to_string()))?;
    trained
        .save(&request.out)
        .map_err(|e| CliError::Failed(e.to_string()))?;
    Ok(trained.info)
}

/// Without burn there is nothing to train.
#[cfg(not(feature = "model"))]
pub(in crate::cli) fn train_prior(_: &PriorRequest) -> Result<TrainedInfo, CliError> {
    Err(CliError::Failed(ModelError::NotBuilt.to_string()))
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
