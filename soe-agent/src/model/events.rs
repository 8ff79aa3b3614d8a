//! What events do to a volume's load, learnt from what followed earlier ones of their kind.
//!
//! For every kind of event (and every subject of a kind that is seen again) it is kept, by the bins since
//! the event, how far the log load lay from what was to be expected without it, and how often a burst
//! began. A forecast is moved by that: for an event that is announced, before anything is seen; for one
//! that has happened, by what is still to come of it, since the level has followed what has come
//! already. A kind moves forecasts only while those it would have moved lost less than those it would not:
//! kinds without an effect are many.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::baselines::{Smoothed, pinball};
use super::series::{Known, Series, from_log_load, log_load};
use super::{QuantileRow, SHORT_HORIZON, VolumeName};
use crate::seam::UnixNanos;

/// Bins from an event on in which its effect is looked for: two hours of five-minute bins.
pub const AGES: usize = 24;

/// Events that are to come or have an effect, per volume.
const MOST_ACTIVE: usize = 64;
/// Kinds (and subjects) of which a volume remembers the effect.
const MOST_KINDS: usize = 64;
/// What is kept of what was learnt when another event of a kind comes.
const KEEP: f64 = 0.9;
/// An effect is no greater than this, on the log scale: a factor of 400.
const GREATEST: f64 = 6.0;
/// Events of a kind to have been learnt from before one moves a forecast.
const LEARNT_FROM: f64 = 1.5;
/// How the level follows what has come, by which an effect already seen is known: as the weighted mean.
const FOLLOWS: f64 = 0.3;

/// An event, as it concerns forecasts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Happening {
    /// What kind of event, such as `com.example.deployment`.
    pub kind: String,
    /// What it is about, such as the name of a service.
    pub subject: Option<String>,
    /// The volumes it concerns; empty for all.
    pub volumes: Vec<VolumeName>,
    /// When what it announces is expected, or when it happened.
    pub at: UnixNanos,
}

impl Happening {
    /// Whether it concerns `volume`.
    pub fn concerns(&self, volume: &VolumeName) -> bool {
        self.volumes.is_empty() || self.volumes.contains(volume)
    }
}

/// A kind, or a kind and its subject.
type Key = (String, Option<String>);

#[derive(Clone, Debug)]
struct Active {
    happening: Key,
    /// The bin in which it happens.
    bin: i64,
    /// The log load to be expected without it; known once its first bin is.
    without: Option<f32>,
}

/// What is known of a kind; all counts decay as more events come.
#[derive(Clone, Debug, Default)]
struct Effect {
    events: f64,
    /// The bin of the newest one.
    newest: i64,
    /// Sum of the deviations of the log load, and number of them, by age.
    deviation: [f64; AGES],
    seen: [f64; AGES],
    onsets: [f64; AGES],
    /// Losses of forecasts moved by the effect, and of the same forecasts unmoved.
    moved: f64,
    unmoved: f64,
}

impl Effect {
    /// The mean deviation at an age, drawn towards none by one event without.
    fn at(&self, age: i64) -> f64 {
        match usize::try_from(age) {
            Ok(age) if age < AGES => self.deviation[age] / (self.seen[age] + 1.0),
            _ => 0.0,
        }
    }

    /// What of the effect the level shows after the bin of `age`.
    fn followed(&self, age: i64) -> f64 {
        let mut weight = FOLLOWS;
        let mut sum = 0.0;
        for back in 0..AGES as i64 {
            sum += weight * self.at(age - back);
            weight *= 1.0 - FOLLOWS;
        }
        sum
    }

    /// The probability that a burst begins at an age if none has begun before.
    fn onset(&self, age: i64) -> f64 {
        let Some(age) = usize::try_from(age).ok().filter(|age| *age < AGES) else {
            return 0.0;
        };
        let before: f64 = self.onsets[..age].iter().sum();
        let without = (self.seen[age] + 1.0 - before).max(1.0);
        (self.onsets[age] / without).clamp(0.0, 1.0)
    }

    fn learnt(&self) -> bool {
        self.events >= LEARNT_FROM
    }

    /// Whether it has been good to believe it.
    fn believed(&self) -> bool {
        self.learnt() && self.unmoved > 0.0 && self.moved <= self.unmoved
    }
}

/// A forecast as a kind would have moved it.
#[derive(Clone, Debug)]
pub struct Moved {
    key: Key,
    rows: Vec<QuantileRow>,
}

