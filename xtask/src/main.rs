//! soe
fn main() {}
