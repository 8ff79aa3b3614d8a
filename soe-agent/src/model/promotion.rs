//! Whether a network that was trained here may serve, and whether one that serves should stay. Pure, and
//! done beside the work: nothing waits for it.

use super::Promotion;
use super::dataset::{Dataset, Origin};
use super::onset_features::{label, onset_features};
use super::weights::{ModelError, OnsetWeights, Trained, onset_predictor_of, predictor};
use crate::seam::UnixNanos;

/// Samples of a back-test.
const SAMPLES: usize = 2_000;
/// A new network replaces a serving one if its loss is at most this share of the old one's, and one that
/// serves goes if another's is at most this share of its own.
const BETTER: f64 = 0.995;
/// Seasons of history that a serving network is judged on at least.
const LEAST_SEASONS: i64 = 1;

/// The networks that a new one is compared with.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    /// Trained here and serving.
    pub serving: Option<Trained>,
    /// The one that ships.
    pub prior: Option<Trained>,
}

/// The loss of a network's load forecasts after `from`, relative to the weighted mean's; `None` without
/// anything to judge by.
///
/// # Errors
/// [`ModelError`] if the network does not fit this build.
pub fn loss(data: &Dataset, trained: &Trained, from: UnixNanos) -> Result<Option<f64>, ModelError> {
    let origins = data.validation_origins(from..UnixNanos::MAX, SAMPLES);
    Ok(data.score(predictor(trained)?.as_ref(), &origins))
}

/// The mean logarithmic loss of an onset network.
fn onset_loss(data: &Dataset, weights: &OnsetWeights, labels: &[(Origin, bool)]) -> Option<f64> {
    let network = onset_predictor_of(weights)?;
    let mut sum = 0.0;
    for (origin, happens) in labels {
        let known = data.series[origin.series].1.until(origin.bins);
        let odds = f64::from(network.log_odds(&onset_features(known))?);
        // ln(1 + e^-x), written so that it does not overflow.
        let against = if *happens { -odds } else { odds };
        sum += against.max(0.0) + (-against.abs()).exp().ln_1p();
    }
    (!labels.is_empty()).then(|| sum / labels.len() as f64)
}

/// Judges a network by the history after its training. Its onset network is judged apart: where the one
/// before foretells no worse it takes its place in `offered`.
///
/// # Errors
/// [`ModelError`] if a network does not fit this build.
pub fn judge(
    data: &Dataset,
    offered: &mut Trained,
    standing: &Standing,
) -> Result<Promotion, ModelError> {
    // What the training has not looked at in any way.
    let from = offered.info.chosen_until;
    let Some(new) = loss(data, offered, from)? else {
        return Ok(Promotion::Rejected {
            reason: "too little history after its training to back-test it".to_owned(),
        });
    };
    let before = || [&standing.serving, &standing.prior].into_iter().flatten();
    let mut old: Option<f64> = None;
    for trained in before() {
        if let Some(loss) = loss(data, trained, from)? {
            old = Some(old.map_or(loss, |best| best.min(loss)));
        }
    }
    let (bar, against) = match old {
        Some(old) => (old * BETTER, format!("the serving network's {old:.3}")),
        None => (1.0, "the bar of 1".to_owned()),
    };
    let reason = format!("loss {new:.3} of the weighted mean's against {against}");
    if new > bar {
        return Ok(Promotion::Rejected { reason });
    }
    let labels: Vec<(Origin, bool)> = data
        .validation_origins(from..UnixNanos::MAX, SAMPLES)
        .into_iter()
        .filter_map(|o| Some((o, label(&data.series[o.series].1, o.bins)?)))
        .collect();
    let loss_of = |weights: &OnsetWeights| onset_loss(data, weights, &labels);
    let mut best = offered
        .onset
        .as_ref()
        .and_then(loss_of)
        .unwrap_or(f64::INFINITY);
    for weights in before().filter_map(|trained| trained.onset.as_ref()) {
        let loss = loss_of(weights).unwrap_or(f64::INFINITY);
        if loss.is_finite() && loss <= best {
            best = loss;
            offered.onset = Some(weights.clone());
        }
    }
    Ok(Promotion::Promoted { reason })
}

