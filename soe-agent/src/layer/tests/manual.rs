//! docs/layer-format.md is enough to read a store: this reader follows its tables and uses nothing
//! of the store's own code.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::support::*;
use crate::layer::fs::DirFs;
use crate::layer::{LayerKind, LayerStore};

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn derived(context: &str, bytes: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new_derive_key(context)
        .update(bytes)
        .finalize()
        .as_bytes()
}

/// Section 7.
fn manifest(file: &[u8]) -> serde_json::Value {
    assert_eq!(&file[..8], b"SOEMANI\0");
    assert_eq!(
        (u16_at(file, 8), u16_at(file, 10), u32_at(file, 12)),
        (1, 0, 0)
    );
    let b = u64_at(file, 16) as usize;
    assert_eq!(file.len(), 60 + b);
    assert_eq!(
        file[24 + b..56 + b],
        derived("soe layer manifest 1", &file[..24 + b])
    );
    assert_eq!(u32_at(file, 56 + b), 0);
    serde_json::from_slice(&file[24..24 + b]).unwrap()
}

fn file_of(folder: &Path, named: &serde_json::Value) -> Vec<u8> {
    let bytes = std::fs::read(folder.join(named["file"].as_str().unwrap())).unwrap();
    assert_eq!(bytes.len() as u64, named["len"]);
    assert_eq!(blake3::hash(&bytes).to_hex().as_str(), named["blake3"]);
    bytes
}

/// Sections 5 and 6: lays a layer over `image` and notes the hashes of its blocks.
fn lay_over(folder: &Path, layer: &serde_json::Value, image: &mut [u8], leaves: &mut [[u8; 32]]) {
    let segments: Vec<_> = layer["segments"]
        .as_array()
        .unwrap()
        .iter()
        .map(|named| file_of(folder, named))
        .collect();
    for (number, segment) in (0u32..).zip(&segments) {
        assert_eq!(&segment[..8], b"SOESEGM\0");
        assert_eq!((u16_at(segment, 8), u32_at(segment, 12)), (1, number));
        assert_eq!(u32_at(segment, 124), crc32c::crc32c(&segment[..124]));
    }
    let index = file_of(folder, &layer["index"]);
    assert_eq!(&index[..8], b"SOEINDX\0");
    assert_eq!(u32_at(&index, 60), crc32c::crc32c(&index[..60]));
    let block_size = u32_at(&index, 12) as usize;
    assert_eq!(u64_at(&index, 16), image.len() as u64);
    let (n, m) = (u64_at(&index, 24) as usize, u64_at(&index, 32) as usize);
    let (entries, rest) = index[64..].split_at(64 * n);
    let (holes, sums) = rest.split_at(16 * m);
    assert_eq!(
        (u32_at(sums, 0), u32_at(sums, 4)),
        (crc32c::crc32c(entries), crc32c::crc32c(holes))
    );
    assert_eq!(sums.len(), 8);
    for entry in entries.chunks(64) {
        let (block, offset) = (u64_at(entry, 0) as usize, u64_at(entry, 8) as usize);
        let (len, segment) = (u32_at(entry, 16) as usize, u32_at(entry, 20) as usize);
        let stored = &segments[segment][offset..offset + len];
        let end = image.len().min((block + 1) * block_size);
        let data = match entry[24] {
            1 => stored.to_vec(),
            2 => zstd::bulk::decompress(stored, block_size).unwrap(),
            other => panic!("codec {other}"),
        };
        assert_eq!(blake3::hash(&data).as_bytes(), &entry[32..]);
        image[block * block_size..end].copy_from_slice(&data);
        leaves[block] = entry[32..].try_into().unwrap();
    }
    for hole in holes.chunks(16) {
        let (start, count) = (u64_at(hole, 0) as usize, u64_at(hole, 8) as usize);
        let end = image.len().min((start + count) * block_size);
        image[start * block_size..end].fill(0);
        leaves[start..start + count].fill([0; 32]);
    }
}

