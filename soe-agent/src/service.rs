//! Wires the agent: the only place that builds concrete parts.
