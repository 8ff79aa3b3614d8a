//! Imports: what comes in is what is read, strict about every line, all or nothing.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use proptest::prelude::*;

use super::*;
use crate::window::{IoOp, IoRecord, RegionHeatRow, SECOND_NS as S};

fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, text).unwrap();
    path
}

fn import(
    format: ImportFormat,
    text: &str,
    volume: Option<&str>,
) -> (tempfile::TempDir, Result<ImportReport>) {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "trace.csv", text);
    let result = import_files(format, &[file], volume, &dir.path().join("out"));
    (dir, result)
}

fn rows<R: crate::history::TableRow>(dir: &tempfile::TempDir) -> Vec<R> {
    let reader = HistoryReader::open(&dir.path().join("out")).unwrap();
    reader
        .rows_by_time(&Query::all())
        .unwrap()
        .map(Result::unwrap)
        .collect()
}

/// An import leaves nothing but finished files.
fn leftovers(dir: &tempfile::TempDir) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![dir.path().join("out")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path
                .extension()
                .is_none_or(|extension| extension != "parquet")
            {
                found.push(path);
            }
        }
    }
    found.retain(|path| path.file_name().unwrap() != ".lock");
    found
}

#[test]
fn csv_becomes_requests_windows_and_heat() {
    let text = "ts_us,volume,op,offset,length,latency_us\n\
                1000000,a,R,0,4096,500\n\
                1500000,a,W,4096,8192,\n\
                \"3000000\",\"b,c\",discard,1048576,4096,1.5\r\n\
                3000001.5,,w,0,512,-1\n\n";
    let (dir, report) = import(ImportFormat::Csv, text, Some("d"));
    let report = report.unwrap();
    assert_eq!(report.lines, 4);
    assert_eq!(
        report.volumes.keys().map(|n| &**n).collect::<Vec<_>>(),
        ["a", "b,c", "d"]
    );
    // Three volumes, three seconds: idle ones are zeroes.
    assert_eq!(report.rows[&Table::VolumeStats], 9);
    let requests: Vec<IoRecord> = rows(&dir);
    assert_eq!(requests[0].latency, Some(500_000));
    assert_eq!(
        (requests[2].op, requests[2].latency),
        (IoOp::Discard, Some(1500))
    );
    assert_eq!((requests[3].ts, &*requests[3].volume), (3_000_001_500, "d"));
    let windows: Vec<VolumeWindow> = rows(&dir);
    let first = windows
        .iter()
        .find(|w| w.start == S && &*w.volume == "a")
        .unwrap();
    assert_eq!((first.read.ops, first.read.bytes), (Some(1), Some(4096)));
    assert_eq!(
        (first.write.ops, first.sequential_share),
        (Some(1), Some(0.5))
    );
    let idle = windows
        .iter()
        .find(|w| w.start == 2 * S && &*w.volume == "a")
        .unwrap();
    assert_eq!((idle.read.ops, idle.write.bytes), (Some(0), Some(0)));
    let heat: Vec<RegionHeatRow> = rows(&dir);
    assert_eq!(heat.len(), 2);
    assert_eq!(
        (heat[0].region, heat[0].read_ops, heat[0].write_ops),
        (0, 1, 1)
    );
    assert!(leftovers(&dir).is_empty());
}

