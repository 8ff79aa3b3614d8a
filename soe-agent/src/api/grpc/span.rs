//! The audit of one call.

use std::sync::Arc;

use crate::api::audit::{Audit, Entry, Outcome};
use crate::api::engine::EngineError;
use crate::metrics::Metrics;
use crate::seam::Clock;

/// The audit of one call. Dropped without [`Span::end`], it says that the caller went away.
pub(super) struct Span {
    pub(super) audit: Arc<Audit>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) entry: Option<Entry>,
    pub(super) call: &'static str,
    pub(super) ended: bool,
}

impl Span {
    pub(super) fn line(&self, outcome: Outcome) {
        if let Some(entry) = &self.entry {
            self.audit.record(&Entry {
                at: self.clock.now(),
                outcome,
                ..entry.clone()
            });
        }
    }

    pub(super) fn end(mut self, error: Option<&EngineError>) {
        self.ended = true;
        let outcome = error.map_or("done", |e| e.kind.as_str());
        self.metrics.api_requests.with([self.call, outcome]).inc();
        self.line(match error {
            None => Outcome::Done,
            Some(e) => Outcome::Failed {
                kind: e.kind.to_string(),
                error: e.message.clone(),
            },
        });
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if !self.ended {
            self.metrics
                .api_requests
                .with([self.call, "abandoned"])
                .inc();
            self.line(Outcome::Abandoned);
        }
    }
}

/// How a call is audited.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// Changes nothing: no line.
    Reads,
    /// One line at the end.
    Changes,
    /// Takes long: a line at the beginning, too.
    Works,
}
