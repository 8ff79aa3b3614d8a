//! `soe simulate`: a recorded history through the planner, and what it gave as Parquet.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::api::engine::EngineError;
use crate::cli::error::CliError;
use crate::config::{Bandwidth, Config};
use crate::history::{FlatColumn, FlatTable, HistoryReader, OnDamage, Query, Table, write_flat};
use crate::model::mixture::{Mixture, MixtureConfig};
use crate::model::{LoadBin, QuantileForecast, SHORT_HORIZON, TimeScale, VolumeName};
use crate::plan::simulate::{self, History, SimulationConfig, Sink, TraceAccess, VolumeHistory};
use crate::plan::staged::StagedRow;
use crate::plan::types::ExternalEvent;
use crate::plan::{Criticality, Decision, GroupSpec, PlannerConfig, StagingConfig};
use crate::seam::{ByteRange, UnixNanos};
use crate::stage::score::Access;
use crate::window::{EventRow, IoOp, IoRecord};

/// Rows of `forecasts.parquet`; when the history is longer, every n-th origin is recorded.
const MAX_FORECAST_ROWS: usize = 2_000_000;

/// Simulates the history in `dir`, one group a volume, and writes the outputs to `out`.
/// Captures from `from` on are judged.
pub(in crate::cli) fn simulate(
    dir: &Path,
    config: &Config,
    from: Option<UnixNanos>,
    out: &Path,
) -> Result<Value, CliError> {
    let planner = planner(config)?;
    let history = read(dir, planner.scale)?;
    let groups = history
        .volumes
        .iter()
        .map(|v| group(&v.name, config))
        .collect();
    let mut simulation = SimulationConfig::new(planner, groups);
    if let Bandwidth::BytesPerSecond(rate) = config.limits.capture_bandwidth {
        simulation.capture_rate = rate as f64;
    }
    simulation.judge_from = from;
    let bins: usize = history.volumes.iter().map(|v| v.bins.len()).sum();
    simulation.record_every = (bins * SHORT_HORIZON).div_ceil(MAX_FORECAST_ROWS).max(1);
    let mut forecaster = Mixture::new(MixtureConfig::new(planner.scale));
    let mut rows = Rows::default();
    let summary = run(&history, &simulation, config, &mut forecaster, &mut rows);
    fs::create_dir_all(out).map_err(CliError::io(format!("folder {}", out.display())))?;
    rows.write(out)?;
    let summary = serde_json::to_value(&summary)
        .map_err(|e| CliError::Failed(format!("summary as JSON: {e}")))?;
    let path = out.join("summary.json");
    fs::write(&path, format!("{summary:#}\n"))
        .map_err(CliError::io(format!("file {}", path.display())))?;
    Ok(summary)
}

#[cfg(feature = "model")]
fn run(
    history: &History,
    simulation: &SimulationConfig,
    config: &Config,
    forecaster: &mut Mixture,
    rows: &mut Rows,
) -> crate::plan::summary::Summary {
    use crate::model::net::{Budget, train};
    // Only steps bound the training, so that the result does not depend on the machine.
    let budget = Budget {
        max_cpu: None,
        max_samples: Budget::BACKGROUND_SAMPLES,
        ..Budget::default()
    };
    let never = std::sync::atomic::AtomicBool::new(false);
    let seed = u64::from(config.model.seed);
    let prior = crate::model::weights::prior().ok();
    if let Some(prior) = &prior {
        // A build with a network has one that fits.
        let _ = forecaster.set_prior(prior);
    }
    let trainer = move |data: &crate::model::dataset::Dataset| {
        train(data, budget, seed, prior.as_ref(), &never)
    };
    simulate::simulate(history, simulation, forecaster, Some(&trainer), rows)
}

#[cfg(not(feature = "model"))]
fn run(
    history: &History,
    simulation: &SimulationConfig,
    _: &Config,
    forecaster: &mut Mixture,
    rows: &mut Rows,
) -> crate::plan::summary::Summary {
    simulate::simulate(history, simulation, forecaster, None, rows)
}