#[test]
fn series_keeps_unknown_and_missing_apart_from_zero() {
    let text = "ts_s,volume,read_ops,write_ops,read_bytes,write_bytes\n\
                0,a,1,2,3,4\n300.0,a,,,1024.6,0\n900,a,0,0,0,0\n0,b,1,1,1,1\n3600,b,1,1,1,1\n";
    let (dir, report) = import(ImportFormat::Series, text, None);
    assert_eq!(report.unwrap().rows[&Table::VolumeStats], 5);
    let windows: Vec<VolumeWindow> = rows(&dir);
    let a: Vec<_> = windows.iter().filter(|w| &*w.volume == "a").collect();
    assert_eq!(a.len(), 3);
    assert!(
        a.iter()
            .all(|w| w.interval == 300 * S && w.flush_ops.is_none())
    );
    assert_eq!(
        (a[1].read.ops, a[1].read.bytes, a[1].write.bytes),
        (None, Some(1025), Some(0))
    );
    let b = windows.iter().find(|w| &*w.volume == "b").unwrap();
    assert_eq!(b.interval, 3600 * S);
    let reader = HistoryReader::open(&dir.path().join("out")).unwrap();
    let (bins, _) = reader
        .load_bins(&Query::range(0..1200 * S), 300 * S)
        .unwrap();
    let reads: Vec<_> = bins["a"]
        .bins
        .iter()
        .map(|bin| bin.and_then(|b| b.read_bytes))
        .collect();
    assert_eq!(reads, [Some(3.0), Some(1025.0), None, Some(0.0)]);
    assert_eq!(bins["a"].bins[1].unwrap().read_ops, None);
}

#[test]
fn a_bad_line_is_named_and_nothing_is_written() {
    let good = "1,a,R,0,512\n";
    for (format, bad, reason) in [
        (ImportFormat::Csv, "1,a,R,0\n", "expected 5"),
        (ImportFormat::Csv, "1,a,R,0,512,1,1\n", "expected 5"),
        (ImportFormat::Csv, "x,a,R,0,512\n", "ts_us"),
        (ImportFormat::Csv, "-1,a,R,0,512\n", "ts_us"),
        (
            ImportFormat::Csv,
            "99999999999999999999,a,R,0,512\n",
            "ts_us",
        ),
        (ImportFormat::Csv, "1,a,X,0,512\n", "op"),
        (ImportFormat::Csv, "1,a,R,-5,512\n", "offset"),
        (ImportFormat::Csv, "1,a,R,0,99999999999\n", "length"),
        (
            ImportFormat::Csv,
            "1,a,R,9223372036854775807,512\n",
            "length",
        ),
        (ImportFormat::Csv, "1,,R,0,512\n", "--volume"),
        (ImportFormat::Csv, "1,\"a,R,0,512\n", "quote"),
        (
            ImportFormat::Csv,
            "ts_us,volume,op,offset,length\n",
            "ts_us",
        ),
    ] {
        let (dir, result) = import(format, &format!("{good}{bad}"), None);
        let error = result.unwrap_err().to_string();
        assert!(
            error.contains("trace.csv:2: ") && error.contains(reason),
            "{bad:?}: {error}"
        );
        assert!(leftovers(&dir).is_empty());
        assert!(rows::<IoRecord>(&dir).is_empty() && rows::<VolumeWindow>(&dir).is_empty());
    }
    for (bad, reason) in [
        ("300,a,1,1,1\n", "expected 6"),
        ("300,a,1,1,1,nan\n", "write_bytes"),
        ("300,a,-1,1,1,1\n", "read_ops"),
        ("300,a,1,1,1,inf\n", "write_bytes"),
        ("0,a,1,1,1,1\n", "ascend"),
        ("later,a,1,1,1,1\n", "ts_s"),
    ] {
        let (dir, result) = import(ImportFormat::Series, &format!("0,a,1,1,1,1\n{bad}"), None);
        let error = result.unwrap_err().to_string();
        assert!(
            error.contains("trace.csv:2: ") && error.contains(reason),
            "{bad:?}: {error}"
        );
        assert!(rows::<VolumeWindow>(&dir).is_empty());
    }
    let (_dir, binary) = import(ImportFormat::Csv, "1,a,R,0,512\n\u{0}\n", None);
    assert!(binary.is_err());
    let (_dir, wrong_header) = import(ImportFormat::Csv, "ts_us,vol,op,offset,length\n", None);
    assert!(wrong_header.unwrap_err().to_string().contains("header"));
    let (_dir, empty) = import(ImportFormat::Csv, "", None);
    assert!(empty.unwrap_err().to_string().contains("no line"));
    let (_dir, single) = import(ImportFormat::Series, "0,a,1,1,1,1\n", None);
    assert!(single.unwrap_err().to_string().contains("at least two"));
}

