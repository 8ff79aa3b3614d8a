//! Rust source text, read just far enough: what is code and what is comment or string, which paths it
//! names, and where its test modules are.

/// One file.
pub struct Source {
    /// The lines as they are.
    raw: Vec<String>,
    /// The lines with comments and the contents of strings replaced by spaces.
    code: Vec<String>,
    /// Whether a line lies in a module that is compiled for tests only.
    test: Vec<bool>,
}

impl Source {
    /// Reads a file.
    pub fn read(text: &str) -> Self {
        let raw: Vec<String> = text.lines().map(str::to_owned).collect();
        let mut code: Vec<String> = code_of(text).lines().map(str::to_owned).collect();
        code.resize(raw.len(), String::new());
        let test = test_lines(&code);
        Self { raw, code, test }
    }

    /// How many lines it has.
    pub fn lines(&self) -> usize {
        self.raw.len()
    }

    /// Whether a line (counted from 1) lies in a test module.
    pub fn is_test(&self, line: usize) -> bool {
        self.test.get(line - 1).copied().unwrap_or(false)
    }

    /// Every path of two or more parts, and every part of a `use`, each with its line (from 1).
    pub fn paths(&self) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        let tokens = self.tokens();
        let mut at = 0;
        while let Some((line, token)) = tokens.get(at) {
            if token == "use" {
                let end = tokens[at..]
                    .iter()
                    .position(|(_, token)| token == ";")
                    .map_or(tokens.len(), |n| at + n);
                let mut tree = tokens[at + 1..end]
                    .iter()
                    .map(|(line, token)| (*line, token.as_str()))
                    .peekable();
                leaves(&mut tree, &mut Vec::new(), &mut found);
                at = end;
            } else if is_name(token)
                && (at == 0 || tokens[at - 1].1 != "::" || !starts_path(&tokens, at))
            {
                let mut parts = vec![token.clone()];
                let line = *line;
                while tokens.get(at + 1).is_some_and(|(_, token)| token == "::")
                    && tokens.get(at + 2).is_some_and(|(_, token)| is_name(token))
                {
                    parts.push(tokens[at + 2].1.clone());
                    at += 2;
                }
                if parts.len() > 1 {
                    found.push((line, parts.join("::")));
                }
                at += 1;
            } else {
                at += 1;
            }
        }
        found
    }

    /// The lines (from 1) on which unsafe code begins that does not say why it is sound.
    pub fn unsafe_without_reason(&self) -> Vec<usize> {
        let tokens = self.tokens();
        let follows = |at: usize| {
            tokens
                .get(at + 1)
                .map(|(_, token)| token.as_str())
                .unwrap_or_default()
        };
        let mut lines = Vec::new();
        for (at, (line, token)) in tokens.iter().enumerate() {
            if token != "unsafe" {
                continue;
            }
            let word = match follows(at) {
                "{" | "impl" => "SAFETY:",
                // `unsafe fn` in a type or a trait's implementation has its contract elsewhere.
                "fn" if at == 0
                    || ["pub", "}", ";", "]", ")"].contains(&tokens[at - 1].1.as_str()) =>
                {
                    "# Safety"
                }
                _ => continue,
            };
            if !self.says_above(*line, word) {
                lines.push(*line);
            }
        }
        lines
    }

    /// Unfinished work: the line and what is there.
    pub fn leftovers(&self) -> Vec<(usize, String)> {
        let marks = [
            concat!("TO", "DO"),
            concat!("FIX", "ME"),
            concat!("XX", "X"),
        ];
        let calls = [
            concat!("to", "do!"),
            concat!("unimple", "mented!"),
            concat!("#[ig", "nore"),
        ];
        let mut found = Vec::new();
        for (index, (raw, code)) in self.raw.iter().zip(&self.code).enumerate() {
            let comment = raw
                .split_once("//")
                .map(|(_, comment)| comment)
                .unwrap_or_default();
            for mark in marks.into_iter().filter(|mark| {
                comment
                    .split(|c: char| !c.is_alphanumeric())
                    .any(|word| word == *mark)
            }) {
                found.push((index + 1, format!("{mark} in a comment: do it, or file it")));
            }
            for call in calls.into_iter().filter(|call| code.contains(call)) {
                found.push((
                    index + 1,
                    format!("{call}: unfinished work is not kept in the source"),
                ));
            }
        }
        found
    }

    /// Whether the comment above the statement on `line` (from 1), or on it, contains `word`.
    fn says_above(&self, line: usize, word: &str) -> bool {
        if self.raw[line - 1].contains(word) {
            return true;
        }
        for index in (0..line - 1).rev() {
            if self.raw[index].contains(word) {
                return true;
            }
            let code = self.code[index].trim();
            let is_attribute = code.starts_with("#[");
            if !is_attribute && code.ends_with([';', '}', '{']) {
                return false;
            }
        }
        false
    }

    /// Names, `::` and single punctuation characters, each with its line (from 1).
    fn tokens(&self) -> Vec<(usize, String)> {
        let mut tokens = Vec::new();
        for (index, line) in self.code.iter().enumerate() {
            let mut rest = line.as_str();
            while let Some(first) = rest.chars().next() {
                let length = if is_name_char(first) {
                    rest.find(|c| !is_name_char(c)).unwrap_or(rest.len())
                } else if rest.starts_with("::") {
                    2
                } else {
                    first.len_utf8()
                };
                let (token, after) = rest.split_at(length);
                if !first.is_whitespace() {
                    tokens.push((index + 1, token.to_owned()));
                }
                rest = after;
            }
        }
        tokens
    }
}

