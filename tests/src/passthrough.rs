//! Commands that go to a device past the block layer's view of what is read and written.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::device::Aligned;

/// `NVME_IOCTL_IO_CMD`: `_IOWR('N', 0x43, struct nvme_passthru_cmd)`.
const IO_COMMAND: libc::c_ulong = 0xc048_4e43;
/// `NVME_IOCTL_ADMIN_CMD`.
const ADMIN_COMMAND: libc::c_ulong = 0xc048_4e41;
/// `NVME_URING_CMD_IO`.
const URING_COMMAND: u32 = 0xc048_4e80;
/// `SG_IO` of scsi/sg.h.
const SG_IO: libc::c_ulong = 0x2285;

/// `struct nvme_passthru_cmd`, which `struct nvme_uring_cmd` is as well.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Nvme {
    /// The opcode.
    pub opcode: u8,
    flags: u8,
    reserved: u16,
    /// The namespace.
    pub nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    addr: u64,
    metadata_len: u32,
    data_len: u32,
    /// First block, low half; of identify, what is asked for.
    pub cdw10: u32,
    cdw11: u32,
    /// Blocks less one.
    pub cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    result: u32,
}
const _: () = assert!(size_of::<Nvme>() == 72);

/// Opcodes of the NVM command set.
pub mod nvme {
    /// Write.
    pub const WRITE: u8 = 0x01;
    /// Read.
    pub const READ: u8 = 0x02;
    /// Write zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Flush.
    pub const FLUSH: u8 = 0x00;
    /// Identify, of the admin command set.
    pub const IDENTIFY: u8 = 0x06;
}

impl Nvme {
    /// A command for `blocks` blocks from `first` on of namespace 1.
    pub fn new(opcode: u8, first: u32, blocks: u32) -> Self {
        Self {
            opcode,
            nsid: 1,
            cdw10: first,
            cdw12: blocks.saturating_sub(1),
            ..Self::default()
        }
    }

    /// With a buffer for its data.
    pub fn with(mut self, data: &mut Aligned) -> Self {
        self.addr = data.bytes_mut().as_mut_ptr() as u64;
        self.data_len = data.bytes().len() as u32;
        self
    }

    fn ioctl(mut self, device: &File, request: libc::c_ulong) -> io::Result<()> {
        // SAFETY: the request reads and writes one `struct nvme_passthru_cmd`; its buffer, if it has
        // one, is alive in the caller.
        match unsafe { libc::ioctl(device.as_raw_fd(), request, &raw mut self) } {
            0 => Ok(()),
            -1 => Err(io::Error::last_os_error()),
            status => Err(io::Error::other(format!("NVMe status {status:#x}"))),
        }
    }

    /// Sends it to the namespace by ioctl.
    pub fn send(self, device: &File) -> io::Result<()> {
        self.ioctl(device, IO_COMMAND)
    }

    /// Sends it to the controller's admin queue by ioctl.
    pub fn send_admin(self, device: &File) -> io::Result<()> {
        self.ioctl(device, ADMIN_COMMAND)
    }

    /// Sends it to the namespace's character device by io_uring.
    pub fn send_by_ring(self, generic: &File) -> io::Result<()> {
        let mut ring: IoUring<squeue::Entry128, cqueue::Entry32> = IoUring::builder().build(2)?;
        let mut command = [0u8; 80];
        // SAFETY: a plain structure of 72 bytes without padding, read as bytes.
        let bytes = unsafe { std::slice::from_raw_parts((&raw const self).cast::<u8>(), 72) };
        command[..72].copy_from_slice(bytes);
        let entry = opcode::UringCmd80::new(types::Fd(generic.as_raw_fd()), URING_COMMAND)
            .cmd(command)
            .build();
        // SAFETY: file and buffer outlive the wait below.
        unsafe { ring.submission().push(&entry).map_err(io::Error::other)? };
        ring.submit_and_wait(1)?;
        let done = ring.completion().next().map(|done| done.result());
        match done.unwrap_or(-libc::EIO) {
            0 => Ok(()),
            error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
            status => Err(io::Error::other(format!("NVMe status {status:#x}"))),
        }
    }
}

/// `struct sg_io_hdr` of scsi/sg.h.
#[repr(C)]
struct SgIo {
    interface: i32,
    direction: i32,
    command_len: u8,
    sense_len: u8,
    iovec_count: u16,
    data_len: u32,
    data: *mut u8,
    command: *const u8,
    sense: *mut u8,
    timeout_ms: u32,
    flags: u32,
    id: i32,
    user: *mut u8,
    status: u8,
    masked_status: u8,
    message: u8,
    sense_written: u8,
    host_status: u16,
    driver_status: u16,
    residual: i32,
    duration: u32,
    info: u32,
}

/// Which way the data of a SCSI command goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To the device.
    Out,
    /// From the device.
    In,
}

/// Sends a SCSI command by `SG_IO`; the SCSI status.
pub fn scsi(device: &File, command: &[u8], way: Way, data: &mut Aligned) -> io::Result<u8> {
    let mut sense = [0u8; 64];
    let mut header = SgIo {
        interface: i32::from(b'S'),
        direction: match way {
            Way::Out => -2,
            Way::In => -3,
        },
        command_len: command.len() as u8,
        sense_len: sense.len() as u8,
        iovec_count: 0,
        data_len: data.bytes().len() as u32,
        data: data.bytes_mut().as_mut_ptr(),
        command: command.as_ptr(),
        sense: sense.as_mut_ptr(),
        timeout_ms: 30_000,
        flags: 0,
        id: 0,
        user: std::ptr::null_mut(),
        status: 0,
        masked_status: 0,
        message: 0,
        sense_written: 0,
        host_status: 0,
        driver_status: 0,
        residual: 0,
        duration: 0,
        info: 0,
    };
    // SAFETY: the request reads and writes one `struct sg_io_hdr`; all it points to lives through the
    // call and is as long as it says.
    match unsafe { libc::ioctl(device.as_raw_fd(), SG_IO, &raw mut header) } {
        0 => Ok(header.status),
        _ => Err(io::Error::last_os_error()),
    }
}
