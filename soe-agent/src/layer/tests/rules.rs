//! The rules of attempts and chains, one by one.

use std::sync::Arc;

use soe_common::{BlockIndex, Epoch};

use super::support::*;
use crate::layer::fs::{DirFs, SimFs};
use crate::layer::*;

fn two_volumes() -> Volumes {
    let mut volumes = Volumes::new(&[20 * BLOCK - 7, 6 * BLOCK]);
    (0..12).for_each(|block| volumes.write(0, block, 2 * block + 1));
    volumes
}

#[test]
fn the_manifest_says_what_the_capture_said() {
    let fs = SimFs::new(1);
    let store = open(&fs, 1).unwrap();
    assert_eq!(store.head(GROUP).unwrap(), None);
    let mut volumes = two_volumes();
    let baseline = volumes.capture(&store, LayerKind::Baseline).unwrap();
    volumes.write(0, 1, 0);
    volumes.write(0, 2, 5);
    let manifest = volumes.capture(&store, LayerKind::Differential).unwrap();
    assert_eq!(store.head(GROUP).unwrap().as_ref(), Some(&manifest));
    drop(store);
    let store = open(&fs, 2).unwrap();
    assert_eq!(
        store.head(GROUP).unwrap().as_ref(),
        Some(&manifest),
        "the same after reading it back"
    );
    assert_eq!(
        (manifest.level, manifest.method),
        (CutLevel::Filesystem, CutMethod::Freeze)
    );
    assert_eq!((manifest.pause_us, manifest.skew_us), (1200, 3));
    let layer = manifest.volume("/dev/disk0").unwrap();
    assert_eq!((layer.cut_epoch, layer.since_epoch), (Epoch(7), Epoch(6)));
    assert_eq!(
        (layer.data_blocks, layer.hole_blocks, layer.changed_blocks()),
        (1, 1, 2)
    );
    let parent = layer.parent.as_ref().unwrap();
    let base = baseline.volume("/dev/disk0").unwrap();
    assert_eq!((parent.sequence, parent.state_root), (1, base.state_root));
    assert_eq!(layer.chain, base.chain);
    assert_eq!((base.data_blocks, base.hole_blocks), (12, 8));
    assert_eq!(store.layers(GROUP, "/dev/disk0").unwrap().len(), 2);
    assert_eq!(store.find(layer.id.as_str()).unwrap().layer().id, layer.id);
    let cut_at = manifest.cut_at;
    let at = |instant| {
        store
            .layer_at(GROUP, "/dev/disk0", instant)
            .map(|found| found.manifest.sequence)
    };
    assert_eq!(
        at(cut_at).unwrap(),
        2,
        "both were cut then; the newer one counts"
    );
    assert_eq!(at(cut_at - 1).unwrap_err().class(), ErrorClass::Usage);
    assert_eq!(store.find("").unwrap_err().class(), ErrorClass::Usage);
    assert_eq!(store.groups(), [GROUP]);
}

#[test]
fn the_state_root_depends_on_content_only() {
    let root = |captures: &[LayerKind]| {
        let store = open(&SimFs::new(1), 1).unwrap();
        let mut volumes = Volumes::new(&[20 * BLOCK - 7, 6 * BLOCK]);
        captures.iter().enumerate().for_each(|(round, kind)| {
            volumes.write(0, round as u64, 7);
            volumes.capture(&store, *kind).unwrap();
        });
        (captures.len() as u64..5).for_each(|block| volumes.write(0, block, 7));
        let last = volumes.capture(&store, LayerKind::Rescan).unwrap();
        last.volumes
            .iter()
            .map(|layer| layer.state_root)
            .collect::<Vec<_>>()
    };
    use LayerKind::{Baseline, Differential};
    let one = root(&[Baseline]);
    assert_eq!(one, root(&[Baseline, Differential, Differential]));
    assert_eq!(one, root(&[Baseline, Differential, Baseline, Differential]));
    assert_ne!(one[0], one[1]);
}

