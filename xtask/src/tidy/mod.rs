//! The rules of the source tree, read off the text: which room may name which crate, which rooms are
//! pure, which do not know each other, how long a file may be, and that unsafe code says why it is
//! sound. Also compiled into the test `tidy`, so it uses nothing but the standard library.

mod source;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use source::Source;

/// A file longer than this cannot be read in one sitting.
const LINES_MAX: usize = 700;

/// The packages, as directories below the root.
const PACKAGES: [&str; 5] = ["soe-common", "soe-ebpf", "soe-agent", "xtask", "tests"];

/// The agent's rooms.
const AGENT: &str = "soe-agent/src/";

/// Crates that only some places of the agent may name, and those places.
const OWNED_CRATES: [(&[&str], &[&str]); 5] = [
    (&["arrow", "parquet", "datafusion"], &["history/"]),
    (&["burn"], &["model/"]),
    (&["zbus", "kube", "k8s_openapi"], &["sources/"]),
    (&["io_uring"], &["io/uring.rs", "io/uring/"]),
    (
        &["aya", "aya_obj", "aya_log"],
        &["observe/bpf.rs", "observe/bpf/"],
    ),
];

/// Places that decide and compute: no I/O, no clock, no threads.
const PURE: [&str; 5] = [
    "plan/",
    "window/",
    "layer/",
    "restore/plan.rs",
    "stage/score",
];
/// What lies inside a pure place and does I/O, behind a seam.
const IMPURE: [&str; 1] = ["layer/fs/"];
/// What a pure place may not name.
const EFFECTS: [&str; 12] = [
    "std::fs",
    "std::net",
    "std::process",
    "std::env",
    "std::thread",
    "std::time::SystemTime",
    "std::time::Instant",
    "std::os",
    "tokio",
    "rustix",
    "libc",
    "chrono::Utc::now",
];

/// Rooms that face the kernel or a disk. They meet in `service.rs`, through the seams.
const FACING: [&str; 7] = [
    "observe", "io", "capture", "layer", "history", "stage", "restore",
];
/// The exceptions: (where, which room it may name).
const ADAPTERS: [(&str, &str); 2] = [("capture/sink.rs", "layer"), ("restore/", "layer")];

