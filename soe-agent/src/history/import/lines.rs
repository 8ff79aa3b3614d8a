//! Lines of text traces: streamed, counted, split and parsed strictly.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use crate::history::error::{HistoryError, Result};

/// The longest line that is read: far beyond any trace, far below memory.
const MAX_LINE: u64 = 64 * 1024;
/// The first bytes of a zstd stream.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// The lines of one file, plain or zstd-compressed.
pub(super) struct Lines {
    path: PathBuf,
    reader: Box<dyn BufRead>,
    buffer: Vec<u8>,
    line: u64,
}

impl Lines {
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(HistoryError::io("open", path))?;
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let start = reader.fill_buf().map_err(HistoryError::io("read", path))?;
        let reader: Box<dyn BufRead> = if start.starts_with(&ZSTD_MAGIC) {
            let decoder =
                zstd::Decoder::with_buffer(reader).map_err(HistoryError::io("read", path))?;
            Box::new(BufReader::with_capacity(1 << 20, decoder))
        } else {
            Box::new(reader)
        };
        Ok(Self {
            path: path.to_owned(),
            reader,
            buffer: Vec::new(),
            line: 0,
        })
    }

    /// Moves on to the next line that is not empty; its text is in [`Lines::text`].
    pub fn advance(&mut self) -> Result<bool> {
        loop {
            self.buffer.clear();
            self.line += 1;
            let read = self
                .reader
                .by_ref()
                .take(MAX_LINE)
                .read_until(b'\n', &mut self.buffer);
            let read = read.map_err(HistoryError::io("read", &self.path))?;
            if read == 0 {
                return Ok(false);
            }
            if read as u64 == MAX_LINE && self.buffer.last() != Some(&b'\n') {
                return Err(self.wrong("the line is longer than 64 KiB"));
            }
            if self.line == 1 && self.buffer.starts_with(b"\xef\xbb\xbf") {
                self.buffer.drain(..3);
            }
            while matches!(self.buffer.last(), Some(b'\n' | b'\r')) {
                self.buffer.pop();
            }
            if !self.buffer.iter().all(u8::is_ascii_whitespace) {
                return Ok(true);
            }
        }
    }

    /// The present line.
    pub fn text(&self) -> Result<&str> {
        std::str::from_utf8(&self.buffer).map_err(|_| self.wrong("the line is not UTF-8"))
    }

    /// An error about the present line.
    pub fn wrong(&self, reason: impl Into<String>) -> HistoryError {
        HistoryError::Line {
            path: self.path.clone(),
            line: self.line,
            reason: reason.into(),
        }
    }

    /// Whether this is the first line of the file.
    pub fn is_first(&self) -> bool {
        self.line == 1
    }
}

/// Splits a line at commas; a field in double quotes may hold commas and doubled quotes. `None` when
/// a quote is not closed.
pub(super) fn split(line: &str) -> Option<Vec<std::borrow::Cow<'_, str>>> {
    if !line.contains('"') {
        return Some(line.split(',').map(|field| field.trim().into()).collect());
    }
    let mut fields = Vec::new();
    let mut rest = line;
    loop {
        let trimmed = rest.trim_start();
        let after = if let Some(mut quoted) = trimmed.strip_prefix('"') {
            let mut field = String::new();
            loop {
                let (piece, tail) = quoted.split_once('"')?;
                field.push_str(piece);
                match tail.strip_prefix('"') {
                    Some(tail) => {
                        field.push('"');
                        quoted = tail;
                    }
                    None => {
                        quoted = tail;
                        break;
                    }
                }
            }
            fields.push(field.into());
            quoted.trim_start()
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            let (field, after) = rest.split_at(end);
            fields.push(field.trim().into());
            after
        };
        if after.is_empty() {
            return Some(fields);
        }
        rest = after.strip_prefix(',')?;
    }
}

/// A non-negative decimal number times `scale`, exactly where it has no exponent, rounded to the
/// nearest whole. `None` when it is no such number or does not fit.
pub(super) fn decimal(text: &str, scale: u64) -> Option<i64> {
    if text.contains(['e', 'E']) {
        let value = text.parse::<f64>().ok()? * scale as f64;
        let fits = (0.0..9.2e18).contains(&value);
        return fits.then(|| value.round() as i64);
    }
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(part) {
        return None;
    }
    // Eighteen digits behind the point are more than any scale here can show.
    let part = part.get(..18).unwrap_or(part);
    let denominator = 10u128.pow(part.len() as u32);
    let fraction = if part.is_empty() {
        0
    } else {
        part.parse::<u128>().ok()?
    };
    let scaled = (fraction * u128::from(scale) + denominator / 2) / denominator;
    let total = whole
        .parse::<u128>()
        .ok()?
        .checked_mul(u128::from(scale))?
        .checked_add(scaled)?;
    i64::try_from(total).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_are_exact_and_strict() {
        assert_eq!(decimal("12", 1000), Some(12_000));
        assert_eq!(decimal("12.0015", 1000), Some(12_002));
        assert_eq!(
            decimal("1372629804.123456", 1_000_000_000),
            Some(1_372_629_804_123_456_000)
        );
        assert_eq!(decimal("1e3", 1), Some(1000));
        assert_eq!(decimal("123.", 1), Some(123));
        for bad in [
            "",
            "-1",
            "nan",
            "inf",
            ".5",
            "1,5",
            "0x10",
            " 1",
            "1e99",
            "99999999999999999999",
            "1e",
            "é",
        ] {
            assert_eq!(decimal(bad, 1), None, "{bad}");
        }
    }

    #[test]
    fn quotes_may_hold_commas() {
        let fields =
            |line| split(line).map(|f| f.into_iter().map(|c| c.into_owned()).collect::<Vec<_>>());
        assert_eq!(fields("1, a ,b,").unwrap(), ["1", "a", "b", ""]);
        assert_eq!(fields(r#"1,"a,b",c"#).unwrap(), ["1", "a,b", "c"]);
        assert_eq!(fields(r#""a ""b""", c"#).unwrap(), [r#"a "b""#, "c"]);
        assert_eq!(fields(r#"1,"open"#), None);
        assert_eq!(fields(r#"1,"a"b"#), None);
    }
}
