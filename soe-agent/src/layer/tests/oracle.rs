//! Random lives of a group against an oracle that keeps every image.

use std::sync::Arc;

use proptest::prelude::*;

use super::support::*;
use crate::layer::fs::{DirFs, SimFs, StoreFs};
use crate::layer::*;

#[derive(Clone, Debug)]
enum Step {
    Write {
        volume: usize,
        block: u64,
        content: u64,
    },
    Discard {
        volume: usize,
        block: u64,
        count: u64,
    },
    Capture(LayerKind),
    /// A pre-copy: everything changed so far is put, some of it is written again and put again.
    CaptureInPasses(Vec<(usize, u64, u64)>),
    Abort,
    Reopen,
}

const SIZES: [usize; 2] = [40 * BLOCK - 100, 17 * BLOCK];

fn address() -> impl Strategy<Value = (usize, u64)> + Clone {
    prop_oneof![(Just(0usize), 0..40u64), (Just(1usize), 0..17u64)]
}

fn step() -> impl Strategy<Value = Step> {
    let write = (address(), 0u64..6);
    prop_oneof![
        8 => write.clone().prop_map(|((volume, block), content)| Step::Write { volume, block, content }),
        1 => (address(), 1u64..20).prop_map(|((volume, block), count)| Step::Discard { volume, block, count }),
        2 => Just(Step::Capture(LayerKind::Differential)),
        1 => Just(Step::Capture(LayerKind::Rescan)),
        1 => Just(Step::Capture(LayerKind::Baseline)),
        1 => proptest::collection::vec(write, 1..8).prop_map(|writes| {
            Step::CaptureInPasses(writes.into_iter().map(|((v, b), content)| (v, b, content)).collect())
        }),
        1 => Just(Step::Abort),
        1 => Just(Step::Reopen),
    ]
}

fn live(fs: Arc<dyn StoreFs>, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let open = |seed| LayerStore::open(fs.clone(), options(seed)).unwrap();
    let mut seed = 1;
    let mut store = Some(open(seed));
    let mut volumes = Volumes::new(&SIZES);
    let mut expected = Expected::new();
    volumes
        .capture(store.as_ref().unwrap(), LayerKind::Baseline)
        .unwrap();
    expected.insert(1, volumes.images.clone());
    for step in steps {
        let current = store.as_ref().unwrap();
        match step {
            Step::Write {
                volume,
                block,
                content,
            } => volumes.write(volume, block, content),
            Step::Discard {
                volume,
                block,
                count,
            } => {
                let end = volumes.blocks(volume).min(block + count);
                (block..end).for_each(|block| volumes.write(volume, block, 0));
            }
            Step::Capture(kind) => {
                let changed: Vec<_> = volumes
                    .changed
                    .iter()
                    .map(|blocks| blocks.len() as u64)
                    .collect();
                let manifest = volumes.capture(current, kind).unwrap();
                for (layer, changed) in manifest.volumes.iter().zip(changed) {
                    prop_assert!(
                        kind != LayerKind::Differential || layer.changed_blocks() == changed
                    );
                    prop_assert!(kind != LayerKind::Rescan || layer.changed_blocks() <= changed);
                }
                expected.insert(manifest.sequence, volumes.images.clone());
            }
            Step::CaptureInPasses(writes) => {
                let kind = LayerKind::Differential;
                let mut attempt = current.begin(GROUP, volumes.specs(kind)).unwrap();
                volumes.put(&mut attempt, kind).unwrap();
                for (volume, block, content) in writes {
                    volumes.write(volume, block, content);
                    attempt
                        .put_block(
                            volume,
                            soe_common::BlockIndex(block),
                            volumes.block(volume, block),
                        )
                        .unwrap();
                }
                let manifest = attempt.commit(cut(SIZES.len())).unwrap();
                volumes.changed.iter_mut().for_each(|blocks| blocks.clear());
                expected.insert(manifest.sequence, volumes.images.clone());
            }
            Step::Abort => {
                let mut attempt = current
                    .begin(GROUP, volumes.specs(LayerKind::Baseline))
                    .unwrap();
                volumes.put(&mut attempt, LayerKind::Baseline).unwrap();
                attempt.abort();
            }
            Step::Reopen => {
                seed += 1;
                drop(store.take());
                store = Some(open(seed));
            }
        }
    }
    let store = store.unwrap();
    prop_assert_eq!(store.manifests(GROUP).unwrap().len(), expected.len());
    prop_assert_eq!(
        store.head(GROUP).unwrap().map(|head| head.sequence),
        expected.keys().last().copied()
    );
    check(&store, &expected).map_err(TestCaseError::fail)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn every_layer_of_a_random_life_is_byte_identical_on_the_simulated_disk(
        steps in proptest::collection::vec(step(), 0..60)
    ) {
        live(Arc::new(SimFs::new(1)), steps)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn every_layer_of_a_random_life_is_byte_identical_in_a_folder(
        steps in proptest::collection::vec(step(), 0..40)
    ) {
        let folder = tempfile::tempdir().unwrap();
        live(Arc::new(DirFs::create(folder.path()).unwrap()), steps)?;
    }
}
