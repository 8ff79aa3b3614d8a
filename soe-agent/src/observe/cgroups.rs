//! Names of control groups. The kernel half knows a cgroup by the id of its kernfs node, which is
//! the inode number of its folder.

use std::collections::HashMap;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::PathBuf;

/// Folders looked at; a host with more has the rest shown by number.
const MOST_FOLDERS: usize = 65_536;

/// Where block IO is charged: the `blkio` hierarchy of version 1 if there is one, else version 2.
fn root() -> PathBuf {
    [
        "/sys/fs/cgroup/blkio",
        "/sys/fs/cgroup/unified",
        "/sys/fs/cgroup",
    ]
    .into_iter()
    .map(PathBuf::from)
    .find(|path| path.join("cgroup.procs").exists())
    .unwrap_or_else(|| "/sys/fs/cgroup".into())
}

/// Paths of all control groups below the root, by id.
pub fn paths() -> HashMap<u64, String> {
    let root = root();
    let mut found = HashMap::new();
    if let Ok(meta) = std::fs::metadata(&root) {
        found.insert(meta.ino(), "/".to_string());
    }
    let mut waiting = vec![root.clone()];
    while let Some(folder) = waiting.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            if found.len() >= MOST_FOLDERS || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let path = entry.path();
            if let Ok(below) = path.strip_prefix(&root) {
                found.insert(entry.ino(), format!("/{}", below.display()));
            }
            waiting.push(path);
        }
    }
    found
}

/// The service manager's unit in a path, if there is one: the last part that is named like one.
pub fn unit_of(path: &str) -> Option<&str> {
    path.rsplit('/')
        .find(|part| part.ends_with(".service") || part.ends_with(".scope"))
}

/// The container in a path, if there is one: 64 hexadecimal digits, as the runtimes name them.
pub fn container_of(path: &str) -> Option<&str> {
    path.split(['/', '-', '.', ':'])
        .rev()
        .find(|part| part.len() == 64 && part.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_and_containers_are_found_in_paths() {
        assert_eq!(
            unit_of("/system.slice/postgresql.service"),
            Some("postgresql.service")
        );
        assert_eq!(unit_of("/"), None);
        let id = "a".repeat(64);
        assert_eq!(
            container_of(&format!("/system.slice/docker-{id}.scope")),
            Some(id.as_str())
        );
        assert_eq!(container_of("/system.slice"), None);
    }
}
