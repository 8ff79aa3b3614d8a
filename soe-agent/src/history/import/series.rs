//! `ts_s,volume,read_ops,write_ops,read_bytes,write_bytes`: bins of recorded load.
//!
//! The files are read twice: first to check every line and to learn how wide each volume's bins are
//! (the most frequent step between two bins of it), then to write them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;

use super::lines::{Lines, decimal, split};
use super::{ImportReport, append_windows, volume_name};
use crate::history::error::{HistoryError, Result};
use crate::history::partition::Hour;
use crate::history::store::HistoryStore;
use crate::seam::UnixNanos;
use crate::window::{Name, SECOND_NS, VolumeWindow};

const HEADER: [&str; 6] = [
    "ts_s",
    "volume",
    "read_ops",
    "write_ops",
    "read_bytes",
    "write_bytes",
];
/// Bins that are held before they are written: 64 MiB and some.
const HELD: usize = 1 << 20;
/// Different steps that are counted for one volume.
const MAX_STEPS: usize = 1024;
/// The shortest bin: intervals are stored in milliseconds.
const MIN_STEP: i64 = 1_000_000;

/// A bin as small as it gets: what is unknown is negative.
struct Bin {
    ts: UnixNanos,
    volume: Name,
    values: [i64; 4],
}

#[derive(Default)]
struct Steps {
    last: Option<UnixNanos>,
    counts: HashMap<i64, u64>,
}

impl Steps {
    fn add(&mut self, step: i64) {
        if self.counts.len() < MAX_STEPS || self.counts.contains_key(&step) {
            *self.counts.entry(step).or_default() += 1;
        }
    }
}

/// The most frequent step, the shorter one of two that are equally frequent.
fn usual<'a>(steps: impl Iterator<Item = (&'a i64, &'a u64)>) -> Option<i64> {
    steps
        .max_by_key(|&(&step, &count)| (count, std::cmp::Reverse(step)))
        .map(|(&step, _)| step)
}

pub(super) fn import(
    files: &[PathBuf],
    volume: Option<&str>,
    store: &HistoryStore,
) -> Result<ImportReport> {
    let mut names = BTreeSet::new();
    let widths = widths(files, volume, &mut names)?;
    let mut report = ImportReport::default();
    let mut held: Vec<Bin> = Vec::new();
    each_bin(files, volume, &mut names, |_, bin| {
        report.saw(&bin.volume, bin.ts);
        held.push(bin);
        if held.len() >= HELD {
            write(&mut held, &widths, store, &mut report)?;
        }
        Ok(())
    })?;
    write(&mut held, &widths, store, &mut report)?;
    Ok(report)
}

/// Checks every line; gives the width of every volume's bins.
fn widths(
    files: &[PathBuf],
    volume: Option<&str>,
    names: &mut BTreeSet<Name>,
) -> Result<BTreeMap<Name, i64>> {
    let mut steps: BTreeMap<Name, Steps> = BTreeMap::new();
    each_bin(files, volume, names, |lines, bin| {
        let steps = steps.entry(bin.volume.clone()).or_default();
        if let Some(last) = steps.last.replace(bin.ts) {
            let step = bin.ts.saturating_sub(last);
            if step < MIN_STEP {
                return Err(lines.wrong(format!(
                    "volume {}: this bin does not follow the one before; a volume's bins must ascend in time, each once",
                    bin.volume
                )));
            }
            steps.add(step);
        }
        Ok(())
    })?;
    let mut all: BTreeMap<i64, u64> = BTreeMap::new();
    for (step, count) in steps.values().flat_map(|steps| &steps.counts) {
        *all.entry(*step).or_default() += count;
    }
    let common = usual(all.iter());
    steps
        .into_iter()
        .map(|(name, steps)| {
            let width =
                usual(steps.counts.iter())
                    .or(common)
                    .ok_or_else(|| HistoryError::Import {
                        what: format!("volume {name}"),
                        reason: "one bin alone does not say how long it is; give at least two"
                            .into(),
                    })?;
            Ok((name, width))
        })
        .collect()
}

