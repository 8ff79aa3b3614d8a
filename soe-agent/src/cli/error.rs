//! How a command fails: one sentence and an exit code.

use std::io::{self, Write};

use crate::api::audit::AuditError;
use crate::api::engine::{EngineError, ErrorKind};
use crate::config::ConfigError;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CliError {
    /// The arguments do not make sense. Exit 2.
    #[error("{0}")]
    Usage(String),
    /// Nobody listens. Exit 3.
    #[error(
        "no agent answers at {endpoint}: {why}; start it with `soe agent` or name another with --endpoint or SOE_ENDPOINT"
    )]
    NoDaemon {
        /// Where it was sought.
        endpoint: String,
        /// What the kernel said.
        why: String,
    },
    /// The daemon, or an offline verb, says so.
    #[error("{0}")]
    Engine(#[from] EngineError),
    /// The configuration.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// The audit file. Exit 1.
    #[error("{0}")]
    Audit(#[from] AuditError),
    /// A file or pipe. Exit 1.
    #[error("{what}: {source}")]
    Io {
        /// What was done, on what.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Anything else. Exit 1.
    #[error("{0}")]
    Failed(String),
    /// Nobody reads the output any more. Exit 1, without a word.
    #[error("nobody reads the output")]
    BrokenPipe,
}

impl CliError {
    /// An I/O error that names what was done.
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| match source.kind() {
            io::ErrorKind::BrokenPipe => Self::BrokenPipe,
            _ => Self::Io { what, source },
        }
    }

    /// The documented exit code.
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Config(ConfigError::Line { .. }) => 2,
            Self::NoDaemon { .. } => 3,
            Self::Engine(error) => error.kind.exit_code(),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                ErrorKind::PermissionDenied.exit_code()
            }
            Self::Config(ConfigError::Read { .. })
            | Self::Audit(_)
            | Self::Io { .. }
            | Self::Failed(_)
            | Self::BrokenPipe => 1,
        }
    }

    /// Writes the sentence to standard error.
    pub(super) fn tell(&self) {
        if !matches!(self, Self::BrokenPipe) {
            // Line breaks in what others reported must not make two sentences of one.
            let sentence = self.to_string().replace(['\n', '\r'], " ");
            // Nothing is left to do when standard error is closed, too.
            let _ = writeln!(io::stderr(), "soe: {sentence}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes() {
        let engine = |kind| CliError::Engine(EngineError::new(kind, "x")).exit_code();
        assert_eq!(CliError::Usage("x".into()).exit_code(), 2);
        assert_eq!(
            CliError::NoDaemon {
                endpoint: "x".into(),
                why: "y".into()
            }
            .exit_code(),
            3
        );
        assert_eq!(engine(ErrorKind::Unsafe), 4);
        assert_eq!(engine(ErrorKind::Integrity), 5);
        assert_eq!(engine(ErrorKind::NotFound), 1);
        assert_eq!(CliError::Failed("x".into()).exit_code(), 1);
    }
}
