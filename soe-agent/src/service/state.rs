//! What must survive a restart beside the layers: the groups, and which boot last saw them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::api::types::{Criticality, HostMetadata};
use crate::seam::UnixNanos;

/// A group as the user made it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// Its volumes, as the user named them.
    pub volumes: Vec<String>,
    /// Whether captures follow the forecast.
    pub prediction_enabled: bool,
    /// Recovery point objective in seconds; `None` for the configured default.
    pub rpo_s: Option<u64>,
    /// Pause budget in microseconds; `None` for the configured default.
    pub max_pause_us: Option<u64>,
    /// Foreground latency to respect in microseconds.
    pub p99_target_us: Option<u64>,
    /// Application type.
    pub app: Option<String>,
    /// How much it matters.
    pub criticality: Criticality,
    /// When it was made.
    pub created_at: UnixNanos,
    /// Hosts that use it.
    pub hosts: Vec<HostMetadata>,
    /// Captures whose pause was longer than the budget.
    pub missed_pause_budgets: u64,
}

/// The state file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Version of this file's form.
    pub version: u32,
    /// The kernel's identity of the boot in which it was written.
    pub boot_id: String,
    /// The groups by name.
    pub groups: BTreeMap<String, Group>,
}

/// The form this version writes.
const VERSION: u32 = 1;

/// Errors of the state file.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It could not be read or written.
    #[error("state file {path}: {what}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The call.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Another agent works with the folder.
    #[error(
        "another agent works with the state directory {path}; stop it, or give this one its own ([agent] state_dir)"
    )]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// It is not what this version wrote.
    #[error(
        "state file {path} is damaged ({reason}); the layers are not affected: move it away and create the groups again"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// This boot's identity.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_string())
        .unwrap_or_default()
}

/// The lock of a state directory, held until dropped or the process ends.
#[derive(Debug)]
pub struct StateLock(#[expect(dead_code, reason = "the open file is the lock")] File);

impl StateLock {
    /// Takes the lock of the directory `dir`.
    ///
    /// # Errors
    /// [`StateError::InUse`] when another process has it.
    pub fn take(dir: &Path) -> Result<Self, StateError> {
        let path = dir.join("lock");
        let failed = |what| {
            let path = path.clone();
            move |source| StateError::Io { path, what, source }
        };
        let file = File::create(&path).map_err(failed("create"))?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(StateError::InUse { path: dir.into() }),
            Err(error) => Err(failed("lock")(error.into())),
        }
    }
}

impl State {
    /// Reads the state; a missing file is an empty state.
    pub fn load(path: &Path) -> Result<Self, StateError> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => {
                return Err(StateError::Io {
                    path: path.into(),
                    what: "read",
                    source,
                });
            }
        };
        let damaged = |reason: String| StateError::Damaged {
            path: path.into(),
            reason,
        };
        let state: Self = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        if state.version != VERSION {
            return Err(damaged(format!(
                "it has version {}, this agent knows {VERSION}",
                state.version
            )));
        }
        Ok(state)
    }

    /// Writes the state so that a crash leaves the old or the new one.
    pub fn save(&self, path: &Path) -> Result<(), StateError> {
        let failed = |what| {
            move |source| StateError::Io {
                path: path.to_owned(),
                what,
                source,
            }
        };
        let state = Self {
            version: VERSION,
            boot_id: boot_id(),
            ..self.clone()
        };
        let bytes = serde_json::to_vec_pretty(&state).map_err(|e| StateError::Damaged {
            path: path.into(),
            reason: e.to_string(),
        })?;
        let temporary = path.with_extension("tmp");
        let mut file = File::create(&temporary).map_err(failed("create"))?;
        file.write_all(&bytes).map_err(failed("write"))?;
        file.sync_all().map_err(failed("fsync"))?;
        std::fs::rename(&temporary, path).map_err(failed("rename"))?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        File::open(folder)
            .and_then(|f| f.sync_all())
            .map_err(failed("fsync of its folder"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_directory_has_one_agent() {
        let dir = tempfile::tempdir().unwrap();
        let held = StateLock::take(dir.path()).unwrap();
        assert!(matches!(
            StateLock::take(dir.path()),
            Err(StateError::InUse { .. })
        ));
        drop(held);
        StateLock::take(dir.path()).unwrap();
    }

    #[test]
    fn a_missing_file_is_empty_and_a_damaged_one_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        assert_eq!(State::load(&path).unwrap(), State::default());
        State::default().save(&path).unwrap();
        assert_eq!(State::load(&path).unwrap().groups, BTreeMap::new());
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.truncate(bytes.len() / 2);
        std::fs::write(&path, bytes).unwrap();
        assert!(
            State::load(&path)
                .unwrap_err()
                .to_string()
                .contains("damaged")
        );
    }

    proptest::proptest! {
        #[test]
        fn any_file_is_a_state_or_damaged(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200),
            at in proptest::prelude::any::<proptest::sample::Index>(),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("state.json");
            std::fs::write(&path, &bytes).unwrap();
            let damaged = matches!(State::load(&path), Err(StateError::Damaged { .. }));
            proptest::prop_assert!(damaged);
            State::default().save(&path).unwrap();
            let mut good = std::fs::read(&path).unwrap();
            let at = at.index(good.len());
            good[at] = bytes.first().copied().unwrap_or_default();
            std::fs::write(&path, &good).unwrap();
            if let Err(error) = State::load(&path) {
                proptest::prop_assert!(!error.to_string().contains('\n'));
            }
        }
    }
}
