//! Budgets of CPU, memory, I/O and space, and the foreground-latency guard.
