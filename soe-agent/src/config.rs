//! Configuration: TOML, every key with a default and a documented range.
