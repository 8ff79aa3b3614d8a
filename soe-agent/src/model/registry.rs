//! The networks trained on this host, in versions: which one serves, and those before it, to go back to.
//!
//! One file a version, `NNNNNN.soe`, and the file `serving`, which names the one that serves and below it
//! those that served before and were not gone back from. Both appear whole or not at all (written beside,
//! synced, renamed), so a crash leaves the version before.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::weights::{ModelError, Trained, TrainedInfo, write_whole};

/// Versions kept; older ones are removed, but never the one that serves.
const KEPT: usize = 8;
const SERVING: &str = "serving";
/// What [`SERVING`] holds when the network that ships serves.
const PRIOR: &str = "prior";

/// A version and how it came about.
#[derive(Clone, Debug, PartialEq)]
pub struct Version {
    /// Its number; the first is 1.
    pub number: u64,
    /// How it came about; `None` if its file cannot be read any more or does not fit this build.
    pub info: Option<TrainedInfo>,
}

/// The versions in one folder.
#[derive(Debug)]
pub struct Registry {
    folder: PathBuf,
}

fn failed(path: &Path, call: &'static str, source: io::Error) -> ModelError {
    ModelError::Io {
        path: path.to_owned(),
        call,
        source,
    }
}

impl Registry {
    /// The registry in `folder`, which is made if it is not there.
    ///
    /// # Errors
    /// [`ModelError::Io`] if the folder cannot be made.
    pub fn open(folder: &Path) -> Result<Self, ModelError> {
        fs::create_dir_all(folder).map_err(|e| failed(folder, "create", e))?;
        Ok(Self {
            folder: folder.to_owned(),
        })
    }

    fn path(&self, number: u64) -> PathBuf {
        self.folder.join(format!("{number:06}.soe"))
    }

