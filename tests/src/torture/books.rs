//! What came of the attempts, and the small things every torture test needs.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use soe_agent::capture::CaptureError;
use soe_agent::seam::GenerationEnd;

use super::load::Target;
use super::oracle::{Violation, Wrong};
use super::rig::{Layer, Rig, Volume};
use crate::device::open_direct;

/// A number from the environment.
pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// A seed for this run, printed.
pub fn seed(test: &str) -> u64 {
    let seed = number("SOE_TORTURE_SEED").unwrap_or_else(rand::random);
    println!("{test}: SOE_TORTURE_SEED={seed}");
    seed
}

/// What came of the attempts.
#[derive(Default)]
pub struct Books {
    /// Cuts made.
    pub layers: u32,
    /// Layers of each kind, and cuts by each method.
    pub by_kind: BTreeMap<String, u32>,
    /// Attempts that ended without a layer, by reason.
    pub failed: BTreeMap<&'static str, u32>,
    /// The longest time writers were held at a cut.
    pub longest_pause: Duration,
    /// Time the devices stood still, all cuts together.
    pub windows: Duration,
    /// Cuts tried.
    pub tries: u32,
    /// Restarts that adopted the programs.
    pub restarts: u32,
    /// Restarts that replaced them.
    pub upgrades: u32,
}

impl Books {
    /// Counts a layer.
    pub fn take(&mut self, layer: &Layer) {
        self.layers += 1;
        for volume in &layer.cut.volumes {
            *self
                .by_kind
                .entry(format!("{:?}", volume.kind))
                .or_default() += 1;
        }
        *self
            .by_kind
            .entry(format!("{:?}", layer.cut.method))
            .or_default() += 1;
        self.longest_pause = self.longest_pause.max(layer.cut.pause);
        self.windows += layer.cut.window;
        self.tries += layer.cut.tries;
    }

    /// Counts a failure that a capture may have; any other ends the test.
    pub fn fail(&mut self, rig: &Rig, error: &CaptureError) {
        let name = match error {
            CaptureError::NotQuiet { .. } => "not quiet",
            CaptureError::FreezeTooLong { .. } => "freezing takes too long",
            CaptureError::NotConverging { .. } => "not converging",
            CaptureError::FrozenButMoving { .. } => "frozen but moving",
            CaptureError::Cancelled => "cancelled",
            CaptureError::MissedBeforeFirstCut { .. } => "missed before the first cut",
            CaptureError::GenerationChanged { .. } => "generation changed",
            CaptureError::Sink { source } if source.to_string().contains("on purpose") => "refused",
            // All is written through the block layer here: what the audit finds was a layer without it.
            CaptureError::GenerationEnds {
                volume,
                reason: GenerationEnd::AuditFail,
            } => panic!("a block of {volume} changed without a mark"),
            CaptureError::GenerationEnds { volume, .. } => {
                rig.end_generation(rig.number_of(volume).expect("a volume of the group"));
                "generation ended"
            }
            other => panic!("{other}"),
        };
        *self.failed.entry(name).or_default() += 1;
    }

    /// Says what came of it.
    pub fn print(&self, test: &str, history_ops: u64, links: u64) {
        println!(
            "{test}: {} cuts {:?}, {} tries, longest pause {:?}, windows {:?} in all; failed {:?}; \
             {} restarts, {} upgrades; {history_ops} operations, {links} of them dependent",
            self.layers,
            self.by_kind,
            self.tries,
            self.longest_pause,
            self.windows,
            self.failed,
            self.restarts,
            self.upgrades,
        );
    }
}

/// Ends the test when `what` has violations.
pub fn complain(what: &str, violations: &[Violation]) {
    if violations.is_empty() {
        return;
    }
    let mut counts: BTreeMap<(Wrong, usize), u32> = BTreeMap::new();
    for violation in violations {
        *counts
            .entry((violation.wrong, violation.volume))
            .or_default() += 1;
    }
    let first: Vec<String> = violations.iter().take(4).map(ToString::to_string).collect();
    panic!(
        "{what} is not the devices at one instant: {counts:?}\n{}",
        first.join("\n")
    );
}

/// A volume whose first `bytes` are stamped.
pub fn raw(path: &Path, bytes: u64) -> Volume {
    Volume {
        path: path.into(),
        look: Box::new(move |image| image[..bytes as usize].to_vec()),
    }
}

/// A device to write to, in multiples of `align` sectors.
pub fn device_target(volume: usize, path: &Path, align: u64) -> Target {
    Target {
        volume,
        file: open_direct(path).expect("the device"),
        align,
        device: true,
        borders: Vec::new(),
    }
}

/// `parts` equal areas of `[0, sectors)`.
pub fn areas(sectors: u64, parts: u64) -> Vec<Range<u64>> {
    let each = sectors / parts / 128 * 128;
    (0..parts)
        .map(|part| part * each..(part + 1) * each)
        .collect()
}
