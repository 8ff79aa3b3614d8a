//! A drop folder: every `*.json` in it is one CloudEvent or an array of them.
//!
//! A file is removed once its events would survive a crash; one that is no event is moved to `refused`
//! beside a text that says why. Writers make a file complete under another name (one that begins with a
//! dot, say) and rename it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Outlet, Sink};
use crate::api::cloudevents;
use crate::api::types::Event;
use crate::api::validate;
use crate::seam::UnixNanos;

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The same while something cannot be taken.
const AGAIN: Duration = Duration::from_secs(10);
/// Files kept of those refused, each with its text; the oldest go first.
const MOST_REFUSED: usize = 256;
/// Larger files are refused.
const MOST_BYTES: u64 = 1 << 20;
/// Files taken in one look.
const MOST_FILES: usize = 256;
/// Where files go that are no events.
const REFUSED: &str = "refused";

/// Takes what is dropped until the folder cannot be used any more; says why then.
pub async fn follow(dir: &Path, outlet: &mut Outlet) -> String {
    let mut told = BTreeSet::new();
    loop {
        let (dir, sink) = (dir.to_owned(), outlet.sink());
        // Waits for the disk.
        let looked = tokio::task::spawn_blocking(move || take_all(&dir, &*sink));
        let failed = match looked.await {
            Ok(Ok(failed)) => failed,
            Ok(Err(why)) => return why,
            Err(ended) => return format!("the look into the folder ended unexpectedly: {ended}"),
        };
        // What cannot be taken does not hold up what can, and is told once.
        for why in failed.difference(&told) {
            tracing::warn!(why, "an event stays in the folder");
        }
        tokio::time::sleep(if failed.is_empty() { LOOK_EVERY } else { AGAIN }).await;
        told = failed;
    }
}

/// Takes what lies there now. A file that cannot be taken does not hold up the others: what hinders it is
/// returned.
///
/// # Errors
/// In words, if the folder cannot be used.
pub fn take_all(dir: &Path, sink: &dyn Sink) -> Result<BTreeSet<String>, String> {
    let mut failed = BTreeSet::new();
    for file in waiting(dir)? {
        if let Err(why) = take(dir, &file, sink) {
            failed.insert(format!("{}: {why}", file.display()));
        }
    }
    Ok(failed)
}

fn take(dir: &Path, file: &Path, sink: &dyn Sink) -> Result<(), String> {
    match read(file, sink.now()) {
        Ok(Some(events)) => {
            for event in events {
                sink.publish(event).map_err(|e| e.to_string())?;
            }
            // If this fails the file is taken again, and its events are known.
            match fs::remove_file(file) {
                Err(e) if e.kind() != ErrorKind::NotFound => Err(e.to_string()),
                _ => Ok(()),
            }
        }
        Ok(None) => Ok(()),
        Err(why) => refuse(dir, file, &why),
    }
}

/// The files that wait, by name.
fn waiting(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let error = |e: std::io::Error| format!("folder {}: {e}", dir.display());
    let meta = fs::symlink_metadata(dir).map_err(error)?;
    if !meta.is_dir() {
        return Err(format!("{} is no folder", dir.display()));
    }
    // Who can write there could announce anything, and lay links for the agent to follow.
    let own = rustix::process::geteuid().as_raw();
    if meta.permissions().mode() & 0o022 != 0 || ![0, own].contains(&meta.uid()) {
        return Err(format!(
            "folder {} can be written by others than the agent's user; give it to that user with mode 0755 or less",
            dir.display()
        ));
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(error)? {
        let entry = entry.map_err(error)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file && name.ends_with(".json") && !name.starts_with('.') {
            files.push(entry.path());
        }
        if files.len() == MOST_FILES {
            break;
        }
    }
    files.sort();
    Ok(files)
}

/// The events of a file; `None` if it is gone.
fn read(file: &Path, now: UnixNanos) -> Result<Option<Vec<Event>>, String> {
    let mut bytes = Vec::new();
    let mut options = fs::OpenOptions::new();
    options
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let opened = match options.open(file) {
        Ok(opened) => opened,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.to_string()),
    };
    if !opened.metadata().is_ok_and(|meta| meta.is_file()) {
        return Err("it is no file".to_owned());
    }
    opened
        .take(MOST_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| e.to_string())?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(format!("it is larger than {MOST_BYTES} bytes"));
    }
    let events = cloudevents::from_json(&bytes, now).map_err(|e| e.to_string())?;
    for event in &events {
        validate::event(event).map_err(|e| e.to_string())?;
    }
    Ok(Some(events))
}

