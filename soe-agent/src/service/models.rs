//! The networks of this host: training, which version serves, and what is told of them.

use std::path::Path;

use super::agent::{Agent, lock};
use crate::api::engine::{EngineError, ErrorKind, WhichModel};
use crate::api::types::{
    EventEffect, MemberScore, ModelReport, ModelVersion, StartScore, TimeWindow,
};
use crate::model::mixture::Mixture;
use crate::model::promotion::{self, Standing};
use crate::model::registry::Registry;
use crate::model::weights::{ModelError, prior};
use crate::model::window_gate::{Starter, Starting};
use crate::model::{Forecaster, Promotion, Trained, VolumeName};
use crate::seam::Clock;

/// Where versions before the registry kept their network.
const ALONE: &str = "model.soe";

/// The registry below `state_dir`, with the network of an earlier version of SOE if there is one.
pub(super) fn registry(state_dir: &Path) -> Result<Registry, ModelError> {
    let registry = Registry::open(&state_dir.join("models"))?;
    let alone = state_dir.join(ALONE);
    if alone.exists() {
        match Trained::load(&alone).and_then(|trained| registry.add(&trained)) {
            Ok(version) => {
                tracing::info!(version, "the network of before is a version now");
                let _ = std::fs::remove_file(&alone);
            }
            Err(error) => {
                tracing::warn!(%error, "the network of an earlier version of SOE is not used");
                let _ = std::fs::rename(&alone, alone.with_extension("old"));
            }
        }
    }
    Ok(registry)
}

/// Puts in service what served before.
pub(super) fn restore(registry: &Registry, mixture: &mut Mixture) {
    if let Err(error) = prior().and_then(|prior| mixture.set_prior(&prior)) {
        tracing::warn!(%error, "the network that ships with SOE is not used");
    }
    let Some(version) = registry.serving() else {
        return;
    };
    let restored = registry
        .load(version)
        .and_then(|trained| mixture.restore(&trained));
    match restored {
        Ok(()) => tracing::info!(version, "the network that served before serves again"),
        Err(error) => {
            tracing::warn!(version, %error, "the network that was trained here is not used until the next training");
        }
    }
}

/// Does work on a thread of its own, because its priority stays low; `None` if it panicked.
fn in_background<T: Send>(work: impl FnOnce() -> T + Send) -> Option<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: setpriority of this thread touches no memory.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
            work()
        });
        thread.join().ok()
    })
}

impl Agent {
    /// Judges the network that serves by what has happened since, trains another on what the forecasters
    /// remember, and lets it serve if it is better. Nothing waits for it.
    #[cfg(feature = "model")]
    pub(super) fn train(&self) -> Result<String, String> {
        in_background(|| self.train_here())
            .unwrap_or_else(|| Err("the training ended by a panic; the log says why".into()))
    }

    #[cfg(feature = "model")]
    fn train_here(&self) -> Result<String, String> {
        use crate::model::net::{Budget, train};
        let told = |error: ModelError| error.to_string();
        let dataset = lock(&self.mind).mixture.dataset();
        let back = self.roll_back_if_outdone(&dataset).map_err(told)?;
        let began = self.clock.monotonic();
        let budget = Budget {
            max_samples: Budget::BACKGROUND_SAMPLES,
            cores: Some(self.config().limits.cpu),
            ..Budget::default()
        };
        let seed = u64::from(self.config().model.seed);
        let (served, standing) = {
            let registry = lock(&self.models);
            let standing = lock(&self.mind).mixture.standing().clone();
            (registry.serving(), standing)
        };
        let mut trained = train(
            &dataset,
            budget,
            seed,
            standing.prior.as_ref(),
            &self.stopping,
        )
        .map_err(told)?;
        self.metrics
            .training_duration
            .observe([], (self.clock.monotonic() - began).as_secs_f64());
        let promotion = promotion::judge(&dataset, &mut trained, &standing).map_err(told)?;
        let outcome = match promotion {
            Promotion::Promoted { reason } => {
                let registry = lock(&self.models);
                // What a user has chosen meanwhile was not compared with.
                if registry.serving() != served {
                    return Ok(
                        "another version was chosen meanwhile; what was trained is not used".into(),
                    );
                }
                let version = registry.add(&trained).map_err(told)?;
                lock(&self.mind).mixture.restore(&trained).map_err(told)?;
                format!("version {version} serves: {reason}")
            }
            Promotion::Rejected { reason } => format!("not better: {reason}"),
        };
        Ok(match back {
            Some(back) => format!("{back}; {outcome}"),
            None => outcome,
        })
    }

