//! What the kernel tells of block devices that come, go and change: its uevents
//! (`lib/kobject_uevent.c` in the kernel tree), as they are broadcast over netlink before any udev
//! has seen them.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recvfrom, socket_with};

/// The multicast group of the kernel's own messages; udev's have another.
const KERNEL_GROUP: u32 = 1;
/// The kernel's longest message (`UEVENT_BUFFER_SIZE`) and its header.
const LONGEST: usize = 8192;

/// One message about a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uevent {
    /// What happened: `add`, `remove`, `change`, ...
    pub action: String,
    /// Kernel name of the device, such as `sda1`.
    pub device: String,
}

/// What came since the last look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Nothing about block devices.
    Nothing,
    /// These.
    Block(Vec<Uevent>),
    /// More than the socket could hold: anything may have happened.
    Lost,
}

/// The kernel's announcements.
pub struct Uevents {
    socket: OwnedFd,
}

impl Uevents {
    /// Begins to listen. What happened before is not told.
    pub fn listen() -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            Some(KOBJECT_UEVENT),
        )?;
        bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
        Ok(Self { socket })
    }

    /// Waits up to `limit` for messages and takes all that are there.
    pub fn wait(&self, limit: Duration) -> io::Result<Heard> {
        let limit = Timespec::try_from(limit).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut polled = [PollFd::new(&self.socket, PollFlags::IN)];
        match poll(&mut polled, Some(&limit)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(Heard::Nothing),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let mut block = Vec::new();
        let mut message = vec![0; LONGEST];
        loop {
            match recvfrom(&self.socket, message.as_mut_slice(), RecvFlags::empty()) {
                Ok((bytes, _, sender)) => {
                    let sender = sender.and_then(|any| SocketAddrNetlink::try_from(any).ok());
                    // Anyone may send to a netlink socket; the kernel's port is 0.
                    if sender.is_some_and(|sender| sender.pid() == 0) {
                        block.extend(message.get(..bytes).and_then(parse));
                    }
                }
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::NOBUFS) => return Ok(Heard::Lost),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(match block.is_empty() {
            true => Heard::Nothing,
            false => Heard::Block(block),
        })
    }
}

/// Reads `ACTION@DEVPATH`, then `KEY=VALUE` pairs, each ended by a zero byte; `None` when it is not
/// about a block device. Pure.
pub fn parse(message: &[u8]) -> Option<Uevent> {
    let mut parts = message.split(|byte| *byte == 0);
    let head = std::str::from_utf8(parts.next()?).ok()?;
    let (action, path) = head.split_once('@')?;
    let mut block = false;
    let mut name = None;
    for part in parts {
        match std::str::from_utf8(part).ok()?.split_once('=') {
            Some(("SUBSYSTEM", subsystem)) => block = subsystem == "block",
            Some(("DEVNAME", device)) => name = Some(device),
            _ => {}
        }
    }
    let name = name.or_else(|| path.rsplit('/').next())?;
    block.then(|| Uevent {
        action: action.to_owned(),
        device: name.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(head: &str, pairs: &[&str]) -> Vec<u8> {
        let mut bytes = head.as_bytes().to_vec();
        for pair in pairs {
            bytes.push(0);
            bytes.extend_from_slice(pair.as_bytes());
        }
        bytes.push(0);
        bytes
    }

    #[test]
    fn block_devices_are_heard_and_others_are_not() {
        let change = message(
            "change@/devices/virtual/block/loop3",
            &[
                "ACTION=change",
                "DEVPATH=/devices/virtual/block/loop3",
                "SUBSYSTEM=block",
                "RESIZE=1",
                "MAJOR=7",
                "MINOR=3",
                "DEVNAME=loop3",
                "DEVTYPE=disk",
                "DISKSEQ=12",
                "SEQNUM=4711",
            ],
        );
        let heard = Uevent {
            action: "change".into(),
            device: "loop3".into(),
        };
        assert_eq!(parse(&change), Some(heard));
        assert_eq!(
            parse(&message(
                "add@/devices/x/net/eth0",
                &["SUBSYSTEM=net", "DEVNAME=eth0"]
            )),
            None
        );
        let nameless = message("remove@/devices/x/block/sda/sda1", &["SUBSYSTEM=block"]);
        assert_eq!(parse(&nameless).unwrap().device, "sda1");
        assert_eq!(parse(b"libudev\0\xfe\xed\xca\xfe"), None);
    }

    proptest! {
        #[test]
        fn any_message_is_read_or_left(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(&bytes);
            let mut block = b"change@/x\0SUBSYSTEM=block\0".to_vec();
            block.extend_from_slice(&bytes);
            if let Some(event) = parse(&block) {
                prop_assert!(event.action == "change");
            }
        }
    }
}
