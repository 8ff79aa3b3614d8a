//! The live tables of device-mapper nodes, through the control device: sysfs does not show them.
//! A table that is changed leaves node, number and `diskseq` as they are, but other blocks stand
//! behind the same sectors.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

const CONTROL: &str = "/dev/mapper/control";
/// `DM_TABLE_STATUS` of linux/dm-ioctl.h: `_IOWR(0xfd, 12, struct dm_ioctl)`.
const DM_TABLE_STATUS: libc::c_ulong = 0xc138_fd0c;
/// Tell the table, not the status.
const DM_STATUS_TABLE_FLAG: u32 = 1 << 4;
/// The answer did not fit.
const DM_BUFFER_FULL_FLAG: u32 = 1 << 8;
/// The kernel wipes its copies: tables of dm-crypt may hold keys.
const DM_SECURE_DATA_FLAG: u32 = 1 << 15;
/// The largest answer that is waited for.
const MOST_BYTES: usize = 16 << 20;

// `struct dm_ioctl`, as offsets.
const HEADER: usize = 312;
const DATA_SIZE: usize = 12;
const DATA_START: usize = 16;
const TARGET_COUNT: usize = 20;
const FLAGS: usize = 28;
const DEVICE: usize = 40;
// `struct dm_target_spec`, as offsets.
const SPEC: usize = 40;
const SPEC_NEXT: usize = 20;
const SPEC_KIND: usize = 24;

/// One line of a table (dmsetup(8)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// First sector.
    pub start: u64,
    /// Sectors.
    pub sectors: u64,
    /// The target's type, such as `linear`.
    pub kind: String,
    /// Its parameters.
    pub parameters: Vec<u8>,
}

impl Target {
    /// Whether the parameters say where the blocks are. Those of targets that choose among equal
    /// copies change with every path or leg that fails.
    pub fn maps_by_parameters(&self) -> bool {
        !matches!(self.kind.as_str(), "multipath" | "raid" | "mirror")
    }

    /// Whether what stands behind the members is what stands behind this target. A thin volume's
    /// blocks are found through the pool's own metadata, and the pool may grow.
    pub fn maps_members(&self) -> bool {
        self.maps_by_parameters() && !matches!(self.kind.as_str(), "thin" | "thin-pool")
    }
}

/// The live table of the node `major:minor`.
pub fn table(major: u32, minor: u32) -> io::Result<Vec<Target>> {
    let control = File::options()
        .read(true)
        .write(true)
        .open(Path::new(CONTROL))
        .map_err(|error| io::Error::new(error.kind(), format!("{CONTROL}: {error}")))?;
    let mut bytes = 16 << 10;
    while bytes <= MOST_BYTES {
        let mut buffer = vec![0u8; bytes];
        for (at, word) in [
            (0, 4u32),
            (DATA_SIZE, bytes as u32),
            (DATA_START, HEADER as u32),
        ] {
            buffer[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        }
        let flags = DM_STATUS_TABLE_FLAG | DM_SECURE_DATA_FLAG;
        buffer[FLAGS..FLAGS + 4].copy_from_slice(&flags.to_ne_bytes());
        // The kernel's encoding of a device number (huge_encode_dev).
        let (major, minor) = (u64::from(major), u64::from(minor));
        let device = (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12);
        buffer[DEVICE..DEVICE + 8].copy_from_slice(&device.to_ne_bytes());
        // SAFETY: the buffer begins with a whole `struct dm_ioctl` that tells the buffer's size, within
        // which the kernel writes.
        let done =
            unsafe { libc::ioctl(control.as_raw_fd(), DM_TABLE_STATUS, buffer.as_mut_ptr()) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        if word(&buffer, FLAGS)? & DM_BUFFER_FULL_FLAG == 0 {
            let targets = parse(&buffer);
            buffer.fill(0);
            return targets;
        }
        bytes *= 4;
    }
    Err(io::Error::other(format!(
        "the table of {major}:{minor} is larger than {MOST_BYTES} bytes"
    )))
}

fn cut() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "a device-mapper table is cut off",
    )
}

