//! What the store needs of a file system, and nothing more: files that only grow until they are
//! synced, folders, one rename that never replaces.
//!
//! Paths are relative to the store, with `/` between names; the store itself is `""`.
//!
//! What a caller may rely on after a power cut is little: a file's bytes only after
//! [`AppendFile::sync`] succeeded, and its *name* only after [`StoreFs::sync_dir`] of its folder did.
//! [`SimFs`] takes away everything else.

mod real;
mod sim;

#[cfg(test)]
mod conformance;

use std::io;

pub use real::DirFs;
pub use sim::{Fault, SimFs};

/// A file being written, from its creation on.
pub trait AppendFile: Send {
    /// Appends all of `data`. After an error the file's length is unknown.
    fn append(&mut self, data: &[u8]) -> io::Result<()>;
    /// Makes all bytes durable. After an error they must be considered lost, even if a later sync
    /// succeeds.
    fn sync(&mut self) -> io::Result<()>;
}

/// A file being read.
pub trait ReadFile: Send + Sync {
    /// Bytes in the file.
    fn len(&self) -> io::Result<u64>;
    /// Whether it has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Fills `buf` from `offset` on; [`io::ErrorKind::UnexpectedEof`] when the file ends before.
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
}

/// One name in a folder.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DirEntry {
    /// The name, without its folder.
    pub name: String,
    /// Whether it is a folder itself.
    pub is_dir: bool,
}

/// Holds the store for one writer until it is dropped.
pub trait StoreLock: Send + Sync {}

/// The file system under a store.
pub trait StoreFs: Send + Sync {
    /// Where the store is, for messages.
    fn describe(&self) -> String;
    /// Creates an empty file; [`io::ErrorKind::AlreadyExists`] when the name is taken.
    fn create(&self, path: &str) -> io::Result<Box<dyn AppendFile>>;
    /// Opens a file for reading.
    fn open(&self, path: &str) -> io::Result<Box<dyn ReadFile>>;
    /// Creates a folder; [`io::ErrorKind::AlreadyExists`] when the name is taken.
    fn create_dir(&self, path: &str) -> io::Result<()>;
    /// Makes the names in a folder durable.
    fn sync_dir(&self, path: &str) -> io::Result<()>;
    /// Renames a file; [`io::ErrorKind::AlreadyExists`] when `to` is taken, in one step.
    fn rename_no_replace(&self, from: &str, to: &str) -> io::Result<()>;
    /// The names in a folder, sorted.
    fn list(&self, path: &str) -> io::Result<Vec<DirEntry>>;
    /// Removes a file.
    fn remove_file(&self, path: &str) -> io::Result<()>;
    /// Removes an empty folder.
    fn remove_dir(&self, path: &str) -> io::Result<()>;
    /// Bytes that can still be written.
    fn free_space(&self) -> io::Result<u64>;
    /// Takes the store for one writer; [`io::ErrorKind::WouldBlock`] when another process has it.
    fn lock(&self) -> io::Result<Box<dyn StoreLock>>;
}