fn each_bin(
    files: &[PathBuf],
    volume: Option<&str>,
    names: &mut BTreeSet<Name>,
    mut each: impl FnMut(&Lines, Bin) -> Result<()>,
) -> Result<()> {
    for path in files {
        let mut lines = Lines::open(path)?;
        while lines.advance()? {
            if let Some(bin) = parse(&lines, volume, names)? {
                each(&lines, bin)?;
            }
        }
    }
    Ok(())
}

fn parse(lines: &Lines, volume: Option<&str>, names: &mut BTreeSet<Name>) -> Result<Option<Bin>> {
    let fields = split(lines.text()?).ok_or_else(|| lines.wrong("a quote is not closed"))?;
    let [ts, name, values @ ..] = fields.as_slice() else {
        return Err(lines.wrong(format!(
            "{} fields, expected 6 ({})",
            fields.len(),
            HEADER.join(",")
        )));
    };
    if values.len() != 4 {
        return Err(lines.wrong(format!(
            "{} fields, expected 6 ({})",
            fields.len(),
            HEADER.join(",")
        )));
    }
    if lines.is_first() && ts.eq_ignore_ascii_case("ts_s") {
        let known = fields
            .iter()
            .zip(HEADER)
            .all(|(field, name)| field.eq_ignore_ascii_case(name));
        return if known {
            Ok(None)
        } else {
            Err(lines.wrong(format!("the header is not {}", HEADER.join(","))))
        };
    }
    let wrong = |name: &str, text: &str, what: &str| {
        lines.wrong(format!("{name} is {text:?}, expected {what}"))
    };
    let ts = decimal(ts, SECOND_NS.unsigned_abs())
        .ok_or_else(|| wrong("ts_s", ts, "seconds since 1970, 0 or more"))?;
    let mut parsed = [-1; 4];
    for ((slot, text), name) in parsed.iter_mut().zip(values).zip(HEADER.iter().skip(2)) {
        if !text.is_empty() {
            *slot = decimal(text, 1).ok_or_else(|| {
                wrong(
                    name,
                    text,
                    "a number of 0 or more that fits, or nothing when it is unknown",
                )
            })?;
        }
    }
    let volume = volume_name(name, volume, names)
        .ok_or_else(|| lines.wrong("the volume is empty; name it with --volume"))?;
    Ok(Some(Bin {
        ts,
        volume,
        values: parsed,
    }))
}

/// Writes the held bins hour by hour, so that each hour gets one file.
fn write(
    held: &mut Vec<Bin>,
    widths: &BTreeMap<Name, i64>,
    store: &HistoryStore,
    report: &mut ImportReport,
) -> Result<()> {
    held.sort_by(|a, b| (Hour::of(a.ts), &a.volume, a.ts).cmp(&(Hour::of(b.ts), &b.volume, b.ts)));
    for hour in held.chunk_by(|a, b| Hour::of(a.ts) == Hour::of(b.ts)) {
        let mut windows: Vec<VolumeWindow> = hour.iter().map(|bin| window(bin, widths)).collect();
        append_windows(store, &mut windows, report)?;
    }
    held.clear();
    Ok(())
}

fn window(bin: &Bin, widths: &BTreeMap<Name, i64>) -> VolumeWindow {
    let interval = widths.get(&bin.volume).copied().unwrap_or(SECOND_NS);
    let mut window = VolumeWindow::unknown(bin.ts, interval, bin.volume.clone());
    let [read_ops, write_ops, read_bytes, write_bytes] =
        bin.values.map(|value| u64::try_from(value).ok());
    window.read.ops = read_ops;
    window.write.ops = write_ops;
    window.read.bytes = read_bytes;
    window.write.bytes = write_bytes;
    window
}
