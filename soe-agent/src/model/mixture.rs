//! The forecaster that serves: all members side by side, blended per volume.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::baselines::{self, Member, pinball_levels};
use super::blend::{Blend, BlendRules};
use super::burst::BurstRule;
use super::dataset::{Dataset, network_rows};
use super::events::{Events, Happening, KnownEffect, Moved};
use super::features::features;
use super::foretold::Foretold;
use super::onset::OnsetMixture;
use super::onset_features::{LEAD, MATURES, onset_features};
use super::promotion::{self, Standing};
use super::series::{Known, LoadBin, Series, SeriesError, TimeScale};
use super::weights::{
    ModelError, OnsetPredictor, Predictor, Trained, TrainedInfo, WindowWeights, onset_predictor,
    predictor,
};
use super::window_features::{Past, WINDOW_SEASONS};
use super::window_gate::{Judgement, StartGate, Starting};
use super::{
    Forecaster, Pace, Promotion, Q10, Q90, QUANTILES, QuantileForecast, QuantileRow, SHORT_HORIZON,
    Serving, VolumeName,
};
use crate::seam::UnixNanos;

/// Settings of a [`Mixture`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MixtureConfig {
    /// Bin and season.
    pub scale: TimeScale,
    /// What a burst is.
    pub burst: BurstRule,
    /// How members are weighed.
    pub blend: BlendRules,
    /// Seasons of history kept in memory per volume (16 bytes a bin); at least eight.
    pub keep_seasons: usize,
}

impl MixtureConfig {
    /// The defaults for a time scale.
    pub fn new(scale: TimeScale) -> Self {
        Self {
            scale,
            burst: BurstRule::default(),
            blend: BlendRules::default(),
            keep_seasons: 29,
        }
    }
}

/// Seasons of history below which the onset network has nothing to go by.
const ONSET_SEASONS: f64 = 2.0;

const MEMBERS: usize = Member::ALL.len();
type MemberRows = [Option<Vec<QuantileRow>>; MEMBERS];

struct Pending {
    origin: i64,
    rows: MemberRows,
    /// The blend of them, how events would have moved it, and what was served.
    blended: Vec<QuantileRow>,
    moved: Vec<Moved>,
    served: Vec<QuantileRow>,
}

struct Volume {
    series: Series,
    blend: Blend,
    onset: OnsetMixture,
    foretold: Foretold,
    events: Events,
    pending: VecDeque<Pending>,
}

/// All members, all volumes.
pub struct Mixture {
    config: MixtureConfig,
    volumes: BTreeMap<VolumeName, Volume>,
    /// The networks as they were given.
    standing: Standing,
    /// The network that ships, and the one trained here.
    prior: Option<Box<dyn Predictor>>,
    network: Option<Box<dyn Predictor>>,
    /// The same for onsets.
    prior_onset: Option<Box<dyn OnsetPredictor>>,
    /// The network that says when to begin a capture.
    window: Option<WindowWeights>,
    /// Who says so for volumes that are captured together.
    starts: BTreeMap<Vec<VolumeName>, StartGate>,
    onset: Option<Box<dyn OnsetPredictor>>,
}

impl Mixture {
    /// A mixture without volumes and without a network.
    pub fn new(config: MixtureConfig) -> Self {
        Self {
            config,
            volumes: BTreeMap::new(),
            standing: Standing::default(),
            prior: None,
            network: None,
            prior_onset: None,
            window: None,
            starts: BTreeMap::new(),
            onset: None,
        }
    }

    /// The last `bins` bins of `volume`: when each started, and its load in bytes per second if measured.
    pub fn recent(&self, volume: &VolumeName, bins: usize) -> Vec<(UnixNanos, Option<f64>)> {
        let Some(volume) = self.volumes.get(volume) else {
            return Vec::new();
        };
        let known = volume.series.known();
        let rows = known.trailing(bins);
        let first = known.next_index() - rows.len() as i64;
        rows.iter()
            .zip(first..)
            .map(|(row, index)| {
                let load = row.known.then_some(f64::from(row.load));
                (known.scale.start_of(index), load)
            })
            .collect()
    }

    /// What a training or a back-test needs of one volume, or of all.
    pub fn dataset_of(&self, volume: Option<&VolumeName>) -> Dataset {
        let wanted = |name: &VolumeName| volume.is_none_or(|volume| volume == name);
        Dataset {
            scale: self.config.scale,
            series: self
                .volumes
                .iter()
                .filter(|(name, _)| wanted(name))
                .map(|(name, v)| (name.clone(), v.series.clone()))
                .collect(),
        }
    }

