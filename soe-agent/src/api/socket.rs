//! The unix socket: only its owner and root can reach it, at no instant anybody else.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another daemon answers there.
    #[error("{} is served by another agent; stop it, or listen elsewhere ([api] listen)", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is not a socket lies there.
    #[error("{} exists and is not a socket; remove it, or listen elsewhere ([api] listen)", path.display())]
    NotASocket {
        /// What lies there.
        path: PathBuf,
    },
    /// Others may write to the folder, so they could put their own socket there.
    #[error(
        "{} belongs to uid {uid} with mode {mode:o}, so others could replace the socket in it; use a folder that only the agent's user can write to",
        path.display()
    )]
    OpenFolder {
        /// The folder.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// Its permissions.
        mode: u32,
    },
    /// The kernel refused.
    #[error("socket {}: {call}: {source}", path.display())]
    Kernel {
        /// The socket.
        path: PathBuf,
        /// The call.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// A listening socket that takes its file away when dropped.
#[derive(Debug)]
pub struct OwnedSocket {
    path: PathBuf,
    identity: Identity,
}

/// Device, inode and time of creation of the file we bound, so that we never remove a successor's. Inodes alone are
/// reused at once.
type Identity = (u64, u64, i64, i64);

fn identity(meta: &fs::Metadata) -> Identity {
    (meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec())
}

impl OwnedSocket {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for OwnedSocket {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|m| identity(&m) == self.identity);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Binds `path` with mode 0600 and listens. A missing folder is created with mode 0700. A socket
/// file that nobody serves any more is replaced, one that somebody serves is not.
pub fn bind(path: &Path) -> Result<(UnixListener, OwnedSocket), SocketError> {
    let kernel = |call: &'static str| {
        let path = path.to_owned();
        move |source: io::Error| SocketError::Kernel { path, call, source }
    };
    let folder = prepare_folder(path)?;
    // Two agents that start at once must not each take the other's fresh socket, bound but not yet listening, for a
    // stale one.
    let _lock = lock_folder(&folder, path)?;
    make_way(path)?;
    let address = SocketAddrUnix::new(path).map_err(|e| kernel("address")(e.into()))?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|e| kernel("socket")(e.into()))?;
    // The mode of a socket file is the mode of its descriptor at bind, so the file is never wider.
    rustix::fs::fchmod(&socket, rustix::fs::Mode::from_raw_mode(0o600))
        .map_err(|e| kernel("fchmod")(e.into()))?;
    rustix::net::bind(&socket, &address).map_err(|e| match e {
        rustix::io::Errno::ADDRINUSE => SocketError::InUse {
            path: path.to_owned(),
        },
        other => kernel("bind")(other.into()),
    })?;
    // Nobody can connect before listen, so this also covers kernels that ignore the fchmod above.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(kernel("chmod"))?;
    let meta = fs::symlink_metadata(path).map_err(kernel("stat"))?;
    let owned = OwnedSocket {
        path: path.to_owned(),
        identity: identity(&meta),
    };
    rustix::net::listen(&socket, 128).map_err(|e| kernel("listen")(e.into()))?;
    let listener = UnixListener::from(socket);
    listener
        .set_nonblocking(true)
        .map_err(kernel("set_nonblocking"))?;
    Ok((listener, owned))
}

fn prepare_folder(path: &Path) -> Result<PathBuf, SocketError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let fail = |call| {
        let path = folder.to_owned();
        move |source| SocketError::Kernel { path, call, source }
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(fail("mkdir"))?;
    let meta = fs::metadata(folder).map_err(fail("stat"))?;
    let own = rustix::process::geteuid().as_raw();
    let mode = meta.mode() & 0o7777;
    // In a sticky folder such as /tmp others can't remove or replace what is ours.
    let writable_by_others = mode & 0o022 != 0 && mode & 0o1000 == 0;
    if writable_by_others || (meta.uid() != own && meta.uid() != 0) {
        return Err(SocketError::OpenFolder {
            path: folder.to_owned(),
            uid: meta.uid(),
            mode,
        });
    }
    Ok(folder.to_owned())
}

/// Holds the folder for the short time of binding; gives up after two seconds.
fn lock_folder(folder: &Path, path: &Path) -> Result<File, SocketError> {
    let fail = |call| {
        let path = folder.to_owned();
        move |source| SocketError::Kernel { path, call, source }
    };
    let file = File::open(folder).map_err(fail("open"))?;
    for _ in 0..40 {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(e) => return Err(fail("flock")(e.into())),
        }
    }
    Err(SocketError::InUse {
        path: path.to_owned(),
    })
}

/// Removes a socket file that nobody serves.
fn make_way(path: &Path) -> Result<(), SocketError> {
    let kernel = |call: &'static str| {
        move |source| SocketError::Kernel {
            path: path.to_owned(),
            call,
            source,
        }
    };
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(kernel("stat")(e)),
    };
    if !meta.file_type().is_socket() {
        return Err(SocketError::NotASocket {
            path: path.to_owned(),
        });
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(kernel("unlink"))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        // Answering, or busy (EAGAIN), or not ours to judge (EACCES).
        Ok(_) => Err(SocketError::InUse {
            path: path.to_owned(),
        }),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(SocketError::InUse {
            path: path.to_owned(),
        }),
        Err(e) => Err(kernel("connect")(e)),
    }
}

/// Whether a peer may call: root, or the daemon's own user.
pub const fn may_call(peer_uid: u32, own_uid: u32) -> bool {
    peer_uid == 0 || peer_uid == own_uid
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn socket_and_folder_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/soe.sock");
        let (_listener, owned) = bind(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        drop(owned);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_served_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("soe.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (listener, owned) = bind(&path).unwrap();
        assert!(matches!(bind(&path), Err(SocketError::InUse { .. })));
        assert!(UnixStream::connect(&path).is_ok());
        drop(listener);
        let (_second, second_owned) = bind(&path).unwrap();
        // The first owner no longer owns what lies there.
        drop(owned);
        assert!(path.exists());
        drop(second_owned);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_in_the_way_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("soe.sock");
        fs::write(&path, b"precious").unwrap();
        assert!(matches!(bind(&path), Err(SocketError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_folder_that_others_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        let path = open.join("soe.sock");
        assert!(matches!(
            bind(&path),
            Err(SocketError::OpenFolder { mode: 0o777, .. })
        ));
        fs::set_permissions(&open, fs::Permissions::from_mode(0o1777)).unwrap();
        assert!(bind(&path).is_ok());
    }

    #[test]
    fn root_and_self_may_call() {
        assert!(may_call(0, 1000));
        assert!(may_call(1000, 1000));
        assert!(!may_call(1001, 1000));
        assert!(!may_call(1000, 0));
    }
}
