//! Which prefetches pay: the share used, learned by kind, strength and distance. Pure.
//!
//! Feedback-directed prefetching (Srinath et al., HPCA 2007) with a table in place of one degree:
//! a run of many requests may be read far ahead, a run of one by a block, or not at all where that
//! turned out to be waste. What is switched off is probed now and then.

/// Where a prefetch comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// An ascending run.
    Up,
    /// A descending run.
    Down,
    /// A sequence seen before.
    Replay,
}

/// Strengths and distances told apart.
const STEPS: usize = 8;
const CELLS: usize = 3 * STEPS * STEPS;
/// Prefetches remembered per cell.
const MEMORY: f32 = 1024.0;
/// Prefetches by which the first guess weighs.
const PRIOR_WEIGHT: f32 = 16.0;
/// The share used that is guessed first.
const PRIOR: f32 = 0.5;
/// A cell that is off is tried once in so many times.
const PROBE: u16 = 32;

/// What one kind of prefetch was good for; noted with each block prefetched.
pub type Cell = u8;

#[derive(Clone, Copy, Debug, Default)]
struct Record {
    used: f32,
    done: f32,
    refused: u16,
}

/// The shares used of all kinds of prefetches.
#[derive(Clone, Debug)]
pub struct Gate {
    cells: [Record; CELLS],
    min_precision: f32,
}

impl Gate {
    /// A gate that lets pass what is used with a chance of at least `min_precision`.
    pub fn new(min_precision: f64) -> Self {
        Self {
            cells: [Record::default(); CELLS],
            min_precision: if min_precision.is_nan() {
                1.0
            } else {
                min_precision.clamp(0.0, 1.0) as f32
            },
        }
    }

    /// The cell of a prefetch `distance` blocks (from 1) ahead after `strength` (from 1) matches.
    pub fn cell(source: Source, strength: u64, distance: u64) -> Cell {
        let step = |x: u64| (x.max(1).ilog2() as usize).min(STEPS - 1);
        ((source as usize * STEPS + step(strength)) * STEPS + step(distance)) as Cell
    }

    /// How many blocks ahead to prefetch, at most `most`.
    pub fn reach(&mut self, source: Source, strength: u64, most: u64) -> u64 {
        for step in 0..STEPS as u32 {
            let before = (1u64 << step) - 1;
            if before >= most {
                return most;
            }
            let cell = usize::from(Self::cell(source, strength, 1 << step));
            if self.precision(cell) < self.min_precision {
                let record = &mut self.cells[cell];
                record.refused = (record.refused + 1) % PROBE;
                return before + u64::from(record.refused == 0);
            }
        }
        most
    }

    /// A prefetched block of `cell` was used, or left the cache unused.
    pub fn learn(&mut self, cell: Cell, used: bool) {
        let Some(record) = self.cells.get_mut(usize::from(cell)) else {
            return;
        };
        record.done += 1.0;
        record.used += f32::from(u8::from(used));
        if record.done >= MEMORY {
            record.done *= 0.5;
            record.used *= 0.5;
        }
    }

    fn precision(&self, cell: usize) -> f32 {
        let record = &self.cells[cell];
        (record.used + PRIOR * PRIOR_WEIGHT) / (record.done + PRIOR_WEIGHT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reach_follows_what_was_used() {
        let mut gate = Gate::new(0.25);
        assert_eq!(gate.reach(Source::Up, 8, 100), 100);
        for _ in 0..100 {
            gate.learn(Gate::cell(Source::Up, 8, 4), false);
            gate.learn(Gate::cell(Source::Up, 1, 1), false);
            gate.learn(Gate::cell(Source::Replay, 8, 1), true);
        }
        assert_eq!(
            gate.reach(Source::Up, 15, 100),
            3,
            "distances of 4 to 7 are waste"
        );
        assert_eq!(gate.reach(Source::Up, 1, 100), 0);
        assert_eq!(
            gate.reach(Source::Up, 16, 100),
            100,
            "longer runs are another matter"
        );
        assert_eq!(gate.reach(Source::Replay, 8, 5), 5);
        let tried: u64 = (0..640).map(|_| gate.reach(Source::Up, 1, 100)).sum();
        assert_eq!(tried, 20, "what is off is probed");
        for _ in 0..500 {
            gate.learn(Gate::cell(Source::Up, 1, 1), true);
        }
        assert!(gate.reach(Source::Up, 1, 100) > 0, "and comes back");
    }

    #[test]
    fn any_cell_is_fine() {
        let mut gate = Gate::new(f64::NEG_INFINITY);
        (0..=255).for_each(|cell| gate.learn(cell, true));
        assert!(usize::from(Gate::cell(Source::Replay, u64::MAX, u64::MAX)) < CELLS);
        assert_eq!(gate.reach(Source::Down, 0, 0), 0);
        assert_eq!(gate.reach(Source::Down, 0, u64::MAX), u64::MAX);
    }
}