/// Whether the name at `at`, which follows a `::`, is a later part of a path (and not the first part
/// of one that begins with `::`).
fn starts_path(tokens: &[(usize, String)], at: usize) -> bool {
    at >= 2 && (is_name(&tokens[at - 2].1) || tokens[at - 2].1 == ">")
}

/// Expands the tree behind `use` into its leaves.
fn leaves<'a>(
    tree: &mut std::iter::Peekable<impl Iterator<Item = (usize, &'a str)>>,
    prefix: &mut Vec<String>,
    found: &mut Vec<(usize, String)>,
) {
    let depth = prefix.len();
    let mut last_line = 0;
    let mut renamed = false;
    while let Some((line, token)) = tree.next() {
        last_line = line;
        match token {
            "{" => {
                leaves(tree, prefix, found);
                // The group was the end of this branch; its leaves are noted.
                prefix.truncate(depth);
                renamed = false;
                while let Some((_, token)) = tree.peek() {
                    if *token == "," {
                        break;
                    }
                    if *token == "}" {
                        break;
                    }
                    tree.next();
                }
            }
            "," | "}" => {
                if prefix.len() > depth {
                    found.push((line, prefix.join("::")));
                }
                prefix.truncate(depth);
                renamed = false;
                if token == "}" {
                    return;
                }
            }
            "as" => renamed = true,
            "::" | "*" => {}
            name if !renamed => prefix.push(name.to_owned()),
            _ => {}
        }
    }
    if prefix.len() > depth {
        found.push((last_line, prefix.join("::")));
        prefix.truncate(depth);
    }
}

