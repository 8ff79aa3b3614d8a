//! Who says when to begin a capture of these volumes: the networks, or a plain rule that did better here.
//!
//! An interval that is over is played through once more by each of them, bin by bin with what was known
//! then, so both are judged on the same intervals whoever served. Before there were any, the last
//! intervals of the same kind in the history are played through. Every question plays through some bins
//! more, so that judging costs about as much as asking.

use std::collections::VecDeque;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::Pace;
use super::weights::WindowWeights;
use super::window_features::{Past, Start, WINDOW_SEASONS, quiet_enough};

/// Who says when to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Starter {
    /// The networks trained on the regret of captures.
    Network,
    /// Begin when it is about as quiet as it usually gets in the starts that remain.
    Rule,
}

impl Starter {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Network, Self::Rule];

    /// Its name in outputs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Network => "network",
            Self::Rule => "rule",
        }
    }
}

impl fmt::Display for Starter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether to begin a capture, and who says so.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Judgement {
    /// Begin with the next bin.
    pub begin: bool,
    /// Who says so.
    pub by: Starter,
    /// The networks' log odds of beginning.
    pub log_odds: f32,
}

impl fmt::Display for Judgement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.by {
            Starter::Network => write!(f, "log odds of beginning now {:.1}", self.log_odds),
            Starter::Rule => f.write_str("by the rule that has done better here"),
        }
    }
}

/// Intervals that are played through from the history before there are others.
const BEFORE: i64 = 48;
/// Starts that a question plays through at least, and the share of an interval's.
const SLICE: (usize, usize) = (8, 16);
/// What of the evidence is kept after each interval.
const KEEP: f64 = 0.98;
/// Intervals of evidence before the rule may take over.
const LEAST: f64 = 10.0;
/// The rule takes over when it is ahead on the same intervals by so many standard errors, and hands back
/// when it is behind.
const TAKES_OVER: f64 = 2.0;
/// An interval in which a start was worse than this multiple of a random one's regret counts as this bad:
/// one burst met is no reason to change sides.
const WORST: f64 = 3.0;

/// An interval's first start may move by so many bins while it lasts, because how long a capture takes is
/// estimated anew.
const MOST_SLIP: i64 = 2;

/// An interval by the numbers of its first and last start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Interval {
    first: i64,
    last: i64,
}

/// An interval that is being played through.
#[derive(Clone, Debug)]
struct Replay {
    interval: Interval,
    /// The start to come next.
    next: i64,
    /// What each met that has begun, by [`Starter::ALL`].
    begun: [Option<f64>; 2],
    least: f64,
    sum: f64,
}

/// The choice for the volumes of one group.
#[derive(Clone, Debug)]
pub struct StartGate {
    /// Not judged yet, oldest first, and the one before them that is being judged.
    open: VecDeque<Interval>,
    replay: Option<Replay>,
    /// Decayed sums of regret relative to that of a random start, by [`Starter::ALL`].
    regret: [f64; 2],
    /// Decayed sum of the squares of by how much the rule was ahead.
    squares: f64,
    intervals: f64,
    serving: Starter,
    /// The number of the bin that was last asked about.
    asked: Option<i64>,
}

/// Who says when to begin, and how each did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Starting {
    /// Who serves.
    pub by: Starter,
    /// Each one's regret: 0 is the quietest start of every interval, 1 a random one. `None` before any
    /// interval was judged.
    pub regret: Vec<(Starter, Option<f64>)>,
    /// Intervals of evidence, decayed.
    pub intervals: f64,
}

impl Default for StartGate {
    fn default() -> Self {
        Self {
            open: VecDeque::new(),
            replay: None,
            regret: [0.0; 2],
            squares: 0.0,
            intervals: 0.0,
            serving: Starter::Network,
            asked: None,
        }
    }
}

impl StartGate {
    /// Whether to begin with the next bin after what `past` knows; `None` with too little history.
    pub fn judge(&mut self, past: &Past, network: &WindowWeights, pace: Pace) -> Option<Judgement> {
        let next = past.first() + past.bins() as i64;
        let now = Interval {
            first: next - pace.passed as i64,
            last: next + pace.later as i64,
        };
        self.note(past, now);
        self.asked = Some(next);
        self.settle(past, network, next);
        let start = Start {
            bins: past.bins(),
            later: pace.later,
            passed: pace.passed,
        };
        let inputs = past.inputs(start)?;
        let log_odds = network.log_odds(&inputs, pace.later);
        let begin = match self.serving {
            Starter::Network => log_odds > 0.0,
            Starter::Rule => quiet_enough(&inputs),
        };
        Some(Judgement {
            begin,
            by: self.serving,
            log_odds,
        })
    }