    /// Without burn there is nothing to train.
    #[cfg(not(feature = "model"))]
    pub(super) fn train(&self) -> Result<String, String> {
        Err(ModelError::NotBuilt.to_string())
    }

    /// Goes back to the version before the one that serves, or the network that ships, if that would have
    /// lost less since; says so.
    #[cfg(feature = "model")]
    fn roll_back_if_outdone(
        &self,
        dataset: &crate::model::dataset::Dataset,
    ) -> Result<Option<String>, ModelError> {
        let Standing { serving, prior } = lock(&self.mind).mixture.standing().clone();
        let (Some(serving), Some(version)) = (serving, lock(&self.models).serving()) else {
            return Ok(None);
        };
        let before = lock(&self.models).before();
        let before = before
            .map(|number| lock(&self.models).load(number))
            .transpose()?;
        let Some(other) = before.or(prior) else {
            return Ok(None);
        };
        let Some(reason) = promotion::outdone(dataset, &serving, &other)? else {
            return Ok(None);
        };
        let back = lock(&self.models).back()?;
        self.install(back)?;
        let reason = format!("version {version} was rolled back: {reason}");
        tracing::warn!(reason, "the network that served is not used any more");
        Ok(Some(reason))
    }

    /// Puts in service what the registry says serves.
    fn install(&self, version: Option<u64>) -> Result<(), ModelError> {
        let trained = version
            .map(|version| lock(&self.models).load(version))
            .transpose()?;
        let mixture = &mut lock(&self.mind).mixture;
        match trained {
            Some(trained) => mixture.restore(&trained),
            None => {
                mixture.retire();
                Ok(())
            }
        }
    }

    /// Lets the version serve that a user asks for.
    pub(super) fn serve_model(&self, which: WhichModel) -> Result<(), EngineError> {
        let refused = |error: ModelError| EngineError::new(ErrorKind::Conflict, error.to_string());
        let version = match which {
            WhichModel::Shipped => {
                lock(&self.models).serve(None).map_err(refused)?;
                None
            }
            WhichModel::Version(version) => {
                let registry = lock(&self.models);
                let known = registry.versions().map_err(refused)?;
                if !known.iter().any(|v| v.number == version) {
                    return Err(EngineError::not_found(format!(
                        "there is no version {version} of the model; 'soe model show' lists those there are"
                    )));
                }
                registry.serve(Some(version)).map_err(refused)?;
                Some(version)
            }
            WhichModel::Before => {
                let registry = lock(&self.models);
                if registry.serving().is_none() && registry.before().is_none() {
                    return Err(EngineError::new(
                        ErrorKind::Conflict,
                        "the model that ships with SOE serves; there is none before it to go back to",
                    ));
                }
                registry.back().map_err(refused)?
            }
        };
        self.install(version).map_err(refused)
    }

    /// The model of a volume or of all, with what each version would have lost since the newest one was
    /// trained.
    pub(super) fn backtest_models(
        &self,
        volume: Option<String>,
    ) -> Result<ModelReport, EngineError> {
        // It takes a copy of the histories and some time of a core: one is enough.
        let Ok(_turn) = self.judging.try_lock() else {
            return Err(EngineError::new(
                ErrorKind::Conflict,
                "the model is being judged already; try again when that has ended",
            ));
        };
        in_background(|| self.judge_versions(volume)).unwrap_or_else(|| {
            let why = "the back-test ended by a panic; the log says why";
            Err(EngineError::new(ErrorKind::Internal, why))
        })
    }

    fn judge_versions(&self, volume: Option<String>) -> Result<ModelReport, EngineError> {
        let mut report = self.model_report(volume.clone())?;
        let name = volume.as_deref().map(VolumeName::from);
        let dataset = lock(&self.mind).mixture.dataset_of(name.as_ref());
        let newest = report.versions.iter().filter_map(|v| v.trained_at).max();
        let season = i64::try_from(self.scale.season().as_nanos()).unwrap_or(i64::MAX);
        let (_, to) = dataset.range().unwrap_or_default();
        // Without any version of this host's, the network that ships is judged by the last week.
        let host = report.versions.iter().any(|v| v.version.is_some());
        let from = match newest.filter(|_| host) {
            Some(newest) => newest,
            None => to.saturating_sub(season.saturating_mul(7)),
        };
        for version in &mut report.versions {
            let judged = self
                .trained(version.version)
                .and_then(|trained| promotion::loss(&dataset, &trained, from));
            match judged {
                Ok(loss) => version.backtest = loss,
                Err(error) => version.unusable = Some(error.to_string()),
            }
        }
        if report.versions.iter().all(|v| v.backtest.is_none()) {
            return Err(EngineError::new(
                ErrorKind::Conflict,
                "nothing was measured since the newest training to judge the model by; try again in some hours",
            ));
        }
        Ok(report)
    }

