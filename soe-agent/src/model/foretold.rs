//! What the onset network foretells for one volume, corrected by how it did there.
//!
//! One network serves all volumes, but how often bursts come differs: the log odds are shifted as each
//! volume's outcomes teach. (Learning a slope as well brought nothing.)
//! Where the network loses twice what the plain predictors of [`super::onset`] lose, those serve.

use std::collections::VecDeque;

use super::onset_features::{LEAD, MATURES};
use super::series::Known;

/// How fast the shift follows an outcome.
const RATE: f64 = 0.003;
/// The network serves as long as its loss is no more than this multiple of the plain predictors'.
const WORSE: f64 = 2.0;
/// Seasons after which an outcome counts half.
const HALF_LIFE_SEASONS: f64 = 2.0;

struct Pending {
    /// The first bin that was not known.
    origin: i64,
    log_odds: f64,
    plain: f64,
}

/// The correction of one volume.
#[derive(Default)]
pub struct Foretold {
    shift: f64,
    /// Decayed log losses: the network's and the plain predictors'.
    loss: [f64; 2],
    pending: VecDeque<Pending>,
}

fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

impl Foretold {
    /// The probability that a burst begins in the window ([`LEAD`] bins ahead, to [`MATURES`]): by the
    /// network's `log_odds`, or `plain` where that is better. Also judges what is known by now; asking
    /// again without new bins changes nothing.
    pub fn probability(&mut self, known: Known<'_>, log_odds: f64, plain: f64) -> f64 {
        self.judge(known);
        let origin = known.next_index();
        if self.pending.back().is_none_or(|p| p.origin < origin) {
            self.pending.push_back(Pending {
                origin,
                log_odds,
                plain,
            });
        }
        if self.loss[0] > self.loss[1] * WORSE + 1.0 {
            return plain;
        }
        self.corrected(log_odds)
    }

    fn corrected(&self, log_odds: f64) -> f64 {
        sigmoid(self.shift + log_odds)
    }

    fn judge(&mut self, known: Known<'_>) {
        let next = known.next_index();
        let keep = 0.5f64.powf(1.0 / (HALF_LIFE_SEASONS * known.scale.season_bins() as f64));
        while let Some(first) = self.pending.front() {
            if first.origin + MATURES as i64 > next {
                // A clock that stepped back leaves answers for a time that was rewound.
                if first.origin > next {
                    self.pending.clear();
                }
                return;
            }
            let Some(answer) = self.pending.pop_front() else {
                return;
            };
            let at = usize::try_from(answer.origin - known.first).ok();
            let window = at.and_then(|at| known.rows.get(at + LEAD..at + MATURES));
            let Some(window) = window.filter(|rows| rows.iter().all(|row| row.known)) else {
                continue;
            };
            let happened = window.iter().any(|row| row.onset);
            let p = self.corrected(answer.log_odds);
            let error = p - f64::from(u8::from(happened));
            self.shift -= RATE * error;
            for (loss, p) in self.loss.iter_mut().zip([p, answer.plain]) {
                let p = p.clamp(0.001, 0.999);
                *loss = *loss * keep - if happened { p } else { 1.0 - p }.ln();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::burst::BurstRule;
    use crate::model::series::{LoadBin, Series, TimeScale};
    use std::time::Duration;

    /// Bursts every 30 bins; asks for each quiet bin with fixed log odds.
    fn course(log_odds: f64, plain: f64) -> f64 {
        let scale = TimeScale::new(Duration::from_secs(1), 48).unwrap();
        let mut series = Series::new(scale, BurstRule::STRICT, 8);
        let mut foretold = Foretold::default();
        let mut last = 0.0;
        for i in 0..3000 {
            let load = LoadBin {
                read_bytes: if i % 30 == 0 { 1e9 } else { 1e5 },
                ..LoadBin::default()
            };
            series.push(i * 1_000_000_000, Some(load)).unwrap();
            last = foretold.probability(series.known(), log_odds, plain);
            assert_eq!(last, foretold.probability(series.known(), log_odds, plain));
        }
        last
    }

    #[test]
    fn odds_that_are_too_high_or_too_low_come_to_the_truth() {
        // In a window of six of thirty bins a burst begins: one in five.
        for log_odds in [-3.0, 0.0, 1.0] {
            let p = course(log_odds, 0.2);
            assert!((0.1..0.35).contains(&p), "{log_odds}: {p}");
        }
    }

    #[test]
    fn a_network_that_is_wrong_steps_back() {
        let scale = TimeScale::new(Duration::from_secs(1), 48).unwrap();
        let mut series = Series::new(scale, BurstRule::STRICT, 8);
        let mut foretold = Foretold::default();
        let mut right = 0;
        for i in 0..2000i64 {
            let load = LoadBin {
                read_bytes: if i % 30 == 0 { 1e9 } else { 1e5 },
                ..LoadBin::default()
            };
            series.push(i * 1_000_000_000, Some(load)).unwrap();
            // The plain predictor knows; the network says the opposite.
            let soon = (2..=7).any(|ahead| (i + ahead) % 30 == 0);
            let (odds, plain) = if soon { (-3.0, 0.9) } else { (3.0, 0.1) };
            let p = foretold.probability(series.known(), odds, plain);
            right += u32::from(i > 1000 && (p - plain).abs() < 1e-9);
        }
        assert!(right > 990, "{right}");
    }
}
