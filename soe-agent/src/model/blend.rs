//! What a volume is served: a blend of all members, weighted by how well each did of late.
//!
//! Every forecast of every member is scored once its bins are known (matured). For each quantile apart,
//! a member's weight is its prior times `exp(-eta * n * r)`, where `r` is its decayed pinball loss relative
//! to that of the weighted mean over the same bins, and `n` counts the evidence (exponential
//! weighting; Berrisch and Ziel, "CRPS learning", 2021, do it for each quantile as well). Such a blend
//! loses little more than the best member. A second record, of hours, takes the weight of a member that
//! turns bad before the first one, of days, would.
//!
//! The outer quantiles are then moved apart or together until they cover what they promise (adaptive
//! conformal inference; Gibbs and Candes, 2021).

use serde::{Deserialize, Serialize};

use super::baselines::Member;
use super::series::{TimeScale, from_log_load, log_load};
use super::{Q50, QUANTILES, QuantileRow};

/// The rules of the blend.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BlendRules {
    /// Seasons of history below which only the exponentially weighted mean serves.
    pub ewma_only_seasons: f64,
    /// Seasons of history below which the members that need more of it do not.
    pub simple_only_seasons: f64,
    /// How sharply weights follow losses, per day of evidence.
    pub eta: f64,
    /// What of the evidence is kept after a 24th of a season, in the slow record and in the fast one.
    pub keep: [f64; 2],
    /// How fast the outer quantiles follow their coverage, per 24th of a season.
    pub coverage_rate: f64,
}

impl Default for BlendRules {
    fn default() -> Self {
        Self {
            ewma_only_seasons: 1.0,
            simple_only_seasons: 2.0,
            eta: 10.0,
            keep: [0.99, 0.85],
            coverage_rate: 0.01,
        }
    }
}

const MEMBERS: usize = Member::ALL.len();
const LEVELS: usize = QUANTILES.len();

/// Weights before there is evidence, by [`Member::index`]: the networks have learnt from many volumes, and
/// the last value is there for those that drift.
const PRIOR: [f64; MEMBERS] = [1.0, 1.0, 1.0, 0.2, 5.0, 2.5];
/// Evidence beyond this many 24ths of a season makes weights no sharper.
const MOST_EVIDENCE: f64 = 168.0;
/// A member whose loss over some hours is this multiple of the weighted mean's loses its weight at once.
const CLEARLY_WORSE: f64 = 1.5;
/// How far the outer quantiles are moved at most, as the log of the factor of their distance.
const WIDEST: (f32, f32) = (-1.0, 1.5);

/// A member's losses over the bins for which it had a forecast, and the weighted mean's over the same.
#[derive(Clone, Copy, Debug, Default)]
struct Record {
    mine: [f64; LEVELS],
    reference: [f64; LEVELS],
    /// 24ths of a season, decayed.
    evidence: f64,
}

impl Record {
    /// The loss relative to that of the weighted mean on the same bins, as which a member without evidence
    /// counts. On bins that the weighted mean foresaw exactly (a dead volume) nobody is better.
    fn ratio(&self, level: usize) -> f64 {
        let (mine, reference) = (self.mine[level], self.reference[level]);
        if reference > 1e-9 {
            mine / reference
        } else if mine > 1e-9 {
            2.0
        } else {
            1.0
        }
    }

    /// Days of evidence.
    fn days(&self) -> f64 {
        self.evidence.min(MOST_EVIDENCE) / 24.0
    }
}

/// The blend of one volume.
#[derive(Clone, Debug)]
pub struct Blend {
    rules: BlendRules,
    /// Decay per bin.
    keep: [f64; 2],
    /// A bin as a share of a 24th of a season.
    bin: f64,
    slow: [Record; MEMBERS],
    fast: [Record; MEMBERS],
    /// How the lower and the upper quantiles are moved.
    width: [f32; 2],
    serving: Member,
    why: String,
}

