//! The HTTP listener on loopback: metrics, health, CloudEvents in, status out.
//!
//! Nothing authenticates a caller here, so it must be one on this host that means to call: requests
//! for another host name (DNS rebinding) and from web pages of another origin are refused.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{ConnectInfo, Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::json;

use super::audit::{Audit, Caller, Entry, Outcome};
use super::cloudevents;
use super::engine::{Engine, EngineError, ErrorKind};
use super::validate;
use crate::metrics::Metrics;
use crate::seam::Clock;

/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// What the routes need.
#[derive(Clone)]
pub struct HttpState {
    /// The daemon.
    pub engine: Arc<dyn Engine>,
    /// Where changes are recorded.
    pub audit: Arc<Audit>,
    /// What `/metrics` shows.
    pub metrics: Arc<Metrics>,
    /// The time of events that do not tell theirs.
    pub clock: Arc<dyn Clock>,
    /// Bytes of the largest body of `POST /events`.
    pub max_event_bytes: usize,
    /// Whether `POST /events` is open; may change while it runs.
    pub accept_events: Arc<AtomicBool>,
    /// The address it listens on.
    pub address: SocketAddr,
}

struct HttpError(EngineError);

impl From<EngineError> for HttpError {
    fn from(error: EngineError) -> Self {
        Self(error)
    }
}

const fn status_code(kind: ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::InvalidArgument => StatusCode::BAD_REQUEST,
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::AlreadyExists | ErrorKind::Conflict | ErrorKind::Unsafe => StatusCode::CONFLICT,
        ErrorKind::PermissionDenied => StatusCode::FORBIDDEN,
        ErrorKind::Exhausted => StatusCode::INSUFFICIENT_STORAGE,
        ErrorKind::Unsupported => StatusCode::NOT_IMPLEMENTED,
        ErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::Integrity | ErrorKind::Cancelled | ErrorKind::Internal => {
            StatusCode::INTERNAL_SERVER_ERROR
        }
    }
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        failure(
            status_code(self.0.kind),
            self.0.kind.as_str(),
            &self.0.message,
        )
    }
}

fn failure(status: StatusCode, kind: &str, message: &str) -> Response {
    (status, Json(json!({"error": message, "kind": kind}))).into_response()
}

/// The routes. Serve them with `into_make_service_with_connect_info::<SocketAddr>()`.
pub fn router(state: HttpState) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/events", post(events))
        .route("/api/v1/groups", get(groups))
        .route("/api/v1/groups/{name}", get(group))
        .route("/api/v1/volumes", get(volumes))
        .fallback(async || {
            failure(
                StatusCode::NOT_FOUND,
                "not-found",
                "there is nothing under this path",
            )
        })
        .layer(middleware::from_fn_with_state(state.clone(), guard))
        .with_state(state)
}

/// Lets only requests pass that are meant for this listener.
async fn guard(State(state): State<HttpState>, request: Request, next: Next) -> Response {
    if let Err(why) = meant_for_us(request.headers(), state.address) {
        return failure(StatusCode::FORBIDDEN, "permission-denied", why);
    }
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// Whether `Host` names this listener and no foreign web page sent the request. Pure.
fn meant_for_us(headers: &HeaderMap, address: SocketAddr) -> Result<(), &'static str> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts
        .next()
        .and_then(|h| h.to_str().ok())
        .ok_or("the request names no host")?;
    if hosts.next().is_some() || !is_local(host, address.port()) {
        return Err("the request is for another host; use localhost or a loopback address");
    }
    if let Some(origin) = headers.get(header::ORIGIN) {
        let local = origin
            .to_str()
            .ok()
            .and_then(|o| o.strip_prefix("http://"))
            .is_some_and(|o| is_local(o, address.port()));
        if !local {
            return Err("the request comes from a web page of another origin");
        }
    }
    let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
    if !matches!(site, None | Some(b"same-origin" | b"none")) {
        return Err("the request comes from a web page of another site");
    }
    Ok(())
}

/// Whether `authority` is `localhost` or a loopback address, with our port or none.
fn is_local(authority: &str, port: u16) -> bool {
    let (host, given) = match authority.rsplit_once(':') {
        Some((host, digits)) if !digits.ends_with(']') => (host, Some(digits)),
        _ => (authority, None),
    };
    let port_fits = given.is_none_or(|digits| {
        digits.parse() == Ok(port) && digits.bytes().all(|b| b.is_ascii_digit())
    });
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let loopback = match bare {
        Some(v6) => v6
            .parse::<std::net::Ipv6Addr>()
            .is_ok_and(|a| a.is_loopback()),
        None => host
            .parse::<std::net::Ipv4Addr>()
            .is_ok_and(|a| a.is_loopback()),
    };
    port_fits && (loopback || host.eq_ignore_ascii_case("localhost"))
}

async fn metrics(State(state): State<HttpState>) -> Response {
    match state.metrics.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, Metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => failure(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            &format!("metrics cannot be written: {error}"),
        ),
    }
}

async fn readyz(State(state): State<HttpState>) -> Response {
    match state.engine.not_ready() {
        None => "ready\n".into_response(),
        Some(why) => failure(StatusCode::SERVICE_UNAVAILABLE, "unavailable", &why),
    }
}

