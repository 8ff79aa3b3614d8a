//! Block events in: the eBPF half, recorded traces, and the volumes they belong to.