impl Blend {
    /// A blend without evidence.
    pub fn new(scale: TimeScale, rules: BlendRules) -> Self {
        let bin = 24.0 / scale.season_bins() as f64;
        Self {
            rules,
            keep: rules.keep.map(|keep| keep.powf(bin.min(1.0))),
            bin: bin.min(1.0),
            slow: Default::default(),
            fast: Default::default(),
            width: [0.0; 2],
            serving: Member::Ewma,
            why: "no forecast has matured yet".to_owned(),
        }
    }

    /// Takes each member's mean pinball losses per level for a bin that is now known (by
    /// [`Member::index`]; `None` where it lacked a forecast).
    pub fn mature(&mut self, losses: [Option<[f64; LEVELS]>; MEMBERS]) {
        let Some(reference) = losses[Member::Ewma.index()] else {
            return;
        };
        for (records, keep) in [&mut self.slow, &mut self.fast].into_iter().zip(self.keep) {
            for (record, losses) in records.iter_mut().zip(losses) {
                let Some(mine) = losses.filter(|l| l.iter().all(|v| v.is_finite())) else {
                    continue;
                };
                for level in 0..LEVELS {
                    record.mine[level] = record.mine[level] * keep + mine[level];
                    record.reference[level] = record.reference[level] * keep + reference[level];
                }
                record.evidence = record.evidence * keep + self.bin;
            }
        }
    }

    /// Takes how often what was served lay above the truth at the lowest level, and below it at 0.9, in
    /// a bin that is now known; shares of the forecasts for it.
    pub fn covered(&mut self, below: f64, above: f64) {
        let rate = self.rules.coverage_rate * self.bin;
        for (width, missed) in self.width.iter_mut().zip([below, above]) {
            *width = (*width + (rate * (missed - 0.1)) as f32).clamp(WIDEST.0, WIDEST.1);
        }
    }

    /// A new network stands behind [`Member::Network`]: what the old one earned is forgotten.
    pub fn network_changed(&mut self) {
        self.slow[Member::Network.index()] = Record::default();
        self.fast[Member::Network.index()] = Record::default();
    }

    /// Blends one row per member (by [`Member::index`]) for each bin; `None` without any.
    pub fn serve(
        &mut self,
        seasons: f64,
        members: &[Option<Vec<QuantileRow>>; MEMBERS],
    ) -> Option<Vec<QuantileRow>> {
        let eligible = |m: Member| {
            let old_enough = match m {
                Member::Ewma => true,
                Member::Trailing => seasons >= self.rules.ewma_only_seasons,
                _ => seasons >= self.rules.simple_only_seasons,
            };
            old_enough && members[m.index()].is_some()
        };
        let weights = self.weights(Member::ALL.map(eligible));
        self.explain(seasons, &weights);
        let bins = members.iter().flatten().map(Vec::len).min()?;
        let rows = (0..bins)
            .map(|bin| {
                let mut row: QuantileRow = std::array::from_fn(|level| {
                    let parts = members.iter().zip(&weights).filter_map(|(rows, weights)| {
                        let weight = weights[level];
                        let value = rows.as_ref().filter(|_| weight > 0.0)?.get(bin)?[level];
                        Some(weight * f64::from(value))
                    });
                    parts.sum::<f64>() as f32
                });
                row.sort_unstable_by(f32::total_cmp);
                self.spread(row)
            })
            .collect();
        Some(rows)
    }

    /// The weights by member and level; those of a level sum to one.
    fn weights(&self, eligible: [bool; MEMBERS]) -> [[f64; LEVELS]; MEMBERS] {
        let mut weights = [[0.0; LEVELS]; MEMBERS];
        for level in 0..LEVELS {
            let logs: [f64; MEMBERS] = std::array::from_fn(|m| {
                if !eligible[m] {
                    return f64::NEG_INFINITY;
                }
                let (slow, fast) = (&self.slow[m], &self.fast[m]);
                let lately = slow.days() * (slow.ratio(level) - 1.0);
                let just_now = fast.days() * (fast.ratio(level) - CLEARLY_WORSE).max(0.0);
                PRIOR[m].ln() - self.rules.eta * (lately + just_now)
            });
            let best = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let raw = logs.map(|log| (log - best).exp());
            let sum: f64 = raw.iter().sum();
            for (weights, raw) in weights.iter_mut().zip(raw) {
                weights[level] = raw / sum;
            }
        }
        weights
    }

