//! Errors that name file and line.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::de::DeTable;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration {}: {source}; name a readable file with --config", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line of it is wrong.
    #[error("{}:{line}: {message}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong, and what would be right.
        message: String,
    },
}

fn line_of(text: &str, offset: usize) -> usize {
    let before = text.as_bytes().get(..offset).unwrap_or(text.as_bytes());
    before.iter().filter(|b| **b == b'\n').count() + 1
}

impl ConfigError {
    pub(super) fn from_toml(error: &toml::de::Error, text: &str, path: &Path) -> Self {
        let span = error.span();
        let line = span.as_ref().map_or(1, |s| line_of(text, s.start));
        let message = error.message().replace('\n', " ");
        let key = span.and_then(|s| key_around(text, &s));
        // An unknown key is named by the parser itself.
        let message = match key {
            Some(key) if !message.contains("unknown field") => format!("{key}: {message}"),
            _ => message,
        };
        Self::Line {
            path: path.to_owned(),
            line,
            message,
        }
    }

    /// An error at `table.key`, or at the table, or at line 1 when the file has neither.
    pub(super) fn at_key(text: &str, path: &Path, table: &str, key: &str, message: String) -> Self {
        let offset = DeTable::parse(text).ok().and_then(|document| {
            let (name, value) = document
                .get_ref()
                .iter()
                .find(|(name, _)| name.get_ref() == table)?;
            let inner = value
                .get_ref()
                .as_table()
                .and_then(|t| t.iter().find(|(name, _)| name.get_ref() == key))
                .map(|(name, _)| name.span().start);
            Some(inner.unwrap_or(name.span().start))
        });
        Self::Line {
            path: path.to_owned(),
            line: line_of(text, offset.unwrap_or(0)),
            message: format!("{table}.{key}: {message}"),
        }
    }
}

/// The dotted key whose value lies at `span`.
fn key_around(text: &str, span: &Range<usize>) -> Option<String> {
    fn search(table: &DeTable<'_>, span: &Range<usize>, prefix: &str) -> Option<String> {
        table.iter().find_map(|(name, value)| {
            let key = if prefix.is_empty() {
                name.get_ref().to_string()
            } else {
                format!("{prefix}.{}", name.get_ref())
            };
            let tables: Vec<&DeTable<'_>> = match value.get_ref() {
                toml::de::DeValue::Table(table) => vec![table],
                toml::de::DeValue::Array(items) => items
                    .iter()
                    .filter_map(|i| i.get_ref().as_table())
                    .collect(),
                _ => Vec::new(),
            };
            let inner = tables.into_iter().find_map(|t| search(t, span, &key));
            inner.or_else(|| (value.span() == *span).then_some(key))
        })
    }
    let document = DeTable::parse(text).ok()?;
    search(document.get_ref(), span, "")
}
