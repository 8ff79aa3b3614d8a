//! Who did what: one JSON line for every call that changes something, appended to a file that only
//! the daemon's user can read. `soe audit` shows it.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::types::rfc3339;
use crate::seam::UnixNanos;

/// Who called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "via", rename_all = "lowercase")]
pub enum Caller {
    /// A process on the unix socket, as the kernel vouches for it.
    Unix {
        /// User.
        uid: u32,
        /// Group.
        gid: u32,
        /// Process; `None` when the kernel did not say.
        pid: Option<i32>,
    },
    /// Someone on the loopback listener; nothing vouches for who it was.
    Http {
        /// Address and port.
        peer: String,
    },
}

/// How a call ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub enum Outcome {
    /// It began; a second line with the same call and subject will tell how it ended.
    Started,
    /// It was done.
    Done,
    /// It was not done.
    Failed {
        /// The kind of error.
        kind: String,
        /// The sentence.
        error: String,
    },
    /// The caller went away before the end.
    Abandoned,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// When.
    #[serde(with = "rfc3339")]
    pub at: UnixNanos,
    /// Who.
    #[serde(flatten)]
    pub caller: Caller,
    /// The call's name in the service definition, or `POST /events`.
    pub call: String,
    /// The group, volume, event or layer it was about.
    pub subject: String,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// Errors of the audit file.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The file cannot be opened or read.
    #[error("audit file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The open audit file.
#[derive(Debug)]
pub struct Audit {
    path: PathBuf,
    file: Mutex<File>,
}

impl Audit {
    /// Opens `path` for appending; creates it readable by its owner alone. A line that a crash cut
    /// short is closed, so that it spoils no other.
    pub fn open(path: &Path) -> Result<Self, AuditError> {
        let fail = |source| AuditError::Io {
            path: path.to_owned(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)
            .map_err(fail)?;
        if file.metadata().map_err(fail)?.len() > 0 {
            file.seek(SeekFrom::End(-1)).map_err(fail)?;
            let mut last = [0u8; 1];
            file.read_exact(&mut last).map_err(fail)?;
            if last != *b"\n" {
                file.write_all(b"\n").map_err(fail)?;
            }
        }
        Ok(Self {
            path: path.to_owned(),
            file: Mutex::new(file),
        })
    }

    /// Appends one line with a single write. A failure is logged: refusing every command because the
    /// disk is full would keep the operator from freeing it.
    pub fn record(&self, entry: &Entry) {
        let written = serde_json::to_vec(entry)
            .map_err(io::Error::from)
            .and_then(|mut line| {
                line.push(b'\n');
                self.file
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .write_all(&line)
            });
        if let Err(error) = written {
            tracing::error!(path = %self.path.display(), %error, call = entry.call, "the audit line was not written");
        }
    }
}

/// A line as [`read`] finds it.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// A whole line.
    Entry(Entry),
    /// A line that is not an entry: cut short by a crash, or damaged.
    Damaged {
        /// Counted from 1.
        number: usize,
    },
}

/// Reads every line of an audit file, oldest first.
pub fn read(path: &Path) -> Result<Vec<Line>, AuditError> {
    let fail = |source| AuditError::Io {
        path: path.to_owned(),
        source,
    };
    let reader = BufReader::new(File::open(path).map_err(fail)?);
    let mut lines = Vec::new();
    for (index, line) in reader.split(b'\n').enumerate() {
        let line = line.map_err(fail)?;
        lines.push(match serde_json::from_slice(&line) {
            Ok(entry) => Line::Entry(entry),
            Err(_) => Line::Damaged { number: index + 1 },
        });
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn entry(subject: &str, outcome: Outcome) -> Entry {
        Entry {
            at: 1,
            caller: Caller::Unix {
                uid: 0,
                gid: 0,
                pid: Some(7),
            },
            call: "CaptureLayer".into(),
            subject: subject.into(),
            outcome,
        }
    }

    #[test]
    fn lines_survive_reopening_and_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        let failed = Outcome::Failed {
            kind: "unsafe".into(),
            error: "no\nnewline splits a line".into(),
        };
        Audit::open(&path)
            .unwrap()
            .record(&entry("a", Outcome::Done));
        Audit::open(&path)
            .unwrap()
            .record(&entry("b", failed.clone()));
        assert_eq!(
            read(&path).unwrap(),
            [
                Line::Entry(entry("a", Outcome::Done)),
                Line::Entry(entry("b", failed))
            ]
        );
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    #[test]
    fn a_line_cut_short_spoils_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        std::fs::write(&path, b"{\"at\":\"2026").unwrap();
        Audit::open(&path)
            .unwrap()
            .record(&entry("a", Outcome::Done));
        assert_eq!(
            read(&path).unwrap(),
            [
                Line::Damaged { number: 1 },
                Line::Entry(entry("a", Outcome::Done))
            ]
        );
    }

    #[test]
    fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("precious");
        std::fs::write(&target, b"x").unwrap();
        let link = dir.path().join("audit.jsonl");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(Audit::open(&link).is_err());
    }
}
