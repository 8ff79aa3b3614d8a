//! The bpf(2) calls and mappings that aya has no safe form for: inner maps of different sizes,
//! mapped arrays, per-CPU reads in a known order, links pinned by hand, and the count of skipped
//! runs. Thin and checked; the only `unsafe` of this room besides the mapped words themselves.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_MAP_GET_FD_BY_ID: libc::c_long = 14;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_RAW_TRACEPOINT_OPEN: libc::c_long = 17;

const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_F_MMAPABLE: u32 = 1 << 10;
const BPF_F_INNER_MAP: u32 = 1 << 12;

/// Carries out bpf(2) with `attr` as the union's leading bytes.
fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a plain structure that lives through the call, and its size is given.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr as *mut T, size_of::<T>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn owned(fd: libc::c_long) -> OwnedFd {
    // SAFETY: the kernel has just handed out this descriptor to us.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

#[repr(C)]
#[derive(Default)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
}

/// Creates a mapped array whose elements are one page, to be put into an array of maps.
pub fn create_page_array(name: &str, pages: u32) -> io::Result<OwnedFd> {
    let mut attr = MapCreate {
        map_type: BPF_MAP_TYPE_ARRAY,
        key_size: 4,
        value_size: PAGE as u32,
        max_entries: pages,
        map_flags: BPF_F_MMAPABLE | BPF_F_INNER_MAP,
        ..MapCreate::default()
    };
    for (to, from) in attr.map_name.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    bpf(BPF_MAP_CREATE, &mut attr).map(owned)
}

#[repr(C)]
struct MapElement {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

fn element<K, V: ?Sized>(map: BorrowedFd<'_>, key: &K, value: *mut V) -> MapElement {
    MapElement {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: key as *const K as u64,
        value: value.cast::<u8>() as u64,
        flags: 0,
    }
}

/// Plain data that may be read from and written to maps as bytes.
///
/// # Safety
///
/// Every bit pattern must be valid and there must be no padding.
pub unsafe trait Plain: Copy {}
// SAFETY: integers.
unsafe impl Plain for u32 {}
// SAFETY: integers.
unsafe impl Plain for u64 {}
// SAFETY: integers only, padding spelled out, sizes asserted in soe-common.
unsafe impl Plain for soe_common::record::DiskCounters {}
// SAFETY: as above.
unsafe impl Plain for soe_common::record::DiskStats {}
// SAFETY: as above.
unsafe impl Plain for soe_common::record::CgroupKey {}
// SAFETY: as above.
unsafe impl Plain for soe_common::record::CgroupStats {}
// SAFETY: as above.
unsafe impl Plain for soe_common::record::TraceBooks {}

/// Sets `key` to `value`. For maps of plain values only; `V` must have the map's value size.
pub fn update<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: K, mut value: V) -> io::Result<()> {
    bpf(BPF_MAP_UPDATE_ELEM, &mut element(map, &key, &raw mut value)).map(drop)
}

/// Puts `inner` into an array of maps.
pub fn update_inner(map: BorrowedFd<'_>, key: u32, inner: BorrowedFd<'_>) -> io::Result<()> {
    update(map, key, inner.as_raw_fd() as u32)
}

/// The inner map at `key`, or `None`.
pub fn lookup_inner(map: BorrowedFd<'_>, key: u32) -> io::Result<Option<OwnedFd>> {
    let Some(id) = lookup::<u32, u32>(map, key)? else {
        return Ok(None);
    };
    by_id(BPF_MAP_GET_FD_BY_ID, id).map(Some)
}

#[repr(C)]
#[derive(Default)]
struct ById {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

fn by_id(command: libc::c_long, id: u32) -> io::Result<OwnedFd> {
    bpf(
        command,
        &mut ById {
            id,
            ..ById::default()
        },
    )
    .map(owned)
}

/// A descriptor of the program with this id.
pub fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    by_id(BPF_PROG_GET_FD_BY_ID, id)
}

