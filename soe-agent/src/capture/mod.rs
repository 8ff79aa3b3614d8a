//! Cuts and copies: optimistic and freezing providers, pre-copy passes, the freeze guard.
