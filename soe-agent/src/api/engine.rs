//! What the daemon does for its callers, free of any wire format.

use futures::future::BoxFuture;
use futures::stream::BoxStream;
use std::fmt;
use std::time::Duration;

use super::types::{
    Event, EventQuery, ForecastReport, GroupSpec, GroupStatus, GroupUpdate, HostUpdate,
    LayerDetail, LayerInfo, LayerKind, ModelReport, RestoreProgress, RestoreRequest, StageReport,
    TraceReport, VerifyEvent, VolumeInfo, WatchItem,
};
use crate::seam::ByteRange;

/// What kind of failure an error is. Each kind has one gRPC code and one exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request itself is wrong. `INVALID_ARGUMENT`, exit 2.
    InvalidArgument,
    /// No such group, volume, layer. `NOT_FOUND`, exit 1.
    NotFound,
    /// The name is taken. `ALREADY_EXISTS`, exit 1.
    AlreadyExists,
    /// The state does not allow it now; later it may. `ABORTED`, exit 1.
    Conflict,
    /// The caller may not. `PERMISSION_DENIED`, exit 4.
    PermissionDenied,
    /// Doing it would be dangerous, such as writing to a mounted device. `FAILED_PRECONDITION`, exit 4.
    Unsafe,
    /// Data does not match its hash. `DATA_LOSS`, exit 5.
    Integrity,
    /// No space, memory or time left in a budget. `RESOURCE_EXHAUSTED`, exit 1.
    Exhausted,
    /// This host or build cannot. `UNIMPLEMENTED`, exit 1.
    Unsupported,
    /// The daemon is starting or stopping. `UNAVAILABLE`, exit 3.
    Unavailable,
    /// The work was cancelled. `CANCELLED`, exit 1.
    Cancelled,
    /// Anything else. `INTERNAL`, exit 1.
    Internal,
}

impl ErrorKind {
    /// Every kind.
    pub const ALL: &'static [Self] = &[
        Self::InvalidArgument,
        Self::NotFound,
        Self::AlreadyExists,
        Self::Conflict,
        Self::PermissionDenied,
        Self::Unsafe,
        Self::Integrity,
        Self::Exhausted,
        Self::Unsupported,
        Self::Unavailable,
        Self::Cancelled,
        Self::Internal,
    ];

    /// The stable name, sent as the trailer `soe-error-kind` and in HTTP errors.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidArgument => "invalid-argument",
            Self::NotFound => "not-found",
            Self::AlreadyExists => "already-exists",
            Self::Conflict => "conflict",
            Self::PermissionDenied => "permission-denied",
            Self::Unsafe => "unsafe",
            Self::Integrity => "integrity",
            Self::Exhausted => "exhausted",
            Self::Unsupported => "unsupported",
            Self::Unavailable => "unavailable",
            Self::Cancelled => "cancelled",
            Self::Internal => "internal",
        }
    }

    /// The exit code of a command that ends with this kind.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::InvalidArgument => 2,
            Self::Unavailable => 3,
            Self::PermissionDenied | Self::Unsafe => 4,
            Self::Integrity => 5,
            Self::NotFound
            | Self::AlreadyExists
            | Self::Conflict
            | Self::Exhausted
            | Self::Unsupported
            | Self::Cancelled
            | Self::Internal => 1,
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A failure as a caller sees it: one sentence that says what failed, on what, why, what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct EngineError {
    /// What kind it is.
    pub kind: ErrorKind,
    /// The sentence, in lower case, without full stop.
    pub message: String,
}

impl EngineError {
    /// An error of `kind`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// An [`ErrorKind::InvalidArgument`].
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidArgument, message)
    }

    /// An [`ErrorKind::NotFound`].
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }
}

/// Which version of the model is to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhichModel {
    /// This one.
    Version(u64),
    /// The one that ships.
    Shipped,
    /// The one before the one that serves.
    Before,
}

/// What a unary call returns.
pub type Reply<'a, T> = BoxFuture<'a, Result<T, EngineError>>;

/// What a streaming call returns: an error before anything began, or the stream. Dropping the
/// stream cancels the work behind it.
pub type StreamReply<'a, T> =
    BoxFuture<'a, Result<BoxStream<'static, Result<T, EngineError>>, EngineError>>;

