//! Forecasts, models, decisions.

use super::{WireError, pb, required};
use crate::api::types::{
    Decision, EventEffect, ForecastPoint, ForecastReport, LoadPoint, MemberScore, ModelReport,
    ModelVersion, Prediction, StartScore,
};

impl From<Prediction> for pb::Prediction {
    fn from(p: Prediction) -> Self {
        Self {
            load_now: p.load_now,
            next_burst_at_unix_ns: p.next_burst_at,
            burst_probability: p.burst_probability,
            next_low_window: p.next_low_window.map(Into::into),
            model: p.model,
            model_reason: p.model_reason,
        }
    }
}

impl From<pb::Prediction> for Prediction {
    fn from(p: pb::Prediction) -> Self {
        Self {
            load_now: p.load_now,
            next_burst_at: p.next_burst_at_unix_ns,
            burst_probability: p.burst_probability,
            next_low_window: p.next_low_window.map(Into::into),
            model: p.model,
            model_reason: p.model_reason,
        }
    }
}

impl From<Decision> for pb::Decision {
    fn from(d: Decision) -> Self {
        Self {
            at_unix_ns: d.at,
            action: d.action,
            reason: d.reason,
        }
    }
}

impl From<pb::Decision> for Decision {
    fn from(d: pb::Decision) -> Self {
        Self {
            at: d.at_unix_ns,
            action: d.action,
            reason: d.reason,
        }
    }
}

impl From<ForecastPoint> for pb::ForecastPoint {
    fn from(p: ForecastPoint) -> Self {
        let ForecastPoint {
            start,
            q10,
            q50,
            q80,
            q90,
            q95,
            q99,
            burst_probability,
        } = p;
        Self {
            start_unix_ns: start,
            q10,
            q50,
            q80,
            q90,
            q95,
            q99,
            burst_probability,
        }
    }
}

impl From<pb::ForecastPoint> for ForecastPoint {
    fn from(p: pb::ForecastPoint) -> Self {
        let pb::ForecastPoint {
            start_unix_ns,
            q10,
            q50,
            q80,
            q90,
            q95,
            q99,
            burst_probability,
        } = p;
        Self {
            start: start_unix_ns,
            q10,
            q50,
            q80,
            q90,
            q95,
            q99,
            burst_probability,
        }
    }
}

impl From<LoadPoint> for pb::LoadPoint {
    fn from(p: LoadPoint) -> Self {
        Self {
            start_unix_ns: p.start,
            load: p.load,
        }
    }
}

impl From<pb::LoadPoint> for LoadPoint {
    fn from(p: pb::LoadPoint) -> Self {
        Self {
            start: p.start_unix_ns,
            load: p.load,
        }
    }
}

impl From<ForecastReport> for pb::ForecastReport {
    fn from(r: ForecastReport) -> Self {
        Self {
            volume: r.volume,
            issued_at_unix_ns: r.issued_at,
            bin_s: r.bin_s,
            predicted: Some(r.predicted.into()),
            points: r.points.into_iter().map(Into::into).collect(),
            history: r.history.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<pb::ForecastReport> for ForecastReport {
    type Error = WireError;

    fn try_from(r: pb::ForecastReport) -> Result<Self, WireError> {
        Ok(Self {
            volume: r.volume,
            issued_at: r.issued_at_unix_ns,
            bin_s: r.bin_s,
            predicted: required(r.predicted, "predicted")?.into(),
            points: r.points.into_iter().map(Into::into).collect(),
            history: r.history.into_iter().map(Into::into).collect(),
        })
    }
}

impl From<MemberScore> for pb::MemberScore {
    fn from(m: MemberScore) -> Self {
        Self {
            member: m.member,
            quantile_loss: m.quantile_loss,
            matured: m.matured,
        }
    }
}

impl From<pb::MemberScore> for MemberScore {
    fn from(m: pb::MemberScore) -> Self {
        Self {
            member: m.member,
            quantile_loss: m.quantile_loss,
            matured: m.matured,
        }
    }
}

impl From<EventEffect> for pb::EventEffect {
    fn from(e: EventEffect) -> Self {
        Self {
            r#type: e.kind,
            subject: e.subject,
            events: e.events,
            factor: e.factor,
            after_s: e.after_s,
            burst_probability: e.burst_probability,
            believed: e.believed,
        }
    }
}

impl From<pb::EventEffect> for EventEffect {
    fn from(e: pb::EventEffect) -> Self {
        Self {
            kind: e.r#type,
            subject: e.subject,
            events: e.events,
            factor: e.factor,
            after_s: e.after_s,
            burst_probability: e.burst_probability,
            believed: e.believed,
        }
    }
}

impl From<StartScore> for pb::StartScore {
    fn from(s: StartScore) -> Self {
        Self {
            volumes: s.volumes,
            by: s.by,
            intervals: s.intervals,
            network_regret: s.network_regret,
            rule_regret: s.rule_regret,
        }
    }
}

impl From<pb::StartScore> for StartScore {
    fn from(s: pb::StartScore) -> Self {
        Self {
            volumes: s.volumes,
            by: s.by,
            intervals: s.intervals,
            network_regret: s.network_regret,
            rule_regret: s.rule_regret,
        }
    }
}

impl From<ModelVersion> for pb::ModelVersion {
    fn from(v: ModelVersion) -> Self {
        Self {
            version: v.version,
            serving: v.serving,
            trained_at_unix_ns: v.trained_at,
            training_samples: v.training_samples,
            score: v.score,
            backtest: v.backtest,
            unusable: v.unusable,
        }
    }
}

impl From<pb::ModelVersion> for ModelVersion {
    fn from(v: pb::ModelVersion) -> Self {
        Self {
            version: v.version,
            serving: v.serving,
            trained_at: v.trained_at_unix_ns,
            training_samples: v.training_samples,
            score: v.score,
            backtest: v.backtest,
            unusable: v.unusable,
        }
    }
}

impl From<ModelReport> for pb::ModelReport {
    fn from(m: ModelReport) -> Self {
        Self {
            volume: m.volume,
            serving: m.serving,
            reason: m.reason,
            members: m.members.into_iter().map(Into::into).collect(),
            trained_at_unix_ns: m.trained_at,
            trained_on: m.trained_on.map(Into::into),
            training_samples: m.training_samples,
            seed: m.seed,
            parameters: m.parameters,
            effects: m.effects.into_iter().map(Into::into).collect(),
            starts: m.starts.into_iter().map(Into::into).collect(),
            versions: m.versions.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<pb::ModelReport> for ModelReport {
    fn from(m: pb::ModelReport) -> Self {
        Self {
            volume: m.volume,
            serving: m.serving,
            reason: m.reason,
            members: m.members.into_iter().map(Into::into).collect(),
            trained_at: m.trained_at_unix_ns,
            trained_on: m.trained_on.map(Into::into),
            training_samples: m.training_samples,
            seed: m.seed,
            parameters: m.parameters,
            effects: m.effects.into_iter().map(Into::into).collect(),
            starts: m.starts.into_iter().map(Into::into).collect(),
            versions: m.versions.into_iter().map(Into::into).collect(),
        }
    }
}