/// The planner's settings by the configuration.
fn planner(config: &Config) -> Result<PlannerConfig, CliError> {
    let bins = config
        .season_bins()
        .map_err(|why| CliError::Usage(format!("model.season: {why}")))?;
    let scale =
        TimeScale::new(config.model.bin, bins).map_err(|e| CliError::Usage(e.to_string()))?;
    let defaults = PlannerConfig::new(scale);
    Ok(PlannerConfig {
        tick: config.plan.tick.max(defaults.tick),
        earliest_share: config.plan.earliest,
        idle: config.plan.idle as f64,
        baseline_every: config.plan.baseline_every,
        train_after: config.model.train_after,
        train_every: config.model.train_every,
        staging: StagingConfig {
            alarm: config.plan.stage_above,
            least_precision: config.plan.stage_precision,
            budget_bytes: config.staging.budget,
            ..defaults.staging
        },
        ..defaults
    })
}

fn group(volume: &VolumeName, config: &Config) -> GroupSpec {
    GroupSpec {
        name: volume.as_str().into(),
        volumes: vec![volume.clone()],
        prediction_enabled: true,
        rpo: config.plan.rpo,
        max_pause: config.plan.max_pause,
        p99_target: None,
        app: None,
        criticality: Criticality::default(),
    }
}

/// The history in `dir` as bins, accesses and events.
pub(super) fn read(dir: &Path, scale: TimeScale) -> Result<History, CliError> {
    let reader = HistoryReader::open(dir)?;
    let Some((first, last)) = reader.time_span(Table::VolumeStats)? else {
        return Err(EngineError::not_found(format!(
            "history {} has no volume_stats; import or record some first",
            dir.display()
        ))
        .into());
    };
    let bin = i64::try_from(scale.bin().as_nanos()).unwrap_or(i64::MAX);
    let query = Query::range(first..last.saturating_add(bin));
    debug_assert!(query.on_damage == OnDamage::Fail);
    let (series, _) = reader.load_bins(&query, bin)?;
    let volumes = series
        .into_values()
        .map(|s| VolumeHistory {
            name: VolumeName::from(&*s.volume),
            start: s.start,
            bins: s
                .bins
                .into_iter()
                .map(|b| b.and_then(|b| known(&b)))
                .collect(),
        })
        .collect();
    let mut accesses = Vec::new();
    for record in reader.rows_by_time::<IoRecord>(&Query::all())? {
        accesses.extend(access(&record?));
    }
    let mut events = Vec::new();
    for row in reader.rows_by_time::<EventRow>(&Query::all())? {
        events.push(event(row?));
    }
    events.sort_by_key(|(arrived, _)| *arrived);
    Ok(History {
        volumes,
        accesses,
        events,
    })
}

/// A bin whose bytes are known; operations that are not known count as none.
fn known(bin: &crate::window::LoadBin) -> Option<LoadBin> {
    Some(LoadBin {
        read_bytes: bin.read_bytes?,
        write_bytes: bin.write_bytes?,
        read_ops: bin.read_ops.unwrap_or(0.0),
        write_ops: bin.write_ops.unwrap_or(0.0),
    })
}

pub(super) fn access(record: &IoRecord) -> Option<TraceAccess> {
    let access = match record.op {
        IoOp::Read => Access::Read,
        IoOp::Flush => return None,
        _ => Access::Write,
    };
    Some(TraceAccess {
        at: record.ts,
        volume: VolumeName::from(&*record.volume),
        access,
        range: ByteRange::new(record.offset, record.length),
    })
}

/// An event, and with it what it announces, is known from its arrival on.
fn event(row: EventRow) -> (UnixNanos, ExternalEvent) {
    (row.received.max(row.ts), row.into())
}

