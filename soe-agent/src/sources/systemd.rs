//! systemd's units over D-Bus: those that start, stop and fail, and what timers will start next.
//!
//! systemd tells changes of a unit as `PropertiesChanged` on the unit's object, to those who have called
//! `Subscribe` (org.freedesktop.systemd1(5)). A unit that runs once goes from `activating` to `inactive`
//! and is never `active`, so what counts is leaving rest and coming back to it. A timer's next elapse is an
//! announcement: its event expects a change then.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use futures::StreamExt;
use zbus::message::Type;
use zbus::{Connection, MatchRule, MessageStream, ObjectPath, OwnedObjectPath, OwnedVariant};

use super::Outlet;
use crate::api::types::Event;
use crate::seam::UnixNanos;

const SYSTEMD: &str = "org.freedesktop.systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const MANAGER_PATH: &str = "/org/freedesktop/systemd1";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
const UNITS: &str = "/org/freedesktop/systemd1/unit";
const TIMER: &str = "org.freedesktop.systemd1.Timer";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// Between two looks at the timers.
const TIMERS_EVERY: Duration = Duration::from_secs(60);
/// The longest that systemd may take for an answer.
const ANSWER: Duration = Duration::from_secs(30);
/// Signals that may wait.
const QUEUED: usize = 1024;

/// Kinds of events.
pub const STARTED: &str = "org.freedesktop.systemd1.unit.started";
/// See [`STARTED`].
pub const STOPPED: &str = "org.freedesktop.systemd1.unit.stopped";
/// See [`STARTED`].
pub const FAILED: &str = "org.freedesktop.systemd1.unit.failed";
/// A timer's next elapse.
pub const DUE: &str = "org.freedesktop.systemd1.timer.due";

/// A unit of `ListUnits`: name, description, load state, active state, sub state, followed unit, path,
/// job's number, type and path.
type Listed = (
    String,
    String,
    String,
    String,
    String,
    String,
    OwnedObjectPath,
    u32,
    String,
    OwnedObjectPath,
);

/// What is known of the units; pure.
#[derive(Default)]
pub struct Units {
    /// Those that do not rest.
    running: BTreeSet<String>,
    due: BTreeMap<String, u64>,
}

impl Units {
    /// The kind of event that a unit's new state is, if it is one.
    pub fn state(&mut self, unit: &str, state: &str) -> Option<&'static str> {
        let rests = matches!(state, "inactive" | "failed");
        // Of a unit not seen before it is told whether it starts, not that it had stopped.
        match rests {
            false => self.running.insert(unit.to_owned()).then_some(STARTED),
            true if !self.running.remove(unit) => None,
            true if state == "failed" => Some(FAILED),
            true => Some(STOPPED),
        }
    }

    /// Whether a timer's next elapse (microseconds since the Unix epoch; 0 and the greatest number stand
    /// for none) is news.
    pub fn due(&mut self, timer: &str, at: u64) -> bool {
        let some = at != 0 && at != u64::MAX;
        some && self.due.insert(timer.to_owned(), at) != Some(at)
    }
}

/// The unit's name from the last part of its object's path, in which systemd writes every other character
/// than letters and digits as `_` and two hexadecimal digits; `None` if it is not written so.
pub fn unit_of(path: &str) -> Option<String> {
    let label = path.strip_prefix(UNITS)?.strip_prefix('/')?;
    let mut bytes = Vec::with_capacity(label.len());
    let mut rest = label.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'_' => {
                let digit = |b: u8| char::from(b).to_digit(16);
                let value = digit(rest.next()?)? * 16 + digit(rest.next()?)?;
                bytes.push(u8::try_from(value).ok()?);
            }
            _ => bytes.push(byte),
        }
    }
    String::from_utf8(bytes)
        .ok()
        .filter(|name| !name.is_empty())
}

/// Follows the system's units until that is no longer possible; says why then.
pub async fn follow(units: &[glob::Pattern], outlet: &mut Outlet) -> String {
    let connection = zbus::connection::Builder::system()
        .method_timeout(ANSWER)
        .build();
    let followed = async { follow_on(&connection.await?, units, outlet).await };
    match followed.await {
        Ok(()) => "the connection to systemd ended".to_owned(),
        Err(error) => format!("systemd over D-Bus: {error}"),
    }
}

