//! Block I/O engines: io_uring, a plain fallback, and decorators.
