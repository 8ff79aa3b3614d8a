//! CloudEvents 1.0 to [`Event`], strictly: structured, batched and binary. Pure.
//!
//! Two extension attributes mean something here: `volumes` (comma-separated names of the volumes
//! concerned) and `expectedtime` (RFC 3339, when the announced change is expected). Other extensions
//! are checked and dropped.

use serde_json::{Map, Value};

use super::types::{Event, rfc3339};
use super::validate;
use crate::seam::UnixNanos;

/// Why something is not a CloudEvent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloudEventError {
    /// The body is not JSON.
    #[error("the body is not JSON: {detail}")]
    Json {
        /// What the parser said.
        detail: String,
    },
    /// The body is JSON of another shape.
    #[error("the body is not {expected}")]
    Shape {
        /// What was expected.
        expected: &'static str,
    },
    /// An attribute is absent.
    #[error("the event lacks the attribute {attribute}")]
    Missing {
        /// The attribute.
        attribute: &'static str,
    },
    /// An attribute has a value it must not have.
    #[error("the attribute {attribute} is wrong: {detail}")]
    Attribute {
        /// The attribute.
        attribute: String,
        /// What is wrong.
        detail: String,
    },
    /// One event of a batch is wrong; none of them is kept.
    #[error("event {index} of the batch: {error}")]
    Batch {
        /// Counted from 0.
        index: usize,
        /// What is wrong.
        error: Box<CloudEventError>,
    },
    /// The content type is none of the three modes.
    #[error(
        "content type {content_type:?} without ce- headers is no CloudEvent; send application/cloudevents+json, application/cloudevents-batch+json, or ce- headers"
    )]
    ContentType {
        /// What was sent.
        content_type: String,
    },
}

/// Events of the longest batch.
pub const MAX_BATCH: usize = 1000;

type Parsed<T> = Result<T, CloudEventError>;

fn wrong(attribute: &str, detail: impl Into<String>) -> CloudEventError {
    CloudEventError::Attribute {
        attribute: attribute.to_owned(),
        detail: detail.into(),
    }
}

/// Reads an HTTP request's body. `headers` are all its headers, names in lower case.
pub fn from_http(
    content_type: &str,
    headers: &[(String, String)],
    body: &[u8],
    now: UnixNanos,
) -> Parsed<Vec<Event>> {
    let media = content_type
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    match media.as_str() {
        "application/cloudevents+json" => one(&json(body)?, now).map(|event| vec![event]),
        "application/cloudevents-batch+json" => batch(&json(body)?, now),
        _ if headers.iter().any(|(name, _)| name == "ce-specversion") => {
            binary(&media, headers, body, now).map(|event| vec![event])
        }
        _ => Err(CloudEventError::ContentType {
            content_type: content_type.to_owned(),
        }),
    }
}

/// Reads a file: one event, or an array of them.
pub fn from_json(text: &[u8], now: UnixNanos) -> Parsed<Vec<Event>> {
    let value = json(text)?;
    match value {
        Value::Array(_) => batch(&value, now),
        _ => one(&value, now).map(|event| vec![event]),
    }
}

fn json(body: &[u8]) -> Parsed<Value> {
    serde_json::from_slice(body).map_err(|e| CloudEventError::Json {
        detail: e.to_string(),
    })
}

fn batch(value: &Value, now: UnixNanos) -> Parsed<Vec<Event>> {
    let items = value.as_array().ok_or(CloudEventError::Shape {
        expected: "an array of events",
    })?;
    if items.len() > MAX_BATCH {
        return Err(CloudEventError::Shape {
            expected: "a batch of at most 1000 events",
        });
    }
    items
        .iter()
        .enumerate()
        .map(|(index, item)| {
            one(item, now).map_err(|e| CloudEventError::Batch {
                index,
                error: Box::new(e),
            })
        })
        .collect()
}

fn one(value: &Value, now: UnixNanos) -> Parsed<Event> {
    let attributes = value.as_object().ok_or(CloudEventError::Shape {
        expected: "an object",
    })?;
    let data = match (attributes.get("data"), attributes.get("data_base64")) {
        (Some(_), Some(_)) => {
            return Err(wrong(
                "data_base64",
                "data is given as well; send one of them",
            ));
        }
        (None, Some(Value::String(text))) => {
            if !is_base64(text) {
                return Err(wrong("data_base64", "it is not base64"));
            }
            Some(Value::String(text.clone()))
        }
        (None, Some(_)) => return Err(wrong("data_base64", "it is not a string")),
        (data, None) => data.filter(|d| !d.is_null()).cloned(),
    };
    let mut context = Map::new();
    for (name, attribute) in attributes {
        if name != "data" && name != "data_base64" {
            context.insert(name.clone(), attribute.clone());
        }
    }
    event(&context, data, now)
}

