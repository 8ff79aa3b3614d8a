//! The power goes at every single operation of a life, and what was not synced is lost in many
//! different ways.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use super::support::*;
use crate::layer::fs::{AppendFile, DirEntry, Fault, ReadFile, SimFs, StoreFs, StoreLock};
use crate::layer::*;

/// What a life had come to when it ended.
#[derive(Default)]
struct Outcome {
    /// Images of every capture that was begun, by its sequence number.
    expected: Expected,
    /// The newest commit that was reported as durable.
    acknowledged: u64,
}

/// Opens a store, captures four times, once in passes and once given up, reopens in between.
fn life(fs: Arc<dyn StoreFs>) -> (Outcome, Result<(), LayerError>) {
    let mut outcome = Outcome::default();
    let result = live(fs, &mut outcome);
    (outcome, result)
}

fn live(fs: Arc<dyn StoreFs>, outcome: &mut Outcome) -> Result<(), LayerError> {
    let mut volumes = Volumes::new(&[20 * BLOCK - 7, 6 * BLOCK]);
    let mut store = LayerStore::open(fs.clone(), options(1))?;
    (0..12).for_each(|block| volumes.write(0, block, 2 * block + 1));
    (0..6).for_each(|block| volumes.write(1, block, block));
    capture(&store, &mut volumes, LayerKind::Baseline, outcome)?;

    volumes.write_all(&[(0, 3, 0), (0, 19, 77), (1, 2, 8), (0, 5, 91)]);
    capture(&store, &mut volumes, LayerKind::Differential, outcome)?;

    let mut given_up = store.begin(GROUP, volumes.specs(LayerKind::Baseline))?;
    volumes.put(&mut given_up, LayerKind::Baseline)?;
    given_up.abort();
    drop(store);
    store = LayerStore::open(fs, options(2))?;

    volumes.write_all(&[(0, 5, 13), (1, 0, 15), (0, 6, 0)]);
    capture(&store, &mut volumes, LayerKind::Rescan, outcome)?;

    volumes.write_all(&[(0, 1, 17), (1, 1, 19)]);
    let mut attempt = store.begin(GROUP, volumes.specs(LayerKind::Differential))?;
    volumes.put(&mut attempt, LayerKind::Differential)?;
    (0..9).for_each(|block| volumes.write(0, block, 100 + block));
    volumes.put(&mut attempt, LayerKind::Differential)?;
    outcome
        .expected
        .insert(attempt.sequence(), volumes.images.clone());
    outcome.acknowledged = attempt.commit(cut(2))?.sequence;
    Ok(())
}

fn capture(
    store: &LayerStore,
    volumes: &mut Volumes,
    kind: LayerKind,
    outcome: &mut Outcome,
) -> Result<(), LayerError> {
    outcome
        .expected
        .insert(outcome.acknowledged + 1, volumes.images.clone());
    outcome.acknowledged = volumes.capture(store, kind)?.sequence;
    Ok(())
}

/// What must hold when the machine is back.
fn check_after(fs: &SimFs, outcome: &Outcome) -> Result<(), String> {
    let store = open(fs, 3).map_err(|error| format!("open: {error}"))?;
    let head = store
        .head(GROUP)
        .map_err(|error| format!("head: {error}"))?;
    let newest = head.map_or(0, |head| head.sequence);
    // Everything acknowledged is there; at most the one under way came through as well.
    if newest < outcome.acknowledged || newest > outcome.acknowledged + 1 {
        return Err(format!(
            "the head is {newest}, but {} was acknowledged",
            outcome.acknowledged
        ));
    }
    if newest > 0
        && store
            .manifests(GROUP)
            .map_err(|error| error.to_string())?
            .len() as u64
            != newest
    {
        return Err("a layer in between is missing".into());
    }
    check(&store, &outcome.expected)?;
    check_no_garbage(fs, &store)?;
    // Life goes on from what is there.
    let kind = if newest == 0 {
        LayerKind::Baseline
    } else {
        LayerKind::Rescan
    };
    let mut expected = outcome.expected.clone();
    let mut volumes = Volumes::new(&[20 * BLOCK - 7, 6 * BLOCK]);
    if let Some(images) = expected.get(&newest) {
        volumes.images = images.clone();
    }
    volumes.write(0, 4, 1001);
    let next = volumes
        .capture(&store, kind)
        .map_err(|error| format!("next capture: {error}"))?;
    expected.insert(next.sequence, volumes.images.clone());
    check(&store, &expected)
}

fn check_no_garbage(fs: &SimFs, store: &LayerStore) -> Result<(), String> {
    let mut named = BTreeSet::from(["store".to_owned()]);
    for group in store.groups() {
        for manifest in store.manifests(&group).map_err(|error| error.to_string())? {
            named.insert(format!("m-{:020}", manifest.sequence));
            for layer in &manifest.volumes {
                let files = layer.segments.iter().chain([&layer.index]);
                named.extend(files.map(|file| format!("a-{}/{}", manifest.attempt, file.file)));
            }
        }
    }
    let stray = fs.files().into_iter().find(|path| {
        let path = path
            .split_once('/')
            .filter(|(folder, _)| folder.starts_with("g-"))
            .map_or(path.as_str(), |p| p.1);
        !named.contains(path)
    });
    stray.map_or(Ok(()), |path| Err(format!("{path} was not collected")))
}

