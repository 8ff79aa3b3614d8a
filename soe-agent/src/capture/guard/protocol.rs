//! What the agent and its guard say to each other, one packet each.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Superblocks in one freeze at most.
pub const MAX_SUPERBLOCKS: usize = 64;
/// Bytes of a packet at most.
const PACKET: usize = 1 + 1 + MAX_SUPERBLOCKS;

/// What the agent asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Prepare for superblocks at these depths (0 is frozen first); their mount points' descriptors
    /// come along, the marker's last.
    Prepare(Vec<u8>),
    /// Freeze, and begin to thaw after this long at the latest, frozen or not.
    Freeze(Duration),
    /// Thaw.
    Thaw,
}

/// What the guard answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Prepared; whether its memory is locked.
    Ready { locked: bool },
    /// Everything is frozen; how long that took.
    Frozen { took: Duration },
    /// Superblock `index` could not be frozen; nothing is held any more.
    Refused {
        index: u8,
        errno: i32,
        held: Duration,
    },
    /// Thawed: for how long writers were held, and whether everything was frozen until asked.
    Thawed { pause: Duration, intact: bool },
}

impl Ask {
    pub(crate) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Prepare(depths) => [&[b'P', depths.len() as u8], depths.as_slice()].concat(),
            Self::Freeze(hold) => [&b"F"[..], &nanos(*hold)].concat(),
            Self::Thaw => b"T".to_vec(),
        }
    }

    pub(crate) fn decode(packet: &[u8]) -> Option<Self> {
        match packet {
            [b'P', count, depths @ ..]
                if depths.len() == usize::from(*count) && depths.len() <= MAX_SUPERBLOCKS =>
            {
                Some(Self::Prepare(depths.to_vec()))
            }
            [b'F', hold @ ..] => Some(Self::Freeze(duration(hold)?)),
            [b'T'] => Some(Self::Thaw),
            _ => None,
        }
    }
}

/// Bytes of an encoded answer: a fixed array, because the guard must not allocate.
pub(crate) const ANSWER: usize = 14;

impl Answer {
    pub(crate) fn encode(&self) -> [u8; ANSWER] {
        let (tag, time, index, errno) = match *self {
            Self::Ready { locked } => (b'R', Duration::ZERO, u8::from(locked), 0),
            Self::Frozen { took } => (b'Z', took, 0, 0),
            Self::Refused { index, errno, held } => (b'E', held, index, errno),
            Self::Thawed { pause, intact } => (b'D', pause, u8::from(intact), 0),
        };
        let mut packet = [0; ANSWER];
        packet[0] = tag;
        packet[1..9].copy_from_slice(&nanos(time));
        packet[9] = index;
        packet[10..14].copy_from_slice(&errno.to_le_bytes());
        packet
    }

    pub(crate) fn decode(packet: &[u8]) -> Option<Self> {
        let time = duration(packet.get(1..9)?)?;
        let index = *packet.get(9)?;
        let errno = i32::from_le_bytes(packet.get(10..14)?.try_into().ok()?);
        Some(match packet.first()? {
            b'R' => Self::Ready { locked: index != 0 },
            b'Z' => Self::Frozen { took: time },
            b'E' => Self::Refused {
                index,
                errno,
                held: time,
            },
            b'D' => Self::Thawed {
                pause: time,
                intact: index != 0,
            },
            _ => return None,
        })
    }
}

fn nanos(time: Duration) -> [u8; 8] {
    u64::try_from(time.as_nanos())
        .unwrap_or(u64::MAX)
        .to_le_bytes()
}

fn duration(bytes: &[u8]) -> Option<Duration> {
    Some(Duration::from_nanos(u64::from_le_bytes(
        bytes.try_into().ok()?,
    )))
}

/// Sends a packet, with descriptors if any.
pub(crate) fn send(to: impl AsFd, packet: &[u8], with: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(with.len()))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !with.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(with)) {
        return Err(io::Error::other("too many descriptors for one packet"));
    }
    loop {
        match sendmsg(
            &to,
            &[IoSlice::new(packet)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        ) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives a packet and the descriptors that came with it; an empty packet is the end.
pub(crate) fn receive(from: impl AsFd) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut packet = [0; PACKET];
    let mut space =
        vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SUPERBLOCKS + 1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(
            &from,
            &mut [IoSliceMut::new(&mut packet)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Ok(received) => break received.bytes,
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CONNRESET) => break 0,
            Err(error) => return Err(error.into()),
        }
    };
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let packet = packet.get(..received).unwrap_or_default().to_vec();
    Ok((packet, descriptors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn packets_come_back_as_they_went() {
        let time = Duration::from_nanos(123_456_789);
        for ask in [
            Ask::Prepare(vec![0, 1, 1, 2]),
            Ask::Prepare(vec![]),
            Ask::Freeze(time),
            Ask::Thaw,
        ] {
            assert_eq!(Ask::decode(&ask.encode()), Some(ask));
        }
        for answer in [
            Answer::Ready { locked: true },
            Answer::Frozen { took: time },
            Answer::Refused {
                index: 3,
                errno: -16,
                held: time,
            },
            Answer::Thawed {
                pause: time,
                intact: false,
            },
        ] {
            assert_eq!(Answer::decode(&answer.encode()), Some(answer));
        }
    }

    proptest! {
        #[test]
        fn any_packet_is_read_or_refused(packet in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Some(ask) = Ask::decode(&packet) {
                prop_assert_eq!(ask.encode(), packet.clone());
            }
            let _ = Answer::decode(&packet);
        }
    }
}
