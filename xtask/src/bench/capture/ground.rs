//! What captures are measured on: a loop device of our own, with ext4 or raw. It is taken away on
//! every exit path, also when something left it frozen.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{place, run};

const QUICK: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
/// What is rewritten and copied at a time.
pub(super) const BLOCK: u64 = 64 << 10;

fn tool(name: &str) -> Command {
    Command::new(place::program(name).unwrap_or_else(|| PathBuf::from(name)))
}

/// A loop device over a file in the folder `dir`.
pub(super) struct Ground {
    pub(super) node: String,
    pub(super) bytes: u64,
    file: PathBuf,
    mount: Option<PathBuf>,
}

impl Ground {
    pub(super) fn raw(dir: &Path, name: &str, mib: u64) -> Result<Self> {
        let file = dir.join(format!("{name}.img"));
        File::create_new(&file)
            .and_then(|made| made.set_len(mib * MIB))
            .with_context(|| file.display().to_string())?;
        let mut attach = tool("losetup");
        attach.args(["-f", "--show"]).arg(&file);
        match run::output(&mut attach, QUICK) {
            Ok(node) => Ok(Self {
                node: node.trim().to_owned(),
                bytes: mib * MIB,
                file,
                mount: None,
            }),
            Err(error) => {
                let _ = std::fs::remove_file(&file);
                Err(error)
            }
        }
    }