    /// Whether it was last asked before the bin with this number.
    pub fn forgotten(&self, bin: i64) -> bool {
        self.asked.is_none_or(|asked| asked < bin)
    }

    /// Who serves, and how each did.
    pub fn starting(&self) -> Starting {
        let mean = |sum: f64| (self.intervals > 0.0).then(|| sum / self.intervals);
        let regrets = Starter::ALL.into_iter().zip(self.regret.map(mean));
        Starting {
            by: self.serving,
            regret: regrets.collect(),
            intervals: self.intervals,
        }
    }

    /// Remembers the interval that is asked about, and, if it is the first, those of its kind before it.
    fn note(&mut self, past: &Past, now: Interval) {
        // After a clock has stepped back, what seemed to come is not to be.
        if self
            .asked
            .is_some_and(|asked| asked > now.first + MOST_SLIP + past.day() as i64)
        {
            self.open.clear();
            self.replay = None;
        }
        let same = |open: &Interval| (now.first - open.first).abs() <= MOST_SLIP;
        if let Some(open) = self.open.back_mut().filter(|open| same(open)) {
            open.last = now.last;
            return;
        }
        if self.asked.is_none() {
            let span = now.last - now.first + past.length() as i64;
            let known = past.first() + (WINDOW_SEASONS * past.day()) as i64;
            let whole = (now.first - known).div_euclid(span).min(BEFORE);
            self.open.extend((1..=whole).rev().map(|k| Interval {
                first: now.first - k * span,
                last: now.last - k * span,
            }));
        }
        self.open.push_back(now);
        // Where an interval has few questions, judging does not keep up: the oldest are left out.
        while self.open.len() > BEFORE as usize + 1 {
            self.open.pop_front();
        }
    }

    /// Plays through some starts more of the oldest interval that is wholly known.
    fn settle(&mut self, past: &Past, network: &WindowWeights, next: i64) {
        let over = |open: &mut Interval| open.last + past.length() as i64 <= next;
        if self.replay.is_none() {
            self.replay = self.open.pop_front_if(over).map(Replay::new);
        }
        let Some(replay) = &mut self.replay else {
            return;
        };
        let regret = match replay.go_on(past, network) {
            Some(None) => return,
            Some(Some(regret)) => regret,
            None => {
                self.replay = None;
                return;
            }
        };
        self.replay = None;
        let regret = regret.map(|regret| regret.min(WORST));
        for (sum, regret) in self.regret.iter_mut().zip(regret) {
            *sum = *sum * KEEP + regret;
        }
        let [network, rule] = regret;
        self.squares = self.squares * KEEP + (network - rule).powi(2);
        self.intervals = self.intervals * KEEP + 1.0;
        let ahead = (self.regret[0] - self.regret[1]) / self.intervals;
        let variance = (self.squares / self.intervals - ahead * ahead).max(0.0);
        let error = (variance / self.intervals).sqrt();
        self.serving = match self.serving {
            Starter::Network if self.intervals >= LEAST && ahead > TAKES_OVER * error => {
                Starter::Rule
            }
            Starter::Rule if ahead < 0.0 => Starter::Network,
            serving => serving,
        };
    }
}

impl Replay {
    fn new(interval: Interval) -> Self {
        Self {
            interval,
            next: interval.first,
            begun: [None; 2],
            least: f64::INFINITY,
            sum: 0.0,
        }
    }