/// The raw outputs, column by column.
#[derive(Default)]
struct Rows {
    forecast_volumes: Vec<String>,
    issued: Vec<UnixNanos>,
    starts: Vec<UnixNanos>,
    ends: Vec<UnixNanos>,
    quantiles: [Vec<f64>; 6],
    bursts: Vec<f64>,
    decisions: Vec<Decision>,
    staged: Vec<StagedRow>,
}

impl Sink for Rows {
    fn forecast(&mut self, volume: &VolumeName, forecast: &QuantileForecast) {
        for (h, row) in forecast.rows.iter().take(SHORT_HORIZON).enumerate() {
            self.forecast_volumes.push(volume.to_string());
            self.issued.push(forecast.issued_at);
            self.starts.push(forecast.start_of(h));
            self.ends.push(forecast.start_of(h + 1));
            for (column, value) in self.quantiles.iter_mut().zip(row) {
                column.push(f64::from(*value));
            }
            self.bursts
                .push(forecast.onset.get(h).copied().map_or(0.0, f64::from));
        }
    }

    fn decision(&mut self, decision: &Decision) {
        self.decisions.push(decision.clone());
    }

    fn staged(&mut self, row: &StagedRow) {
        self.staged.push(row.clone());
    }
}

impl Rows {
    fn write(self, out: &Path) -> Result<(), CliError> {
        let rows = self.forecast_volumes.len();
        let mut forecasts = FlatTable::default()
            .column("volume", FlatColumn::Text(self.forecast_volumes))
            .column("issued_at", FlatColumn::Time(self.issued))
            .column("target_start", FlatColumn::Time(self.starts))
            .column("target_end", FlatColumn::Time(self.ends))
            .column(
                "metric",
                FlatColumn::Text(vec!["bytes_per_second".into(); rows]),
            );
        for (name, values) in ["q10", "q50", "q80", "q90", "q95", "q99"]
            .into_iter()
            .zip(self.quantiles)
        {
            forecasts = forecasts.column(name, FlatColumn::Number(values));
        }
        let forecasts = forecasts.column("burst_probability", FlatColumn::Number(self.bursts));
        write_flat(&out.join("forecasts.parquet"), &forecasts)?;

        let of = |pick: fn(&Decision) -> String| self.decisions.iter().map(pick).collect();
        let decisions = FlatTable::default()
            .column(
                "at",
                FlatColumn::Time(self.decisions.iter().map(|d| d.at).collect()),
            )
            .column("volume", FlatColumn::Text(of(|d| d.volume.to_string())))
            .column(
                "action",
                FlatColumn::Text(of(|d| format!("{:?}", d.action).to_lowercase())),
            )
            .column(
                "window_start",
                FlatColumn::OptTime(self.decisions.iter().map(|d| d.window_start).collect()),
            )
            .column(
                "window_end",
                FlatColumn::OptTime(self.decisions.iter().map(|d| d.window_end).collect()),
            )
            .column("reason", FlatColumn::Text(of(|d| d.reason.clone())));
        write_flat(&out.join("decisions.parquet"), &decisions)?;

        let staged = FlatTable::default()
            .column(
                "volume",
                FlatColumn::Text(self.staged.iter().map(|s| s.volume.to_string()).collect()),
            )
            .column(
                "at",
                FlatColumn::Time(self.staged.iter().map(|s| s.at).collect()),
            )
            .column(
                "offset",
                FlatColumn::Count(self.staged.iter().map(|s| s.range.offset).collect()),
            )
            .column(
                "length",
                FlatColumn::Count(self.staged.iter().map(|s| s.range.len).collect()),
            )
            .column(
                "score",
                FlatColumn::Number(self.staged.iter().map(|s| s.score).collect()),
            )
            .column(
                "evicted_at",
                FlatColumn::OptTime(self.staged.iter().map(|s| s.evicted_at).collect()),
            );
        write_flat(&out.join("staged.parquet"), &staged)?;
        Ok(())
    }
}