    fn numbers(&self) -> Result<Vec<u64>, ModelError> {
        let entries = fs::read_dir(&self.folder).map_err(|e| failed(&self.folder, "list", e))?;
        let mut numbers: Vec<u64> = entries
            .filter_map(|entry| {
                let name = entry.ok()?.file_name().into_string().ok()?;
                name.strip_suffix(".soe")?.parse().ok()
            })
            .filter(|number| *number > 0)
            .collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// The versions there are, oldest first.
    ///
    /// # Errors
    /// [`ModelError::Io`] if the folder cannot be read.
    pub fn versions(&self) -> Result<Vec<Version>, ModelError> {
        let numbers = self.numbers()?;
        let version = |number| Version {
            number,
            info: self.load(number).ok().map(|trained| trained.info),
        };
        Ok(numbers.into_iter().map(version).collect())
    }

    /// The version that serves; `None` for the network that ships.
    pub fn serving(&self) -> Option<u64> {
        self.served().first().copied().flatten()
    }

    /// What serves and what served before it, newest first.
    fn served(&self) -> Vec<Option<u64>> {
        let text = fs::read_to_string(self.folder.join(SERVING)).unwrap_or_default();
        text.lines().map(|line| line.trim().parse().ok()).collect()
    }

    /// A version's network.
    ///
    /// # Errors
    /// [`ModelError`] if there is none, or it is damaged or does not fit this build.
    pub fn load(&self, number: u64) -> Result<Trained, ModelError> {
        let trained = Trained::load(&self.path(number))?;
        trained.check()?;
        Ok(trained)
    }

    /// Keeps a network as the newest version and lets it serve; returns its number.
    ///
    /// # Errors
    /// [`ModelError::Io`]; what served before still does.
    pub fn add(&self, trained: &Trained) -> Result<u64, ModelError> {
        let numbers = self.numbers()?;
        let number = numbers.last().map_or(1, |last| last + 1);
        trained.save(&self.path(number))?;
        self.serve(Some(number))?;
        let old = numbers.len().saturating_sub(KEPT - 1);
        for number in &numbers[..old] {
            let path = self.path(*number);
            if let Err(error) = fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "an old version of the model stays");
            }
        }
        Ok(number)
    }

    /// Lets a version serve from now on; `None` for the network that ships.
    ///
    /// # Errors
    /// [`ModelError`] if there is no such version, or it cannot be noted.
    pub fn serve(&self, number: Option<u64>) -> Result<(), ModelError> {
        let mut served = self.served();
        served.retain(|before| *before != number);
        served.insert(0, number);
        self.note(number, &served)
    }

    /// Lets serve again what served before; `None` for the network that ships. What served is not gone
    /// back to.
    ///
    /// # Errors
    /// As [`Registry::serve`].
    pub fn back(&self) -> Result<Option<u64>, ModelError> {
        let before = self.before();
        let place = |served: &[Option<u64>]| served.iter().position(|number| *number == before);
        let mut served = self.served();
        match place(&served) {
            Some(at) => drop(served.drain(..at)),
            None => served = vec![before],
        }
        self.note(before, &served)?;
        Ok(before)
    }

    /// What served before and can serve again; `None` for the network that ships.
    pub fn before(&self) -> Option<u64> {
        let usable = |number: &Option<u64>| number.is_none_or(|number| self.load(number).is_ok());
        self.served().into_iter().skip(1).find(usable).flatten()
    }

    fn note(&self, number: Option<u64>, served: &[Option<u64>]) -> Result<(), ModelError> {
        if let Some(number) = number {
            self.load(number)?;
        }
        let line = |number: &Option<u64>| number.map_or(PRIOR.to_owned(), |n| n.to_string());
        let lines: Vec<String> = served.iter().take(KEPT).map(line).collect();
        write_whole(&self.folder.join(SERVING), lines.join("\n").as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::weights::prior;

    fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(&dir.path().join("models")).unwrap();
        (dir, registry)
    }

    fn trained(seed: u64) -> Trained {
        let mut trained = prior().unwrap();
        trained.info.seed = seed;
        trained
    }

    #[test]
    fn versions_are_kept_served_and_gone_back_to() {
        let (_dir, registry) = registry();
        assert_eq!(registry.serving(), None);
        for seed in 1..=3 {
            assert_eq!(registry.add(&trained(seed)).unwrap(), seed);
            assert_eq!(registry.serving(), Some(seed));
        }
        assert_eq!(registry.before(), Some(2));
        assert_eq!(registry.back().unwrap(), Some(2));
        assert_eq!(registry.serving(), Some(2));
        assert_eq!(registry.load(2).unwrap().info.seed, 2);
        // What was gone back from is not gone back to.
        assert_eq!(registry.add(&trained(4)).unwrap(), 4);
        assert_eq!(registry.back().unwrap(), Some(2));
        assert_eq!(registry.back().unwrap(), Some(1));
        assert_eq!(registry.back().unwrap(), None);
        assert_eq!(registry.serving(), None);
        registry.serve(Some(3)).unwrap();
        assert_eq!(registry.before(), None);
        registry.serve(None).unwrap();
        assert_eq!(
            registry.before(),
            Some(3),
            "a user may have gone to the shipped one"
        );
        assert_eq!(registry.serving(), None);
        let error = registry.serve(Some(9)).unwrap_err();
        assert!(error.to_string().contains("000009.soe"), "{error}");
        assert_eq!(registry.serving(), None);
    }

    #[test]
    fn old_versions_go_but_not_the_newest_ones() {
        let (_dir, registry) = registry();
        for seed in 1..=20 {
            registry.add(&trained(seed)).unwrap();
        }
        let numbers: Vec<u64> = registry
            .versions()
            .unwrap()
            .iter()
            .map(|v| v.number)
            .collect();
        assert_eq!(numbers, (13..=20).collect::<Vec<u64>>());
        assert_eq!(registry.serving(), Some(20));
    }

    #[test]
    fn a_damaged_version_is_told_and_passed_over() {
        let (dir, registry) = registry();
        for seed in 1..=3 {
            registry.add(&trained(seed)).unwrap();
        }
        let path = dir.path().join("models/000002.soe");
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(registry.serve(Some(2)).is_err());
        assert_eq!(registry.serving(), Some(3));
        assert_eq!(registry.before(), Some(1));
        fs::write(dir.path().join("models/serving"), "not a number").unwrap();
        assert_eq!(registry.serving(), None);
        let infos: Vec<bool> = registry
            .versions()
            .unwrap()
            .iter()
            .map(|v| v.info.is_some())
            .collect();
        assert_eq!(infos, [true, false, true]);
    }
}
