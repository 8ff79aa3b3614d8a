//! Damage anywhere is noticed, and never given back as data.

use std::collections::BTreeMap;

use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::support::*;
use crate::layer::fs::SimFs;
use crate::layer::*;

pub(super) fn prepared() -> (SimFs, Expected) {
    let fs = SimFs::new(5);
    let mut volumes = Volumes::new(&[14 * BLOCK - 7, 3 * BLOCK]);
    let mut expected = Expected::new();
    (0..9).for_each(|block| volumes.write(0, block, 2 * block + 1 + block % 2));
    (0..3).for_each(|block| volumes.write(1, block, 2 * block));
    let store = open(&fs, 1).unwrap();
    for kind in [
        LayerKind::Baseline,
        LayerKind::Differential,
        LayerKind::Rescan,
    ] {
        volumes.write_all(&[(0, 4, 55), (0, 13, 12), (1, 1, 0), (0, 2, 71)]);
        // Put twice, so that there are bytes in a segment that no index names.
        let mut attempt = store.begin(GROUP, volumes.specs(kind)).unwrap();
        volumes.put(&mut attempt, kind).unwrap();
        volumes.write(0, 3, 93 + expected.len() as u64 * 2);
        volumes.put(&mut attempt, kind).unwrap();
        let manifest = attempt.commit(cut(2)).unwrap();
        volumes.changed.iter_mut().for_each(|blocks| blocks.clear());
        expected.insert(manifest.sequence, volumes.images.clone());
    }
    drop(store);
    (fs, expected)
}

/// Whether opening or verifying the store says that something is wrong, as an integrity failure.
fn noticed(fs: &SimFs) -> Result<String, String> {
    let anchor_free = match open(fs, 50) {
        Err(error) if error.class() == ErrorClass::Integrity => return Ok(error.to_string()),
        Err(error) => return Err(format!("open failed, but not as damage: {error}")),
        Ok(store) => store.verify(GROUP, None),
    };
    match anchor_free {
        Ok(report) if report.is_clean() => Err("nothing was noticed".into()),
        Ok(report) => Ok(report
            .damages
            .into_iter()
            .map(|damage| damage.what)
            .collect::<Vec<_>>()
            .join("; ")),
        Err(error) => Err(format!("verify gave up: {error}")),
    }
}