fn binary(media: &str, headers: &[(String, String)], body: &[u8], now: UnixNanos) -> Parsed<Event> {
    let mut context = Map::new();
    for (name, value) in headers {
        let Some(attribute) = name.strip_prefix("ce-") else {
            continue;
        };
        let value = percent_decoded(value)
            .ok_or_else(|| wrong(attribute, "its percent-encoding is broken"))?;
        if context
            .insert(attribute.to_owned(), Value::String(value))
            .is_some()
        {
            return Err(wrong(attribute, "it is given twice"));
        }
    }
    let data = if body.is_empty() {
        None
    } else if media == "application/json" || media.ends_with("+json") {
        Some(json(body)?)
    } else {
        let text = std::str::from_utf8(body).map_err(|_| CloudEventError::Shape {
            expected: "UTF-8 text or JSON",
        })?;
        Some(Value::String(text.to_owned()))
    };
    event(&context, data, now)
}

/// Checks the context attributes and builds the event.
fn event(context: &Map<String, Value>, data: Option<Value>, now: UnixNanos) -> Parsed<Event> {
    for (name, value) in context {
        let named_well = !name.is_empty()
            && name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if !named_well {
            return Err(wrong(
                name,
                "attribute names are lower-case letters and digits",
            ));
        }
        if value.is_object() || value.is_array() {
            return Err(wrong(name, "attributes are strings, numbers or booleans"));
        }
    }
    if required(context, "specversion")? != "1.0" {
        return Err(wrong("specversion", "this version reads 1.0"));
    }
    let source = required(context, "source")?;
    uri_reference("source", source)?;
    if let Some(schema) = optional(context, "dataschema")? {
        uri_reference("dataschema", schema)?;
    }
    optional(context, "datacontenttype")?;
    let time = |name: &'static str| -> Parsed<Option<UnixNanos>> {
        optional(context, name)?
            .map(|t| rfc3339::parse(t).map_err(|e| wrong(name, e)))
            .transpose()
    };
    let volumes = optional(context, "volumes")?
        .map(|list| list.split(',').map(|v| v.trim().to_owned()).collect());
    let event = Event {
        id: required(context, "id")?.to_owned(),
        source: source.to_owned(),
        kind: required(context, "type")?.to_owned(),
        subject: optional(context, "subject")?.map(str::to_owned),
        time: time("time")?.unwrap_or(now),
        expected_at: time("expectedtime")?,
        volumes: volumes.unwrap_or_default(),
        data,
    };
    validate::event(&event).map_err(|e| wrong("event", e.message))?;
    Ok(event)
}

fn optional<'a>(context: &'a Map<String, Value>, name: &'static str) -> Parsed<Option<&'a str>> {
    match context.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if !text.is_empty() => Ok(Some(text)),
        Some(Value::String(_)) => Err(wrong(name, "it is empty")),
        Some(_) => Err(wrong(name, "it is not a string")),
    }
}

fn required<'a>(context: &'a Map<String, Value>, name: &'static str) -> Parsed<&'a str> {
    optional(context, name)?.ok_or(CloudEventError::Missing { attribute: name })
}

/// Whether the characters are those of a URI reference.
fn uri_reference(name: &str, text: &str) -> Parsed<()> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._~:/?#[]@!$&'()*+,;=%".contains(&b);
    if text.bytes().all(allowed) {
        Ok(())
    } else {
        Err(wrong(name, format!("{text:?} is not a URI reference")))
    }
}

fn is_base64(text: &str) -> bool {
    let body = text.trim_end_matches('=');
    let padding = text.len() - body.len();
    text.len().is_multiple_of(4)
        && padding <= 2
        && body
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'+' || b == b'/')
}