/// Checks every source file below `root`; each complaint is `file:line: what is wrong`.
pub fn check(root: &Path) -> io::Result<Vec<String>> {
    let mut files = Vec::new();
    for package in PACKAGES {
        collect(&root.join(package), &mut files)?;
    }
    files.sort();
    let mut complaints = Vec::new();
    if files.is_empty() {
        complaints.push(format!("{}: no source files were found", root.display()));
    }
    for file in files {
        let name = file
            .strip_prefix(root)
            .unwrap_or(&file)
            .to_string_lossy()
            .into_owned();
        complaints.extend(check_file(&name, &fs::read_to_string(&file)?));
    }
    Ok(complaints)
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            if path.file_name().is_none_or(|name| name != "target") {
                collect(&path, files)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

/// Checks one file, whose name is relative to the root.
pub fn check_file(name: &str, text: &str) -> Vec<String> {
    let source = Source::read(text);
    let mut complaints = Vec::new();
    if source.lines() > LINES_MAX {
        complaints.push(format!(
            "{name}:{}: {} lines; a file has at most {LINES_MAX}",
            LINES_MAX + 1,
            source.lines()
        ));
    }
    let mut say = |line: usize, what: String| complaints.push(format!("{name}:{line}: {what}"));
    for line in source.unsafe_without_reason() {
        say(
            line,
            "unsafe code without a `// SAFETY:` comment directly above it".to_owned(),
        );
    }
    for (line, what) in source.leftovers() {
        say(line, what);
    }
    if let Some(place) = name.strip_prefix(AGENT) {
        let module = module_of(place);
        for (line, path) in source.paths() {
            for what in rules_of_rooms(place, &module, &path, source.is_test(line)) {
                say(line, what);
            }
        }
    }
    complaints.dedup();
    complaints
}

/// What is wrong with naming `path` in the agent's file `place`.
fn rules_of_rooms(place: &str, module: &[String], path: &str, in_test: bool) -> Vec<String> {
    let mut complaints = Vec::new();
    let first = path.split("::").next().unwrap_or_default();
    for (crates, places) in OWNED_CRATES {
        let owned = crates.iter().any(|one| {
            first == *one
                || first
                    .strip_prefix(one)
                    .is_some_and(|rest| rest.starts_with('_'))
        });
        if owned && !places.iter().any(|allowed| place.starts_with(allowed)) {
            complaints.push(format!("only {} may name {first}", places[0]));
        }
    }
    let is_test_file = place.contains("/tests/")
        || place.ends_with("/tests.rs")
        || place.ends_with("/conformance.rs");
    if in_test || is_test_file {
        return complaints;
    }
    let within = |list: &[&str]| list.iter().any(|start| place.starts_with(start));
    if within(&PURE) && !within(&IMPURE) {
        for effect in EFFECTS {
            if path == effect
                || path
                    .strip_prefix(effect)
                    .is_some_and(|rest| rest.starts_with("::"))
            {
                complaints.push(format!("{place} is pure and may not name {path}"));
            }
        }
    }
    let own = module.first().map(String::as_str).unwrap_or_default();
    if let Some(other) = room_named(module, path)
        && FACING.contains(&own)
        && FACING.contains(&other.as_str())
        && own != other
        && !ADAPTERS
            .iter()
            .any(|(start, room)| place.starts_with(start) && *room == other)
    {
        complaints.push(format!(
            "{own} may not name {other}: they meet in service.rs through the seams"
        ));
    }
    complaints
}

/// The module a file is, from the agent's root: `io/uring.rs` is `[io, uring]`.
fn module_of(place: &str) -> Vec<String> {
    let place = place.strip_suffix(".rs").unwrap_or(place);
    let mut parts: Vec<String> = place.split('/').map(str::to_owned).collect();
    if parts
        .last()
        .is_some_and(|last| last == "mod" || last == "lib")
    {
        parts.pop();
    }
    parts
}

/// The room a path leads into, when it begins at the agent's root or climbs there.
fn room_named(module: &[String], path: &str) -> Option<String> {
    let mut parts = path.split("::").peekable();
    if parts.peek() == Some(&"crate") {
        return parts.nth(1).map(str::to_owned);
    }
    let mut base = module.len();
    while parts.peek() == Some(&"super") {
        parts.next();
        base = base.checked_sub(1)?;
    }
    (base == 0 && !module.is_empty())
        .then(|| parts.next().map(str::to_owned))
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints(name: &str, text: &str) -> usize {
        check_file(name, text).len()
    }

    #[test]
    fn a_crate_is_named_in_its_room_only() {
        for (place, text) in [
            (
                "history/write.rs",
                "use parquet::file::properties::WriterProperties;",
            ),
            (
                "model/net.rs",
                "use burn::{tensor::Tensor, module::Module};",
            ),
            ("io/uring.rs", "fn f() { io_uring::IoUring::new(8); }"),
            ("observe/bpf.rs", "use aya::Ebpf;"),
            ("observe/bpf/maps.rs", "use aya::maps::Array;"),
            (
                "plan/mod.rs",
                "// use burn::Tensor;\nconst S: &str = \"use burn::Tensor;\";",
            ),
            ("plan/mod.rs", "use crate::model::burn::Thing;"),
        ] {
            assert_eq!(
                complaints(&format!("soe-agent/src/{place}"), text),
                0,
                "{place}: {text}"
            );
        }
        for (place, text) in [
            (
                "plan/mod.rs",
                "use parquet::file::properties::WriterProperties;",
            ),
            ("cli/sql.rs", "use datafusion::prelude::*;"),
            ("cli/sql.rs", "use arrow_array::RecordBatch;"),
            ("window/mod.rs", "use {burn::tensor::Tensor};"),
            ("io/mod.rs", "fn f() { io_uring::IoUring::new(8); }"),
            ("observe/volumes.rs", "use ::aya::Ebpf;"),
            ("observe/volumes.rs", "pub(crate) use aya as kernel;"),
        ] {
            assert_eq!(
                complaints(&format!("soe-agent/src/{place}"), text),
                1,
                "{place}: {text}"
            );
        }
    }

    #[test]
    fn a_pure_place_has_no_effects() {
        let bad = [
            "use std::{collections::BTreeMap, fs};",
            "use std::time::{Duration, Instant};",
            "fn f() { std::time::SystemTime::now(); }",
            "use tokio::sync::mpsc;",
        ];
        for text in bad {
            assert_eq!(complaints("soe-agent/src/plan/brain.rs", text), 1, "{text}");
            assert_eq!(
                complaints("soe-agent/src/layer/chain.rs", text),
                1,
                "{text}"
            );
            assert_eq!(
                complaints("soe-agent/src/layer/fs/real.rs", text),
                0,
                "{text}"
            );
            let in_test = format!("fn g() {{}}\n#[cfg(test)]\nmod tests {{\n    {text}\n}}\n");
            assert_eq!(
                complaints("soe-agent/src/plan/brain.rs", &in_test),
                0,
                "{text}"
            );
            let after_test = format!("#[cfg(test)]\nmod tests {{\n    fn x() {{}}\n}}\n{text}\n");
            assert_eq!(
                complaints("soe-agent/src/plan/brain.rs", &after_test),
                1,
                "{text}"
            );
        }
        assert_eq!(
            complaints("soe-agent/src/plan/brain.rs", "use std::time::Duration;"),
            0
        );
    }

    #[test]
    fn rooms_that_face_the_outside_do_not_know_each_other() {
        for (place, text) in [
            ("capture/cut.rs", "use crate::io::uring::Engine;"),
            (
                "capture/cut.rs",
                "use crate::{seam::ByteRange, layer::Store};",
            ),
            (
                "stage/copy.rs",
                "fn f() { crate::observe::volumes::list(); }",
            ),
            ("io/uring.rs", "use super::super::capture::Cut;"),
            ("io/mod.rs", "use super::capture::Cut;"),
            ("layer/store.rs", "use crate::history::Table;"),
        ] {
            assert_eq!(
                complaints(&format!("soe-agent/src/{place}"), text),
                1,
                "{place}: {text}"
            );
        }
        for (place, text) in [
            ("capture/sink.rs", "use crate::layer::Store;"),
            ("restore/job.rs", "use crate::layer::Image;"),
            ("capture/cut.rs", "use crate::capture::guard::Guard;"),
            ("capture/cut.rs", "use crate::seam::ByteRange;"),
            ("io/uring.rs", "use super::Engine;"),
            ("service.rs", "use crate::{capture, layer, io};"),
        ] {
            assert_eq!(
                complaints(&format!("soe-agent/src/{place}"), text),
                0,
                "{place}: {text}"
            );
        }
    }

    #[test]
    fn a_file_has_an_end() {
        assert_eq!(complaints("xtask/src/x.rs", &"\n".repeat(LINES_MAX)), 0);
        assert_eq!(complaints("xtask/src/x.rs", &"\n".repeat(LINES_MAX + 1)), 1);
    }

    #[test]
    fn unsafe_code_says_why_it_is_sound() {
        let good = [
            "fn f() {\n    // SAFETY: the pointer is ours.\n    unsafe { g() }\n}",
            "fn f() {\n    // SAFETY: the pointer\n    // is ours.\n    let x =\n        unsafe { g() };\n}",
            "// SAFETY: plain bytes.\nunsafe impl Send for X {}",
            "/// Reads.\n///\n/// # Safety\n/// `p` is valid.\npub unsafe fn f(p: *const u8) {}",
            "#[unsafe(no_mangle)]\nfn f() {}",
            "// unsafe { }\nconst S: &str = \"unsafe { }\";",
        ];
        for text in good {
            assert_eq!(complaints("soe-ebpf/src/x.rs", text), 0, "{text}");
        }
        let bad = [
            "fn f() {\n    unsafe { g() }\n}",
            "fn f() {\n    // SAFETY: for the first.\n    unsafe { g() };\n    unsafe { g() }\n}",
            "unsafe impl Send for X {}",
            "pub unsafe fn f(p: *const u8) {}",
        ];
        for text in bad {
            assert_eq!(complaints("soe-ebpf/src/x.rs", text), 1, "{text}");
        }
    }

    #[test]
    fn nothing_is_left_to_do() {
        let later = concat!("fn f() { to", "do!() }");
        let note = concat!("// TO", "DO: more");
        let off = concat!("#[test]\n#[ig", "nore]\nfn f() {}");
        for text in [later, note, off] {
            assert_eq!(complaints("soe-common/src/x.rs", text), 1, "{text}");
        }
    }
}
