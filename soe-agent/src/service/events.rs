//! Events from outside: taken once, kept in the history, told to the brain, and told again after a
//! restart as long as what they announce is still to come.

use std::sync::Arc;

use super::ServiceError;
use super::agent::{Agent, lock};
use super::engine::service_error;
use crate::api::engine::EngineError;
use crate::api::types::{Event, EventQuery, WatchEvent};
use crate::api::validate;
use crate::history::{HistoryReader, Query};
use crate::model::{Forecaster, VolumeName};
use crate::plan;
use crate::seam::{Clock, UnixNanos};
use crate::sources::Sink;
use crate::window::EventRow;

/// How far back an event without a time of its own is looked for, in ns: a day of retries.
const LATELY: i64 = 86_400_000_000_000;

impl Sink for Arc<Agent> {
    fn publish(&self, event: Event) -> Result<bool, EngineError> {
        validate::event(&event)?;
        self.take_event(event)
    }

    fn now(&self) -> UnixNanos {
        self.clock.now()
    }
}

impl Agent {
    pub(super) fn take_event(self: &Arc<Self>, event: Event) -> Result<bool, EngineError> {
        // Two calls with the same event: the second finds what the first kept.
        let _turn = lock(&self.event_turn);
        let now = self.clock.now();
        let known = self.read_events(EventQuery {
            // One that says it happened long ago lies among the rows of that time, which is kept
            // in microseconds.
            since: Some(event.time.saturating_sub(1000).min(now - LATELY)),
            limit: usize::MAX,
        })?;
        if known
            .iter()
            .any(|e| e.id == event.id && e.source == event.source)
        {
            return Ok(false);
        }
        let row = EventRow {
            ts: event.time,
            received: now,
            expected: event.expected_at,
            id: event.id.clone(),
            source: event.source.clone(),
            kind: event.kind.clone(),
            subject: event.subject.clone(),
            volumes: event.volumes.iter().map(|v| v.as_str().into()).collect(),
            data_content_type: event.data.as_ref().map(|_| "application/json".into()),
            data: event.data.as_ref().map(ToString::to_string),
        };
        self.history
            .append(std::slice::from_ref(&row))
            .map_err(|e| service_error(e.into()))?;
        // An event is acknowledged only when it would survive a crash.
        self.history.flush().map_err(|e| service_error(e.into()))?;
        let event_of_plan = plan::ExternalEvent::from(row);
        self.foretell(&event_of_plan);
        self.apply(plan::Event::EventReceived(event_of_plan));
        self.tell(WatchEvent::Published {
            published: Box::new(event),
        });
        Ok(true)
    }

    pub(super) fn read_events(&self, query: EventQuery) -> Result<Vec<Event>, EngineError> {
        let error = |e| service_error(ServiceError::History(e));
        self.history.flush().map_err(error)?;
        let reader = HistoryReader::open(self.history.dir()).map_err(error)?;
        let range = query.since.unwrap_or(i64::MIN)..i64::MAX;
        let rows = reader
            .rows_by_time::<EventRow>(&Query::range(range).skip_damage())
            .map_err(error)?;
        let mut events = Vec::new();
        for row in rows {
            let row = row.map_err(error)?;
            events.push(Event {
                id: row.id,
                source: row.source,
                kind: row.kind,
                subject: row.subject,
                time: row.ts,
                expected_at: row.expected,
                volumes: row.volumes.iter().map(|v| v.to_string()).collect(),
                data: row.data.and_then(|data| serde_json::from_str(&data).ok()),
            });
        }
        let skip = events.len().saturating_sub(query.limit);
        Ok(events.split_off(skip))
    }

    /// Tells the forecasters of the volumes an event concerns.
    fn foretell(&self, event: &plan::ExternalEvent) {
        let happening = event.happening();
        let names = self.all_entries();
        let names = names
            .iter()
            .map(|entry| VolumeName::from(entry.name.as_str()));
        let mut mind = lock(&self.mind);
        for name in names.filter(|name| happening.concerns(name)) {
            mind.mixture.happening(&name, &happening);
        }
    }

    /// The events of before that matter after a restart, by their arrival: those not older than `since`, and
    /// those that announce something that is still to come.
    pub(super) fn known_events(&self, since: UnixNanos) -> Vec<(UnixNanos, plan::ExternalEvent)> {
        let now = self.clock.now();
        let rows = HistoryReader::open(self.history.dir())
            .and_then(|reader| reader.rows_by_time::<EventRow>(&Query::all().skip_damage()));
        let rows = match rows {
            Ok(rows) => rows,
            Err(error) => {
                tracing::warn!(%error, "events of before are forgotten");
                return Vec::new();
            }
        };
        let mut events = Vec::new();
        for row in rows {
            match row {
                Ok(row) if row.ts >= since || row.expected.is_some_and(|at| at > now) => {
                    events.push((row.received.max(row.ts), row.into()));
                }
                Ok(_) => {}
                Err(error) => tracing::warn!(%error, "an event of before is forgotten"),
            }
        }
        events.sort_by_key(|(arrived, _)| *arrived);
        events
    }
}