fn bytes_at<const N: usize>(buffer: &[u8], at: usize) -> io::Result<[u8; N]> {
    let end = at.checked_add(N).ok_or_else(cut)?;
    let slice = buffer.get(at..end).ok_or_else(cut)?;
    slice.try_into().map_err(|_| cut())
}

fn word(buffer: &[u8], at: usize) -> io::Result<u32> {
    bytes_at(buffer, at).map(u32::from_ne_bytes)
}

fn long(buffer: &[u8], at: usize) -> io::Result<u64> {
    bytes_at(buffer, at).map(u64::from_ne_bytes)
}

fn parse(buffer: &[u8]) -> io::Result<Vec<Target>> {
    let start = word(buffer, DATA_START)? as usize;
    let end = (word(buffer, DATA_SIZE)? as usize).min(buffer.len());
    let data = buffer.get(start..end).unwrap_or_default();
    let mut targets = Vec::new();
    let mut at = 0;
    for _ in 0..word(buffer, TARGET_COUNT)? {
        let kind: [u8; 16] = bytes_at(data, at + SPEC_KIND)?;
        let parameters = data.get(at + SPEC..).ok_or_else(cut)?;
        targets.push(Target {
            start: long(data, at)?,
            sectors: long(data, at + 8)?,
            kind: String::from_utf8_lossy(until_zero(&kind)).into_owned(),
            parameters: until_zero(parameters).to_vec(),
        });
        // Counted from the first target on.
        at = word(data, at + SPEC_NEXT)? as usize;
    }
    Ok(targets)
}

fn until_zero(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer of the kernel with the targets (start, sectors, kind, parameters).
    fn answer(targets: &[(u64, u64, &str, &str)]) -> Vec<u8> {
        let mut data = Vec::new();
        for (start, sectors, kind, parameters) in targets {
            let mut spec = vec![0u8; SPEC];
            spec[..8].copy_from_slice(&start.to_ne_bytes());
            spec[8..16].copy_from_slice(&sectors.to_ne_bytes());
            spec[SPEC_KIND..SPEC_KIND + kind.len()].copy_from_slice(kind.as_bytes());
            spec.extend(parameters.as_bytes());
            spec.push(0);
            spec.resize(spec.len().next_multiple_of(8), 0);
            let next = (data.len() + spec.len()) as u32;
            spec[SPEC_NEXT..SPEC_NEXT + 4].copy_from_slice(&next.to_ne_bytes());
            data.extend(spec);
        }
        let mut buffer = vec![0u8; HEADER];
        let size = (HEADER + data.len()) as u32;
        buffer[DATA_SIZE..DATA_SIZE + 4].copy_from_slice(&size.to_ne_bytes());
        buffer[DATA_START..DATA_START + 4].copy_from_slice(&(HEADER as u32).to_ne_bytes());
        let count = (targets.len() as u32).to_ne_bytes();
        buffer[TARGET_COUNT..TARGET_COUNT + 4].copy_from_slice(&count);
        buffer.extend(data);
        buffer
    }

    #[test]
    fn an_answer_is_read_target_by_target() {
        let buffer = answer(&[
            (0, 65537, "linear", "259:1 2048"),
            (65537, 8, "multipath", "0 0 1 1 round-robin 0 1 1 8:0 1000"),
        ]);
        let targets = parse(&buffer).unwrap();
        assert_eq!(targets.len(), 2);
        assert_eq!(targets[0].parameters, b"259:1 2048");
        assert_eq!((targets[1].start, targets[1].sectors), (65537, 8));
        assert!(targets[0].maps_members() && !targets[1].maps_by_parameters());
    }

    #[test]
    fn an_answer_that_is_cut_off_is_an_error() {
        let buffer = answer(&[(0, 8, "linear", "259:1 0"), (8, 8, "linear", "259:1 8")]);
        for len in 0..buffer.len() - 16 {
            let _ = parse(&buffer[..len]);
        }
        assert!(parse(&buffer[..HEADER + SPEC]).is_err());
    }
}
