//! Errors on the wire, and who may call.

use tonic::transport::server::UdsConnectInfo;
use tonic::{Code, Request, Status};

use crate::api::audit::Caller;
use crate::api::convert::WireError;
use crate::api::engine::{EngineError, ErrorKind};
use crate::api::socket;

/// The trailer that carries [`ErrorKind`].
pub const KIND_TRAILER: &str = "soe-error-kind";
const fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::InvalidArgument => Code::InvalidArgument,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::AlreadyExists => Code::AlreadyExists,
        ErrorKind::Conflict => Code::Aborted,
        ErrorKind::PermissionDenied => Code::PermissionDenied,
        ErrorKind::Unsafe => Code::FailedPrecondition,
        ErrorKind::Integrity => Code::DataLoss,
        ErrorKind::Exhausted => Code::ResourceExhausted,
        ErrorKind::Unsupported => Code::Unimplemented,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::Cancelled => Code::Cancelled,
        ErrorKind::Internal => Code::Internal,
    }
}

/// The error as gRPC sends it.
pub fn to_status(error: EngineError) -> Status {
    let mut status = Status::new(code(error.kind), error.message);
    if let Ok(value) = error.kind.as_str().parse() {
        status.metadata_mut().insert(KIND_TRAILER, value);
    }
    status
}

/// The error as it was before gRPC; one that did not come from [`to_status`] is told by its code.
pub fn from_status(status: &Status) -> EngineError {
    let named = status
        .metadata()
        .get(KIND_TRAILER)
        .and_then(|v| v.to_str().ok());
    let kind = ErrorKind::ALL
        .iter()
        .copied()
        .find(|k| Some(k.as_str()) == named)
        .or_else(|| {
            ErrorKind::ALL
                .iter()
                .copied()
                .find(|k| code(*k) == status.code())
        })
        .unwrap_or(ErrorKind::Internal);
    EngineError::new(kind, status.message())
}

impl From<WireError> for EngineError {
    fn from(error: WireError) -> Self {
        Self::invalid(error.to_string())
    }
}

/// Lets only root and the daemon's own user in. For a layer around every service.
pub fn check_peer(request: Request<()>) -> Result<Request<()>, Status> {
    let own = rustix::process::geteuid().as_raw();
    let peer = request
        .extensions()
        .get::<UdsConnectInfo>()
        .and_then(|info| info.peer_cred);
    match peer {
        Some(cred) if socket::may_call(cred.uid(), own) => Ok(request),
        Some(cred) => Err(to_status(EngineError::new(
            ErrorKind::PermissionDenied,
            format!(
                "uid {} may not call the agent; only root and uid {own} may",
                cred.uid()
            ),
        ))),
        None => Err(to_status(EngineError::new(
            ErrorKind::PermissionDenied,
            "the kernel does not vouch for the caller; use the agent's unix socket",
        ))),
    }
}

/// Who sent the request, for the audit.
pub(super) fn caller<T>(request: &Request<T>) -> Caller {
    let cred = request
        .extensions()
        .get::<UdsConnectInfo>()
        .and_then(|info| info.peer_cred);
    match cred {
        Some(cred) => Caller::Unix {
            uid: cred.uid(),
            gid: cred.gid(),
            pid: cred.pid(),
        },
        // `check_peer` lets no such request pass; a record that says nobody is better than a wrong one.
        None => Caller::Unix {
            uid: u32::MAX,
            gid: u32::MAX,
            pid: None,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_the_wire() {
        for kind in ErrorKind::ALL {
            let error = EngineError::new(*kind, "what failed, on what, why, what to do");
            assert_eq!(from_status(&to_status(error.clone())), error);
        }
    }

    #[test]
    fn a_foreign_status_is_told_by_its_code() {
        assert_eq!(
            from_status(&Status::data_loss("x")).kind,
            ErrorKind::Integrity
        );
        assert_eq!(from_status(&Status::unknown("x")).kind, ErrorKind::Internal);
        assert_eq!(
            from_status(&Status::unimplemented("x")).kind,
            ErrorKind::Unsupported
        );
    }

    #[test]
    fn a_request_without_credentials_is_refused() {
        assert_eq!(
            check_peer(Request::new(())).unwrap_err().code(),
            Code::PermissionDenied
        );
    }
}
