//! The on-disk layer format, the rules of chains, the store.