    fn trained(&self, version: Option<u64>) -> Result<Trained, ModelError> {
        match version {
            Some(version) => lock(&self.models).load(version),
            None => prior(),
        }
    }

    /// The network that ships and the versions of this host.
    fn versions(&self) -> Vec<ModelVersion> {
        let registry = lock(&self.models);
        // What serves, not what should: a version that cannot be used leaves the one that ships.
        let used = lock(&self.mind).mixture.network().is_some();
        let serving = registry.serving().filter(|_| used);
        let shipped = prior().map(|trained| trained.info);
        let mut all = vec![(None, shipped.as_ref().ok().cloned(), shipped.err())];
        match registry.versions() {
            Ok(versions) => all.extend(versions.into_iter().map(|v| {
                let unusable = v.info.is_none().then(|| registry.load(v.number).err());
                (Some(v.number), v.info, unusable.flatten())
            })),
            Err(error) => tracing::warn!(%error, "the versions of the model are not known"),
        }
        all.into_iter()
            .map(|(version, info, unusable)| ModelVersion {
                version,
                serving: version == serving,
                trained_at: info.as_ref().map(|info| info.data_to),
                training_samples: info.as_ref().map_or(0, |info| info.samples as u64),
                score: info.as_ref().map(|info| info.score),
                backtest: None,
                unusable: unusable.map(|error| error.to_string()),
            })
            .collect()
    }

    pub(super) fn model_report(&self, volume: Option<String>) -> Result<ModelReport, EngineError> {
        if let Some(volume) = &volume {
            self.known(volume)?;
        }
        let versions = self.versions();
        let mind = lock(&self.mind);
        let network = mind.mixture.network();
        let serving = volume
            .as_ref()
            .and_then(|volume| mind.mixture.serving(&VolumeName::from(volume.as_str())));
        Ok(ModelReport {
            serving: serving
                .as_ref()
                .map_or_else(|| "none".into(), |s| s.member.to_string()),
            reason: serving.as_ref().map_or_else(
                || "no volume was named, or nothing was observed of it yet".into(),
                |s| s.why.clone(),
            ),
            members: serving
                .map(|s| {
                    s.losses
                        .into_iter()
                        .map(|(member, loss)| MemberScore {
                            member: member.to_string(),
                            quantile_loss: loss,
                            matured: s.bins as u64,
                        })
                        .collect()
                })
                .unwrap_or_default(),
            trained_at: network.map(|n| n.data_to),
            trained_on: network.map(|n| TimeWindow {
                start: n.data_from,
                end: n.trained_until,
            }),
            training_samples: network.map_or(0, |n| n.samples as u64),
            seed: network.map(|n| n.seed),
            parameters: network.map(|n| n.shape.weights() as u64),
            effects: volume
                .as_ref()
                .map(|volume| mind.mixture.effects(&VolumeName::from(volume.as_str())))
                .unwrap_or_default()
                .into_iter()
                .map(|effect| EventEffect {
                    kind: effect.kind,
                    subject: effect.subject,
                    events: effect.events,
                    factor: effect.factor,
                    after_s: self
                        .scale
                        .bin()
                        .as_secs()
                        .saturating_mul(effect.after_bins as u64),
                    burst_probability: effect.burst_probability,
                    believed: effect.believed,
                })
                .collect(),
            starts: volume
                .as_ref()
                .map(|volume| mind.mixture.starting(&VolumeName::from(volume.as_str())))
                .unwrap_or_default()
                .into_iter()
                .map(start_score)
                .collect(),
            versions,
            volume,
        })
    }
}

fn start_score((volumes, starting): (Vec<VolumeName>, Starting)) -> StartScore {
    let regret = |of: Starter| {
        let found = starting.regret.iter().find(|(starter, _)| *starter == of);
        found.and_then(|(_, regret)| *regret)
    };
    StartScore {
        volumes: volumes.iter().map(ToString::to_string).collect(),
        by: starting.by.to_string(),
        intervals: starting.intervals,
        network_regret: regret(Starter::Network),
        rule_regret: regret(Starter::Rule),
    }
}