/// The HTTP binding percent-encodes what is not printable ASCII.
fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let high = char::from(rest.next()?).to_digit(16)?;
        let low = char::from(rest.next()?).to_digit(16)?;
        bytes.push(u8::try_from(high * 16 + low).ok()?);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const NOW: UnixNanos = 42;

    fn minimal() -> Value {
        json!({"specversion": "1.0", "id": "1", "source": "/ci", "type": "com.example.deploy"})
    }

    fn with(name: &str, value: Value) -> Value {
        let mut event = minimal();
        event[name] = value;
        event
    }

    fn read(value: &Value) -> Parsed<Event> {
        one(value, NOW)
    }

    fn headers(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|(n, v)| (n.to_string(), v.to_string()))
            .collect()
    }

    #[test]
    fn a_minimal_event_happens_now() {
        let event = read(&minimal()).unwrap();
        assert_eq!(
            (event.id.as_str(), event.time, event.data),
            ("1", NOW, None)
        );
        assert!(event.volumes.is_empty());
    }

    #[test]
    fn a_full_event() {
        let event = read(&json!({
            "specversion": "1.0", "id": "7", "source": "https://ci.example/jobs", "type": "deploy",
            "subject": "web", "time": "2026-03-01T12:00:00+01:00", "datacontenttype": "application/json",
            "dataschema": "urn:x", "volumes": "/dev/sda, /dev/sdb", "expectedtime": "2026-03-01T11:30:00Z",
            "other": 5, "flag": true, "data": {"replicas": 3}
        }))
        .unwrap();
        assert_eq!(rfc3339::format(event.time), "2026-03-01T11:00:00Z");
        assert_eq!(
            event.expected_at.map(rfc3339::format).as_deref(),
            Some("2026-03-01T11:30:00Z")
        );
        assert_eq!(event.volumes, ["/dev/sda", "/dev/sdb"]);
        assert_eq!(event.data, Some(json!({"replicas": 3})));
    }

    #[test]
    fn every_required_attribute_is_required() {
        for name in ["specversion", "id", "source", "type"] {
            let mut event = minimal();
            event.as_object_mut().unwrap().remove(name);
            assert_eq!(
                read(&event),
                Err(CloudEventError::Missing { attribute: name })
            );
            assert!(
                read(&with(name, json!(""))).is_err(),
                "{name} may not be empty"
            );
            assert!(
                read(&with(name, json!(3))).is_err(),
                "{name} must be a string"
            );
        }
    }

    #[test]
    fn wrong_attributes_are_refused() {
        let cases = [
            with("specversion", json!("0.3")),
            with("source", json!("not a uri")),
            with("time", json!("yesterday")),
            with("time", json!(5)),
            with("expectedtime", json!("2026-13-01T00:00:00Z")),
            with("subject", json!("")),
            with("camelCase", json!("x")),
            with("under_score", json!("x")),
            with("nested", json!({"a": 1})),
            with("list", json!([1])),
            with("data_base64", json!("@@@@")),
            with("data_base64", json!("abc")),
            with("data_base64", json!(1)),
            with("volumes", json!("/dev/sda,,/dev/sdb")),
            with("volumes", json!("/dev/sda,/dev/sda")),
            with("id", json!("a\nb")),
            json!({"specversion": "1.0", "id": "1", "source": "/", "type": "t", "data": 1, "data_base64": "AA=="}),
            json!([]),
            json!("x"),
        ];
        for case in cases {
            assert!(read(&case).is_err(), "{case} was accepted");
        }
        assert!(read(&with("data_base64", json!("AA=="))).is_ok());
    }

    #[test]
    fn modes_are_told_by_content_type() {
        let body = minimal().to_string();
        let structured = from_http(
            "application/cloudevents+json; charset=utf-8",
            &[],
            body.as_bytes(),
            NOW,
        );
        assert_eq!(structured.unwrap().len(), 1);
        let batch = format!("[{body},{body}]");
        assert_eq!(
            from_http(
                "application/cloudevents-batch+json",
                &[],
                batch.as_bytes(),
                NOW
            )
            .unwrap()
            .len(),
            2
        );
        assert_eq!(
            from_http("application/cloudevents-batch+json", &[], b"[]", NOW)
                .unwrap()
                .len(),
            0
        );
        for (content_type, body) in [
            ("application/json", body.as_str()),
            ("", body.as_str()),
            ("application/cloudevents+json", batch.as_str()),
            ("application/cloudevents-batch+json", body.as_str()),
            ("application/cloudevents+json", "{"),
        ] {
            assert!(
                from_http(content_type, &[], body.as_bytes(), NOW).is_err(),
                "{content_type} {body}"
            );
        }
    }

    #[test]
    fn one_bad_event_spoils_its_batch_by_name() {
        let error =
            from_json(json!([minimal(), {"id": "x"}]).to_string().as_bytes(), NOW).unwrap_err();
        assert_eq!(
            error.to_string(),
            "event 1 of the batch: the event lacks the attribute specversion"
        );
    }

    #[test]
    fn binary_mode_reads_headers() {
        let ce = headers(&[
            ("ce-specversion", "1.0"),
            ("ce-id", "9"),
            ("ce-source", "/k8s"),
            ("ce-type", "scale"),
            ("ce-subject", "caf%C3%A9"),
            ("host", "localhost"),
        ]);
        let event = &from_http("application/json", &ce, b"{\"a\":1}", NOW).unwrap()[0];
        assert_eq!(event.subject.as_deref(), Some("café"));
        assert_eq!(event.data, Some(json!({"a": 1})));
        let text = &from_http("text/plain", &ce, b"hello", NOW).unwrap()[0];
        assert_eq!(text.data, Some(json!("hello")));
        assert_eq!(from_http("", &ce, b"", NOW).unwrap()[0].data, None);
        assert!(from_http("application/json", &ce, b"{", NOW).is_err());
        assert!(from_http("text/plain", &ce, b"\xff", NOW).is_err());
        let mut twice = ce.clone();
        twice.push(("ce-id".into(), "10".into()));
        assert!(from_http("", &twice, b"", NOW).is_err());
        let mut broken = ce;
        broken.push(("ce-x".into(), "%C3".into()));
        assert!(from_http("", &broken, b"", NOW).is_err());
    }

    proptest! {
        #[test]
        fn no_body_panics(body in prop::collection::vec(any::<u8>(), 0..200), header in "\\PC*") {
            let ce = headers(&[("ce-specversion", "1.0"), ("ce-id", &header), ("ce-source", "/"), ("ce-type", "t")]);
            for content_type in ["application/cloudevents+json", "application/cloudevents-batch+json", "text/plain"] {
                let _ = from_http(content_type, &ce, &body, NOW);
            }
        }
    }
}