/// What is known of a kind, for people.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KnownEffect {
    /// The kind.
    pub kind: String,
    /// The subject, if it is about one.
    pub subject: Option<String>,
    /// Events learnt from; older ones count less.
    pub events: f64,
    /// The greatest factor by which the load changes, and bins after the event when it does.
    pub factor: f64,
    /// See there.
    pub after_bins: usize,
    /// The probability that a burst begins within [`AGES`] bins.
    pub burst_probability: f64,
    /// Whether forecasts are moved by it.
    pub believed: bool,
}

/// The events of one volume and what was learnt from them.
#[derive(Clone, Debug, Default)]
pub struct Events {
    active: VecDeque<Active>,
    effects: BTreeMap<Key, Effect>,
}

impl Events {
    /// Takes an event that concerns the volume. Its effect is learnt from the bins to come.
    pub fn take(&mut self, event: &Happening, series: &Series) {
        let bin = series.scale().index_of(event.at);
        let known = series.known();
        let next = known.next_index();
        // One that comes late has had its effect already, and before the first bin nothing was expected.
        if bin + AGES as i64 <= next || known.rows.is_empty() || bin <= known.first {
            return;
        }
        let mut keys = vec![(event.kind.clone(), None)];
        if event.subject.is_some() {
            keys.push((event.kind.clone(), event.subject.clone()));
        }
        for happening in keys {
            // The same thing told twice, or many at once (a service on every node), is one event.
            if self
                .active
                .iter()
                .any(|a| a.happening == happening && a.bin == bin)
            {
                continue;
            }
            if self.active.len() >= MOST_ACTIVE {
                self.make_room(next);
            }
            self.active.push_back(Active {
                happening,
                bin,
                without: None,
            });
        }
    }

    /// Forgets the event that was over first, or else the one that is farthest ahead.
    fn make_room(&mut self, next: i64) {
        let over = |active: &Active| active.bin + AGES as i64 <= next;
        let worst = (0..self.active.len()).max_by_key(|i| {
            let active = &self.active[*i];
            match over(active) {
                true => (1, -active.bin),
                false => (0, active.bin),
            }
        });
        if let Some(worst) = worst {
            self.active.remove(worst);
        }
    }

    /// Learns from the bin that is now known.
    pub fn learn(&mut self, series: &Series) {
        let known = series.known();
        let next = known.next_index();
        let Some(row) = known.back(1).filter(|_| !self.active.is_empty()) else {
            return;
        };
        for index in 0..self.active.len() {
            let active = &mut self.active[index];
            let age = next - 1 - active.bin;
            if age < 0 {
                continue;
            }
            if active.without.is_none() {
                let before = usize::try_from(active.bin - known.first).unwrap_or(0);
                active.without = Some(Smoothed::of(series.until(before)).level);
                let (key, bin) = (active.happening.clone(), active.bin);
                self.begin(key, bin);
            }
            let active = &self.active[index];
            let (Some(without), true) = (active.without, row.known) else {
                continue;
            };
            let Some(effect) = self.effects.get_mut(&active.happening) else {
                continue;
            };
            if let Some(age) = usize::try_from(age).ok().filter(|age| *age < AGES) {
                let deviation = f64::from(row.log - without);
                effect.deviation[age] += deviation.clamp(-GREATEST, GREATEST);
                effect.seen[age] += 1.0;
                effect.onsets[age] += f64::from(u8::from(row.onset));
            }
        }
        // As long again the level shows what is left of it.
        self.active
            .retain(|active| active.bin + 2 * AGES as i64 > next);
    }

    /// Another event of a kind begins: what was learnt before counts less.
    fn begin(&mut self, key: Key, bin: i64) {
        if !self.effects.contains_key(&key) && self.effects.len() >= MOST_KINDS {
            // Subjects that come once, such as the number of a build, make room first.
            let oldest = self
                .effects
                .iter()
                .min_by_key(|(_, effect)| (effect.learnt(), effect.newest))
                .map(|(key, _)| key.clone());
            if let Some(oldest) = oldest {
                self.effects.remove(&oldest);
            }
        }
        let effect = self.effects.entry(key).or_default();
        effect.newest = bin;
        effect.events = effect.events * KEEP + 1.0;
        effect.moved *= KEEP;
        effect.unmoved *= KEEP;
        for counts in [&mut effect.deviation, &mut effect.seen, &mut effect.onsets] {
            counts.iter_mut().for_each(|count| *count *= KEEP);
        }
    }