/// Section 8.
fn state_root(volume_bytes: u64, block_size: u32, leaves: &[[u8; 32]]) -> [u8; 32] {
    let mut level = leaves.to_vec();
    let mut height = 1;
    while level.len() > 1 {
        let node = |children: &[[u8; 32]]| {
            derived(
                "soe layer state node 1",
                &[&[height][..], &children.concat()].concat(),
            )
        };
        level = level.chunks(16).map(node).collect();
        height += 1;
    }
    let parts = [
        &volume_bytes.to_le_bytes()[..],
        &block_size.to_le_bytes(),
        &level[0],
    ];
    derived("soe layer state root 1", &parts.concat())
}

#[test]
fn a_reader_written_from_the_document_alone_gets_every_image_back() {
    let folder = tempfile::tempdir().unwrap();
    let store =
        LayerStore::open(Arc::new(DirFs::create(folder.path()).unwrap()), options(1)).unwrap();
    let mut volumes = Volumes::new(&[300 * BLOCK - 100, 5 * BLOCK]);
    let mut images = BTreeMap::new();
    for (round, kind) in [
        LayerKind::Baseline,
        LayerKind::Differential,
        LayerKind::Rescan,
        LayerKind::Baseline,
    ]
    .into_iter()
    .enumerate()
    {
        (0..9).for_each(|i| volumes.write(0, (i * 37 + round as u64 * 11) % 300, i + round as u64));
        volumes.write(1, round as u64, 5);
        let sequence = volumes.capture(&store, kind).unwrap().sequence;
        images.insert(sequence, volumes.images.clone());
    }
    drop(store);

    let header = std::fs::read(folder.path().join("store")).unwrap();
    assert_eq!(
        (header.len(), &header[..8], u16_at(&header, 8)),
        (36, &b"SOESTOR\0"[..], 1)
    );
    assert_eq!(u32_at(&header, 32), crc32c::crc32c(&header[..32]));
    let group = folder.path().join("g-db%2feu%201");
    let mut state: Vec<_> = volumes
        .images
        .iter()
        .map(|image| {
            (
                vec![0xeeu8; image.len()],
                vec![[0xee; 32]; image.len().div_ceil(BLOCK)],
            )
        })
        .collect();
    for (sequence, expected) in images {
        let manifest = manifest(&std::fs::read(group.join(format!("m-{sequence:020}"))).unwrap());
        assert_eq!(manifest["group"], GROUP);
        assert_eq!(manifest["sequence"], sequence);
        let attempt = group.join(format!("a-{}", manifest["attempt"].as_str().unwrap()));
        for (position, layer) in manifest["volumes"].as_array().unwrap().iter().enumerate() {
            let (image, leaves) = &mut state[position];
            if layer["parent"].is_null() {
                image.fill(0xee); // a baseline lies over nothing
            } else {
                let bytes = image.len() as u64;
                assert_eq!(
                    layer["parent"]["state_root"],
                    hex(&state_root(bytes, BLOCK as u32, leaves))
                );
            }
            lay_over(&attempt, layer, image, leaves);
            assert!(
                image == &expected[position],
                "layer {sequence} of volume {position}"
            );
            assert_eq!(
                layer["state_root"],
                hex(&state_root(image.len() as u64, BLOCK as u32, leaves))
            );
            let mut parts = blake3::hash(
                &std::fs::read(attempt.join(layer["index"]["file"].as_str().unwrap())).unwrap(),
            )
            .as_bytes()
            .to_vec();
            parts.extend(layer["index"]["len"].as_u64().unwrap().to_le_bytes());
            let segments = layer["segments"].as_array().unwrap();
            parts.extend((segments.len() as u32).to_le_bytes());
            for segment in segments {
                parts.extend(
                    blake3::Hash::from_hex(segment["blake3"].as_str().unwrap())
                        .unwrap()
                        .as_bytes(),
                );
                parts.extend(segment["len"].as_u64().unwrap().to_le_bytes());
            }
            assert_eq!(
                layer["delta_root"],
                hex(&derived("soe layer delta root 1", &parts))
            );
        }
    }
}
