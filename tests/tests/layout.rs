//! Rules of the workspace that a compiler does not hold.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use moesaic_tests::root;
use serde_json::Value;
use std::process::Command;

const SERVICES: [&str; 5] =
    ["moesaic-gateway", "moesaic-router", "moesaic-scheduler", "moesaic-expert-shard", "moesaic-kv-store"];

#[test]
fn no_service_depends_on_another_services_crate() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let mut seen = 0;
    for package in packages {
        let name = package["name"].as_str().unwrap();
        let other =
            |dependency: &Value| dependency["name"].as_str().filter(|on| *on != name).unwrap_or_default().to_owned();
        let depends = |dependency: &&Value| SERVICES.contains(&other(dependency).as_str());
        let on: Vec<_> = package["dependencies"].as_array().unwrap().iter().filter(depends).collect();
        let may = name == "moesaic" || name == "moesaic-tests";
        assert!(on.is_empty() || may, "{name} depends on {on:?}");
        seen += usize::from(SERVICES.contains(&name));
    }
    assert_eq!(seen, SERVICES.len());
}

#[test]
fn unsafe_stands_in_the_kernels_alone_and_no_file_is_a_heap() {
    let files = Command::new("git").args(["ls-files", "*.rs"]).current_dir(root()).output().unwrap();
    let files = String::from_utf8(files.stdout).unwrap();
    assert!(files.lines().count() > 50);
    for file in files.lines() {
        let Ok(text) = std::fs::read_to_string(root().join(file)) else { continue };
        let lines = text.lines().count();
        assert!(lines <= 600, "{file} has {lines} lines; split it by responsibility");
        let crate_root = file.ends_with("src/lib.rs") || file.ends_with("src/main.rs");
        if crate_root && !file.contains("lib/kernels") {
            assert!(text.contains("#![forbid(unsafe_code)]"), "{file} must forbid unsafe code");
        }
    }
}
