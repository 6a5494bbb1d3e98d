#![allow(clippy::print_stdout, reason = "a build script speaks to cargo")]
//! Compiles the protos without protoc.
use std::path::PathBuf;

/// Every area; its folder is its package.
const AREAS: [&str; 8] = ["error", "expert", "inference", "kv", "router", "scheduler", "stage", "tensor"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = AREAS.map(|area| format!("moesaic/{area}/v1/{area}.proto"));
    for file in &files {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(&files, ["."])?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    // `Bytes`: tensors and blocks are not copied out of the frame that they came in
    tonic_prost_build::configure().bytes(".").build_transport(true).compile_fds(descriptors)?;
    Ok(())
}
