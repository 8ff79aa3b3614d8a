//! Reading with io_uring: direct, with registered buffers and file, several requests in flight.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use io_uring::{IoUring, Probe, opcode, types};

use super::ReadOptions;
use super::buffer::{BUFFER_ALIGN, Buffers};
use super::depth::DepthControl;
use super::request::{Request, Requests};
use super::volume::{OpenError, VolumeFile, VolumeSpec, read_error};
use crate::seam::{BlockReader, ByteRange, Pace};

/// Times a request that the kernel answers with "again" is repeated.
const RETRIES: u32 = 16;
/// Index of the volume among the registered files.
const FILE: types::Fixed = types::Fixed(0);

/// Reads one volume through its own ring.
pub struct UringReader {
    volume: VolumeFile,
    options: ReadOptions,
    engine: Mutex<Engine>,
    began: Instant,
}

struct Engine {
    // Dropped before the buffers it reads into.
    ring: IoUring,
    buffers: Buffers,
    depth: DepthControl,
}

impl UringReader {
    /// Opens the volume and sets up its ring. [`OpenError::NoUring`] says that the plain reader has
    /// to be used.
    pub fn open(spec: &VolumeSpec, options: ReadOptions) -> Result<Self, OpenError> {
        let volume = VolumeFile::open(spec)?;
        let max_depth = options.max_depth.clamp(1, 64);
        let buffers = Buffers::new(
            max_depth as usize,
            options.max_request as usize + 2 * BUFFER_ALIGN,
        )?;
        let ring = set_up(&volume, &buffers, max_depth).map_err(|reason| OpenError::NoUring {
            path: spec.path.clone(),
            reason,
        })?;
        let start = if options.urgent { max_depth } else { 4 };
        Ok(Self {
            volume,
            options,
            engine: Mutex::new(Engine {
                ring,
                buffers,
                depth: DepthControl::new(start, max_depth),
            }),
            began: Instant::now(),
        })
    }
}

fn set_up(volume: &VolumeFile, buffers: &Buffers, entries: u32) -> Result<IoUring, String> {
    let said = |what: &str, error: io::Error| format!("{what}: {error}");
    let ring = IoUring::new(entries.next_power_of_two()).map_err(|e| said("set-up", e))?;
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|e| said("probe", e))?;
    if !probe.is_supported(opcode::ReadFixed::CODE) {
        return Err("the kernel has no fixed reads".to_owned());
    }
    ring.submitter()
        .register_files(&[volume.file.as_raw_fd()])
        .map_err(|e| said("registering the file", e))?;
    let vectors: Vec<libc::iovec> = (0..buffers.count())
        .map(|index| libc::iovec {
            iov_base: buffers.pointer(index).cast(),
            iov_len: buffers.each(),
        })
        .collect();
    // SAFETY: the vectors describe the mapping of `buffers`, which the engine keeps for as long as
    // the ring and drops after it.
    unsafe { ring.submitter().register_buffers(&vectors) }.map_err(|e| {
        said(
            "registering the buffers (is the locked-memory limit too low?)",
            e,
        )
    })?;
    Ok(ring)
}

/// A request on its way in the buffer of the same number.
#[derive(Clone, Copy)]
struct Flight {
    request: Request,
    /// Bytes of the cover that have arrived.
    done: u64,
    retries: u32,
}

/// One call of `read`. Dropping it waits for everything in flight, also when the sink panics: the
/// next call must not find foreign completions, nor buffers that are still being filled.
struct Session<'a> {
    engine: &'a mut Engine,
    path: &'a Path,
    ioprio: u16,
    flights: Vec<Option<Flight>>,
    in_flight: usize,
}

