//! Manifests whose hash is right and whose content is not: made by a mistake of another version, or by
//! somebody who means harm (layers are not signed yet). They are refused or read, and nothing panics.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::damage::prepared;
use super::support::*;
use crate::layer::manifest::{decode, seal};

/// All values of a document that hold no other, by their path.
fn leaves(value: &Value, path: &str, out: &mut Vec<String>) {
    match value {
        Value::Object(map) => map
            .iter()
            .for_each(|(key, inner)| leaves(inner, &format!("{path}/{key}"), out)),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .for_each(|(at, inner)| leaves(inner, &format!("{path}/{at}"), out)),
        _ => out.push(path.to_owned()),
    }
}

fn other_values() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        Just(json!([])),
        Just(json!({})),
        any::<u64>().prop_map(Value::from),
        (0u64..20).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        Just(json!(u64::MAX)),
        "[a-z0-9./-]{0,70}".prop_map(Value::from),
        "[0-9a-f]{64}".prop_map(Value::from),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn a_sealed_lie_never_panics(
        which in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), other_values()), 1..4),
    ) {
        let (fs, expected) = prepared();
        let manifests: Vec<(String, Vec<u8>)> = fs
            .contents()
            .into_iter()
            .filter(|(path, _)| path.contains("/m-"))
            .collect();
        let (path, bytes) = &manifests[which.index(manifests.len())];
        let honest = decode(path, bytes).unwrap();
        let mut document = serde_json::to_value(&honest).unwrap();
        prop_assert_eq!(&seal(&serde_json::to_vec(&document).unwrap())[..24], &bytes[..24]);
        let mut paths = Vec::new();
        leaves(&document, "", &mut paths);
        for (leaf, value) in changes {
            let leaf = &paths[leaf.index(paths.len())];
            // An earlier change may have taken it away.
            if let Some(place) = document.pointer_mut(leaf) {
                *place = value;
            }
        }
        let lie = seal(&serde_json::to_vec(&document).unwrap());
        let _ = decode(path, &lie);
        fs.tamper(path, |bytes| *bytes = lie);
        if let Ok(store) = open(&fs, 60) {
            let _ = store.verify(GROUP, None);
            for sequence in expected.keys() {
                for volume in 0..2 {
                    let _ = store.image(GROUP, &volume_name(volume), Some(*sequence));
                }
            }
        }
    }

    #[test]
    fn a_sealed_body_of_any_bytes_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(decode("m", &seal(&bytes)).is_err());
        prop_assert!(decode("m", &bytes).is_err());
    }
}