fn refuse(dir: &Path, file: &Path, why: &str) -> Result<(), String> {
    tracing::warn!(file = %file.display(), why, "no event");
    let refused = dir.join(REFUSED);
    let name = file.file_name().unwrap_or_default();
    let to = refused.join(name);
    let moved = fs::create_dir_all(&refused).and_then(|()| {
        fs::write(to.with_extension("why"), format!("{why}\n"))?;
        fs::rename(file, &to)
    });
    moved.map_err(|e| format!("it cannot be moved to {}: {e}", refused.display()))?;
    if let Err(error) = forget_oldest(&refused) {
        tracing::warn!(folder = %refused.display(), %error, "old refused files stay");
    }
    Ok(())
}

/// Removes the files refused longest ago, with their texts, where there are too many.
fn forget_oldest(refused: &Path) -> std::io::Result<()> {
    let mut texts = Vec::new();
    for entry in fs::read_dir(refused)? {
        let path = entry?.path();
        let meta = fs::symlink_metadata(&path)?;
        // The text was written when the file was refused, however old the file is.
        if meta.is_file() && path.extension().is_some_and(|e| e == "why") {
            texts.push((meta.modified()?, path));
        }
    }
    texts.sort();
    let old = texts.len().saturating_sub(MOST_REFUSED);
    for (_, text) in &texts[..old] {
        let _ = fs::remove_file(text.with_extension("json"));
        fs::remove_file(text)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::support::Taken;
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    const EVENT: &str =
        r#"{"specversion":"1.0","id":"a","source":"/ci","type":"com.example.deployment"}"#;

    fn look(dir: &Path, taken: &Arc<Taken>) -> Result<BTreeSet<String>, String> {
        take_all(dir, &**taken)
    }

    #[test]
    fn a_file_is_taken_once_kept_and_a_wrong_one_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let taken = Arc::new(Taken::default());
        fs::write(dir.path().join("1.json"), EVENT).unwrap();
        fs::write(dir.path().join("2.json"), format!("[{EVENT},{EVENT}]")).unwrap();
        fs::write(dir.path().join("3.json"), "{}").unwrap();
        fs::write(
            dir.path().join("4.json"),
            vec![b' '; MOST_BYTES as usize + 1],
        )
        .unwrap();
        fs::write(dir.path().join(".5.json"), "half").unwrap();
        look(dir.path(), &taken).unwrap();
        assert_eq!(taken.events.lock().unwrap().len(), 3);
        let left = |name: &str| dir.path().join(name).exists();
        assert!(!left("1.json") && !left("2.json") && left(".5.json"));
        assert!(left("refused/3.json") && left("refused/4.json"));
        let why = fs::read_to_string(dir.path().join("refused/3.why")).unwrap();
        assert!(why.contains("specversion"), "{why}");
    }

    #[test]
    fn what_cannot_be_kept_stays() {
        let dir = tempfile::tempdir().unwrap();
        let taken = Arc::new(Taken::default());
        taken.full.store(true, Ordering::SeqCst);
        fs::write(dir.path().join("1.json"), EVENT).unwrap();
        let failed = look(dir.path(), &taken).unwrap();
        let why = failed.first().unwrap();
        assert!(why.contains("the disk is full"), "{why}");
        assert!(dir.path().join("1.json").exists());
        // A link is not followed, wherever it leads.
        let secret = dir.path().join("secret");
        fs::write(&secret, EVENT).unwrap();
        std::os::unix::fs::symlink(&secret, dir.path().join("0.json")).unwrap();
        taken.full.store(false, Ordering::SeqCst);
        look(dir.path(), &taken).unwrap();
        assert!(!dir.path().join("1.json").exists());
        assert_eq!(
            taken.events.lock().unwrap().len(),
            1,
            "the link's is not taken"
        );
    }

    #[test]
    fn of_what_is_refused_the_newest_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..MOST_REFUSED + 10 {
            fs::write(dir.path().join(format!("{i:04}.json")), "{}").unwrap();
        }
        // What lies there of somebody else is left alone.
        fs::create_dir_all(dir.path().join(REFUSED).join("folder")).unwrap();
        for _ in 0..2 {
            look(dir.path(), &Arc::default()).unwrap();
        }
        let kept = |name: &str| dir.path().join(REFUSED).join(name).exists();
        let files = fs::read_dir(dir.path().join(REFUSED)).unwrap().count();
        assert_eq!(files, 2 * MOST_REFUSED + 1);
        fs::write(dir.path().join("last.json"), "{}").unwrap();
        look(dir.path(), &Arc::default()).unwrap();
        assert!(kept("last.json") && kept("last.why") && kept("folder"));
        assert!(waiting(dir.path()).unwrap().is_empty());
    }

    #[test]
    fn a_folder_that_others_can_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for mode in [0o777, 0o775] {
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
            let why = look(dir.path(), &Arc::default()).unwrap_err();
            assert!(why.contains("by others"), "{why}");
        }
        let gone = dir.path().join("none");
        assert!(look(&gone, &Arc::default()).is_err());
    }
}
