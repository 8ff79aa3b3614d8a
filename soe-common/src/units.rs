//! Newtypes for the quantities that are easily confused.

/// Bytes in a sector of the kernel's block layer, whatever the device's own sector size.
pub const SECTOR_SIZE: u64 = 512;

/// An absolute position on a whole disk, in 512-byte sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Sector(pub u64);

/// The index of a block of the change map or of a layer, counted from the start of its volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct BlockIndex(pub u64);

/// The number of a period between two cuts of one disk. Blocks are stamped with the epoch in which
/// they were last written; "changed since the cut that began epoch E" is `stamp >= E`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Epoch(pub u32);

impl Epoch {
    /// The epoch in which tracking begins. Stamp 0 means "never written since tracking began".
    pub const FIRST: Epoch = Epoch(1);

    /// The epoch after this one. Epochs are 32 bits wide; a generation ends before they wrap.
    pub const fn next(self) -> Epoch {
        Epoch(self.0 + 1)
    }

    /// The epoch before this one, never below [`Epoch::FIRST`].
    pub const fn previous(self) -> Epoch {
        if self.0 > Self::FIRST.0 {
            Epoch(self.0 - 1)
        } else {
            Self::FIRST
        }
    }
}