    /// Moves the quantiles on both sides of the median by what coverage has taught.
    fn spread(&self, row: QuantileRow) -> QuantileRow {
        let middle = log_load(f64::from(row[Q50]));
        let factor = self.width.map(f32::exp);
        let mut moved = row.map(|value| {
            let log = log_load(f64::from(value));
            let side = usize::from(log > middle);
            from_log_load(middle + (log - middle) * factor[side])
        });
        moved[Q50] = row[Q50];
        moved.sort_unstable_by(f32::total_cmp);
        moved
    }

    fn explain(&mut self, seasons: f64, weights: &[[f64; LEVELS]; MEMBERS]) {
        let weight = |m: Member| weights[m.index()][Q50];
        self.serving = Member::ALL
            .into_iter()
            .max_by(|a, b| weight(*a).total_cmp(&weight(*b)))
            .unwrap_or(Member::Ewma);
        if seasons < self.rules.ewma_only_seasons {
            self.why = format!(
                "cold start: {seasons:.1} of {:.1} seasons of history",
                self.rules.ewma_only_seasons
            );
            return;
        }
        let mut parts: Vec<(f64, String)> = Member::ALL
            .into_iter()
            .filter(|m| weight(*m) >= 0.005)
            .map(|m| {
                let loss = self
                    .relative(m)
                    .map_or(String::new(), |r| format!(" (loss {r:.2} of ewma's)"));
                (weight(m), format!("{m} {:.0} %{loss}", weight(m) * 100.0))
            })
            .collect();
        parts.sort_by(|a, b| b.0.total_cmp(&a.0));
        let parts: Vec<String> = parts.into_iter().map(|(_, part)| part).collect();
        self.why = format!("blend of {}", parts.join(", "));
    }

    /// A member's loss relative to that of the weighted mean over the same bins.
    fn relative(&self, m: Member) -> Option<f64> {
        let record = &self.slow[m.index()];
        let reference: f64 = record.reference.iter().sum();
        (record.evidence > 0.0 && reference > 1e-9)
            .then(|| record.mine.iter().sum::<f64>() / reference)
    }

    /// Who weighs most at the median.
    pub fn serving(&self) -> Member {
        self.serving
    }

    /// Why, in words.
    pub fn why(&self) -> &str {
        &self.why
    }

    /// Each member's recent mean pinball loss in bytes per second, by [`Member::index`].
    pub fn losses(&self) -> [Option<f64>; MEMBERS] {
        self.slow.map(|record| {
            let bins = record.evidence / self.bin;
            (bins > 0.0).then(|| record.mine.iter().sum::<f64>() / LEVELS as f64 / bins)
        })
    }