    /// Plays through some starts. The regret of each relative to that of a random start once the interval
    /// is through, and `None` within before; `None` where it is not known or all starts are alike.
    fn go_on(&mut self, past: &Past, network: &WindowWeights) -> Option<Option<[f64; 2]>> {
        let Interval { first, last } = self.interval;
        let starts = usize::try_from(last - first + 1).ok()?;
        let slice = SLICE.0.max(starts / SLICE.1) as i64;
        let until = last.min(self.next + slice - 1);
        for start in self.next..=until {
            let bins = usize::try_from(start - past.first()).ok()?;
            let load = past.load_met(bins)?;
            self.least = self.least.min(load);
            self.sum += load;
            if self.begun.iter().all(Option::is_some) {
                continue;
            }
            let later = usize::try_from(last - start).ok()?;
            let passed = usize::try_from(start - first).ok()?;
            let inputs = past.inputs(Start {
                bins,
                later,
                passed,
            })?;
            let says = [
                network.log_odds(&inputs, later) > 0.0,
                quiet_enough(&inputs),
            ];
            for (begun, says) in self.begun.iter_mut().zip(says) {
                if begun.is_none() && (says || later == 0) {
                    *begun = Some(load);
                }
            }
        }
        self.next = until + 1;
        if self.next <= last {
            return Some(None);
        }
        let random = self.sum / starts as f64 - self.least;
        let [Some(network), Some(rule)] = self.begun else {
            return None;
        };
        (random > 1e-6).then(|| Some([network, rule].map(|load| (load - self.least) / random)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::series::support::series_of;
    use crate::model::weights::prior;

    const DAY: i64 = 24;

    /// Asks at every start of back-to-back intervals of `starts`, as a group does that begins only with
    /// the last one, over a history of `load`.
    fn gate(days: i64, starts: i64, load: impl Fn(i64) -> f64) -> StartGate {
        let loads: Vec<Option<f64>> = (0..days * DAY).map(|bin| Some(load(bin))).collect();
        let series = series_of(&loads, 29);
        let network = prior().unwrap().window.unwrap();
        let mut gate = StartGate::default();
        for bin in 8 * DAY..days * DAY {
            let past = Past::of(&[series.until(bin as usize)], 1).unwrap();
            let passed = bin.rem_euclid(starts);
            let pace = Pace {
                passed: passed as usize,
                later: (starts - 1 - passed) as usize,
                length: 1,
            };
            gate.judge(&past, &network, pace);
        }
        gate
    }

    fn noise(bin: i64) -> f64 {
        ((bin as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 44) as f64
    }

    #[test]
    fn both_are_judged_on_intervals_that_are_over_and_on_those_before() {
        let gate = gate(12, 12, noise);
        let starting = gate.starting();
        // Eight intervals asked about, of which the last is not over, and two before them.
        // Twelve starts take two questions, and each interval has twelve.
        let judged = (1.0 - KEEP.powi(9)) / (1.0 - KEEP);
        assert!((starting.intervals - judged).abs() < 1e-9, "{starting:?}");
        assert!(starting.regret.iter().all(|(_, r)| r.is_some()));
        assert!(gate.open.len() <= 2, "{:?}", gate.open);
    }

    #[test]
    fn who_does_worse_hands_over_and_back() {
        let mut gate = StartGate::default();
        let network = WindowWeights {
            intervals: 1,
            // A network that never begins: it is left with the last start.
            weights: prior()
                .unwrap()
                .window
                .unwrap()
                .weights
                .iter()
                .map(|_| 0.0)
                .collect(),
        };
        // The load falls to nothing in the second bin of every interval of eight, and is worst at its end.
        let load = |bin: i64| match bin.rem_euclid(8) {
            1 => 0.0,
            7 => 9e6,
            _ => 1e6,
        };
        let loads: Vec<Option<f64>> = (0..20 * DAY).map(|bin| Some(load(bin))).collect();
        let series = series_of(&loads, 29);
        let mut served = Vec::new();
        for bin in 8 * DAY..20 * DAY {
            let past = Past::of(&[series.until(bin as usize)], 1).unwrap();
            let passed = bin.rem_euclid(8) as usize;
            let pace = Pace {
                passed,
                later: 7 - passed,
                length: 1,
            };
            served.extend(gate.judge(&past, &network, pace).map(|judged| judged.by));
        }
        assert_eq!(served[0], Starter::Network);
        assert_eq!(served.last(), Some(&Starter::Rule), "{:?}", gate.starting());
        // What it takes to hand back.
        gate.replay = None;
        gate.regret = [1.0, 1.1];
        gate.intervals = 1.0;
        let past = Past::of(&[series.until(20 * DAY as usize)], 1).unwrap();
        let over = Interval {
            first: past.first() + 18 * DAY,
            last: past.first() + 18 * DAY + 1,
        };
        gate.open = VecDeque::from([over]);
        gate.settle(&past, &network, past.first() + 20 * DAY);
        assert_eq!(gate.serving, Starter::Network, "{:?}", gate.starting());
    }

    #[test]
    fn a_clock_that_steps_back_leaves_nothing_to_wait_for() {
        let mut ahead = gate(12, 12, noise);
        let loads: Vec<Option<f64>> = (0..9 * DAY).map(|bin| Some(noise(bin))).collect();
        let series = series_of(&loads, 29);
        let past = Past::of(&[series.known()], 1).unwrap();
        let network = prior().unwrap().window.unwrap();
        let pace = Pace {
            passed: 0,
            later: 11,
            length: 1,
        };
        ahead.judge(&past, &network, pace);
        assert_eq!(ahead.open.len(), 1);
    }
}