    /// Who says when to begin captures that `volume` takes part in, by the volumes captured together.
    pub fn starting(&self, volume: &VolumeName) -> Vec<(Vec<VolumeName>, Starting)> {
        self.starts
            .iter()
            .filter(|(volumes, _)| volumes.contains(volume))
            .map(|(volumes, gate)| (volumes.clone(), gate.starting()))
            .collect()
    }

    /// What events do to `volume`, as far as it has been learnt.
    pub fn effects(&self, volume: &VolumeName) -> Vec<KnownEffect> {
        self.volumes
            .get(volume)
            .map(|v| v.events.known_effects())
            .unwrap_or_default()
    }

    /// How the serving network came about; `None` without one.
    pub fn network(&self) -> Option<&TrainedInfo> {
        self.standing.serving.as_ref().map(|trained| &trained.info)
    }

    /// The networks that a new one is to be compared with.
    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    /// Puts a network in service that was back-tested elsewhere, or served before. Each volume still weighs
    /// it by what it does there.
    ///
    /// # Errors
    /// [`ModelError`] if the network does not fit this build.
    pub fn restore(&mut self, trained: &Trained) -> Result<(), ModelError> {
        self.network = Some(predictor(trained)?);
        self.onset = onset_predictor(trained);
        self.standing.serving = Some(trained.clone());
        self.network_changed();
        Ok(())
    }

    /// Takes the network that was trained here out of service: the one that ships is left.
    pub fn retire(&mut self) {
        self.network = None;
        self.onset = None;
        self.standing.serving = None;
        self.network_changed();
    }

    fn network_changed(&mut self) {
        for volume in self.volumes.values_mut() {
            volume.blend.network_changed();
            volume.foretold = Foretold::default();
        }
    }

    /// Puts a network beside it that was trained elsewhere: the one that ships with this build.
    ///
    /// # Errors
    /// As [`Mixture::restore`].
    pub fn set_prior(&mut self, prior: &Trained) -> Result<(), ModelError> {
        self.prior = Some(predictor(prior)?);
        self.prior_onset = onset_predictor(prior);
        self.window = prior.window.clone();
        self.standing.prior = Some(prior.clone());
        Ok(())
    }
}

impl Volume {
    fn new(config: &MixtureConfig) -> Self {
        Self {
            series: Series::new(config.scale, config.burst, config.keep_seasons),
            blend: Blend::new(config.scale, config.blend),
            onset: OnsetMixture::default(),
            foretold: Foretold::default(),
            events: Events::default(),
            pending: VecDeque::new(),
        }
    }

    /// Scores the forecasts for the bin that was just taken.
    fn mature(&mut self) {
        let known = self.series.known();
        let next = known.next_index();
        self.pending.retain(|p| p.origin < next);
        let Some(row) = known.back(1).filter(|r| r.known) else {
            return;
        };
        let mut sums = [([0.0; QUANTILES.len()], 0usize); MEMBERS];
        let (mut origins, mut below, mut above) = (0, 0, 0);
        for pending in &self.pending {
            let lead = usize::try_from(next - 1 - pending.origin).unwrap_or(usize::MAX);
            if lead >= SHORT_HORIZON {
                continue;
            }
            origins += 1;
            for (sum, rows) in sums.iter_mut().zip(&pending.rows) {
                if let Some(forecast) = rows.as_ref().and_then(|r| r.get(lead)) {
                    let losses = pinball_levels(forecast, row.load);
                    sum.0.iter_mut().zip(losses).for_each(|(s, l)| *s += l);
                    sum.1 += 1;
                }
            }
            self.events
                .score(&pending.moved, &pending.blended, lead, row.load);
            if let Some(served) = pending.served.get(lead) {
                below += usize::from(row.load < served[Q10]);
                above += usize::from(row.load > served[Q90]);
            }
        }
        if origins > 0 {
            // A member that lacks a forecast for some origins is not comparable on this bin.
            let mean = |(sum, n): ([f64; QUANTILES.len()], usize)| {
                (n == origins).then(|| sum.map(|s| s / n as f64))
            };
            self.blend.mature(sums.map(mean));
            let share = |n: usize| n as f64 / origins as f64;
            self.blend.covered(share(below), share(above));
        }
        while self
            .pending
            .front()
            .is_some_and(|p| p.origin + SHORT_HORIZON as i64 <= next)
        {
            self.pending.pop_front();
        }
    }

