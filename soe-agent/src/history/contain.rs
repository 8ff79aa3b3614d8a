//! Panics of libraries that are given bytes nobody vouches for, made into errors.
//!
//! The Parquet library asserts, in debug builds, what a broken file does not keep. A file of ours is
//! proven by checksums before any of it is parsed; a file that somebody else put into the history has
//! none, so it is decoded in here.

use std::any::Any;
use std::cell::Cell;
use std::future::Future;
use std::panic::{self, AssertUnwindSafe};
use std::pin::pin;
use std::sync::Once;
use std::task::Poll;

thread_local! {
    /// Whether a panic of this thread is about to be told as an error.
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// What a library said when it gave up.
#[derive(Debug)]
pub(super) struct Panicked(pub String);

/// Runs `work`; a panic in it is an error, and nothing of it is printed.
pub(super) fn contained<T>(work: impl FnOnce() -> T) -> Result<T, Panicked> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let loud = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !CONTAINED.get() {
                loud(info);
            }
        }));
    });
    let before = CONTAINED.replace(true);
    // What `work` borrows is not looked at again when it panicked.
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    CONTAINED.set(before);
    result.map_err(|payload| Panicked(message(&*payload)))
}

/// The same for a future, whichever thread it is polled on.
#[cfg(feature = "sql")]
pub(super) async fn contained_future<F: Future>(future: F) -> Result<F::Output, Panicked> {
    let mut future = pin!(future);
    std::future::poll_fn(
        |context| match contained(|| future.as_mut().poll(context)) {
            Ok(poll) => poll.map(Ok),
            Err(panicked) => Poll::Ready(Err(panicked)),
        },
    )
    .await
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no reason given").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_and_a_value_is_a_value() {
        assert_eq!(contained(|| 5).unwrap(), 5);
        let words = contained(|| -> u8 { panic!("at {}", 7) }).unwrap_err();
        assert_eq!(words.0, "at 7");
        // The next panic of this thread is loud again.
        assert!(!CONTAINED.get());
    }
}
