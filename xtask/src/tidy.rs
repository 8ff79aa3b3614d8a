//! fn check stub
pub fn check(_root: &std::path::Path) -> std::io::Result<Vec<String>> {
    Ok(vec![])
}
