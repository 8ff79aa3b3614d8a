//! Ctrl-C, SIGTERM and SIGHUP end the demo the ordinary way, so that everything it made is removed.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_: libc::c_int) {
    ASKED.store(true, Ordering::SeqCst);
}

/// From here on the signals only leave a note.
pub fn install() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let handler: extern "C" fn(libc::c_int) = note;
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe, and it stays
        // valid for as long as the process lives.
        unsafe {
            libc::signal(signal, handler as libc::sighandler_t);
        }
    }
}

/// Whether the demo was asked to end.
pub fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}

/// Fails when the demo was asked to end.
pub fn check() -> Result<()> {
    if asked() {
        bail!("stopped on request");
    }
    Ok(())
}
