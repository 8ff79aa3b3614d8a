//! `soe backtest staging` and `soe backtest cache`: recorded IO through the choice of blocks and the live
//! cache.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::Serialize;

use super::backtest::Answer;
use super::simulation;
use crate::cli::error::CliError;
use crate::history::{FlatColumn, FlatTable, HistoryReader, Query, write_flat};
use crate::model::VolumeName;
use crate::plan::backtest_blocks::{
    Amount, CacheCounts, ChosenBlock, GivenBurst, cache, footprints, staging,
};
use crate::plan::simulate::TraceAccess;
use crate::window::IoRecord;

/// What is asked.
pub(in crate::cli) struct Request {
    /// The history's folder.
    pub(in crate::cli) history: PathBuf,
    /// The bursts; required for staging.
    pub(in crate::cli) bursts: Option<PathBuf>,
    /// How much is staged, or cached.
    pub(in crate::cli) amount: Amount,
    /// Bytes of a block.
    pub(in crate::cli) block: u32,
    /// The file to write.
    pub(in crate::cli) out: PathBuf,
}

impl Request {
    fn accesses(
        &self,
    ) -> Result<impl Iterator<Item = Result<TraceAccess, CliError>> + use<>, CliError> {
        let reader = HistoryReader::open(&self.history)?;
        let rows = reader.rows_by_time::<IoRecord>(&Query::all())?;
        Ok(rows.filter_map(|row| match row {
            Ok(record) => simulation::access(&record).map(Ok),
            Err(error) => Some(Err(error.into())),
        }))
    }

    fn bursts(&self) -> Result<Vec<GivenBurst>, CliError> {
        let Some(path) = &self.bursts else {
            return Ok(Vec::new());
        };
        let named = path.display();
        let text =
            std::fs::read_to_string(path).map_err(CliError::io(format!("bursts {named}")))?;
        let mut bursts = Vec::new();
        for (nth, line) in text.lines().enumerate() {
            let line = line.trim_end_matches('\r');
            if line.is_empty() || (nth == 0 && line == HEADER) {
                continue;
            }
            let burst = burst(line).map_err(|why| {
                CliError::Usage(format!("bursts {named}, line {}: {why}", nth + 1))
            })?;
            bursts.push(burst);
        }
        Ok(bursts)
    }
}

const HEADER: &str = "volume,start_us,end_us";

fn burst(line: &str) -> Result<GivenBurst, String> {
    let why = || format!("{line:?} is no burst; write {HEADER}");
    let mut fields = line.rsplitn(3, ',');
    let mut time = || {
        let us: i64 = fields.next()?.trim().parse().ok()?;
        us.checked_mul(1_000)
    };
    let (end, start) = time().zip(time()).ok_or_else(why)?;
    let volume = fields
        .next()
        .filter(|name| !name.is_empty())
        .ok_or_else(why)?;
    if end < start {
        return Err(format!("the burst {line:?} ends before it starts"));
    }
    Ok(GivenBurst {
        volume: VolumeName::from(volume),
        start,
        end,
    })
}

/// How many volumes the bursts name, if all of them were traced.
fn known(
    bursts: &[GivenBurst],
    traced: &BTreeMap<VolumeName, usize>,
    request: &Request,
) -> Result<usize, CliError> {
    let history = request.history.display();
    if traced.is_empty() {
        return Err(CliError::Usage(format!(
            "history {history} has no io_trace; import one with 'soe trace import'"
        )));
    }
    let names: BTreeSet<&VolumeName> = bursts.iter().map(|burst| &burst.volume).collect();
    match names.iter().find(|name| !traced.contains_key(**name)) {
        None => Ok(names.len()),
        Some(name) => Err(CliError::Usage(format!(
            "history {history} has no io_trace of {name}, which the bursts name; correct its name or import its trace"
        ))),
    }
}

/// Writes the blocks that would be staged for each burst.
pub(in crate::cli) fn run_staging(request: &Request) -> Result<Answer, CliError> {
    let bursts = request.bursts()?;
    if bursts.is_empty() {
        return Err(CliError::Usage(
            "there is no burst to stage for; give a file of bursts with --bursts".to_owned(),
        ));
    }
    let names = known(
        &bursts,
        &footprints(request.accesses()?, request.block)?,
        request,
    )?;
    let mut volumes = Vec::new();
    let mut starts = Vec::new();
    let mut ranks = Vec::new();
    let mut offsets = Vec::new();
    staging(
        request.accesses()?,
        &bursts,
        request.amount,
        request.block,
        &mut |chosen: ChosenBlock| {
            volumes.push(chosen.volume.to_string());
            starts.push(chosen.burst_start);
            ranks.push(chosen.rank as u64);
            offsets.push(chosen.offset);
        },
    )?;
    let table = FlatTable::default()
        .column("volume", FlatColumn::Text(volumes))
        .column("burst_start", FlatColumn::Time(starts))
        .column("rank", FlatColumn::Count(ranks))
        .column("offset", FlatColumn::Count(offsets));
    write_flat(&request.out, &table)?;
    Ok(Answer {
        volumes: names,
        rows: table.rows(),
        file: request.out.display().to_string(),
    })
}

/// What a cache of the live volumes missed.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct CacheAnswer {
    /// Bytes of a block.
    pub(in crate::cli) block: u32,
    /// Share of the blocks read that was not in the cache: live cache and online prefetch alone.
    pub(in crate::cli) miss_ratio: f64,
    /// The same with staging before the bursts, in the same capacity; `None` without bursts.
    pub(in crate::cli) miss_ratio_with_staging: Option<f64>,
    /// Each volume's counts, in blocks.
    pub(in crate::cli) volumes: Vec<CacheCounts>,
}

/// Writes what the live cache misses, alone and with staging.
pub(in crate::cli) fn run_cache(request: &Request) -> Result<CacheAnswer, CliError> {
    let bursts = request.bursts()?;
    let footprints = footprints(request.accesses()?, request.block)?;
    known(&bursts, &footprints, request)?;
    let volumes = cache(
        request.accesses()?,
        &footprints,
        &bursts,
        request.amount,
        request.block,
    )?;
    let reads: u64 = volumes.iter().map(|v| v.reads).sum();
    let ratio = |misses: u64| misses as f64 / reads.max(1) as f64;
    // A volume without bursts misses the same with them.
    let with = |v: &CacheCounts| v.misses_with_staging.unwrap_or(v.misses);
    let staged = volumes.iter().any(|v| v.misses_with_staging.is_some());
    let answer = CacheAnswer {
        block: request.block,
        miss_ratio: ratio(volumes.iter().map(|v| v.misses).sum()),
        miss_ratio_with_staging: staged.then(|| ratio(volumes.iter().map(with).sum())),
        volumes,
    };
    let json = serde_json::to_vec_pretty(&answer)
        .map_err(|e| CliError::Failed(format!("the answer cannot be written: {e}")))?;
    let named = request.out.display();
    std::fs::write(&request.out, json).map_err(CliError::io(format!("file {named}")))?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bursts_are_read_and_bad_lines_told() {
        let good = burst("/dev/sda, 1,2,3").unwrap();
        assert_eq!(good.volume.as_str(), "/dev/sda, 1");
        assert_eq!((good.start, good.end), (2_000, 3_000));
        for bad in [
            "",
            "a",
            "a,1",
            ",1,2",
            "a,1,x",
            "a,9223372036854775807,1",
            "a,5,4",
        ] {
            assert!(burst(bad).is_err(), "{bad}");
        }
    }
}
