//! Full disks and I/O errors at every operation: the capture fails clearly, nothing else is harmed.

use super::support::*;
use crate::layer::fs::{Fault, SimFs};
use crate::layer::*;

/// Two layers that are there before anything goes wrong.
fn prepared() -> (SimFs, Volumes, Expected) {
    let fs = SimFs::new(5);
    let mut volumes = Volumes::new(&[20 * BLOCK - 7, 6 * BLOCK]);
    let mut expected = Expected::new();
    (0..12).for_each(|block| volumes.write(0, block, 2 * block + 1));
    (0..6).for_each(|block| volumes.write(1, block, block));
    let store = open(&fs, 1).unwrap();
    for kind in [LayerKind::Baseline, LayerKind::Differential] {
        volumes.write(0, 4, 55);
        volumes.write(1, 3, 0);
        let manifest = volumes.capture(&store, kind).unwrap();
        expected.insert(manifest.sequence, volumes.images.clone());
    }
    (fs, volumes, expected)
}

fn fails_clearly(fault: Fault) {
    let (fs, volumes, expected) = prepared();
    for op in 0.. {
        let fs = fs.fork(op);
        let mut volumes = volumes.clone();
        let mut expected = expected.clone();
        let store = open(&fs, 10).unwrap();
        (0..9).for_each(|block| volumes.write(0, block, 201 + 2 * block));
        volumes.write(1, 5, 301);
        expected.insert(3, volumes.images.clone());
        let changed = volumes.changed.clone();
        fs.fault_at(fs.ops() + op, fault);
        let before = fs.ops();
        let result = volumes.capture(&store, LayerKind::Differential);
        let reached = fs.ops() > before + op;
        let Err(error) = result else {
            assert!(op > 15 && !reached, "{fault:?} at {op} was swallowed");
            return;
        };
        assert!(reached, "{fault:?} at {op}: {error}");
        assert_eq!(error.class(), ErrorClass::Failed, "{error}");
        assert!(
            fault != Fault::NoSpace || error.to_string().contains("no space"),
            "{error}"
        );
        // Nothing is forgotten: what changed is still known, and the next attempt takes it in.
        assert_eq!(volumes.changed, changed);
        fs.heal();
        let head = store.head(GROUP).unwrap().unwrap().sequence;
        assert!(head == 2 || head == 3, "{head}");
        check(&store, &expected).unwrap_or_else(|what| panic!("{fault:?} at {op}: {what}"));
        let manifest = volumes.capture(&store, LayerKind::Differential).unwrap();
        assert_eq!(manifest.sequence, head + 1);
        expected.insert(manifest.sequence, volumes.images.clone());
        check(&store, &expected).unwrap_or_else(|what| panic!("{fault:?} at {op}, again: {what}"));
        // And the truth survives a power cut, also what a failed sync may have dropped.
        for loss in 0..4 {
            let back = open(&fs.after_power_cut(loss), 11).unwrap();
            assert_eq!(
                back.head(GROUP).unwrap().unwrap().sequence,
                manifest.sequence
            );
            check(&back, &expected)
                .unwrap_or_else(|what| panic!("{fault:?} at {op}, loss {loss}: {what}"));
        }
    }
}

#[test]
fn a_full_disk_at_any_operation_fails_the_attempt_and_nothing_else() {
    fails_clearly(Fault::NoSpace);
}

#[test]
fn an_io_error_at_any_operation_fails_the_attempt_and_nothing_else() {
    fails_clearly(Fault::IoError);
}

#[test]
fn an_io_error_at_any_read_is_told_and_makes_nothing_be_deleted() {
    let (fs, volumes, mut expected) = prepared();
    let contents = fs.contents();
    let mut passed_by = 0;
    for read_op in 0.. {
        let fs = fs.fork(read_op);
        fs.fault_at(read_op, Fault::ReadError);
        let mut volumes = volumes.clone();
        let all = || -> Result<(), String> {
            let store = open(&fs, 20).map_err(|error| error.to_string())?;
            check(&store, &expected)?;
            volumes.write(0, 2, 401);
            expected.insert(3, volumes.images.clone());
            volumes
                .capture(&store, LayerKind::Differential)
                .map_err(|error| error.to_string())?;
            Ok(())
        };
        let result = { all }();
        let reached = fs.reads() > read_op;
        if !reached {
            result.unwrap();
            assert!(read_op > 30, "{read_op}");
            // Only the collection of garbage, which lists the store and the group, may be put off.
            assert_eq!(passed_by, 2);
            return;
        }
        passed_by += u32::from(result.is_ok());
        fs.heal();
        assert!(
            fs.contents().is_superset(&contents),
            "something was deleted after the error at read {read_op}"
        );
        let store = open(&fs, 21).unwrap();
        check(&store, &expected).unwrap();
    }
}