#[test]
fn a_block_put_again_keeps_the_last_content_whatever_came_before() {
    let store = open(&SimFs::new(1), 1).unwrap();
    let mut volumes = two_volumes();
    volumes.capture(&store, LayerKind::Baseline).unwrap();
    let parent_block = volumes.block(0, 3).to_vec();
    let contents = |content| {
        let mut block = vec![0; BLOCK];
        fill(&mut block, content);
        block
    };
    // Every order of: data, other data, zeroes, what the parent has; put plainly or compared.
    let kinds = [contents(41), contents(43), contents(0), parent_block];
    for first in &kinds {
        for second in &kinds {
            for compare in [false, true] {
                let mut attempt = store
                    .begin(GROUP, volumes.specs(LayerKind::Differential))
                    .unwrap();
                attempt.put_block(0, BlockIndex(3), first).unwrap();
                let put = if compare {
                    attempt.put_if_different(0, BlockIndex(3), second).unwrap()
                } else {
                    attempt.put_block(0, BlockIndex(3), second).unwrap()
                };
                let unchanged = compare && second == &kinds[3];
                assert_eq!(put == Put::Unchanged, unchanged);
                assert_eq!(put == Put::Hole, second == &kinds[2]);
                assert_eq!(attempt.changed_blocks(0), u64::from(!unchanged));
                let sequence = attempt.commit(cut(2)).unwrap().sequence;
                assert_eq!(
                    &read(&store, 0, sequence).unwrap()[3 * BLOCK..4 * BLOCK],
                    second.as_slice()
                );
                // Back to what the parent had, for the next round.
                let mut attempt = store
                    .begin(GROUP, volumes.specs(LayerKind::Differential))
                    .unwrap();
                attempt.put_block(0, BlockIndex(3), &kinds[3]).unwrap();
                attempt.commit(cut(2)).unwrap();
            }
        }
    }
    assert!(store.verify(GROUP, None).unwrap().is_clean());
}

#[test]
fn holes_cost_nothing() {
    let fs = SimFs::new(1);
    let store = open(&fs, 1).unwrap();
    let spec = LayerSpec {
        volume: "v".into(),
        device_id: "d".into(),
        volume_bytes: 1 << 30,
        block_size: 1 << 16,
        kind: LayerKind::Baseline,
    };
    let mut attempt = store.begin(GROUP, vec![spec]).unwrap();
    let zeroes = vec![0; 1 << 16];
    (0..1 << 14).for_each(|block| {
        assert_eq!(
            attempt.put_block(0, BlockIndex(block), &zeroes).unwrap(),
            Put::Hole
        )
    });
    let manifest = attempt.commit(cut(1)).unwrap();
    assert_eq!(manifest.volumes[0].hole_blocks, 1 << 14);
    assert!(manifest.volumes[0].segments.is_empty());
    assert!(
        fs.used_bytes() < 2000,
        "{} bytes for an empty volume of a gibibyte",
        fs.used_bytes()
    );
}

#[test]
fn blocks_that_do_not_fit_are_refused_and_the_attempt_goes_on() {
    let store = open(&SimFs::new(1), 1).unwrap();
    let mut volumes = two_volumes();
    let mut attempt = store
        .begin(GROUP, volumes.specs(LayerKind::Baseline))
        .unwrap();
    let full = vec![1; BLOCK];
    for (block, data) in [
        (0, &full[1..]),
        (20, &full[..]),
        (19, &full[..]),
        (u64::MAX, &full[..]),
        (1 << 60, &full[..]),
    ] {
        let error = attempt.put_block(0, BlockIndex(block), data).unwrap_err();
        assert!(matches!(error, LayerError::BadBlock { .. }), "{error}");
    }
    assert!(matches!(
        attempt.put_block(2, BlockIndex(0), &full),
        Err(LayerError::BadRequest { .. })
    ));
    volumes.put(&mut attempt, LayerKind::Baseline).unwrap();
    attempt.commit(cut(2)).unwrap();
    volumes.write(0, 19, 3);
    volumes.capture(&store, LayerKind::Differential).unwrap();
    assert_eq!(read(&store, 0, 2).unwrap(), volumes.images[0]);
}

#[test]
fn a_baseline_or_rescan_that_missed_a_block_is_not_stored() {
    let fs = SimFs::new(1);
    let store = open(&fs, 1).unwrap();
    let mut volumes = two_volumes();
    for kind in [LayerKind::Baseline, LayerKind::Rescan] {
        let mut attempt = store.begin(GROUP, volumes.specs(kind)).unwrap();
        for volume in 0..2 {
            for block in (0..volumes.blocks(volume)).filter(|&block| (volume, block) != (1, 4)) {
                attempt
                    .put_if_different(volume, BlockIndex(block), volumes.block(volume, block))
                    .unwrap();
            }
        }
        let error = attempt.commit(cut(2)).unwrap_err();
        assert!(
            matches!(error, LayerError::Incomplete { block: 4, .. }),
            "{error}"
        );
        if kind == LayerKind::Baseline {
            assert_eq!(store.head(GROUP).unwrap(), None);
            volumes.capture(&store, LayerKind::Baseline).unwrap();
        }
    }
    assert_eq!(store.head(GROUP).unwrap().unwrap().sequence, 1);
    assert!(store.verify(GROUP, None).unwrap().is_clean());
}