    fn forecast(
        &mut self,
        horizon: usize,
        networks: [(Member, Option<&dyn Predictor>); 2],
        onset: Option<&dyn OnsetPredictor>,
    ) -> Option<QuantileForecast> {
        let known = self.series.known();
        let mut members: MemberRows = Default::default();
        for member in Member::SIMPLE {
            members[member.index()] = baselines::forecast(member, known, SHORT_HORIZON);
        }
        if known.seasons() >= 1.0 && networks.iter().any(|(_, network)| network.is_some()) {
            let (inputs, normal) = features(known);
            for (member, network) in networks {
                members[member.index()] =
                    network.and_then(|network| network_rows(network, &inputs, normal));
            }
        }
        let blended = self.blend.serve(known.seasons(), &members)?;
        let member = self.blend.serving();
        let mut rows = blended.clone();
        if horizon > SHORT_HORIZON {
            let tail = baselines::forecast(self.tail(known), known, horizon)?;
            rows.extend_from_slice(&tail[SHORT_HORIZON..]);
        }
        let moved = self.events.move_rows(known, &mut rows);
        let mut served = rows.clone();
        served.truncate(SHORT_HORIZON);
        rows.truncate(horizon);
        let onset = self.onsets(horizon, onset);
        let known = self.series.known();
        let forecast = QuantileForecast {
            issued_at: known.issued_at(),
            bin: known.scale.bin(),
            rows,
            onset,
            burst_threshold: f64::from(known.back(1).map_or(f32::INFINITY, |r| r.threshold)),
            member,
        };
        let origin = known.next_index();
        if self.pending.back().is_none_or(|p| p.origin < origin) {
            self.pending.push_back(Pending {
                origin,
                rows: members,
                blended,
                moved,
                served,
            });
        }
        Some(forecast)
    }

    /// For each bin the probability that a burst begins in it: as the plain predictors spread it, so much
    /// of it in the window of a label as the network says.
    fn onsets(&mut self, horizon: usize, network: Option<&dyn OnsetPredictor>) -> Vec<f32> {
        let known = self.series.known();
        let plain = self.onset.predict(known, horizon.max(MATURES));
        let quiet = known.back(1).is_some_and(|row| row.known && !row.burst);
        let odds = network
            .filter(|_| quiet && known.seasons() >= ONSET_SEASONS)
            .and_then(|network| network.log_odds(&onset_features(known)));
        let mut spread = plain;
        if let Some(odds) = odds {
            let within: f64 = spread[LEAD..MATURES].iter().map(|p| f64::from(*p)).sum();
            let said = self
                .foretold
                .probability(known, f64::from(odds), within.min(1.0));
            let even = (said / (MATURES - LEAD) as f64) as f32;
            let factor = (within > 1e-6).then(|| (said / within) as f32);
            for p in spread.iter_mut().take(MATURES) {
                *p = factor.map_or(even, |factor| (*p * factor).min(1.0));
            }
        }
        self.events.raise_onsets(known, &mut spread);
        spread.truncate(horizon);
        spread
    }

    /// Who forecasts the bins that no member is scored on: the climatology once it has more than a
    /// season to stand on and has not done worse than the plain quantiles.
    fn tail(&self, known: Known<'_>) -> Member {
        let trailing_won = self.blend.better(Member::Trailing, Member::Seasonal);
        if known.seasons() >= 2.0 && !trailing_won {
            Member::Seasonal
        } else {
            Member::Trailing
        }
    }
}

impl Forecaster for Mixture {
    fn observe(
        &mut self,
        volume: &VolumeName,
        start: UnixNanos,
        load: Option<LoadBin>,
    ) -> Result<(), SeriesError> {
        let config = self.config;
        let volume = self
            .volumes
            .entry(volume.clone())
            .or_insert_with(|| Volume::new(&config));
        volume.series.push(start, load)?;
        volume.mature();
        volume.events.learn(&volume.series);
        Ok(())
    }

    fn happening(&mut self, volume: &VolumeName, event: &Happening) {
        if let Some(volume) = self.volumes.get_mut(volume) {
            volume.events.take(event, &volume.series);
        }
    }

    fn forecast(&mut self, volume: &VolumeName, horizon: usize) -> Option<QuantileForecast> {
        let networks = [
            (Member::Prior, self.prior.as_deref()),
            (Member::Network, self.network.as_deref()),
        ];
        let onset = self.onset.as_deref().or(self.prior_onset.as_deref());
        self.volumes
            .get_mut(volume)?
            .forecast(horizon, networks, onset)
    }

