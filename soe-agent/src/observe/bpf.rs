//! Loads the kernel half: the only file that names aya.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use aya::programs::{BtfTracePoint, ProgramError};
use aya::{Btf, EbpfLoader};
use soe_common::record::KernelOffsets;

use super::TrackerError;

/// The compiled kernel half, made by `cargo xtask build-ebpf`.
#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);
static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(env!("SOE_EBPF_OBJECT")));

/// Programs that track changes and keep statistics; attached first, and always.
pub const MARKING: [(&str, &str); 3] = [
    ("bio_queued", "block_bio_queue"),
    ("request_done", "block_rq_complete"),
    ("bio_done", "block_bio_complete"),
];
/// Watches disks that passthrough commands can reach (NVMe, SCSI); attached from the first of them on,
/// because it runs for every request of the host.
pub const PASSTHROUGH: (&str, &str) = ("watch_passthrough", "block_rq_issue");
/// Programs that record every IO; attached while a disk is traced.
pub const TRACING: [(&str, &str); 3] = [
    ("trace_queue", "block_bio_queue"),
    ("trace_request_done", "block_rq_complete"),
    ("trace_bio_done", "block_bio_complete"),
];
/// Maps sized by the number of slots.
pub const SLOTTED: [&str; 6] = ["CONTROL", "STAMPS", "CHUNKS", "HEAT", "COUNTERS", "STATS"];

/// Programs loaded and maps created, nothing attached yet.
pub struct Loaded {
    /// By program name.
    pub programs: BTreeMap<String, OwnedFd>,
    /// By map name; the read-only data is `.rodata`.
    pub maps: BTreeMap<String, OwnedFd>,
}

/// How often a program is loaded before it is given up; libbpf tries as often.
const LOAD_TRIES: u32 = 5;

/// Whether the verifier stopped because a signal came in (`bpf_check` gives EAGAIN then), which says
/// nothing about the program.
fn interrupted(error: &ProgramError) -> bool {
    matches!(error, ProgramError::LoadError { io_error, .. }
        if io_error.raw_os_error() == Some(libc::EAGAIN))
}

fn failed(what: impl Into<String>) -> impl FnOnce(&dyn std::error::Error) -> TrackerError {
    let what = what.into();
    move |error| {
        // The whole chain in one sentence: the outermost message alone says little.
        let mut reason = error.to_string();
        let mut source = error.source();
        while let Some(inner) = source {
            let text = inner.to_string();
            if !reason.contains(&text) {
                reason = format!("{reason}: {text}");
            }
            source = inner.source();
        }
        TrackerError::Load {
            what,
            reason: brief(&reason),
        }
    }
}

/// One line; of a verifier's log its end, which tells why.
fn brief(reason: &str) -> String {
    let line = reason.split_whitespace().collect::<Vec<_>>().join(" ");
    let chars = line.chars().count();
    if chars <= 700 {
        return line;
    }
    let head: String = line.chars().take(100).collect();
    let tail: String = line.chars().skip(chars - 600).collect();
    format!("{head} ... {tail}")
}

/// Loads all programs with room for `slots` disks.
pub fn load(offsets: &KernelOffsets, slots: u32) -> Result<Loaded, TrackerError> {
    let kernel = Btf::from_sys_fs().map_err(|e| failed("the kernel's type information")(&e))?;
    // SAFETY: KernelOffsets is made of u32 only, so all of its bytes are initialised.
    let bytes = unsafe {
        std::slice::from_raw_parts(
            (&raw const *offsets).cast::<u8>(),
            size_of::<KernelOffsets>(),
        )
    };
    let mut loader = EbpfLoader::new();
    loader.override_global("OFFSETS", bytes, true);
    for map in SLOTTED {
        loader.map_max_entries(map, slots);
    }
    let mut object = loader
        .load(&OBJECT.0)
        .map_err(|e| failed("the eBPF object")(&e))?;
    let mut programs = BTreeMap::new();
    for (name, tracepoint) in MARKING.into_iter().chain([PASSTHROUGH]).chain(TRACING) {
        let program: &mut BtfTracePoint = object
            .program_mut(name)
            .ok_or_else(|| TrackerError::Load {
                what: name.into(),
                reason: "not in the object".into(),
            })?
            .try_into()
            .map_err(|e: ProgramError| failed(name)(&e))?;
        let mut tries = 0;
        while let Err(error) = program.load(tracepoint, &kernel) {
            tries += 1;
            if tries == LOAD_TRIES || !interrupted(&error) {
                return Err(failed(format!("program {name}"))(&error));
            }
        }
        let fd = program
            .fd()
            .map_err(|e| failed(name)(&e))?
            .as_fd()
            .try_clone_to_owned();
        programs.insert(name.into(), fd.map_err(|e| failed(name)(&e))?);
    }
    let mut maps = BTreeMap::new();
    for (name, map) in object.maps() {
        let fd = map_fd(map)
            .try_clone_to_owned()
            .map_err(|e| failed(name)(&e))?;
        maps.insert(name.to_string(), fd);
    }
    Ok(Loaded { programs, maps })
}

fn map_fd(map: &aya::maps::Map) -> std::os::fd::BorrowedFd<'_> {
    use aya::maps::Map;
    match map {
        Map::Array(data)
        | Map::ArrayOfMaps(data)
        | Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data)
        | Map::PerCpuLruHashMap(data)
        | Map::RingBuf(data) => data.fd().as_fd(),
        _ => unreachable!("the object declares no other kinds of map"),
    }
}