/// Cuts the power at every operation, with several kinds of loss each; the first failure.
fn cut_everywhere(wrap: &dyn Fn(SimFs) -> Arc<dyn StoreFs>, losses: u64) -> Result<u64, String> {
    let whole = SimFs::new(0);
    let (outcome, result) = life(wrap(whole.clone()));
    result.map_err(|error| format!("without any power cut: {error}"))?;
    check_after(&whole.after_power_cut(1), &outcome)
        .map_err(|error| format!("cut after the end: {error}"))?;
    let ops = whole.ops();
    for op in 0..ops {
        let fs = SimFs::new(op);
        fs.fault_at(op, Fault::PowerCut);
        let (outcome, result) = life(wrap(fs.clone()));
        assert!(fs.is_dead(), "operation {op} was never reached");
        assert!(
            result.is_err() || op + 2 >= ops,
            "the life went on without power after {op}"
        );
        for loss in 0..losses {
            check_after(&fs.after_power_cut(loss), &outcome).map_err(|error| {
                format!("power cut at operation {op} of {ops}, loss {loss}: {error}")
            })?;
        }
    }
    Ok(ops)
}

#[test]
fn a_power_cut_at_any_operation_leaves_every_committed_layer_and_all_or_nothing_of_the_next() {
    let ops = cut_everywhere(&|fs| Arc::new(fs), 12).unwrap();
    assert!(
        ops > 60,
        "only {ops} operations: the life is too short to prove anything"
    );
}

#[test]
fn a_second_power_cut_while_garbage_is_collected_is_harmless() {
    let whole = SimFs::new(0);
    life(Arc::new(whole.clone())).1.unwrap();
    for op in (0..whole.ops()).step_by(3) {
        let fs = SimFs::new(op);
        fs.fault_at(op, Fault::PowerCut);
        let (outcome, _) = life(Arc::new(fs.clone()));
        for second in 0..25 {
            let back = fs.after_power_cut(op);
            back.fault_at(second, Fault::PowerCut);
            let opened = open(&back, 4).map(drop);
            if !back.is_dead() {
                opened.unwrap();
                break;
            }
            let again = back.after_power_cut(second);
            check_after(&again, &outcome)
                .unwrap_or_else(|error| panic!("cut at {op}, again at {second}: {error}"));
        }
    }
}

/// A disk whose driver forgets some syncs: the mutation that the test above must notice.
#[derive(Clone)]
struct Forgetful {
    fs: SimFs,
    forgets: Forgets,
}

struct ForgetfulFile(Box<dyn AppendFile>, bool);

impl AppendFile for ForgetfulFile {
    fn append(&mut self, data: &[u8]) -> io::Result<()> {
        self.0.append(data)
    }
    fn sync(&mut self) -> io::Result<()> {
        if self.1 { Ok(()) } else { self.0.sync() }
    }
}

impl StoreFs for Forgetful {
    fn describe(&self) -> String {
        self.fs.describe()
    }
    fn create(&self, path: &str) -> io::Result<Box<dyn AppendFile>> {
        Ok(Box::new(ForgetfulFile(
            self.fs.create(path)?,
            (self.forgets)(&self.fs, path),
        )))
    }
    fn open(&self, path: &str) -> io::Result<Box<dyn ReadFile>> {
        self.fs.open(path)
    }
    fn create_dir(&self, path: &str) -> io::Result<()> {
        self.fs.create_dir(path)
    }
    fn sync_dir(&self, path: &str) -> io::Result<()> {
        if (self.forgets)(&self.fs, &format!("{path}/")) {
            Ok(())
        } else {
            self.fs.sync_dir(path)
        }
    }
    fn rename_no_replace(&self, from: &str, to: &str) -> io::Result<()> {
        self.fs.rename_no_replace(from, to)
    }
    fn list(&self, path: &str) -> io::Result<Vec<DirEntry>> {
        self.fs.list(path)
    }
    fn remove_file(&self, path: &str) -> io::Result<()> {
        self.fs.remove_file(path)
    }
    fn remove_dir(&self, path: &str) -> io::Result<()> {
        self.fs.remove_dir(path)
    }
    fn free_space(&self) -> io::Result<u64> {
        self.fs.free_space()
    }
    fn lock(&self) -> io::Result<Box<dyn StoreLock>> {
        self.fs.lock()
    }
}

/// What a forgetful disk does not sync: files by name, folders by their name and a slash.
type Forgets = fn(&SimFs, &str) -> bool;

/// Whether the group's folder `path` has the files of an attempt that no manifest names yet.
fn is_group_before_its_manifest(fs: &SimFs, path: &str) -> Option<bool> {
    let folder = path
        .strip_suffix('/')
        .filter(|folder| folder.starts_with("g-") && !folder.contains('/'))?;
    let entries = fs.list(folder).ok()?;
    let count = |prefix: &str| {
        entries
            .iter()
            .filter(|entry| entry.name.starts_with(prefix))
            .count()
    };
    Some(count("a-") > count("m-"))
}

const MUTATIONS: [(&str, Forgets); 8] = [
    ("segments", |_, path| path.ends_with(".segment")),
    ("indexes", |_, path| path.ends_with(".index")),
    ("manifests", |_, path| path.contains("/tmp-")),
    ("the store's header", |_, path| path.starts_with("tmp-")),
    ("the folder of the store", |_, path| path == "/"),
    ("the folder of the attempt", |_, path| {
        path.ends_with('/') && path.contains("/a-")
    }),
    ("the folder of the group before the manifest", |fs, path| {
        is_group_before_its_manifest(fs, path) == Some(true)
    }),
    ("the folder of the group after the manifest", |fs, path| {
        is_group_before_its_manifest(fs, path) == Some(false)
    }),
];

#[test]
fn every_sync_of_a_commit_is_needed() {
    for (what, forgets) in MUTATIONS {
        let noticed = cut_everywhere(&|fs| Arc::new(Forgetful { fs, forgets }), 12);
        assert!(
            noticed.is_err(),
            "a store that never syncs {what} passes the test"
        );
    }
}