    /// The same with a mounted ext4.
    pub(super) fn ext4(dir: &Path, name: &str, mib: u64) -> Result<Self> {
        let mut ground = Self::raw(dir, name, mib)?;
        let mut format = tool("mkfs.ext4");
        format
            .args(["-Fq", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
            .arg(&ground.node);
        run::check(&mut format, QUICK)?;
        let mount = dir.join(format!("{name}.mnt"));
        std::fs::create_dir(&mount).with_context(|| mount.display().to_string())?;
        run::check(tool("mount").arg(&ground.node).arg(&mount), QUICK)?;
        ground.mount = Some(mount);
        Ok(ground)
    }

    /// The file behind the device.
    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// Where it is mounted.
    pub(super) fn mount(&self) -> Result<&Path> {
        self.mount.as_deref().context("it is not mounted")
    }

    /// Fills the whole device with bytes of which an eighth compresses away.
    pub(super) fn fill(&self, seed: u64) -> Result<()> {
        let mut device = self.open(false)?;
        let mut piece = vec![0; MIB as usize];
        for number in 0..self.bytes / MIB {
            scramble(&mut piece, seed ^ number);
            device.write_all(&piece).context("filling the device")?;
        }
        device.sync_all().context("filling the device")
    }

    /// Overwrites the blocks `numbers` of [`BLOCK`] bytes.
    pub(super) fn rewrite(&self, numbers: &[u64], seed: u64) -> Result<()> {
        let device = self.open(false)?;
        let mut piece = vec![0; BLOCK as usize];
        for number in numbers {
            scramble(&mut piece, seed ^ number);
            device
                .write_all_at(&piece, number * BLOCK)
                .context("changing a block")?;
        }
        device.sync_all().context("changing blocks")
    }

    /// Opens the device; `direct` reads past the page cache.
    pub(super) fn open(&self, direct: bool) -> Result<File> {
        File::options()
            .read(true)
            .write(!direct)
            .custom_flags(if direct { libc::O_DIRECT } else { 0 })
            .open(&self.node)
            .with_context(|| self.node.clone())
    }

    /// Freezes (`-f`) or thaws (`-u`) the filesystem by hand.
    pub(super) fn fsfreeze(&self, how: &str) -> Result<()> {
        run::check(tool("fsfreeze").arg(how).arg(self.mount()?), QUICK)
    }

    fn holds_our_file(&self) -> bool {
        let name = self.node.trim_start_matches("/dev/");
        std::fs::read_to_string(format!("/sys/class/block/{name}/loop/backing_file"))
            .is_ok_and(|text| Path::new(text.trim_end()) == self.file)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if let Some(mount) = self.mount.take() {
            // Nothing is frozen unless something went wrong; then it is refused, quietly.
            let _ = run::output(tool("fsfreeze").arg("-u").arg(&mount), QUICK);
            let unmounted = (0..20).any(|_| {
                let done = run::output(tool("umount").arg(&mount), QUICK).is_ok();
                if !done {
                    std::thread::sleep(Duration::from_millis(250));
                }
                done
            });
            if !unmounted {
                eprintln!("bench: {} could not be unmounted", mount.display());
                return;
            }
        }
        // Numbers of loop devices are shared: detach only what still lies on our file.
        if self.holds_our_file()
            && let Err(error) = run::check(tool("losetup").args(["-d", &self.node]), QUICK)
        {
            eprintln!("bench: {error:#}");
        }
        let _ = std::fs::remove_file(&self.file);
    }
}

/// Numbers that look random and are the same in every run.
pub(super) struct Noise(pub(super) u64);

impl Noise {
    pub(super) fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// `count` different numbers below `end`, ascending.
    pub(super) fn choose(&mut self, count: u64, end: u64) -> Vec<u64> {
        let mut chosen = std::collections::BTreeSet::new();
        while (chosen.len() as u64) < count.min(end) {
            chosen.insert(self.next() % end);
        }
        chosen.into_iter().collect()
    }
}

fn scramble(piece: &mut [u8], seed: u64) {
    let mut noise = Noise(seed);
    for page in piece.chunks_mut(4096) {
        let (random, even) = page.split_at_mut(page.len() / 8 * 7);
        for word in random.chunks_mut(8) {
            let bytes = noise.next().to_le_bytes();
            word.copy_from_slice(&bytes[..word.len()]);
        }
        even.fill(0);
    }
}

/// Copies `ranges` (offset and length, multiples of 4 KiB) of `from` past the page cache to the file
/// `to`, one after the other, and makes the copy durable.
pub(super) fn copy(from: &mut File, ranges: &[(u64, u64)], to: &Path) -> Result<u64> {
    let mut out = File::create(to).with_context(|| to.display().to_string())?;
    let mut buffer = Aligned::new(MIB as usize);
    let mut copied = 0;
    for (offset, len) in ranges {
        from.seek(SeekFrom::Start(*offset)).context("seek")?;
        let mut left = *len;
        while left > 0 {
            let take = usize::try_from(left.min(MIB))?;
            let piece = buffer.get(take);
            from.read_exact(piece).context("reading the device")?;
            out.write_all(piece).context("writing the copy")?;
            left -= take as u64;
            copied += take as u64;
        }
    }
    out.sync_all().context("writing the copy")?;
    if copied == 0 {
        bail!("there was nothing to copy");
    }
    Ok(copied)
}

/// A buffer that O_DIRECT takes.
struct Aligned {
    bytes: Vec<u8>,
    at: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + 4096];
        let at = bytes.as_ptr().align_offset(4096);
        Self { bytes, at }
    }

    fn get(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.at..self.at + len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_numbers_are_different_and_within_bounds() {
        let chosen = Noise(7).choose(655, 32_768);
        assert_eq!(chosen.len(), 655);
        assert!(chosen.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(chosen.iter().all(|n| *n < 32_768));
        assert_eq!(Noise(1).choose(9, 3), [0, 1, 2]);
    }

    #[test]
    fn what_is_copied_are_the_ranges() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let content: Vec<u8> = (0..3 * MIB).map(|i| (i / 4096) as u8).collect();
        std::fs::write(&from, &content).unwrap();
        let mut file = File::open(&from).unwrap();
        let ranges = [(4096, 8192), (MIB, MIB + 4096)];
        assert_eq!(copy(&mut file, &ranges, &to).unwrap(), MIB + 12_288);
        let mut wanted = content[4096..12_288].to_vec();
        wanted.extend(&content[MIB as usize..2 * MIB as usize + 4096]);
        assert_eq!(std::fs::read(&to).unwrap(), wanted);
    }
}