fn is_name_char(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn is_name(token: &str) -> bool {
    token
        .chars()
        .next()
        .is_some_and(|first| first.is_alphabetic() || first == '_')
}

/// Marks the lines of `#[cfg(test)] mod ... { ... }`.
fn test_lines(code: &[String]) -> Vec<bool> {
    let mut marks = vec![false; code.len()];
    let mut index = 0;
    while index < code.len() {
        if code[index].trim() != "#[cfg(test)]"
            || !code
                .get(index + 1)
                .is_some_and(|next| next.contains("mod "))
        {
            index += 1;
            continue;
        }
        let mut depth = 0_i64;
        let mut opened = false;
        while index < code.len() {
            marks[index] = true;
            for c in code[index].chars() {
                match c {
                    '{' => {
                        depth += 1;
                        opened = true;
                    }
                    '}' => depth -= 1,
                    _ => {}
                }
            }
            let declared_only = !opened && code[index].trim_end().ends_with(';');
            index += 1;
            if (opened && depth == 0) || declared_only {
                break;
            }
        }
    }
    marks
}

/// The text with comments and the contents of strings and characters replaced by spaces.
fn code_of(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let blank = |c: char| if c == '\n' { '\n' } else { ' ' };
    let at = |index: usize| chars.get(index).copied().unwrap_or('\0');
    let mut i = 0;
    while i < chars.len() {
        let end = match (at(i), at(i + 1)) {
            ('/', '/') => (i..chars.len())
                .find(|n| at(*n) == '\n')
                .unwrap_or(chars.len()),
            ('/', '*') => end_of_block_comment(&chars, i),
            ('"', _) => end_of_string(&chars, i),
            ('r', '"' | '#') if i == 0 || !is_name_char(at(i - 1)) || at(i - 1) == 'b' => {
                end_of_raw_string(&chars, i)
            }
            ('\'', _) => end_of_char(&chars, i),
            _ => i + 1,
        };
        if end == i + 1 {
            out.push(at(i));
        } else {
            chars[i..end.min(chars.len())]
                .iter()
                .for_each(|c| out.push(blank(*c)));
        }
        i = end;
    }
    out
}

fn end_of_block_comment(chars: &[char], start: usize) -> usize {
    let mut depth = 0;
    let mut i = start;
    while i + 1 < chars.len() {
        match (chars[i], chars[i + 1]) {
            ('/', '*') => {
                depth += 1;
                i += 2;
            }
            ('*', '/') => {
                depth -= 1;
                i += 2;
                if depth == 0 {
                    return i;
                }
            }
            _ => i += 1,
        }
    }
    chars.len()
}

fn end_of_string(chars: &[char], start: usize) -> usize {
    let mut i = start + 1;
    while i < chars.len() {
        match chars[i] {
            '\\' => i += 2,
            '"' => return i + 1,
            _ => i += 1,
        }
    }
    chars.len()
}

/// The end of `r"..."` or `r#"..."#`; the next character when it is something else (`r#name`).
fn end_of_raw_string(chars: &[char], start: usize) -> usize {
    let hashes = chars[start + 1..].iter().take_while(|c| **c == '#').count();
    let open = start + 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return start + 1;
    }
    let mut i = open + 1;
    while i < chars.len() {
        if chars[i] == '"'
            && chars[i + 1..]
                .iter()
                .take(hashes)
                .filter(|c| **c == '#')
                .count()
                == hashes
        {
            return i + 1 + hashes;
        }
        i += 1;
    }
    chars.len()
}

/// The end of a character; the next character when the quote begins a lifetime.
fn end_of_char(chars: &[char], start: usize) -> usize {
    match (chars.get(start + 1), chars.get(start + 2)) {
        (Some('\\'), _) => {
            let close = (start + 3..chars.len()).find(|n| chars[*n] == '\'');
            close.map_or(chars.len(), |close| close + 1)
        }
        (Some(_), Some('\'')) => start + 3,
        _ => start + 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_told_from_comments_and_strings() {
        let text = "let a = \"x // y\"; // c \"d\nlet b = r#\"e\"f\"#; /* g /* h */ i */ let c = '\"'; let d: &'a str = '\\'';";
        let code = code_of(text);
        assert_eq!(
            code.split_whitespace().collect::<String>(),
            "leta=;letb=;letc=;letd:&'astr=;"
        );
        assert_eq!(code.lines().count(), text.lines().count());
    }

    #[test]
    fn uses_are_expanded() {
        let source = Source::read(
            "use a::{b, c::{self, d as e, f::*}, g};\nuse h;\npub use ::i::j;\nfn f() { k::l(m.n, ::o::p) }",
        );
        let paths: Vec<String> = source.paths().into_iter().map(|(_, path)| path).collect();
        assert_eq!(
            paths,
            [
                "a::b",
                "a::c::self",
                "a::c::d",
                "a::c::f",
                "a::g",
                "h",
                "i::j",
                "k::l",
                "o::p"
            ]
        );
    }
}
