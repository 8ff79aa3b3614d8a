//! The files of a history as the query engine sees them: read-only, nothing but the history, and
//! every byte proven before it is handed over.
//!
//! The engine reads through an object store of its own. It would believe a flipped bit, and its
//! Parquet decoder may panic on one. So whatever it asks for passes here: the tail of a file is
//! proven by the file's name when it is first seen, each row group by its checksum when a byte of it
//! is first asked for, and a file without checksums is decoded once from end to end.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use datafusion::object_store::local::LocalFileSystem;
use datafusion::object_store::path::Path as Location;
use datafusion::object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result,
};
use futures::StreamExt;
use futures::stream::BoxStream;

use super::error::HistoryError;
use super::file::{HistoryFile, Proof};
use super::partition::SUFFIX;
use super::store::lock;
use super::table::Table;

/// Bytes of the shortest file that may be Parquet: its mark twice, and a length.
const SHORTEST: u64 = 12;

/// One file whose tail was proven.
struct Seen {
    proof: Proof,
    /// The row groups that were proven, too.
    groups: Mutex<BTreeSet<usize>>,
}

/// The read-only view of one history.
pub(super) struct ProvenFiles {
    local: LocalFileSystem,
    known: Arc<Known>,
}

/// What is known of the files.
struct Known {
    dir: PathBuf,
    root: Location,
    seen: Mutex<BTreeMap<Location, Arc<Seen>>>,
    first_error: Mutex<Option<HistoryError>>,
}

impl ProvenFiles {
    /// The history in `dir`, whose absolute path without links is `absolute`.
    pub fn new(dir: &Path, absolute: &Path) -> Result<Self> {
        Ok(Self {
            local: LocalFileSystem::new(),
            known: Arc::new(Known {
                dir: dir.to_owned(),
                root: Location::from_absolute_path(absolute)?,
                seen: Mutex::default(),
                first_error: Mutex::default(),
            }),
        })
    }

    /// The first file that could not be proven, for the one sentence that is told.
    pub fn take_error(&self) -> Option<HistoryError> {
        lock(&self.known.first_error).take()
    }

    /// Proves what lies in `ranges`; `None` is the whole file.
    async fn prove(&self, location: &Location, ranges: Option<&[Range<u64>]>) -> Result<()> {
        let (known, location) = (self.known.clone(), location.clone());
        let ranges = ranges.map(<[_]>::to_vec);
        tokio::task::spawn_blocking(move || known.prove(&location, ranges.as_deref()))
            .await
            .unwrap_or_else(|error| Err(generic(error.to_string())))
    }
}

impl Known {
    /// The path as the user would write it, and the table it belongs to.
    fn place(&self, location: &Location) -> Option<(PathBuf, Table)> {
        let parts: Vec<String> = location
            .prefix_match(&self.root)?
            .map(|part| part.as_ref().to_owned())
            .collect();
        let table = Table::ALL
            .into_iter()
            .find(|table| parts.first().is_some_and(|first| first == table.name()))?;
        Some((self.dir.join(parts.join("/")), table))
    }

    fn prove(&self, location: &Location, ranges: Option<&[Range<u64>]>) -> Result<()> {
        let not_found = |source: String| Error::NotFound {
            path: location.to_string(),
            source: source.into(),
        };
        let (path, table) = self
            .place(location)
            .ok_or_else(|| not_found("it is no file of the history".into()))?;
        let proven = self
            .seen(location, &path, table)
            .and_then(|seen| seen.prove(ranges));
        proven.map_err(|error| {
            let text = error.to_string();
            if error.is_not_found() {
                // Compacted or removed since it was listed: the query is run again.
                return not_found(text);
            }
            lock(&self.first_error).get_or_insert(error);
            generic(text)
        })
    }

    fn seen(
        &self,
        location: &Location,
        path: &Path,
        table: Table,
    ) -> Result<Arc<Seen>, HistoryError> {
        if let Some(seen) = lock(&self.seen).get(location) {
            return Ok(seen.clone());
        }
        let seen = Arc::new(Seen {
            proof: HistoryFile::open(path, table)?.into_proof()?,
            groups: Mutex::default(),
        });
        lock(&self.seen).insert(location.clone(), seen.clone());
        Ok(seen)
    }

    /// The engine takes an empty file for one without rows, and refuses a very short one without
    /// its name; of neither it asks for a byte. No file of a history is that short.
    fn listed(&self, meta: &ObjectMeta) -> Result<()> {
        let name = meta.location.filename().unwrap_or_default();
        if meta.size < SHORTEST && name.ends_with(SUFFIX) && !name.starts_with('.') {
            self.prove(&meta.location, None)?;
        }
        Ok(())
    }
}

impl Seen {
    fn prove(&self, ranges: Option<&[Range<u64>]>) -> Result<(), HistoryError> {
        for group in 0..self.proof.row_groups() {
            let wanted = ranges
                .is_none_or(|ranges| ranges.iter().any(|range| self.proof.overlaps(group, range)));
            if wanted && !lock(&self.groups).contains(&group) {
                self.proof.prove_group(group)?;
                lock(&self.groups).insert(group);
            }
        }
        Ok(())
    }
}

fn generic(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Generic {
        store: "history",
        source: reason.into(),
    }
}

fn read_only<T>() -> Result<T> {
    Err(generic("the history is read-only"))
}

impl fmt::Debug for ProvenFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ProvenFiles({})", self.known.dir.display())
    }
}

impl fmt::Display for ProvenFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "history {}", self.known.dir.display())
    }
}

#[async_trait]
impl ObjectStore for ProvenFiles {
    async fn get_opts(&self, location: &Location, options: GetOptions) -> Result<GetResult> {
        if !options.head {
            let range = match &options.range {
                Some(range) => {
                    let head = GetOptions {
                        head: true,
                        ..GetOptions::default()
                    };
                    let size = self.local.get_opts(location, head).await?.meta.size;
                    // A range beyond the end is refused below.
                    range.as_range(size).ok().map(|range| [range])
                }
                None => None,
            };
            let ranges = range.as_ref().map(<[_; 1]>::as_slice);
            self.prove(location, ranges).await?;
        }
        self.local.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Location, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.prove(location, Some(ranges)).await?;
        self.local.get_ranges(location, ranges).await
    }

    fn list(&self, prefix: Option<&Location>) -> BoxStream<'static, Result<ObjectMeta>> {
        let known = self.known.clone();
        let listed =
            move |meta: Result<ObjectMeta>| meta.and_then(|m| known.listed(&m).map(|()| m));
        self.local.list(prefix).map(listed).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Location>) -> Result<ListResult> {
        let listed = self.local.list_with_delimiter(prefix).await?;
        listed
            .objects
            .iter()
            .try_for_each(|meta| self.known.listed(meta))?;
        Ok(listed)
    }

    async fn put_opts(&self, _: &Location, _: PutPayload, _: PutOptions) -> Result<PutResult> {
        read_only()
    }

    async fn put_multipart_opts(
        &self,
        _: &Location,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        read_only()
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Location>>,
    ) -> BoxStream<'static, Result<Location>> {
        locations.map(|_| read_only()).boxed()
    }

    async fn copy_opts(&self, _: &Location, _: &Location, _: CopyOptions) -> Result<()> {
        read_only()
    }

    async fn rename_opts(&self, _: &Location, _: &Location, _: RenameOptions) -> Result<()> {
        read_only()
    }
}