/// The daemon, as the surface knows it. Arguments have passed [`super::validate`].
pub trait Engine: Send + Sync + 'static {
    /// Why the daemon cannot serve yet or any more; `None` when it can.
    fn not_ready(&self) -> Option<String>;

    /// Creates a group and begins to track its volumes.
    fn create_group(&self, spec: GroupSpec) -> Reply<'_, GroupStatus>;
    /// A group and the state of its volumes.
    fn group_status(&self, name: String) -> Reply<'_, GroupStatus>;
    /// Changes a group.
    fn update_group(&self, update: GroupUpdate) -> Reply<'_, GroupStatus>;
    /// Every group, by name.
    fn list_groups(&self) -> Reply<'_, Vec<GroupStatus>>;
    /// Forgets a group; with `delete_layers` gives up its layers too. Returns how many were given up.
    fn delete_group(&self, name: String, delete_layers: bool) -> Reply<'_, u64>;
    /// Sets what is known of a host that uses a group's volumes.
    fn set_host_metadata(&self, update: HostUpdate) -> Reply<'_, GroupStatus>;

    /// Captures one layer of every volume of the group, cut at one instant; `None` lets the agent
    /// choose the kind. Returns when all are durable, in the order of the group's volumes.
    fn capture(&self, group: String, kind: Option<LayerKind>) -> Reply<'_, Vec<LayerInfo>>;
    /// The layers of a group, or of one of its volumes, oldest first.
    fn list_layers(&self, group: String, volume: Option<String>) -> Reply<'_, Vec<LayerInfo>>;
    /// One layer.
    fn show_layer(&self, id: String) -> Reply<'_, LayerDetail>;
    /// Re-reads and checks every layer of a group, or of one of its volumes.
    fn verify_layers(&self, group: String, volume: Option<String>) -> StreamReply<'_, VerifyEvent>;
    /// The ranges that differ between two layers of a volume, ascending, in pieces.
    fn diff_layers(
        &self,
        group: String,
        volume: String,
        from: String,
        to: String,
    ) -> StreamReply<'_, Vec<ByteRange>>;
    /// Restores a state of a volume.
    fn restore(&self, request: RestoreRequest) -> StreamReply<'_, RestoreProgress>;

    /// The volumes found on this host.
    fn list_volumes(&self) -> Reply<'_, Vec<VolumeInfo>>;
    /// Records every IO of a volume for a time. Returns when the record is in the history.
    fn record_trace(&self, volume: String, duration: Duration) -> Reply<'_, TraceReport>;

    /// The forecast of a volume.
    fn forecast(&self, volume: String, horizon: Duration) -> Reply<'_, ForecastReport>;
    /// The model of a volume, or the shared one.
    fn model_show(&self, volume: Option<String>) -> Reply<'_, ModelReport>;
    /// Trains now. Returns when the result was judged.
    fn model_train(&self, volume: Option<String>) -> Reply<'_, ModelReport>;
    /// Judges every version of the model, of a volume or of all, by the history since the newest one was
    /// trained.
    fn model_backtest(&self, volume: Option<String>) -> Reply<'_, ModelReport>;
    /// Lets another version of the model serve.
    fn model_serve(&self, which: WhichModel) -> Reply<'_, ModelReport>;

    /// Keeps an event. `false` when one of this source and id was already known.
    fn publish_event(&self, event: Event) -> Reply<'_, bool>;
    /// Events, newest first.
    fn list_events(&self, query: EventQuery) -> Reply<'_, Vec<Event>>;

    /// What is staged of a volume.
    fn stage_status(&self, volume: String) -> Reply<'_, StageReport>;
    /// Stages now what the next burst would want.
    fn stage_now(&self, volume: String) -> Reply<'_, StageReport>;
    /// Drops everything staged of a volume.
    fn stage_drop(&self, volume: String) -> Reply<'_, StageReport>;

    /// What happens from now on, in one group or in all.
    fn watch(&self, group: Option<String>) -> StreamReply<'_, WatchItem>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trait_is_object_safe() {
        fn takes(_: Option<&dyn Engine>) {}
        takes(None);
    }

    #[test]
    fn exit_codes_are_the_documented_ones() {
        let codes: Vec<u8> = ErrorKind::ALL.iter().map(|k| k.exit_code()).collect();
        assert_eq!(codes, [2, 1, 1, 1, 4, 4, 5, 1, 1, 3, 1, 1]);
    }
}
