//! Who serves a volume: never worse than the simple way for long.
//!
//! Every forecast of every member is scored once its bins are known (matured). The gate keeps two
//! decayed means of these losses per member: a slow one, by which the server is chosen with
//! hysteresis, and a fast one, by which a member that turned bad is put out of service at once.
//! The network is compared only on bins for which it also had a forecast.

use serde::{Deserialize, Serialize};

use super::baselines::Member;
use super::series::TimeScale;

/// The rules of the choice.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GateRules {
    /// Seasons of history below which only the exponentially weighted mean serves.
    pub ewma_only_seasons: f64,
    /// Seasons of history below which only it and the trailing quantiles serve.
    pub simple_only_seasons: f64,
    /// A challenger must be better than the incumbent by this share of the incumbent's loss.
    pub hysteresis: f64,
    /// The incumbent is put out of service when its fast loss is this multiple of the best one's.
    pub clearly_worse: f64,
}

impl Default for GateRules {
    fn default() -> Self {
        Self {
            ewma_only_seasons: 1.0,
            simple_only_seasons: 7.0,
            hysteresis: 0.03,
            clearly_worse: 1.25,
        }
    }
}

const MEMBERS: usize = Member::ALL.len();

/// An exponentially decayed mean.
#[derive(Clone, Copy, Debug, Default)]
struct Decayed {
    sum: f64,
    weight: f64,
}

impl Decayed {
    fn add(&mut self, value: f64, keep: f64) {
        self.sum = self.sum * keep + value;
        self.weight = self.weight * keep + 1.0;
    }

    fn mean(&self, min_weight: f64) -> Option<f64> {
        (self.weight >= min_weight.max(1.0)).then(|| self.sum / self.weight)
    }
}

/// The choice for one volume.
#[derive(Clone, Debug)]
pub struct Gate {
    rules: GateRules,
    slow_keep: f64,
    fast_keep: f64,
    min_evidence: f64,
    bar_bins: u64,
    slow: [Decayed; MEMBERS],
    /// As `slow`, over the bins for which the network had a forecast.
    paired: [Decayed; MEMBERS],
    fast: [Decayed; MEMBERS],
    /// Matured bins so far, and until which of them each member is barred.
    matured: u64,
    barred_until: [u64; MEMBERS],
    serving: Member,
    why: String,
}

impl Gate {
    /// A gate without evidence; the exponentially weighted mean serves.
    pub fn new(scale: TimeScale, rules: GateRules) -> Self {
        let season = scale.season_bins() as f64;
        let keep = |half_life: f64| 0.5f64.powf(1.0 / half_life);
        Self {
            rules,
            slow_keep: keep(2.0 * season),
            fast_keep: keep((season / 12.0).max(6.0)),
            min_evidence: (season / 4.0).max(12.0),
            bar_bins: (scale.season_bins() / 2) as u64,
            slow: Default::default(),
            paired: Default::default(),
            fast: Default::default(),
            matured: 0,
            barred_until: [0; MEMBERS],
            serving: Member::Ewma,
            why: "no forecast has matured yet".to_owned(),
        }
    }

    /// Takes the loss of each member (by [`Member::index`]) for a bin that is now known.
    pub fn mature(&mut self, losses: [Option<f64>; MEMBERS]) {
        self.matured += 1;
        let with_network = losses[Member::Network.index()].is_some();
        for (m, loss) in losses.into_iter().enumerate() {
            let Some(loss) = loss.filter(|l| l.is_finite()) else {
                continue;
            };
            self.slow[m].add(loss, self.slow_keep);
            self.fast[m].add(loss, self.fast_keep);
            if with_network {
                self.paired[m].add(loss, self.slow_keep);
            }
        }
    }

    /// A new network stands behind [`Member::Network`]: what the old one earned is forgotten.
    pub fn network_changed(&mut self) {
        let m = Member::Network.index();
        self.slow[m] = Decayed::default();
        self.fast[m] = Decayed::default();
        self.paired = Default::default();
        self.barred_until[m] = 0;
    }

    /// Chooses who serves now.
    pub fn choose(&mut self, seasons: f64, network: bool) -> Member {
        let rules = self.rules;
        let eligible = |m: Member| match m {
            Member::Ewma => true,
            Member::Trailing => seasons >= rules.ewma_only_seasons,
            Member::Seasonal | Member::LastValue => seasons >= rules.simple_only_seasons,
            Member::Network => network && seasons >= rules.simple_only_seasons,
        };
        if !eligible(self.serving) {
            self.serving = Member::Ewma;
        }
        if seasons < self.rules.ewma_only_seasons {
            self.why = format!(
                "cold start: {seasons:.1} of {:.1} seasons of history",
                self.rules.ewma_only_seasons
            );
            return self.serving;
        }
        self.put_out_if_clearly_worse(&eligible);
        let candidates: Vec<Member> = Member::ALL
            .into_iter()
            .filter(|m| eligible(*m) && self.barred_until[m.index()] <= self.matured)
            .collect();
        for challenger in candidates {
            if challenger == self.serving {
                continue;
            }
            let Some((mine, theirs)) = self.compare(challenger, self.serving) else {
                continue;
            };
            if mine < theirs * (1.0 - self.rules.hysteresis) {
                self.why = format!(
                    "recent loss {} against {} of {}",
                    bytes(mine),
                    bytes(theirs),
                    self.serving
                );
                self.serving = challenger;
            }
        }
        self.serving
    }

    /// Who serves.
    pub fn serving(&self) -> Member {
        self.serving
    }

    /// Why, in words.
    pub fn why(&self) -> &str {
        &self.why
    }

