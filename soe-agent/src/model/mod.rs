//! Forecasters: the burn network, the baselines beside it, and the choice among them.