#[test]
fn the_same_time_of_a_volume_is_imported_once() {
    let (dir, first) = import(ImportFormat::Csv, "1,a,R,0,512\n", None);
    first.unwrap();
    let out = dir.path().join("out");
    let again = import_files(
        ImportFormat::Csv,
        &[dir.path().join("trace.csv")],
        None,
        &out,
    );
    assert!(again.unwrap_err().to_string().contains("volume a"));
    assert_eq!(rows::<IoRecord>(&dir).len(), 1);
    let other = write(dir.path(), "other.csv", "1,b,R,0,512\n");
    import_files(ImportFormat::Csv, &[other], None, &out).unwrap();
    assert_eq!(rows::<IoRecord>(&dir).len(), 2);
}

/// What counts is what the windows cover: a bin of hours that begins long before the import, and
/// seconds in which a volume was idle while the trace went on.
#[test]
fn windows_that_reach_into_each_other_are_refused() {
    let bins = "0,a,1,1,1,1\n7200,a,1,1,1,1\n";
    for (first, second, overlap) in [
        (bins, "14399000000,a,R,0,512\n", true),
        (bins, "14400000000,a,R,0,512\n", false),
        (bins, "14399000000,b,R,0,512\n", false),
        // The trace goes on after the only request to a, which was idle then.
        (
            "9000,a,1,1,1,1\n9001,a,1,1,1,1\n",
            "1000000,a,R,0,512\n9500000000,b,R,0,512\n",
            true,
        ),
    ] {
        let (dir, imported) = import(ImportFormat::Series, first, None);
        imported.unwrap();
        let before = rows::<VolumeWindow>(&dir).len();
        let file = write(dir.path(), "second.csv", second);
        let result = import_files(ImportFormat::Csv, &[file], None, &dir.path().join("out"));
        assert_eq!(result.is_err(), overlap, "{first} and {second}: {result:?}");
        assert_eq!(rows::<VolumeWindow>(&dir).len() > before, !overlap);
    }
}

#[test]
fn compressed_traces_and_several_files_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.csv.zst");
    fs::write(&path, zstd::encode_all(&b"5,a,R,0,512\n"[..], 1).unwrap()).unwrap();
    let second = write(dir.path(), "second.csv", "1,a,R,0,512\n");
    let report = import_files(
        ImportFormat::Csv,
        &[path, second],
        None,
        &dir.path().join("out"),
    )
    .unwrap();
    assert_eq!((report.lines, report.span()), (2, Some((1000, 5000))));
}

/// A crash after the mark is mended at the next start; before it, the import is gone.
#[test]
fn a_marked_import_is_ended_at_the_next_start() {
    for marked in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        drop(HistoryStore::open(StoreConfig::new(&out)).unwrap());
        let file = write(dir.path(), "trace.csv", "1,a,R,0,512\n");
        let work = out.join(WORK).join("import-x");
        fs::create_dir_all(out.join(WORK)).unwrap();
        build(ImportFormat::Csv, &[file], None, &work).unwrap();
        if marked {
            make_durable(&RealDisk { durable: true }, &work).unwrap();
        }
        drop(HistoryStore::open(StoreConfig::new(&out)).unwrap());
        assert_eq!(rows::<IoRecord>(&dir).len(), usize::from(marked));
        assert_eq!(rows::<VolumeWindow>(&dir).len(), usize::from(marked));
        assert!(!work.exists());
    }
}

