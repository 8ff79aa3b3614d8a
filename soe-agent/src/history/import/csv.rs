//! `ts_us,volume,op,offset,length[,latency_us]`, in and out.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;
use std::str::FromStr;

use super::lines::{Lines, decimal, split};
use super::{ImportReport, append_windows};
use crate::history::error::{HistoryError, Result};
use crate::history::partition::Hour;
use crate::history::read::{HistoryReader, Query};
use crate::history::store::HistoryStore;
use crate::history::table::TableRow;
use crate::seam::UnixNanos;
use crate::window::{
    HeatWindower, IoOp, IoRecord, IoWindower, Name, RegionHeatRow, SECOND_NS, VolumeWindow,
    WindowConfig,
};

const HEADER: [&str; 6] = ["ts_us", "volume", "op", "offset", "length", "latency_us"];
/// Rows that are handed on at a time.
const CHUNK: usize = 50_000;
/// The longest request that is believed: the kernel's largest discard is just below 4 GiB.
const MAX_LENGTH: i64 = 1 << 32;

/// Writes `io_trace` from the lines, then `volume_stats` and `region_heat` from `io_trace`, so that
/// lines may come in any order.
pub(super) fn import(
    files: &[PathBuf],
    volume: Option<&str>,
    store: &HistoryStore,
) -> Result<ImportReport> {
    let mut report = ImportReport::default();
    let mut names = BTreeSet::new();
    let mut chunk = Vec::with_capacity(CHUNK);
    for path in files {
        let mut lines = Lines::open(path)?;
        let mut columns = None;
        while lines.advance()? {
            let Some(record) = parse(&lines, volume, &mut columns, &mut names)? else {
                continue;
            };
            report.saw(&record.volume, record.ts);
            chunk.push(record);
            if chunk.len() >= CHUNK {
                append(store, &mut chunk, &mut report)?;
            }
        }
    }
    append(store, &mut chunk, &mut report)?;
    store.flush()?;
    derive(store, &mut report)?;
    Ok(report)
}

fn append<R: TableRow>(
    store: &HistoryStore,
    rows: &mut Vec<R>,
    report: &mut ImportReport,
) -> Result<()> {
    store.append(rows)?;
    report.wrote(R::TABLE, rows.len());
    rows.clear();
    Ok(())
}

