//! The wire: messages and services of `moesaic.<area>.v1`, generated from the `.proto` files at build time.
#![forbid(unsafe_code)]

/// All areas' file descriptors, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The public door.
pub mod inference {
    /// Version 1.
    #[allow(missing_docs, clippy::all, reason = "generated; the comments are in the proto")]
    pub mod v1 {
        tonic::include_proto!("moesaic.inference.v1");
    }
}