prop_compose! {
    fn any_line()(
        ts in 0u64..5 * 3600 * 1_000_000,
        volume in 0u8..3,
        op in prop::sample::select(IoOp::ALL.to_vec()),
        offset in 0u64..1 << 30,
        length in 0u64..1 << 20,
        latency in prop::option::of(0u64..10_000_000),
    ) -> (u64, u8, IoOp, u64, u64, Option<u64>) {
        (ts, volume, op, offset, length, latency)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
    /// Lines in any order: every request is kept, windows and heat add up, and the export gives the
    /// lines back.
    #[test]
    fn an_import_loses_and_invents_nothing(lines in prop::collection::vec(any_line(), 1..60)) {
        let mut text = String::new();
        for (ts, volume, op, offset, length, latency) in &lines {
            let latency = latency.map(|ns| format!("{}.{:03}", ns / 1000, ns % 1000)).unwrap_or_default();
            writeln!(text, "{ts},v{volume},{op},{offset},{length},{latency}").unwrap();
        }
        let (dir, report) = import(ImportFormat::Csv, &text, None);
        prop_assert_eq!(report.unwrap().lines, lines.len() as u64);
        let windows: Vec<VolumeWindow> = rows(&dir);
        let mut per_volume: BTreeMap<String, Vec<i64>> = BTreeMap::new();
        for window in &windows {
            per_volume.entry(window.volume.to_string()).or_default().push(window.start);
        }
        for starts in per_volume.values() {
            prop_assert!(starts.windows(2).all(|pair| pair[0] + S == pair[1]));
        }
        let count = |op: fn(IoOp) -> bool| lines.iter().filter(|line| op(line.2)).count() as u64;
        let total = |of: fn(&VolumeWindow) -> Option<u64>| windows.iter().filter_map(of).sum::<u64>();
        prop_assert_eq!(total(|w| w.read.ops), count(|op| op == IoOp::Read));
        prop_assert_eq!(total(|w| w.write.ops), count(|op| matches!(op, IoOp::Write | IoOp::WriteZeroes)));
        prop_assert_eq!(total(|w| w.flush_ops), count(|op| op == IoOp::Flush));
        let heat: Vec<RegionHeatRow> = rows(&dir);
        let touched: u64 = lines.iter().filter(|line| line.2 == IoOp::Read)
            .map(|line| (line.3 + line.4.max(1) - 1) / (1 << 20) - line.3 / (1 << 20) + 1).sum();
        prop_assert_eq!(heat.iter().map(|row| row.read_ops).sum::<u64>(), touched);

        let reader = HistoryReader::open(&dir.path().join("out")).unwrap();
        let mut exported = Vec::new();
        export_csv(&reader, &Query::all(), &mut exported).unwrap();
        let (again, report) = import(ImportFormat::Csv, std::str::from_utf8(&exported).unwrap(), None);
        prop_assert_eq!(report.unwrap().lines, lines.len() as u64);
        let sorted = |mut rows: Vec<IoRecord>| { rows.sort_by_key(|r| (r.ts, r.volume.clone(), r.offset, r.length)); rows };
        prop_assert_eq!(sorted(rows(&dir)), sorted(rows(&again)));
        prop_assert_eq!(rows::<VolumeWindow>(&dir).len(), rows::<VolumeWindow>(&again).len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    /// Whatever a file holds, it is imported or refused with one line that says why.
    #[test]
    fn any_file_is_imported_or_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        line in "[0-9.,\"a-zRW\r\n-]{0,60}",
        series in any::<bool>(),
        zstd in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace");
        let (format, good) = match series {
            true => (ImportFormat::Series, "0,a,1,1,1,1\n300,a,1,1,1,1\n"),
            false => (ImportFormat::Csv, "1,a,R,0,512\n"),
        };
        let mut content = if zstd { b"\x28\xb5\x2f\xfd".to_vec() } else { good.as_bytes().to_vec() };
        content.extend_from_slice(line.as_bytes());
        content.extend_from_slice(&bytes);
        fs::write(&path, &content).unwrap();
        let out = dir.path().join("out");
        if let Err(error) = import_files(format, &[path], Some("d"), &out) {
            let text = error.to_string();
            prop_assert!(!text.contains('\n') && text.len() < 1000, "{text}");
            prop_assert!(leftovers(&dir).is_empty());
        }
    }
}