/// The same over a connection that there is.
///
/// # Errors
/// Of D-Bus.
pub async fn follow_on(
    connection: &Connection,
    patterns: &[glob::Pattern],
    outlet: &mut Outlet,
) -> zbus::Result<()> {
    let rule = MatchRule::builder()
        .msg_type(Type::Signal)
        .interface(PROPERTIES)
        .member("PropertiesChanged")
        .path_namespace(UNITS)
        .arg(0, UNIT)
        .build()?;
    let most = std::num::NonZeroUsize::new(QUEUED);
    let mut signals = MessageStream::for_match_rule(rule, connection, most).await?;
    call(connection, "Subscribe").await?;
    let wanted = |unit: &str| patterns.iter().any(|pattern| pattern.matches(unit));
    let mut units = Units::default();
    // What runs already has not started now.
    for unit in list(connection).await? {
        if wanted(&unit.0) {
            units.state(&unit.0, &unit.3);
        }
    }
    let mut look = tokio::time::interval(TIMERS_EVERY);
    loop {
        tokio::select! {
            signal = signals.next() => {
                let Some(signal) = signal else { return Ok(()) };
                let signal = signal?;
                let header = signal.header();
                let unit = header.path().and_then(|path| unit_of(path.as_str()));
                let body = signal.body();
                let Ok((_, changed, _)) =
                    body.deserialize::<(String, HashMap<String, OwnedVariant>, Vec<String>)>()
                else {
                    continue;
                };
                let state = changed.get("ActiveState").and_then(text);
                let (Some(unit), Some(state)) = (unit, state) else { continue };
                if wanted(&unit)
                    && let Some(kind) = units.state(&unit, &state)
                {
                    tell(outlet, kind, &unit, None).await;
                }
            }
            _ = look.tick() => {
                for (timer, at) in timers(connection, &wanted).await? {
                    if units.due(&timer, at) {
                        let at = i64::try_from(at).unwrap_or(i64::MAX).saturating_mul(1000);
                        tell(outlet, DUE, &timer, Some(at)).await;
                    }
                }
            }
        }
    }
}

async fn call(connection: &Connection, method: &str) -> zbus::Result<zbus::Message> {
    connection
        .call_method(Some(SYSTEMD), MANAGER_PATH, Some(MANAGER), method, &())
        .await
}

async fn list(connection: &Connection) -> zbus::Result<Vec<Listed>> {
    call(connection, "ListUnits").await?.body().deserialize()
}

/// The timers that are wanted and when they elapse next, in microseconds since the Unix epoch.
async fn timers(
    connection: &Connection,
    wanted: &impl Fn(&str) -> bool,
) -> zbus::Result<Vec<(String, u64)>> {
    let mut timers = Vec::new();
    for unit in list(connection).await? {
        let (name, path) = (unit.0, unit.6);
        let Some(stem) = name.strip_suffix(".timer") else {
            continue;
        };
        // A timer is wanted with the service it starts.
        if !wanted(&name) && !wanted(&format!("{stem}.service")) {
            continue;
        }
        let next = next_elapse(connection, &path).await;
        // A unit may be gone between the two calls.
        if let Ok(at) = next {
            timers.push((name, at));
        }
    }
    Ok(timers)
}

async fn next_elapse(connection: &Connection, path: &ObjectPath<'_>) -> zbus::Result<u64> {
    let answer = connection
        .call_method(
            Some(SYSTEMD),
            path,
            Some(PROPERTIES),
            "Get",
            &(TIMER, "NextElapseUSecRealtime"),
        )
        .await?;
    let value: OwnedVariant = answer.body().deserialize()?;
    u64::try_from(value)
}

fn text(value: &OwnedVariant) -> Option<String> {
    String::try_from(value.try_clone().ok()?).ok()
}

async fn tell(outlet: &mut Outlet, kind: &str, unit: &str, expected_at: Option<UnixNanos>) {
    let now = outlet.now();
    let event = Event {
        id: format!("{unit}@{}", expected_at.unwrap_or(now)),
        source: super::SYSTEMD.to_owned(),
        kind: kind.to_owned(),
        subject: Some(unit.to_owned()),
        time: now,
        expected_at,
        volumes: Vec::new(),
        data: None,
    };
    if let Err(error) = outlet.publish(event).await {
        tracing::warn!(%error, unit, "an event of systemd could not be kept");
    }
}

#[cfg(test)]
mod tests;
