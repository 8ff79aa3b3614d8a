//! The source tree keeps its own rules (those of `cargo xtask tidy`).

#[path = "../../xtask/src/tidy/mod.rs"]
mod tidy;

#[test]
fn the_source_tree_keeps_its_rules() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap();
    let complaints = tidy::check(root).unwrap();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}