#[test]
fn what_cannot_be_a_differential_needs_a_baseline_and_says_why() {
    let store = open(&SimFs::new(1), 1).unwrap();
    let mut volumes = two_volumes();
    let refused = |specs: Vec<LayerSpec>, reason: &str| {
        let error = store.begin(GROUP, specs).err().unwrap();
        assert!(
            matches!(error, LayerError::NeedsBaseline { .. }) && error.to_string().contains(reason),
            "{error}"
        );
        assert_eq!(error.class(), ErrorClass::Refused);
    };
    for kind in [LayerKind::Differential, LayerKind::Rescan] {
        refused(volumes.specs(kind), "no baseline yet");
    }
    volumes.capture(&store, LayerKind::Baseline).unwrap();
    let change = |kind, change: &dyn Fn(&mut LayerSpec)| {
        let mut specs = volumes.specs(kind);
        change(&mut specs[1]);
        specs
    };
    for kind in [LayerKind::Differential, LayerKind::Rescan] {
        refused(change(kind, &|spec| spec.volume_bytes += 512), "bytes");
        refused(change(kind, &|spec| spec.block_size *= 2), "in blocks of");
    }
    refused(
        change(LayerKind::Differential, &|spec| {
            spec.device_id = "other".into()
        }),
        "other",
    );
    // A rescan compares every byte, so another device is no harm.
    drop(
        store
            .begin(
                GROUP,
                change(LayerKind::Rescan, &|spec| spec.device_id = "other".into()),
            )
            .unwrap(),
    );
    for bad in [
        change(LayerKind::Baseline, &|spec| spec.block_size = 1000),
        change(LayerKind::Baseline, &|spec| spec.volume_bytes = 0),
        change(LayerKind::Baseline, &|spec| {
            spec.volume = "/dev/disk0".into()
        }),
        Vec::new(),
    ] {
        assert_eq!(
            store.begin(GROUP, bad).err().unwrap().class(),
            ErrorClass::Usage
        );
    }
}

#[test]
fn a_new_baseline_continues_the_sequence_and_begins_a_chain() {
    let store = open(&SimFs::new(1), 1).unwrap();
    let mut volumes = two_volumes();
    let first = volumes.capture(&store, LayerKind::Baseline).unwrap();
    let second = volumes.capture(&store, LayerKind::Baseline).unwrap();
    assert_eq!(second.sequence, 2);
    assert_ne!(first.volumes[0].chain, second.volumes[0].chain);
    assert_eq!(first.volumes[0].state_root, second.volumes[0].state_root);
    volumes.write(0, 0, 3);
    let third = volumes.capture(&store, LayerKind::Differential).unwrap();
    assert_eq!(third.volumes[0].chain, second.volumes[0].chain);
    assert_eq!(
        store
            .image(GROUP, "/dev/disk0", Some(3))
            .unwrap()
            .layers()
            .len(),
        2
    );
}

#[test]
fn a_volume_that_pauses_in_its_group_continues_from_its_own_last_layer() {
    let store = open(&SimFs::new(1), 1).unwrap();
    let mut both = two_volumes();
    both.capture(&store, LayerKind::Baseline).unwrap();
    both.write(1, 2, 9);
    let mut first_only = both.clone();
    first_only.images.truncate(1);
    first_only.changed.truncate(1);
    first_only.write(0, 7, 99);
    first_only.capture(&store, LayerKind::Differential).unwrap();
    assert_eq!(
        store
            .volume_head(GROUP, "/dev/disk1")
            .unwrap()
            .unwrap()
            .manifest
            .sequence,
        1
    );
    both.images[0] = first_only.images[0].clone();
    let third = both.capture(&store, LayerKind::Differential).unwrap();
    assert_eq!(third.volumes[0].parent.as_ref().unwrap().sequence, 2);
    assert_eq!(third.volumes[1].parent.as_ref().unwrap().sequence, 1);
    assert_eq!(read(&store, 1, 3).unwrap(), both.images[1]);
    assert_eq!(
        store
            .image(GROUP, "/dev/disk1", Some(2))
            .err()
            .unwrap()
            .class(),
        ErrorClass::Usage
    );
    assert!(store.verify(GROUP, None).unwrap().is_clean());
}

