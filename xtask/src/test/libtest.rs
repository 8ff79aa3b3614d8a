//! What a test program's output says.
//!
//! Rust's test harness knows no "skipped at run time". A test that cannot do its work here prints a
//! line `SKIPPED: reason` and returns; it is counted as skipped, not as passed.

/// What a skipping test prints first, on a line of its own or behind the harness's `test name ... `.
const SKIPPED: &str = "SKIPPED: ";

/// What was counted in one program's output, or in several one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Tests that did their work.
    pub passed: u64,
    /// Tests that failed.
    pub failed: u64,
    /// Tests that did not do their work, each as `name: reason`.
    pub skipped: Vec<String>,
    /// Whether every program that began also gave its result.
    pub complete: bool,
    running: u64,
    current: String,
}

impl Tally {
    /// Reads one more line.
    pub fn read(&mut self, line: &str) {
        let text = match heading(line) {
            Some((name, rest)) => {
                self.current = name.to_owned();
                rest
            }
            None => line,
        };
        if line.starts_with("running ") && (line.ends_with(" tests") || line.ends_with(" test")) {
            self.running += 1;
        } else if let Some(result) = line.strip_prefix("test result: ") {
            self.running = self.running.saturating_sub(1);
            self.complete = self.running == 0;
            self.passed += number_before(result, " passed");
            self.failed += number_before(result, " failed");
            for _ in 0..number_before(result, " ignored") {
                self.skipped
                    .push("a test: it is marked #[ignore]".to_owned());
            }
        } else if let Some(reason) = text.strip_prefix(SKIPPED) {
            let skip = format!("{}: {reason}", self.current);
            if !self.skipped.contains(&skip) {
                self.skipped.push(skip);
            }
        }
    }

    /// Takes the skipped tests out of those the harness took for passed.
    pub fn settle(mut self) -> Self {
        let unlucky = self
            .skipped
            .iter()
            .filter(|skip| !skip.ends_with("#[ignore]"))
            .count() as u64;
        self.passed = self.passed.saturating_sub(unlucky);
        self
    }
}

/// The test whose output follows, and what is on the same line: `test name ... output` when output
/// is not captured, `---- name stdout ----` when it was.
fn heading(line: &str) -> Option<(&str, &str)> {
    if let Some(rest) = line.strip_prefix("test ") {
        return rest.split_once(" ... ");
    }
    let name = line.strip_prefix("---- ")?.strip_suffix(" stdout ----")?;
    Some((name, ""))
}

fn number_before(text: &str, word: &str) -> u64 {
    let Some(end) = text.find(word) else { return 0 };
    let digits = text.get(..end).unwrap_or_default();
    digits
        .rsplit(' ')
        .next()
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(text: &str) -> Tally {
        let mut tally = Tally::default();
        text.lines().for_each(|line| tally.read(line));
        tally.settle()
    }

    #[test]
    fn results_are_added_up() {
        let tally = tally(
            "running 3 tests\ntest a ... ok\ntest b ... SKIPPED: no loop device\nok\n\
             test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 2 filtered out; finished in 0.01s\n\
             running 1 test\ntest result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n",
        );
        assert_eq!((tally.passed, tally.failed), (2, 1));
        assert_eq!(tally.skipped, ["b: no loop device"]);
        assert!(tally.complete);
    }

    #[test]
    fn a_skip_in_captured_output_is_told_by_its_heading() {
        let tally = tally(
            "running 1 test\ntest a ... ok\n\nsuccesses:\n\n---- a stdout ----\nSKIPPED: not root\n\n\
             test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n",
        );
        assert_eq!(tally.skipped, ["a: not root"]);
        assert_eq!(tally.passed, 0);
    }

    #[test]
    fn a_program_that_died_gave_no_result() {
        assert!(!tally("running 3 tests\ntest a ... ok\n").complete);
        assert!(!tally("").complete);
    }

    #[test]
    fn an_ignored_test_is_a_skip() {
        let tally = tally(
            "running 1 test\ntest result: ok. 0 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out\n",
        );
        assert_eq!(tally.skipped.len(), 1);
        assert_eq!(tally.passed, 0);
    }
}
