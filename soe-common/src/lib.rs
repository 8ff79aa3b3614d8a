//! The vocabulary that SOE's kernel half and its agent share.
//!
//! `no_std`, no I/O, no dependencies: everything here compiles for the BPF target as well as for
//! the host. Records that cross the kernel boundary are `repr(C)` with explicit padding, and their
//! sizes are asserted at compile time, because a silent change of layout would make the agent adopt
//! pinned maps it misreads.
#![cfg_attr(not(test), no_std)]

pub mod histogram;
pub mod record;
pub mod units;

pub use units::{BlockIndex, Epoch, SECTOR_SIZE, Sector};