fn parse(
    lines: &Lines,
    volume: Option<&str>,
    columns: &mut Option<usize>,
    names: &mut BTreeSet<Name>,
) -> Result<Option<IoRecord>> {
    let fields = split(lines.text()?).ok_or_else(|| lines.wrong("a quote is not closed"))?;
    let count = *columns.get_or_insert(fields.len());
    if fields.len() != count || !(5..=6).contains(&count) {
        let want = columns.filter(|count| (5..=6).contains(count));
        let want = want.map_or("5 or 6".to_owned(), |count| count.to_string());
        return Err(lines.wrong(format!(
            "{} fields, expected {want} ({})",
            fields.len(),
            HEADER.join(",")
        )));
    }
    if lines.is_first()
        && fields
            .first()
            .is_some_and(|first| first.eq_ignore_ascii_case("ts_us"))
    {
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
    let text = |at: usize| fields.get(at).map_or("", |field| &**field);
    let number = |at: usize, scale: u64| {
        decimal(text(at), scale).ok_or_else(|| {
            let name = HEADER.get(at).copied().unwrap_or_default();
            lines.wrong(format!(
                "{name} is {:?}, expected a number of 0 or more that fits",
                text(at)
            ))
        })
    };
    let ts = number(0, 1000)?;
    let op = IoOp::from_str(text(2)).map_err(|()| {
        lines.wrong(format!(
            "op is {:?}, expected read, write, discard, write_zeroes, secure_erase or flush",
            text(2)
        ))
    })?;
    let (offset, length) = (number(3, 1)?, number(4, 1)?);
    if length > MAX_LENGTH || offset.checked_add(length).is_none() {
        return Err(lines.wrong(format!(
            "length {length} at offset {offset} is more than a request can have"
        )));
    }
    let latency = match text(5) {
        // Traces that don't know it write -1.
        "" | "-1" => None,
        _ => Some(number(5, 1000)?.unsigned_abs()),
    };
    let volume = super::volume_name(text(1), volume, names)
        .ok_or_else(|| lines.wrong("the volume is empty; name it with --volume"))?;
    Ok(Some(IoRecord {
        ts,
        volume,
        op,
        offset: offset.unsigned_abs(),
        length: length.unsigned_abs(),
        latency,
        cgroup: None,
        pid: None,
        comm: None,
        sample_weight: 1,
    }))
}

/// Windows and heat from the recorded requests. The trace is taken to have recorded all its volumes
/// all the time, up to a day before a volume's first request and after its last.
fn derive(store: &HistoryStore, report: &mut ImportReport) -> Result<()> {
    let Some((first, last)) = report.span() else {
        return Ok(());
    };
    let config = WindowConfig::default();
    let mut windower = IoWindower::new(config);
    let mut heat = HeatWindower::new(60 * SECOND_NS);
    let spans: Vec<(Name, UnixNanos, UnixNanos)> = report
        .volumes
        .iter()
        .map(|(name, span)| {
            let from = if span.0 - first <= config.max_idle {
                first
            } else {
                span.0
            };
            let to = if last - span.1 <= config.max_idle {
                last
            } else {
                span.1
            };
            (name.clone(), from, to)
        })
        .collect();
    for (name, from, _) in &spans {
        windower.begin(name, *from);
    }
    let (mut windows, mut heats): (Vec<VolumeWindow>, Vec<RegionHeatRow>) = Default::default();
    let mut hour = Hour::of(first);
    for record in HistoryReader::open(store.dir())?.rows::<IoRecord>(&Query::all())? {
        let record = record?;
        if Hour::of(record.ts) > hour {
            hour = Hour::of(record.ts);
            for (name, _, to) in &spans {
                windower.close(name, hour.start().min(to.saturating_add(1)), &mut windows);
                if windows.len() >= CHUNK {
                    append_windows(store, &mut windows, report)?;
                }
            }
            heat.advance(hour.start(), &mut heats);
        }
        heat.push(&record, &mut heats);
        windower.push(record, &mut windows);
        if windows.len() >= CHUNK {
            append_windows(store, &mut windows, report)?;
        }
        if heats.len() >= CHUNK {
            append(store, &mut heats, report)?;
        }
    }
    for (name, _, to) in &spans {
        windower.end(name, *to, &mut windows);
        append_windows(store, &mut windows, report)?;
    }
    let books = windower.books();
    if books.counted != report.lines {
        let reason = format!(
            "{} of {} requests are in no window",
            report.lines - books.counted,
            report.lines
        );
        return Err(HistoryError::Import {
            what: "the trace".into(),
            reason,
        });
    }
    heat.finish(&mut heats);
    append(store, &mut heats, report)
}

/// Writes `io_trace` as CSV, in order of time. Control group, process and sampling weight have no
/// column there. Returns the number of requests.
pub fn export_csv(reader: &HistoryReader, query: &Query, out: &mut dyn Write) -> Result<u64> {
    let failed = |source| HistoryError::Io {
        call: "write",
        path: "CSV output".into(),
        source,
    };
    writeln!(out, "{}", HEADER.join(",")).map_err(failed)?;
    let mut count = 0;
    for record in reader.rows_by_time::<IoRecord>(query)? {
        let record = record?;
        let latency = record
            .latency
            .map(|ns| micros(i128::from(ns)))
            .unwrap_or_default();
        let volume = if record.volume.contains([',', '"']) {
            format!("\"{}\"", record.volume.replace('"', "\"\""))
        } else {
            record.volume.to_string()
        };
        writeln!(
            out,
            "{},{volume},{},{},{},{latency}",
            micros(i128::from(record.ts)),
            record.op,
            record.offset,
            record.length
        )
        .map_err(failed)?;
        count += 1;
    }
    out.flush().map_err(failed)?;
    Ok(count)
}

/// ns as microseconds, with a fraction only where there is one.
fn micros(ns: i128) -> String {
    let (sign, ns) = if ns < 0 { ("-", -ns) } else { ("", ns) };
    match ns % 1000 {
        0 => format!("{sign}{}", ns / 1000),
        part => format!("{sign}{}.{part:03}", ns / 1000),
    }
}