/// Why `serving` should go and `before` serve again: over the history since its training it lost more.
/// `None` where it should stay, or too little has happened since to tell.
///
/// # Errors
/// [`ModelError`] if a network does not fit this build.
pub fn outdone(
    data: &Dataset,
    serving: &Trained,
    before: &Trained,
) -> Result<Option<String>, ModelError> {
    let from = serving.info.data_to;
    let season = i64::try_from(data.scale.season().as_nanos()).unwrap_or(i64::MAX);
    let since = data.range().map_or(0, |(_, to)| to.saturating_sub(from));
    if since < season.saturating_mul(LEAST_SEASONS) {
        return Ok(None);
    }
    let (Some(now), Some(then)) = (loss(data, serving, from)?, loss(data, before, from)?) else {
        return Ok(None);
    };
    Ok((then <= now * BETTER).then(|| {
        format!(
            "since its training it lost {now:.3} of the weighted mean's, the one before {then:.3}"
        )
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::TimeScale;
    use crate::model::series::support::series_of;
    use crate::model::weights::prior;
    use std::time::Duration;

    const S: i64 = 1_000_000_000;
    const DAY: i64 = 24;

    /// Thirty seasons of a daily shape, with a burst at the same clock time of every second one.
    fn data() -> Dataset {
        let loads: Vec<Option<f64>> = (0..30 * DAY)
            .map(|bin| {
                let noise = ((bin as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 44) as f64;
                let shape = (bin % DAY) as f64;
                let burst = if bin % (2 * DAY) == 9 { 3e8 } else { 0.0 };
                Some(1e6 * (1.0 + shape) + noise + burst)
            })
            .collect();
        Dataset {
            scale: TimeScale::new(Duration::from_secs(1), DAY as usize).unwrap(),
            series: vec![("v".into(), series_of(&loads, 29))],
        }
    }

    /// The network that ships as if trained until `until`, or with its weights turned round.
    fn network(until: i64, bad: bool) -> Trained {
        let mut trained = prior().unwrap();
        trained.info.trained_until = until * S;
        trained.info.chosen_until = until * S;
        trained.info.data_to = until * S;
        if bad {
            trained.weights.iter_mut().for_each(|w| *w = -*w);
        }
        trained
    }

    #[test]
    fn what_turned_out_worse_is_rolled_back_and_nothing_else() {
        let data = data();
        let (good, bad) = (network(20 * DAY, false), network(20 * DAY, true));
        let reason = outdone(&data, &bad, &good).unwrap().unwrap();
        assert!(reason.contains("since its training it lost"), "{reason}");
        assert_eq!(outdone(&data, &good, &bad).unwrap(), None);
        assert_eq!(outdone(&data, &good, &good).unwrap(), None);
        // Half a season says too little.
        let young = network(30 * DAY - DAY / 2, true);
        assert_eq!(outdone(&data, &young, &good).unwrap(), None);
    }

    #[test]
    fn a_new_network_must_be_better_and_its_onsets_are_judged_apart() {
        let data = data();
        let mut bad = network(20 * DAY, true);
        let standing = Standing {
            serving: Some(network(10 * DAY, false)),
            prior: None,
        };
        let told = judge(&data, &mut bad, &standing).unwrap();
        assert!(matches!(told, Promotion::Rejected { .. }), "{told:?}");
        // One as good is not better.
        let told = judge(&data, &mut network(20 * DAY, false), &standing).unwrap();
        assert!(matches!(told, Promotion::Rejected { .. }), "{told:?}");
        // Better at the load, worse at onsets: the onset network before stays.
        let mut offered = network(20 * DAY, false);
        let onset = offered.onset.clone().unwrap();
        let turned = OnsetWeights {
            weights: onset.weights.iter().map(|w| -*w).collect(),
            ..onset.clone()
        };
        offered.onset = Some(turned.clone());
        let mut serving = network(10 * DAY, true);
        serving.onset = Some(onset.clone());
        let standing = Standing {
            serving: Some(serving.clone()),
            prior: None,
        };
        let told = judge(&data, &mut offered, &standing).unwrap();
        assert!(matches!(told, Promotion::Promoted { .. }), "{told:?}");
        assert_eq!(offered.onset, Some(onset.clone()));
        // And the other way round the new one is taken.
        let mut offered = network(20 * DAY, false);
        serving.onset = Some(turned);
        let standing = Standing {
            serving: Some(serving),
            prior: None,
        };
        judge(&data, &mut offered, &standing).unwrap();
        assert_eq!(offered.onset, Some(onset));
    }

    #[test]
    fn without_history_after_it_nothing_is_promoted() {
        let told = judge(&data(), &mut network(30 * DAY, false), &Standing::default()).unwrap();
        assert!(matches!(told, Promotion::Rejected { .. }), "{told:?}");
    }
}
