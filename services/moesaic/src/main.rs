//! The all-in-one binary.
fn main() {}