    /// Whether `a` has lost less than `b` of late, as far as both are known.
    pub fn better(&self, a: Member, b: Member) -> bool {
        matches!((self.relative(a), self.relative(b)), (Some(a), Some(b)) if a < b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn blend() -> Blend {
        let scale = TimeScale::new(Duration::from_secs(1), 48).unwrap();
        Blend::new(scale, BlendRules::default())
    }

    fn losses(by_member: [f64; MEMBERS]) -> [Option<[f64; LEVELS]>; MEMBERS] {
        by_member.map(|loss| Some([loss; LEVELS]))
    }

    /// Each member forecasts its own number.
    fn rows() -> [Option<Vec<QuantileRow>>; MEMBERS] {
        std::array::from_fn(|m| Some(vec![[10.0f32.powi(m as i32); LEVELS]]))
    }

    #[test]
    fn cold_start_admits_members_in_order() {
        let mut b = blend();
        assert_eq!(b.serve(0.5, &rows()).unwrap()[0][Q50], 1.0);
        assert!(b.why().contains("cold start"), "{}", b.why());
        assert_eq!(b.serve(1.5, &rows()).unwrap()[0][Q50], 5.5);
        let all = b.serve(9.0, &rows()).unwrap()[0][Q50];
        assert!(all > 5_000.0, "{all}");
        assert_eq!(b.serving(), Member::Prior);
        let mut none = rows();
        none[Member::Prior.index()] = None;
        b.serve(9.0, &none);
        assert_eq!(b.serving(), Member::Network);
    }

    #[test]
    fn a_network_that_turns_bad_has_no_weight_soon() {
        let mut b = blend();
        for _ in 0..400 {
            b.mature(losses([10.0, 20.0, 20.0, 20.0, 30.0, 6.0]));
        }
        b.serve(9.0, &rows());
        assert_eq!(b.serving(), Member::Network);
        let mut bins = 0;
        while b.serving() == Member::Network {
            b.mature(losses([10.0, 20.0, 20.0, 20.0, 30.0, 100.0]));
            b.serve(9.0, &rows());
            bins += 1;
            assert!(bins < 12, "served for {bins} bins while ten times worse");
        }
    }

    #[test]
    fn a_dead_volume_belongs_to_who_says_so() {
        let mut b = blend();
        for _ in 0..100 {
            b.mature(losses([0.0, 3.0, 3.0, 0.0, 2.0, 2.0]));
        }
        let mut members = rows();
        members[Member::Ewma.index()] = Some(vec![[0.0; LEVELS]]);
        members[Member::LastValue.index()] = Some(vec![[0.0; LEVELS]]);
        assert!(b.serve(9.0, &members).unwrap()[0][5] < 1.0);
    }

    #[test]
    fn outer_quantiles_follow_their_coverage() {
        let row: QuantileRow = [1e6, 2e6, 3e6, 4e6, 5e6, 6e6];
        let (mut narrow, mut wide) = (blend(), blend());
        for _ in 0..200 {
            narrow.covered(0.4, 0.4);
            wide.covered(0.0, 0.0);
        }
        let (narrow, wide) = (narrow.spread(row), wide.spread(row));
        assert!(narrow[0] < row[0] && narrow[3] > row[3], "{narrow:?}");
        assert!(wide[0] > row[0] && wide[3] < row[3], "{wide:?}");
        assert_eq!((narrow[Q50], wide[Q50]), (row[Q50], row[Q50]));
    }

    proptest! {
        // Whatever regimes the members go through: once one has lasted, the blend (at least as its members
        // weigh) is hardly behind the best of them, as measured by the weighted mean.
        #[test]
        fn nobody_much_worse_keeps_weight(
            regimes in proptest::collection::vec(proptest::array::uniform6(0.1f64..30.0), 1..5)
        ) {
            let mut b = blend();
            for mut level in regimes {
                level[Member::Ewma.index()] = 10.0;
                for _ in 0..1500 {
                    b.mature(losses(level));
                }
                let weights = b.weights([true; MEMBERS]);
                let best = level.iter().copied().fold(f64::INFINITY, f64::min);
                let blended: f64 = level.iter().zip(&weights).map(|(l, w)| l * w[Q50]).sum();
                prop_assert!(blended < best + 1.0, "{blended} {best} {level:?} {weights:?}");
            }
        }

        #[test]
        fn rows_stay_sound(
            values in proptest::collection::vec(proptest::array::uniform6(0.0f32..1e12), MEMBERS),
            width in -1.0f32..1.5,
        ) {
            let mut b = blend();
            b.width = [width, -width.min(1.0)];
            let members: [_; MEMBERS] = std::array::from_fn(|m| {
                let mut row = values[m];
                row.sort_unstable_by(f32::total_cmp);
                Some(vec![row; 3])
            });
            for row in b.serve(9.0, &members).unwrap() {
                prop_assert!(row.iter().all(|v| v.is_finite() && *v >= 0.0));
                prop_assert!(row.windows(2).all(|w| w[0] <= w[1]), "{row:?}");
            }
        }
    }
}