/// Reading any layer gives the right bytes or an error, never other bytes.
fn never_wrong_bytes(fs: &SimFs, expected: &Expected) -> Result<(), String> {
    let Ok(store) = open(fs, 51) else {
        return Ok(());
    };
    for (&sequence, images) in expected {
        for (position, image) in images.iter().enumerate() {
            match read(&store, position, sequence) {
                Ok(bytes) if &bytes != image => {
                    return Err(format!("wrong bytes in layer {sequence}"));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

#[test]
fn a_flipped_bit_anywhere_in_any_file_is_noticed() {
    let (fs, expected) = prepared();
    noticed(&fs).unwrap_err();
    let mut rng = SmallRng::seed_from_u64(7);
    let mut by_kind: BTreeMap<String, u32> = BTreeMap::new();
    for (path, bytes) in fs.contents() {
        let kind = path
            .rsplit(['.', '/', '-'])
            .next()
            .unwrap_or_default()
            .to_owned();
        // Every byte of what is small, a sample of what is large.
        let stride = (bytes.len() / 500).max(1);
        for at in (0..bytes.len()).step_by(stride) {
            let at = (at + rng.random_range(0..stride)).min(bytes.len() - 1);
            let fs = fs.fork(1);
            let bit = rng.random_range(0..8);
            assert!(fs.tamper(&path, |bytes| bytes[at] ^= 1 << bit));
            noticed(&fs).unwrap_or_else(|what| panic!("bit {bit} of byte {at} of {path}: {what}"));
            never_wrong_bytes(&fs, &expected)
                .unwrap_or_else(|what| panic!("byte {at} of {path}: {what}"));
            *by_kind.entry(kind.clone()).or_default() += 1;
        }
    }
    assert!(
        by_kind["segment"] > 1000 && by_kind["index"] > 500 && by_kind["store"] == 36,
        "{by_kind:?}"
    );
}

#[test]
fn files_cut_short_lengthened_emptied_or_exchanged_are_noticed() {
    let (fs, expected) = prepared();
    let contents: Vec<_> = fs.contents().into_iter().collect();
    for (path, bytes) in &contents {
        let changes: [(&str, Vec<u8>); 4] = [
            ("one byte short", bytes[..bytes.len() - 1].to_vec()),
            ("half", bytes[..bytes.len() / 2].to_vec()),
            ("empty", Vec::new()),
            ("one byte more", [bytes.as_slice(), &[0]].concat()),
        ];
        let others = contents
            .iter()
            .filter(|other| other.0 != *path && other.1 != *bytes);
        let exchanged = others.map(|other| ("another file", other.1.clone()));
        for (what, new) in changes.into_iter().chain(exchanged) {
            let fs = fs.fork(1);
            fs.tamper(path, |bytes| *bytes = new);
            noticed(&fs).unwrap_or_else(|seen| panic!("{path}, {what}: {seen}"));
            never_wrong_bytes(&fs, &expected)
                .unwrap_or_else(|seen| panic!("{path}, {what}: {seen}"));
        }
    }
}

#[test]
fn a_missing_file_is_noticed_and_the_other_layers_stay_readable() {
    use crate::layer::fs::StoreFs;
    let (fs, expected) = prepared();
    for (path, _) in fs.contents() {
        let newest = path.ends_with("m-00000000000000000003");
        let fs = fs.fork(1);
        fs.remove_file(&path).unwrap();
        if newest {
            // Nothing in the store can tell; an anchor kept elsewhere does.
            let store = open(&fs, 50).unwrap();
            assert!(store.verify(GROUP, None).unwrap().is_clean());
            continue;
        }
        noticed(&fs).unwrap_or_else(|what| panic!("{path}: {what}"));
        never_wrong_bytes(&fs, &expected).unwrap();
    }
    // The newest layer's files gone: the older layers still give their images.
    let store = open(&fs, 52).unwrap();
    let newest = store.head(GROUP).unwrap().unwrap();
    drop(store);
    for (path, _) in fs.contents() {
        if path.contains(&newest.attempt.to_string()) {
            fs.remove_file(&path).unwrap();
        }
    }
    let store = open(&fs, 53).unwrap();
    assert_eq!(read(&store, 0, 1).unwrap(), expected[&1][0]);
    assert_eq!(read(&store, 0, 2).unwrap(), expected[&2][0]);
    assert_eq!(
        read(&store, 0, 3).unwrap_err().class(),
        ErrorClass::Integrity
    );
}

#[test]
fn dropped_newest_layers_and_an_older_store_are_noticed_with_an_expected_head() {
    use crate::layer::fs::StoreFs;
    let (fs, _) = prepared();
    let store = open(&fs, 50).unwrap();
    let anchor = store.head(GROUP).unwrap().unwrap().anchor();
    assert!(store.verify(GROUP, Some(&anchor)).unwrap().is_clean());
    for change in 0..3 {
        let mut other = anchor.clone();
        match change {
            0 => other.volumes[0].state_root = Hash32([1; 32]),
            1 => other.volumes[1].chain = uuid::Uuid::from_u128(1),
            _ => other.group = "another".into(),
        }
        assert!(!store.verify(GROUP, Some(&other)).unwrap().is_clean());
    }
    drop(store);
    let newest = fs
        .files()
        .into_iter()
        .find(|path| path.ends_with("m-00000000000000000003"))
        .unwrap();
    fs.remove_file(&newest).unwrap();
    let store = open(&fs, 51).unwrap();
    assert!(
        store.verify(GROUP, None).unwrap().is_clean(),
        "nothing inside the store can tell"
    );
    let report = store.verify(GROUP, Some(&anchor)).unwrap();
    assert!(
        report.damages[0].what.contains("dropped"),
        "{:?}",
        report.damages
    );
}

#[test]
fn a_damaged_head_is_neither_passed_by_nor_built_upon_and_nothing_is_collected() {
    let (fs, expected) = prepared();
    let head = fs
        .files()
        .into_iter()
        .find(|path| path.ends_with("m-00000000000000000003"))
        .unwrap();
    fs.tamper(&head, |bytes| bytes[100] ^= 1);
    let files = fs.files();
    let store = open(&fs, 50).unwrap();
    assert_eq!(
        fs.files(),
        files,
        "what an unreadable manifest names must not be collected"
    );
    assert_eq!(
        store.collect_garbage().unwrap(),
        Collected {
            files: 0,
            groups_left_alone: 1
        }
    );
    assert_eq!(
        store.head(GROUP).unwrap_err().class(),
        ErrorClass::Integrity
    );
    let mut volumes = Volumes::new(&[14 * BLOCK - 7, 3 * BLOCK]);
    volumes.images = expected[&3].clone();
    volumes.write(0, 1, 9);
    for kind in [LayerKind::Differential, LayerKind::Rescan] {
        let error = volumes.capture(&store, kind).unwrap_err();
        assert_eq!(error.class(), ErrorClass::Integrity, "{error}");
    }
    // A new baseline is the way on; it continues the sequence.
    assert_eq!(
        volumes
            .capture(&store, LayerKind::Baseline)
            .unwrap()
            .sequence,
        4
    );
    assert_eq!(read(&store, 0, 4).unwrap(), volumes.images[0]);
    volumes.write(0, 2, 9);
    assert_eq!(
        volumes
            .capture(&store, LayerKind::Differential)
            .unwrap()
            .sequence,
        5
    );
    assert_eq!(read(&store, 0, 2).unwrap(), expected[&2][0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// A manifest may carry a right hash and still be nonsense: no panic, no huge allocation, and
    /// never wrong bytes without a word.
    #[test]
    fn a_manifest_with_nonsense_in_it_never_panics(
        leaf in any::<prop::sample::Index>(), choice in 0usize..9, number in any::<u64>(), which in 1u64..4
    ) {
        let (fs, expected) = prepared();
        let path = fs.files().into_iter().find(|path| path.ends_with(&format!("{which}"))).unwrap();
        fs.tamper(&path, |bytes| {
            let body_len = u64::from_le_bytes(bytes[16..24].try_into().unwrap()) as usize;
            let mut body: serde_json::Value = serde_json::from_slice(&bytes[24..24 + body_len]).unwrap();
            let mut leaves = Vec::new();
            collect_leaves(&body, String::new(), &mut leaves);
            let pointer = &leaves[leaf.index(leaves.len())];
            let new = match choice {
                0 => serde_json::json!(number),
                1 => serde_json::json!(number >> 40),
                2 => serde_json::json!(u64::MAX),
                3 => serde_json::json!(0),
                4 => serde_json::json!(-1),
                5 => serde_json::json!(null),
                6 => serde_json::json!("x"),
                7 => serde_json::json!([]),
                _ => serde_json::json!({}),
            };
            *body.pointer_mut(pointer).unwrap() = new;
            let body = serde_json::to_vec(&body).unwrap();
            let mut out = bytes[..16].to_vec();
            out.extend_from_slice(&(body.len() as u64).to_le_bytes());
            out.extend_from_slice(&body);
            let mut hasher = blake3::Hasher::new_derive_key("soe layer manifest 1");
            hasher.update(&out);
            out.extend_from_slice(hasher.finalize().as_bytes());
            out.extend_from_slice(&[0; 4]);
            *bytes = out;
        });
        let _ = noticed(&fs);
        never_wrong_bytes(&fs, &expected).map_err(TestCaseError::fail)?;
    }

    #[test]
    fn arbitrary_bytes_in_place_of_any_file_never_panic(
        file in any::<prop::sample::Index>(), bytes in proptest::collection::vec(any::<u8>(), 0..600), keep in 0usize..200
    ) {
        let (fs, expected) = prepared();
        let files = fs.files();
        let path = &files[file.index(files.len())];
        // The beginning is kept, so that some get past the first checks.
        fs.tamper(path, |old| {
            old.truncate(keep);
            old.extend_from_slice(&bytes);
        });
        if fs.contents() != prepared().0.contents() {
            noticed(&fs).map_err(TestCaseError::fail)?;
        }
        never_wrong_bytes(&fs, &expected).map_err(TestCaseError::fail)?;
    }
}

fn collect_leaves(value: &serde_json::Value, at: String, out: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(fields) => {
            fields
                .iter()
                .for_each(|(name, value)| collect_leaves(value, format!("{at}/{name}"), out));
        }
        serde_json::Value::Array(items) if !items.is_empty() => {
            items
                .iter()
                .enumerate()
                .for_each(|(i, value)| collect_leaves(value, format!("{at}/{i}"), out));
        }
        _ => out.push(at),
    }
}

#[test]
fn a_layer_in_the_place_of_the_parent_is_noticed() {
    use crate::layer::fs::StoreFs;
    let fs = SimFs::new(5);
    let mut volumes = Volumes::new(&[14 * BLOCK]);
    volumes.write(0, 3, 7);
    volumes
        .capture(&open(&fs, 1).unwrap(), LayerKind::Baseline)
        .unwrap();
    // Two histories of the same store from here on, each of them right in itself.
    let other = fs.fork(1);
    let mut other_volumes = volumes.clone();
    other_volumes.write(0, 4, 99);
    let stray = other_volumes
        .capture(&open(&other, 3).unwrap(), LayerKind::Differential)
        .unwrap();
    let store = open(&fs, 2).unwrap();
    for content in [11, 13] {
        volumes.write(0, 5, content);
        volumes.capture(&store, LayerKind::Differential).unwrap();
    }
    drop(store);
    assert!(
        open(&fs, 4)
            .unwrap()
            .verify(GROUP, None)
            .unwrap()
            .is_clean()
    );
    // The second layer of the other history takes the place of ours.
    for (path, bytes) in other.contents() {
        let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
        if folder.ends_with(&stray.attempt.to_string()) {
            let _ = fs.create_dir(folder);
            fs.create(&path).unwrap();
        }
        fs.tamper(&path, |old| *old = bytes);
    }
    let store = open(&fs, 4).unwrap();
    assert_eq!(read(&store, 0, 2).unwrap(), other_volumes.images[0]);
    let error = read(&store, 0, 3).unwrap_err();
    assert!(
        matches!(error, LayerError::BrokenChain { sequence: 3, .. }),
        "{error}"
    );
    let report = store.verify(GROUP, None).unwrap();
    assert!(
        report
            .damages
            .iter()
            .any(|damage| damage.sequence == Some(3)),
        "{report:?}"
    );
    let error = volumes.capture(&store, LayerKind::Rescan).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Integrity, "{error}");
}