async fn groups(State(state): State<HttpState>) -> Result<Response, HttpError> {
    Ok(Json(json!({"groups": state.engine.list_groups().await?})).into_response())
}

async fn group(
    State(state): State<HttpState>,
    Path(name): Path<String>,
) -> Result<Response, HttpError> {
    validate::group_name(&name)?;
    Ok(Json(state.engine.group_status(name).await?).into_response())
}

async fn volumes(State(state): State<HttpState>) -> Result<Response, HttpError> {
    Ok(Json(json!({"volumes": state.engine.list_volumes().await?})).into_response())
}

/// Reads a body of at most `limit` bytes, in bounded time.
async fn read_body(body: Body, limit: usize) -> Result<axum::body::Bytes, Response> {
    let too_large = |_| {
        failure(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid-argument",
            &format!(
                "the body did not arrive whole or is larger than {limit} bytes ([api] max_event)"
            ),
        )
    };
    match tokio::time::timeout(BODY_TIMEOUT, to_bytes(body, limit)).await {
        Ok(read) => read.map_err(too_large),
        Err(_) => Err(failure(
            StatusCode::REQUEST_TIMEOUT,
            "invalid-argument",
            "the body did not arrive within 10 s",
        )),
    }
}

async fn events(
    State(state): State<HttpState>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    if !state.accept_events.load(Ordering::Relaxed) {
        let message = "events are not accepted here; add [[event.source]] type = \"cloudevents\" to the configuration";
        return failure(StatusCode::FORBIDDEN, "permission-denied", message);
    }
    if let Some(why) = state.engine.not_ready() {
        return failure(StatusCode::SERVICE_UNAVAILABLE, "unavailable", &why);
    }
    let body = match read_body(body, state.max_event_bytes).await {
        Ok(body) => body,
        Err(response) => return response,
    };
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let content_type = headers
        .get(header::CONTENT_TYPE)
        .map(text)
        .unwrap_or_default();
    let all: Vec<(String, String)> = headers
        .iter()
        .map(|(n, v)| (n.as_str().to_owned(), text(v)))
        .collect();
    let parsed = match cloudevents::from_http(&content_type, &all, &body, state.clock.now()) {
        Ok(parsed) => parsed,
        Err(error) => {
            state.metrics.events.with(["refused"]).inc();
            let status = match error {
                cloudevents::CloudEventError::ContentType { .. } => {
                    StatusCode::UNSUPPORTED_MEDIA_TYPE
                }
                _ => StatusCode::BAD_REQUEST,
            };
            return failure(status, "invalid-argument", &error.to_string());
        }
    };
    let caller = Caller::Http {
        peer: peer.to_string(),
    };
    let (mut stored, mut known) = (0u64, 0u64);
    for event in parsed {
        let subject = format!("{} {}", event.source, event.id);
        let result = state.engine.publish_event(event).await;
        let outcome = match &result {
            Ok(_) => Outcome::Done,
            Err(e) => Outcome::Failed {
                kind: e.kind.to_string(),
                error: e.message.clone(),
            },
        };
        state.audit.record(&Entry {
            at: state.clock.now(),
            caller: caller.clone(),
            call: "POST /events".into(),
            subject,
            outcome,
        });
        match result {
            Ok(true) => stored += 1,
            Ok(false) => known += 1,
            Err(error) => {
                state.metrics.events.with(["failed"]).inc();
                let message = format!(
                    "{}; {stored} events were kept before it, and sending all again is safe",
                    error.message
                );
                return failure(status_code(error.kind), error.kind.as_str(), &message);
            }
        }
    }
    state.metrics.events.with(["stored"]).inc_by(stored);
    state.metrics.events.with(["known"]).inc_by(known);
    (
        StatusCode::ACCEPTED,
        Json(json!({"stored": stored, "already_known": known})),
    )
        .into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(pairs: &[(&'static str, &str)]) -> bool {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        meant_for_us(&headers, SocketAddr::from(([127, 0, 0, 1], 9620))).is_ok()
    }

    #[test]
    fn loopback_names_pass() {
        for host in [
            "localhost",
            "localhost:9620",
            "LOCALHOST",
            "127.0.0.1:9620",
            "127.0.0.2",
            "[::1]",
            "[::1]:9620",
        ] {
            assert!(check(&[("host", host)]), "{host}");
        }
    }

    #[test]
    fn other_names_do_not() {
        for host in [
            "evil.example",
            "evil.example:9620",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "10.0.0.1:9620",
            "localhost:80",
            "localhost:+9620",
            "localhost:",
            "::1",
            "[::2]",
            "",
        ] {
            assert!(!check(&[("host", host)]), "{host}");
        }
        assert!(!check(&[]));
        assert!(!check(&[("host", "localhost"), ("host", "localhost")]));
    }

    #[test]
    fn foreign_pages_do_not() {
        let host = ("host", "localhost:9620");
        assert!(check(&[host, ("origin", "http://localhost:9620")]));
        assert!(check(&[host, ("sec-fetch-site", "same-origin")]));
        for origin in [
            "null",
            "http://evil.example",
            "https://localhost:9620",
            "http://localhost:1",
            "",
        ] {
            assert!(!check(&[host, ("origin", origin)]), "{origin}");
        }
        assert!(!check(&[host, ("sec-fetch-site", "cross-site")]));
        assert!(!check(&[host, ("sec-fetch-site", "same-site")]));
    }
}