impl Session<'_> {
    /// Puts the rest of flight `index` on its way.
    fn submit(&mut self, index: usize, flight: Flight) -> io::Result<()> {
        let rest = flight.request.cover.len - flight.done;
        let offset = flight.request.cover.offset + flight.done;
        let pointer = self.engine.buffers.pointer(index);
        let entry = opcode::ReadFixed::new(
            FILE,
            pointer.wrapping_add(flight.done as usize),
            rest as u32,
            index as u16,
        )
        .offset(offset)
        .ioprio(self.ioprio)
        .build()
        .user_data(index as u64);
        // SAFETY: the entry reads into registered buffer `index`, which no other flight uses and
        // which the session does not touch before the completion came; the file is registered.
        unsafe { self.engine.ring.submission().push(&entry) }
            .map_err(|_| io::Error::other("the submission queue is full"))?;
        if let Some(slot) = self.flights.get_mut(index) {
            *slot = Some(flight);
        }
        self.in_flight += 1;
        loop {
            match self.engine.ring.submit() {
                Ok(_) => return Ok(()),
                Err(error) if transient(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits for at least one completion and returns those there are, as (index, result).
    fn wait(&mut self) -> io::Result<Vec<(usize, i32)>> {
        loop {
            match self.engine.ring.submit_and_wait(1) {
                Ok(_) => break,
                Err(error) if transient(&error) => {}
                Err(error) => return Err(error),
            }
        }
        let done: Vec<(usize, i32)> = self
            .engine
            .ring
            .completion()
            .map(|entry| (entry.user_data() as usize, entry.result()))
            .collect();
        self.in_flight = self.in_flight.saturating_sub(done.len());
        Ok(done)
    }

    /// Judges one completion: the finished flight, or nothing when it goes on.
    fn finish(&mut self, index: usize, result: i32, len: u64) -> io::Result<Option<Request>> {
        let Some(mut flight) = self.flights.get_mut(index).and_then(Option::take) else {
            return Err(io::Error::other("a completion nobody waits for"));
        };
        let at = flight.request.cover.offset + flight.done;
        let rest = flight.request.cover.len - flight.done;
        let failed = |error: io::Error| read_error(self.path, at, rest, &error);
        if result < 0 {
            let error = io::Error::from_raw_os_error(-result);
            flight.retries += 1;
            if !transient(&error) || flight.retries > RETRIES {
                return Err(failed(error));
            }
            return self.submit(index, flight).map(|()| None);
        }
        flight.done += result as u64;
        // The cover may end behind the file's last byte.
        let wanted = flight
            .request
            .cover
            .len
            .min(len - flight.request.cover.offset.min(len));
        if flight.done >= wanted {
            return Ok(Some(flight.request));
        }
        if result == 0 {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        self.submit(index, flight).map(|()| None)
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            if let Err(error) = self.wait() {
                // The kernel keeps the pages of registered buffers until it is done with them, so
                // giving up here endangers no memory.
                tracing::error!(path = %self.path.display(), %error, "waiting for reads in flight");
                return;
            }
        }
    }
}

fn transient(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
    )
}

impl BlockReader for UringReader {
    fn len(&self) -> u64 {
        self.volume.len
    }

    fn read(
        &self,
        ranges: &[ByteRange],
        unit: u32,
        pace: &dyn Pace,
        sink: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let volume = &self.volume;
        let mut requests = Requests::new(
            ranges,
            volume.len,
            volume.base,
            volume.align,
            unit,
            u64::from(self.options.max_request),
        )?;
        let now = || -> Duration { self.began.elapsed() };
        let mut engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
        engine.depth.restart(now());
        let slots = engine.buffers.count();
        let mut free: Vec<usize> = (0..slots).rev().collect();
        let mut session = Session {
            engine: &mut engine,
            path: &volume.path,
            ioprio: self.options.ioprio(),
            flights: vec![None; slots],
            in_flight: 0,
        };
        loop {
            while session.in_flight < session.engine.depth.depth()
                && let Some(index) = free.last().copied()
                && let Some(request) = requests.next()
            {
                pace.before(request.cover.len)?;
                free.pop();
                session.submit(
                    index,
                    Flight {
                        request,
                        done: 0,
                        retries: 0,
                    },
                )?;
            }
            if session.in_flight == 0 {
                return Ok(());
            }
            for (index, result) in session.wait()? {
                let end = volume.base + volume.len;
                let Some(request) = session.finish(index, result, end)? else {
                    continue;
                };
                if !self.options.urgent {
                    session.engine.depth.completed(request.cover.len, now());
                }
                // SAFETY: the flight is complete and its buffer not reused before it is free again.
                let data = unsafe {
                    session
                        .engine
                        .buffers
                        .bytes(index, request.cover.len as usize)
                };
                request.pieces(volume.base, unit, data, sink)?;
                free.push(index);
            }
        }
    }
}