    fn begin(
        &mut self,
        volumes: &[VolumeName],
        neighbours: &[VolumeName],
        pace: Pace,
    ) -> Option<Judgement> {
        let window = self.window.as_ref()?;
        let known = |name: &VolumeName| Some(self.volumes.get(name)?.series.known());
        let mut all: Vec<Known<'_>> = volumes.iter().map(known).collect::<Option<_>>()?;
        let newest = all.iter().map(Known::next_index).min()?;
        let oldest = all.iter().map(|known| known.first).max()?;
        let season = self.config.scale.season_bins();
        // A neighbour of which too little is known must not shorten much what is known of the volumes.
        let enough = oldest.max(newest - (2 * WINDOW_SEASONS * season) as i64);
        let long = |known: &Known<'_>| known.next_index() >= newest && known.first <= enough;
        all.extend(neighbours.iter().filter_map(known).filter(long));
        let past = Past::of(&all, pace.length)?;
        let pace = Pace {
            later: pace.later.min(season.saturating_sub(pace.length)),
            ..pace
        };
        if !self.starts.contains_key(volumes) {
            // Groups that were changed or deleted are not asked about any more.
            let kept = newest - (self.config.keep_seasons * season) as i64;
            let live = |gate: &StartGate| !gate.forgotten(kept);
            self.starts.retain(|_, gate| live(gate));
        }
        let gate = self.starts.entry(volumes.to_vec()).or_default();
        gate.judge(&past, window, pace)
    }

    fn serving(&self, volume: &VolumeName) -> Option<Serving> {
        let volume = self.volumes.get(volume)?;
        let losses = volume.blend.losses();
        Some(Serving {
            member: volume.blend.serving(),
            why: volume.blend.why().to_owned(),
            losses: Member::ALL.map(|m| (m, losses[m.index()])).to_vec(),
            bins: volume.series.len(),
        })
    }

    fn dataset(&self) -> Dataset {
        self.dataset_of(None)
    }

    fn install(&mut self, trained: &Trained) -> Result<Promotion, ModelError> {
        let mut offered = trained.clone();
        let promotion = promotion::judge(&self.dataset(), &mut offered, &self.standing)?;
        if matches!(promotion, Promotion::Promoted { .. }) {
            self.restore(&offered)?;
        }
        Ok(promotion)
    }

    fn forget(&mut self, volume: &VolumeName) {
        self.volumes.remove(volume);
        self.starts.retain(|volumes, _| !volumes.contains(volume));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn mixture() -> Mixture {
        Mixture::new(MixtureConfig::new(
            TimeScale::new(Duration::from_secs(1), 24).unwrap(),
        ))
    }

    fn bin(bytes: f64) -> LoadBin {
        LoadBin {
            read_bytes: bytes,
            ..LoadBin::default()
        }
    }

    #[test]
    fn a_volume_never_seen_has_no_forecast() {
        assert!(mixture().forecast(&"v".into(), 12).is_none());
    }

    #[test]
    fn asking_twice_changes_nothing() {
        let mut m = mixture();
        let v: VolumeName = "v".into();
        for i in 0..100 {
            m.observe(&v, i * 1_000_000_000, Some(bin(f64::from(i as i32 % 7))))
                .unwrap();
            let a = m.forecast(&v, 30);
            assert_eq!(a, m.forecast(&v, 30));
        }
        assert!(m.volumes[&v].pending.len() <= SHORT_HORIZON);
    }

    #[test]
    fn a_clock_pattern_brings_the_seasonal_member_into_service() {
        let mut m = mixture();
        let v: VolumeName = "v".into();
        for i in 0..24 * 12 {
            let noise = ((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f64 / 1e5;
            let load = if (8..12).contains(&(i % 24)) {
                9e6
            } else {
                1e5
            };
            m.observe(&v, i * 1_000_000_000, Some(bin(load + noise * 1e3)))
                .unwrap();
            m.forecast(&v, 12);
        }
        let serving = m.serving(&v).unwrap();
        assert_eq!(serving.member, Member::Seasonal, "{serving:?}");
        assert!(serving.why.contains("seasonal"), "{}", serving.why);
    }

    proptest! {
        #[test]
        fn any_history_gives_sound_forecasts(
            pushes in proptest::collection::vec((0i64..4, proptest::option::weighted(0.9, prop_oneof![
                Just(f64::NAN), Just(-5.0), Just(0.0), 0.0f64..1e12
            ])), 1..150),
            back in 0i64..200,
            horizon in 1usize..60,
        ) {
            let mut m = mixture();
            let v: VolumeName = "v".into();
            let mut at = 1_000i64;
            for (i, (step, value)) in pushes.iter().enumerate() {
                at += step;
                if i == 60 {
                    at -= back;
                }
                let _ = m.observe(&v, at * 1_000_000_000, value.map(bin));
                if let Some(f) = m.forecast(&v, horizon) {
                    prop_assert_eq!(f.rows.len(), horizon);
                    prop_assert_eq!(f.onset.len(), horizon);
                    for row in &f.rows {
                        prop_assert!(row.iter().all(|x| x.is_finite() && *x >= 0.0));
                        prop_assert!(row.windows(2).all(|w| w[0] <= w[1]));
                    }
                    prop_assert!(f.onset.iter().all(|p| (0.0..=1.0).contains(p)));
                    prop_assert!((0.0..=1.0).contains(&f.burst_probability()));
                }
            }
        }
    }
}