    /// The events whose effects may move a forecast: of a kind and its subject the subject's, once it is
    /// known.
    fn effective(&self) -> impl Iterator<Item = (&Active, &Effect)> {
        self.active.iter().filter_map(|active| {
            let effect = self.effects.get(&active.happening).filter(|e| e.learnt())?;
            let (kind, subject) = &active.happening;
            let by_subject = subject.is_none()
                && self.active.iter().any(|other| {
                    other.bin == active.bin
                        && other.happening.0 == *kind
                        && other.happening.1.is_some()
                        && self
                            .effects
                            .get(&other.happening)
                            .is_some_and(Effect::learnt)
                });
            (!by_subject).then_some((active, effect))
        })
    }

    /// Moves a forecast of the bins after what is known; also says how each kind in play would have moved
    /// it, to be handed to [`Events::score`].
    pub fn move_rows(&self, known: Known<'_>, rows: &mut [QuantileRow]) -> Vec<Moved> {
        let next = known.next_index();
        let mut shifts: BTreeMap<&Key, Vec<f64>> = BTreeMap::new();
        for (active, effect) in self.effective() {
            let shown = effect.followed(next - 1 - active.bin);
            let shift = shifts
                .entry(&active.happening)
                .or_insert_with(|| vec![0.0; rows.len()]);
            for (lead, shift) in shift.iter_mut().enumerate() {
                *shift += effect.at(next + lead as i64 - active.bin) - shown;
            }
        }
        shifts.retain(|_, shift| shift.iter().any(|s| s.abs() > 0.01));
        let unmoved = rows.to_vec();
        let mut all = Vec::new();
        for (key, shift) in shifts {
            let mut moved = unmoved.clone();
            add(&mut moved, &shift);
            if self.effects.get(key).is_some_and(Effect::believed) {
                add(rows, &shift);
            }
            // No more of it is judged.
            moved.truncate(SHORT_HORIZON);
            all.push(Moved {
                key: key.clone(),
                rows: moved,
            });
        }
        all
    }

    /// Judges a forecast by the bin that is now known: `unmoved` is what it was without events.
    pub fn score(&mut self, moved: &[Moved], unmoved: &[QuantileRow], lead: usize, load: f32) {
        for moved in moved {
            let (Some(with), Some(without)) = (moved.rows.get(lead), unmoved.get(lead)) else {
                continue;
            };
            if let Some(effect) = self.effects.get_mut(&moved.key) {
                effect.moved += pinball(with, load);
                effect.unmoved += pinball(without, load);
            }
        }
    }

    /// Adds to the probabilities that a burst begins, by bin, what events bring.
    pub fn raise_onsets(&self, known: Known<'_>, onsets: &mut [f32]) {
        let next = known.next_index();
        for (active, effect) in self.effective().filter(|(_, e)| e.believed()) {
            for (lead, p) in onsets.iter_mut().enumerate() {
                let more = effect.onset(next + lead as i64 - active.bin);
                *p = (1.0 - (1.0 - f64::from(*p)) * (1.0 - more)).clamp(0.0, 1.0) as f32;
            }
        }
    }

    /// What was learnt, the most seen first.
    pub fn known_effects(&self) -> Vec<KnownEffect> {
        let mut all: Vec<KnownEffect> = self
            .effects
            .iter()
            .map(|((kind, subject), effect)| {
                let (after_bins, greatest) = (0..AGES)
                    .map(|age| (age, effect.at(age as i64)))
                    .max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()))
                    .unwrap_or((0, 0.0));
                let none: f64 = (0..AGES as i64)
                    .map(|age| 1.0 - effect.onset(age))
                    .product();
                KnownEffect {
                    kind: kind.clone(),
                    subject: subject.clone(),
                    events: effect.events,
                    factor: greatest.exp(),
                    after_bins,
                    burst_probability: 1.0 - none,
                    believed: effect.believed(),
                }
            })
            .collect();
        all.sort_by(|a, b| b.events.total_cmp(&a.events));
        all
    }
}

/// Moves rows on the log scale.
fn add(rows: &mut [QuantileRow], shift: &[f64]) {
    for (row, shift) in rows.iter_mut().zip(shift) {
        let shift = shift.clamp(-GREATEST, GREATEST) as f32;
        *row = row.map(|value| from_log_load((log_load(f64::from(value)) + shift).max(0.0)));
    }
}

#[cfg(test)]
mod tests;
