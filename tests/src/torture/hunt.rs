//! Proves that the oracle notices a wrong order of the protocol, and does not blame the right one.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use soe_agent::capture::CapturePolicy;

use super::books::{Books, areas, complain, device_target, raw, seed};
use super::history::SECTOR;
use super::lies::Lie;
use super::load::{EndOnDrop, Gate, Habit, Rhythm, scribble};
use super::oracle::{Violation, Wrong};
use super::rig::{Ask, Rig};
use crate::device::{Aligned, open_direct};

const MIB: u64 = 1 << 20;

/// How a hunt for a mistake goes.
pub struct Hunt<'a> {
    /// Names the hunt in messages and pins.
    pub name: &'a str,
    /// The device; at least 12 MiB.
    pub path: &'a Path,
    /// What its writers do.
    pub habit: Habit,
    /// How many there are.
    pub writers: u64,
    /// When they pause.
    pub rhythm: Rhythm,
    /// Limits of the captures.
    pub policy: CapturePolicy,
    /// Whether every capture reads everything.
    pub baseline: bool,
    /// Cuts after which the hunt gives up.
    pub captures: u32,
}

impl Hunt<'_> {
    /// Captures one volume until a layer is wrong; the number of that layer, and what is wrong.
    fn run(&self, lie: Lie, seed: u64) -> Option<(u32, Vec<Violation>)> {
        const STAMPED: u64 = 12 * MIB;
        let name = format!("{}-{lie:?}", self.name);
        // The device may hold stamps of an earlier hunt.
        let file = open_direct(self.path).expect("the device");
        let blank = Aligned::new(1 << 20, 0);
        for at in 0..STAMPED / MIB {
            file.write_all_at(blank.bytes(), at * MIB).expect("zeroed");
        }
        let mut rig = Rig::new(&name, vec![raw(self.path, STAMPED)], lie);
        let history = rig.history.clone();
        let target = device_target(0, self.path, 1);
        let gate = Gate::default();
        let mut books = Books::default();
        let ask = Ask {
            baseline: self.baseline,
            policy: CapturePolicy {
                audit_blocks: 0,
                ..self.policy
            },
            ..Ask::default()
        };
        let found = std::thread::scope(|scope| {
            let _end = EndOnDrop(&gate);
            let stamped = areas(STAMPED / SECTOR as u64, self.writers);
            for (number, area) in stamped.into_iter().enumerate() {
                let (target, history, gate) = (&target, &*history, &gate);
                let seed = seed ^ (number as u64) << 8;
                scope.spawn(move || scribble(target, area, &self.habit, history, gate, seed));
            }
            scope.spawn(|| gate.beat(&self.rhythm, seed ^ 99));
            let deadline = Instant::now() + Duration::from_secs(120);
            while books.layers < self.captures && Instant::now() < deadline {
                match rig.capture(&ask) {
                    Ok(layer) => {
                        books.take(&layer);
                        if !layer.violations.is_empty() {
                            return Some((books.layers, layer.violations));
                        }
                    }
                    Err(error) => books.fail(&rig, &error),
                }
            }
            None
        });
        books.print(&name, history.issued(), 0);
        if lie == Lie::None {
            assert!(
                books.layers >= 3,
                "the right order made no layers to compare with"
            );
        }
        found
    }

    /// The mistake is found, and the right order is not blamed for it.
    ///
    /// The audit is off: it would end the generation before a wrong layer is made.
    pub fn must_find(&self, lie: Lie, wrong: &[Wrong]) {
        let seed = seed(self.name);
        if let Some((layer, violations)) = self.run(Lie::None, seed) {
            complain(
                &format!("layer {layer} of {} without a lie", self.name),
                &violations,
            );
        }
        let (layer, violations) = self
            .run(lie, seed)
            .unwrap_or_else(|| panic!("{lie:?} was not noticed in {} captures", self.captures));
        let first = &violations[0];
        println!(
            "{lie:?}: noticed at layer {layer}, {} violations, {first}",
            violations.len()
        );
        assert!(wrong.contains(&first.wrong), "{first}");
    }
}
