//! Events from outside: taken once, kept in the history, told to the brain, and told again after a
//! restart as long as what they announce is still to come.

use std::collections::BTreeMap;
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

/// Events remembered at most.
const MOST_REMEMBERED: usize = 1 << 16;

/// The events of the last day, so that a repeated one is known without a look into the history.
#[derive(Default)]
pub(super) struct Recent {
    /// From when on they are complete; `None` before the first look.
    since: Option<UnixNanos>,
    /// When each happened or arrived, whichever was later, by source and identifier.
    ids: BTreeMap<(String, String), UnixNanos>,
}

impl Recent {
    fn note(&mut self, event: &Event, now: UnixNanos) {
        let key = (event.source.clone(), event.id.clone());
        self.ids.insert(key, event.time.max(now));
        if self.ids.len() > MOST_REMEMBERED {
            let mut times: Vec<UnixNanos> = self.ids.values().copied().collect();
            times.sort_unstable();
            self.forget_before(times[MOST_REMEMBERED / 4]);
        }
    }

    /// Takes in the events of the history since then.
    fn fill(&mut self, since: UnixNanos, events: &[Event], now: UnixNanos) {
        // First: where there are too many, noting them moves it on.
        self.since = Some(since);
        events.iter().for_each(|event| self.note(event, now));
    }

    fn forget_before(&mut self, at: UnixNanos) {
        self.ids.retain(|_, kept| *kept >= at);
        self.since = Some(at);
    }

    /// Whether it was taken; `None` where the history must be asked, because it says it happened earlier
    /// than what is remembered.
    fn knows(&mut self, event: &Event, now: UnixNanos) -> Option<bool> {
        // Now and then: what is forgotten a little late does no harm.
        // An event may say that it happened at any time that a number holds.
        if now.saturating_sub(self.since?) > 3 * LATELY {
            self.forget_before(now - 2 * LATELY);
        }
        let since = self.since?;
        let key = (event.source.clone(), event.id.clone());
        if self.ids.contains_key(&key) {
            return Some(true);
        }
        // One that says it is of the future may have been told before. Times are kept in microseconds.
        let told = since.saturating_add(1000)..=now;
        told.contains(&event.time).then_some(false)
    }
}

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
        let mut recent = lock(&self.event_turn);
        let now = self.clock.now();
        let known = match recent.knows(&event, now) {
            Some(known) => known,
            None => {
                // One that says it happened long ago lies among the rows of that time.
                let since = event.time.saturating_sub(1000).min(now - LATELY);
                let events = self.read_events(EventQuery {
                    since: Some(since),
                    limit: usize::MAX,
                })?;
                if recent.since.is_none() {
                    recent.fill(since, &events, now);
                }
                let same = |e: &Event| e.id == event.id && e.source == event.source;
                events.iter().any(same)
            }
        };
        if known {
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
        recent.note(&event, now);
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

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixNanos = 100 * LATELY;

    fn event(id: &str, time: UnixNanos) -> Event {
        Event {
            id: id.into(),
            source: "/ci".into(),
            kind: "k".into(),
            subject: None,
            time,
            expected_at: None,
            volumes: Vec::new(),
            data: None,
        }
    }

    #[test]
    fn what_was_taken_of_late_is_known_without_the_history() {
        let mut recent = Recent::default();
        assert_eq!(
            recent.knows(&event("a", NOW), NOW),
            None,
            "nothing was read yet"
        );
        recent.since = Some(NOW - LATELY);
        recent.note(&event("a", NOW), NOW);
        assert_eq!(recent.knows(&event("a", NOW), NOW), Some(true));
        assert_eq!(recent.knows(&event("b", NOW), NOW), Some(false));
        // Announced for later, told again.
        recent.note(&event("c", NOW + LATELY), NOW);
        assert_eq!(recent.knows(&event("c", NOW + LATELY), NOW + 5), Some(true));
        // One of long ago, or one that says it is of the future, may be in the history.
        assert_eq!(recent.knows(&event("d", NOW - 3 * LATELY), NOW), None);
        assert_eq!(recent.knows(&event("e", NOW + 1), NOW), None);
        let later = NOW + 5 * LATELY;
        recent.note(&event("f", NOW + 4 * LATELY), NOW);
        recent.knows(&event("x", later), later);
        assert_ne!(
            recent.knows(&event("f", NOW + 4 * LATELY), later),
            Some(false)
        );
    }

    #[test]
    fn an_event_of_any_time_is_taken_and_so_is_the_next() {
        for time in [i64::MIN, 0, i64::MAX] {
            let mut recent = Recent::default();
            let first = event("a", time);
            assert_eq!(recent.knows(&first, NOW), None);
            let since = time.saturating_sub(1000).min(NOW - LATELY);
            recent.fill(since, &[], NOW);
            recent.note(&first, NOW);
            assert_eq!(recent.knows(&first, NOW), Some(true), "{time}");
            assert_eq!(recent.knows(&event("b", NOW), NOW), Some(false), "{time}");
        }
    }

    #[test]
    fn of_more_than_is_remembered_the_oldest_are_asked_for() {
        let mut recent = Recent::default();
        let from = NOW - LATELY;
        // Those of before all count as arrived now, so they are told apart by times to come.
        let many: Vec<Event> = (0..=MOST_REMEMBERED)
            .map(|i| event(&i.to_string(), NOW + 1 + i as i64))
            .collect();
        recent.fill(from, &many, NOW);
        let later = NOW + LATELY;
        assert_ne!(recent.knows(&many[0], later), Some(false), "it was taken");
        assert_eq!(recent.knows(&many[MOST_REMEMBERED], later), Some(true));
    }

    #[test]
    fn what_is_remembered_stays_bounded_and_what_is_forgotten_is_asked_for() {
        let mut recent = Recent {
            since: Some(NOW),
            ..Recent::default()
        };
        for day in 0..10 {
            let now = NOW + day * LATELY;
            recent.note(&event(&day.to_string(), now), now);
            recent.knows(&event("x", now), now);
        }
        assert!(recent.ids.len() <= 4, "{:?}", recent.ids);
        assert_eq!(
            recent.knows(&event("1", NOW + LATELY), NOW + 9 * LATELY),
            None
        );
        let now = NOW + 9 * LATELY;
        for i in 0..2 * MOST_REMEMBERED {
            let at = now + i as i64;
            recent.note(&event(&i.to_string(), at), at);
        }
        assert!(recent.ids.len() <= MOST_REMEMBERED);
        let last = now + 2 * MOST_REMEMBERED as i64;
        let newest = event(&(2 * MOST_REMEMBERED - 1).to_string(), last - 1);
        assert_eq!(recent.knows(&newest, last), Some(true));
        assert_eq!(recent.knows(&event("0", now), last), None);
    }
}
