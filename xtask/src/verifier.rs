//! What each program of the kernel half costs the verifier, by kernel: the kernel tests print it, and
//! it is gathered in a table in the build directory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::place;

/// Instructions that the verifier looked at, by program and kernel release.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Table {
    counts: BTreeMap<String, BTreeMap<String, u64>>,
}

/// Where the table is kept.
pub fn path() -> PathBuf {
    place::target().join("verifier.md")
}

impl Table {
    /// Takes a line of a test's output when it tells a count: `verifier RELEASE PROGRAM N instructions`.
    pub fn read(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        for told in words.windows(5) {
            if let ["verifier", release, program, count, "instructions"] = told
                && let Ok(count) = count.parse()
            {
                self.set(release, program, count);
            }
        }
    }

    fn set(&mut self, release: &str, program: &str, count: u64) {
        let of_program = self.counts.entry(program.to_owned()).or_default();
        of_program.insert(release.to_owned(), count);
    }

    fn releases(&self) -> Vec<&str> {
        let all: BTreeSet<&str> = self
            .counts
            .values()
            .flat_map(|counts| counts.keys().map(String::as_str))
            .collect();
        let mut all: Vec<&str> = all.into_iter().collect();
        all.sort_by_key(|release| series(release));
        all
    }

    /// The table in Markdown.
    fn render(&self) -> String {
        let releases = self.releases();
        let mut text = format!("| program | {} |\n| ---", releases.join(" | "));
        text.push_str(&" | ---:".repeat(releases.len()));
        text.push_str(" |\n");
        for (program, counts) in &self.counts {
            let cells: Vec<String> = releases
                .iter()
                .map(|release| counts.get(*release).map_or("-".into(), u64::to_string))
                .collect();
            text.push_str(&format!("| {program} | {} |\n", cells.join(" | ")));
        }
        text
    }

    /// What `render` wrote.
    fn parse(text: &str) -> Self {
        let mut table = Self::default();
        let mut lines = text.lines().map(|line| {
            let cells = line.trim().trim_matches('|').split('|');
            cells.map(str::trim).collect::<Vec<_>>()
        });
        let releases = lines.next().unwrap_or_default();
        for cells in lines.skip(1) {
            for (release, count) in releases.iter().zip(&cells).skip(1) {
                if let Ok(count) = count.parse() {
                    table.set(release, cells[0], count);
                }
            }
        }
        table
    }

    /// Writes what was read into the table that is kept, in place of older counts of the same kernel
    /// series; returns whether there was anything.
    pub fn keep(self) -> Result<bool> {
        if self.counts.is_empty() {
            return Ok(false);
        }
        let mut table = Self::parse(&fs::read_to_string(path()).unwrap_or_default());
        table.replace(self);
        fs::write(path(), table.render())
            .with_context(|| format!("cannot write {}", path().display()))?;
        Ok(true)
    }

    fn replace(&mut self, newer: Self) {
        let fresh: BTreeSet<(u64, u64)> = newer.releases().into_iter().map(series).collect();
        for counts in self.counts.values_mut() {
            counts.retain(|release, _| !fresh.contains(&series(release)));
        }
        self.counts.retain(|_, counts| !counts.is_empty());
        for (program, counts) in newer.counts {
            self.counts.entry(program).or_default().extend(counts);
        }
    }
}

/// The two leading numbers of a release, by which kernels are told apart here.
fn series(release: &str) -> (u64, u64) {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|part| part.parse().ok());
    (
        numbers.next().unwrap_or_default(),
        numbers.next().unwrap_or_default(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(lines: &[&str]) -> Table {
        let mut table = Table::default();
        lines.iter().for_each(|line| table.read(line));
        table
    }

    #[test]
    fn counts_are_read_out_of_the_tests_output() {
        let table = table(&[
            "test cost ... verifier 6.12.9-x bio_queued 3523 instructions",
            "verifier 6.1.0-56 bio_queued 3600 instructions",
            "verifier 6.1.0-56 request_done 40 instructions",
            "the verifier said no",
        ]);
        assert_eq!(
            table.render(),
            "| program | 6.1.0-56 | 6.12.9-x |\n| --- | ---: | ---: |\n\
             | bio_queued | 3600 | 3523 |\n| request_done | 40 | - |\n"
        );
        assert_eq!(Table::parse(&table.render()), table);
    }

    #[test]
    fn a_newer_kernel_of_a_series_takes_the_place_of_the_older() {
        let mut kept = table(&[
            "verifier 6.1.0-56 gone 1 instructions",
            "verifier 6.1.0-56 bio_queued 1 instructions",
            "verifier 6.12.9 bio_queued 2 instructions",
        ]);
        kept.replace(table(&["verifier 6.1.0-57 bio_queued 3 instructions"]));
        let expected = table(&[
            "verifier 6.1.0-57 bio_queued 3 instructions",
            "verifier 6.12.9 bio_queued 2 instructions",
        ]);
        assert_eq!(kept, expected);
    }
}