#[test]
fn one_attempt_a_group_one_writer_a_store_any_number_of_readers() {
    let fs = SimFs::new(1);
    let store = open(&fs, 1).unwrap();
    let mut volumes = two_volumes();
    volumes.capture(&store, LayerKind::Baseline).unwrap();
    volumes.write(0, 5, 9);
    let mut attempt = store
        .begin(GROUP, volumes.specs(LayerKind::Differential))
        .unwrap();
    let busy = store
        .begin(GROUP, volumes.specs(LayerKind::Differential))
        .err()
        .unwrap();
    assert_eq!(busy.class(), ErrorClass::Refused);
    store
        .begin("another", volumes.specs(LayerKind::Baseline))
        .unwrap()
        .abort();
    assert!(matches!(open(&fs, 2), Err(LayerError::Busy { .. })));
    // A reader in another process neither waits nor collects what the attempt has written.
    let readers = StoreOptions {
        read_only: true,
        ..options(3)
    };
    let reader = LayerStore::open(Arc::new(fs.clone()), readers).unwrap();
    volumes.put(&mut attempt, LayerKind::Differential).unwrap();
    assert_eq!(store.collect_garbage().unwrap().files, 0);
    assert!(
        reader
            .begin(GROUP, volumes.specs(LayerKind::Differential))
            .is_err()
    );
    attempt.commit(cut(2)).unwrap();
    assert_eq!(reader.head(GROUP).unwrap().unwrap().sequence, 1);
    reader.refresh(GROUP).unwrap();
    assert_eq!(read(&reader, 0, 2).unwrap(), volumes.images[0]);
    drop(store);
    open(&fs, 4).unwrap();
}

#[test]
fn an_attempt_that_is_dropped_leaves_nothing_behind() {
    let fs = SimFs::new(1);
    let store = open(&fs, 1).unwrap();
    let mut volumes = two_volumes();
    volumes.capture(&store, LayerKind::Baseline).unwrap();
    let before = fs.contents();
    let mut attempt = store
        .begin(GROUP, volumes.specs(LayerKind::Baseline))
        .unwrap();
    volumes.put(&mut attempt, LayerKind::Baseline).unwrap();
    assert_ne!(fs.contents(), before);
    attempt.abort();
    assert_eq!(fs.contents(), before);
    volumes.capture(&store, LayerKind::Differential).unwrap();
}

#[test]
fn a_folder_with_groups_but_no_header_is_not_taken_for_a_new_store() {
    let fs = SimFs::new(1);
    let store = open(&fs, 1).unwrap();
    two_volumes().capture(&store, LayerKind::Baseline).unwrap();
    drop(store);
    let files = fs.files();
    fs.tamper("store", |bytes| bytes[20] ^= 1);
    assert_eq!(open(&fs, 2).err().unwrap().class(), ErrorClass::Integrity);
    use crate::layer::fs::StoreFs;
    fs.remove_file("store").unwrap();
    assert_eq!(open(&fs, 2).err().unwrap().class(), ErrorClass::Integrity);
    assert_eq!(fs.files().len(), files.len() - 1);
}

#[test]
fn reading_alone_changes_nothing_in_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let store =
        LayerStore::open(Arc::new(DirFs::create(folder.path()).unwrap()), options(1)).unwrap();
    let mut volumes = two_volumes();
    volumes.capture(&store, LayerKind::Baseline).unwrap();
    drop(store);
    let list = || {
        let mut out = Vec::new();
        let mut folders = vec![folder.path().to_owned()];
        while let Some(next) = folders.pop() {
            for entry in std::fs::read_dir(next).unwrap().map(Result::unwrap) {
                let meta = entry.metadata().unwrap();
                if meta.is_dir() {
                    folders.push(entry.path());
                } else {
                    out.push((
                        entry.path(),
                        std::fs::read(entry.path()).unwrap(),
                        meta.modified().unwrap(),
                    ));
                }
            }
        }
        out.sort();
        out
    };
    let before = list();
    let readers = StoreOptions {
        read_only: true,
        ..options(2)
    };
    let store = LayerStore::open(Arc::new(DirFs::open(folder.path()).unwrap()), readers).unwrap();
    assert!(store.verify(GROUP, None).unwrap().is_clean());
    assert_eq!(read(&store, 0, 1).unwrap(), volumes.images[0]);
    assert_eq!(list(), before);
}

#[test]
fn attempts_may_move_between_threads_and_images_be_shared() {
    fn moves<T: Send>() {}
    fn shared<T: Send + Sync>() {}
    moves::<LayerAttempt>();
    shared::<Image>();
    shared::<LayerStore>();
}