    /// Each member's slow loss in bytes per second, by [`Member::index`].
    pub fn losses(&self) -> [Option<f64>; MEMBERS] {
        self.slow.map(|l| l.mean(1.0))
    }

    /// Whether `a` has lost less than `b` of late, as far as both are known.
    pub fn better(&self, a: Member, b: Member) -> bool {
        self.compare(a, b).is_some_and(|(a, b)| a < b)
    }

    /// Mean losses of two members over the same bins.
    fn compare(&self, a: Member, b: Member) -> Option<(f64, f64)> {
        let table = if a == Member::Network || b == Member::Network {
            &self.paired
        } else {
            &self.slow
        };
        let mean = |m: Member| table[m.index()].mean(self.min_evidence);
        Some((mean(a)?, mean(b)?))
    }

    fn put_out_if_clearly_worse(&mut self, eligible: &dyn Fn(Member) -> bool) {
        let need = self.min_evidence.min(1.0 / (1.0 - self.fast_keep) / 2.0);
        let Some(mine) = self.fast[self.serving.index()].mean(need) else {
            return;
        };
        let best = Member::ALL
            .into_iter()
            .filter(|m| *m != self.serving && eligible(*m))
            .filter(|m| self.barred_until[m.index()] <= self.matured)
            // Who takes over must have proven itself for longer than a few good bins.
            .filter(|m| self.slow[m.index()].weight >= self.min_evidence)
            .filter_map(|m| Some((m, self.fast[m.index()].mean(need)?)))
            .min_by(|a, b| a.1.total_cmp(&b.1));
        if let Some((member, theirs)) = best
            && mine > theirs * self.rules.clearly_worse
        {
            self.why = format!(
                "{} turned worse: {} against {} over the last bins",
                self.serving,
                bytes(mine),
                bytes(theirs)
            );
            self.barred_until[self.serving.index()] = self.matured + self.bar_bins;
            self.serving = member;
        }
    }
}

fn bytes(per_second: f64) -> String {
    if per_second < 1024.0 {
        format!("{per_second:.0} B/s")
    } else if per_second < 1024.0 * 1024.0 {
        format!("{:.1} KiB/s", per_second / 1024.0)
    } else {
        format!("{:.1} MiB/s", per_second / (1024.0 * 1024.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn gate() -> Gate {
        let scale = TimeScale::new(Duration::from_secs(1), 48).unwrap();
        Gate::new(scale, GateRules::default())
    }

    fn losses(ewma: f64, trailing: f64, network: f64) -> [Option<f64>; 5] {
        [
            Some(ewma),
            Some(trailing),
            Some(9e9),
            Some(9e9),
            Some(network),
        ]
    }

    #[test]
    fn cold_start_admits_members_in_order() {
        let mut g = gate();
        for _ in 0..200 {
            g.mature(losses(10.0, 5.0, 1.0));
        }
        assert_eq!(g.choose(0.5, true), Member::Ewma);
        assert!(g.why().contains("cold start"), "{}", g.why());
        assert_eq!(g.choose(2.0, true), Member::Trailing);
        assert_eq!(g.choose(7.5, true), Member::Network);
        assert_eq!(g.choose(7.5, false), Member::Ewma, "without a network");
    }

    #[test]
    fn a_small_advantage_does_not_move_the_choice() {
        let mut g = gate();
        for _ in 0..500 {
            g.mature(losses(10.0, 9.9, 9.8));
        }
        assert_eq!(g.choose(9.0, true), Member::Ewma);
    }

    #[test]
    fn a_member_that_turns_bad_is_put_out_soon_and_barred() {
        let mut g = gate();
        for _ in 0..500 {
            g.mature(losses(10.0, 20.0, 2.0));
            g.choose(9.0, true);
        }
        assert_eq!(g.serving(), Member::Network);
        let mut bad = 0;
        while g.serving() == Member::Network {
            g.mature(losses(10.0, 20.0, 100.0));
            g.choose(9.0, true);
            bad += 1;
            assert!(bad < 12, "served for {bad} bins while ten times worse");
        }
        for _ in 0..20 {
            g.mature(losses(10.0, 20.0, 2.0));
            assert_ne!(g.choose(9.0, true), Member::Network, "barred for a while");
        }
    }

    #[test]
    fn a_new_network_has_to_earn_its_place() {
        let mut g = gate();
        for _ in 0..500 {
            g.mature(losses(10.0, 20.0, 2.0));
            g.choose(9.0, true);
        }
        g.network_changed();
        g.serving = Member::Ewma;
        for _ in 0..10 {
            g.mature(losses(10.0, 20.0, 2.0));
            assert_eq!(g.choose(9.0, true), Member::Ewma);
        }
        for _ in 0..10 {
            g.mature(losses(10.0, 20.0, 2.0));
            g.choose(9.0, true);
        }
        assert_eq!(g.serving(), Member::Network);
    }

    proptest! {
        // The promise: whatever regimes the members go through, the bins in which a member serves
        // that has been twice as bad as the best for a whole half season are none.
        #[test]
        fn nobody_clearly_worse_serves_for_long(
            regimes in proptest::collection::vec(
                (50usize..400, proptest::array::uniform5(1.0f64..100.0)), 1..8)
        ) {
            let mut g = gate();
            for (bins, level) in regimes {
                let best = level.iter().copied().fold(f64::INFINITY, f64::min);
                let mut served_badly = 0;
                for _ in 0..bins {
                    g.mature(level.map(Some));
                    let m = g.choose(20.0, true);
                    if level[m.index()] > 2.0 * best {
                        served_badly += 1;
                    } else {
                        served_badly = 0;
                    }
                    prop_assert!(served_badly <= 80, "{m} for {served_badly} bins: {level:?}");
                }
            }
        }
    }
}
