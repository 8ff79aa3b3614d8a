//! How long work shows how far it is: a bar on a terminal, now and then a plain line elsewhere.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::config::units::human_size;

/// Time between plain lines.
const PLAIN_EVERY: Duration = Duration::from_secs(2);

/// Progress of one work on standard error.
pub(super) struct Progress {
    what: &'static str,
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
}

impl Progress {
    /// Progress of `what`, in bytes.
    pub(super) fn new(what: &'static str) -> Self {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            let template = if plain {
                "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}"
            } else {
                "{msg} [{bar:30.cyan}] {bytes}/{total_bytes} {bytes_per_sec} {eta}"
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.set_message(what);
            bar
        });
        Self {
            what,
            bar,
            last_line: None,
        }
    }

    /// Shows that `done` of `total` bytes are done.
    pub(super) fn update(&mut self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            return;
        }
        if self.last_line.is_none_or(|at| at.elapsed() >= PLAIN_EVERY) {
            self.last_line = Some(Instant::now());
            // Progress that nobody reads is no reason to stop.
            let _ = writeln!(
                io::stderr(),
                "{}: {} of {}",
                self.what,
                human_size(done),
                human_size(total)
            );
        }
    }

    /// Takes the bar away.
    pub(super) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