/// The value at `key`, or `None`.
pub fn lookup<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: K) -> io::Result<Option<V>> {
    let mut value = std::mem::MaybeUninit::<V>::zeroed();
    match bpf(
        BPF_MAP_LOOKUP_ELEM,
        &mut element(map, &key, value.as_mut_ptr()),
    ) {
        // SAFETY: zeroed, then filled by the kernel; every bit pattern is valid.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The raw value at `key` of a map with a 4-byte key.
pub fn lookup_bytes(map: BorrowedFd<'_>, key: u32) -> io::Result<Vec<u8>> {
    let mut value = vec![0u8; map_info(map)?.value_size as usize];
    bpf(
        BPF_MAP_LOOKUP_ELEM,
        &mut element(map, &key, value.as_mut_ptr()),
    )?;
    Ok(value)
}

/// One value per possible CPU at `key` of a per-CPU map, or `None`.
pub fn lookup_per_cpu<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    key: K,
    cpus: usize,
) -> io::Result<Option<Vec<V>>> {
    // The kernel pads each CPU's value to 8 bytes; all values here are multiples of 8.
    assert!(size_of::<V>().is_multiple_of(8) && align_of::<V>() <= 8);
    // SAFETY: an all-zero value is valid for plain data.
    let zero: V = unsafe { std::mem::zeroed() };
    let mut values = vec![zero; cpus];
    match bpf(
        BPF_MAP_LOOKUP_ELEM,
        &mut element(map, &key, values.as_mut_ptr()),
    ) {
        Ok(_) => Ok(Some(values)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Sets the value of every possible CPU at `key`.
pub fn update_per_cpu<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    key: K,
    values: &mut [V],
) -> io::Result<()> {
    bpf(
        BPF_MAP_UPDATE_ELEM,
        &mut element(map, &key, values.as_mut_ptr()),
    )
    .map(drop)
}

/// Removes `key`; whether it was there.
pub fn delete<K: Plain>(map: BorrowedFd<'_>, key: K) -> io::Result<bool> {
    match bpf(
        BPF_MAP_DELETE_ELEM,
        &mut element::<K, u8>(map, &key, std::ptr::null_mut()),
    ) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// All keys of a map.
pub fn keys<K: Plain>(map: BorrowedFd<'_>) -> io::Result<Vec<K>> {
    let mut keys: Vec<K> = Vec::new();
    loop {
        let mut next = std::mem::MaybeUninit::<K>::zeroed();
        let mut attr = MapElement {
            map_fd: map.as_raw_fd() as u32,
            pad: 0,
            key: keys.last().map_or(0, |key| key as *const K as u64),
            value: next.as_mut_ptr() as u64,
            flags: 0,
        };
        match bpf(BPF_MAP_GET_NEXT_KEY, &mut attr) {
            // SAFETY: filled by the kernel; every bit pattern is valid.
            Ok(_) => keys.push(unsafe { next.assume_init() }),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(keys),
            Err(error) => return Err(error),
        }
        // A map that changes underneath may send the walk back to its start.
        if keys.len() > 1 << 20 {
            return Ok(keys);
        }
    }
}

#[repr(C)]
struct Object {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Pins a map, program or link.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = Object {
        pathname: path.as_ptr() as u64,
        bpf_fd: object.as_raw_fd() as u32,
        file_flags: 0,
    };
    bpf(BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Opens what is pinned at `path`.
pub fn pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = Object {
        pathname: path.as_ptr() as u64,
        bpf_fd: 0,
        file_flags: 0,
    };
    bpf(BPF_OBJ_GET, &mut attr).map(owned)
}

#[repr(C)]
struct RawTracepointOpen {
    name: u64,
    prog_fd: u32,
    pad: u32,
}

/// Attaches a loaded `tp_btf` program; it stays attached as long as the link is open or pinned.
pub fn attach_tracepoint(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut attr = RawTracepointOpen {
        name: 0,
        prog_fd: program.as_raw_fd() as u32,
        pad: 0,
    };
    bpf(BPF_RAW_TRACEPOINT_OPEN, &mut attr).map(owned)
}

/// Leading part of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ProgramInfo {
    kind: u32,
    /// Program id.
    pub id: u32,
    /// Digest of the instructions.
    pub tag: [u8; 8],
    jited_prog_len: u32,
    xlated_prog_len: u32,
    jited_prog_insns: u64,
    xlated_prog_insns: u64,
    load_time: u64,
    created_by_uid: u32,
    nr_map_ids: u32,
    map_ids: u64,
    name: [u8; 16],
    ifindex: u32,
    gpl_compatible: u32,
    netns_dev: u64,
    netns_ino: u64,
    nr_jited_ksyms: u32,
    nr_jited_func_lens: u32,
    jited_ksyms: u64,
    jited_func_lens: u64,
    btf_id: u32,
    func_info_rec_size: u32,
    func_info: u64,
    nr_func_info: u32,
    nr_line_info: u32,
    line_info: u64,
    jited_line_info: u64,
    nr_jited_line_info: u32,
    line_info_rec_size: u32,
    jited_line_info_rec_size: u32,
    nr_prog_tags: u32,
    prog_tags: u64,
    /// Nanoseconds spent in the program while `kernel.bpf_stats_enabled` was 1.
    pub run_time_ns: u64,
    /// Runs while `kernel.bpf_stats_enabled` was 1.
    pub run_cnt: u64,
    /// Runs skipped because the program was interrupted by itself.
    pub recursion_misses: u64,
    /// Instructions the verifier looked at.
    pub verified_insns: u32,
    attach_btf_obj_id: u32,
    attach_btf_id: u32,
    pad: u32,
}

#[repr(C)]
struct InfoByFd {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

fn info<T>(object: BorrowedFd<'_>, into: &mut T) -> io::Result<()> {
    let mut attr = InfoByFd {
        bpf_fd: object.as_raw_fd() as u32,
        info_len: size_of::<T>() as u32,
        info: into as *mut T as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr).map(drop)
}

/// What the kernel says of a program.
pub fn program_info(program: BorrowedFd<'_>) -> io::Result<ProgramInfo> {
    let mut out = ProgramInfo::default();
    info(program, &mut out)?;
    Ok(out)
}

/// Ids of the maps a program uses, ascending.
pub fn program_map_ids(program: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut ids = vec![0u32; 64];
    let mut out = ProgramInfo {
        nr_map_ids: ids.len() as u32,
        map_ids: ids.as_mut_ptr() as u64,
        ..ProgramInfo::default()
    };
    info(program, &mut out)?;
    ids.truncate(out.nr_map_ids as usize);
    ids.sort_unstable();
    Ok(ids)
}

#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    prog_id: u32,
    pad: u32,
    rest: [u64; 8],
}

/// Id of the program behind a link.
pub fn link_program(link: BorrowedFd<'_>) -> io::Result<u32> {
    let mut out = LinkInfo::default();
    info(link, &mut out)?;
    Ok(out.prog_id)
}

/// Leading part of `struct bpf_map_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct MapInfo {
    kind: u32,
    /// Map id.
    pub id: u32,
    key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Elements.
    pub max_entries: u32,
    map_flags: u32,
    name: [u8; 16],
}

/// What the kernel says of a map.
pub fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    let mut out = MapInfo::default();
    info(map, &mut out)?;
    Ok(out)
}

/// Possible CPUs, which is how many values a per-CPU map has per key.
pub fn possible_cpus() -> io::Result<usize> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = text
        .trim()
        .rsplit([',', '-'])
        .next()
        .and_then(|n| n.parse::<usize>().ok())
        .ok_or(io::ErrorKind::InvalidData)?;
    Ok(last + 1)
}

/// Bytes of a page; mapped arrays have one or more of them.
pub const PAGE: usize = 4096;

/// An array map in our address space, shared with the kernel.
pub struct Mapped {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is shared memory; all access goes through atomics or volatile reads.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps the first `bytes` of an array map.
    pub fn new(map: &impl AsFd, bytes: usize) -> io::Result<Self> {
        let bytes = bytes.next_multiple_of(PAGE);
        // SAFETY: a new shared mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_fd().as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { start, bytes })
    }

    /// The address of a `T` at byte `offset`.
    ///
    /// Panics when it would not lie within the mapping or not be aligned, which only a mistake in
    /// this room's own arithmetic can bring about.
    pub fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset.is_multiple_of(align_of::<T>()) && offset + size_of::<T>() <= self.bytes);
        // SAFETY: within the mapping, as just checked.
        unsafe { self.start.as_ptr().add(offset).cast() }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: our own mapping; nothing refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}
