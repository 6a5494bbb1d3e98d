//! The wire: messages and services of `moesaic.<area>.v1`, generated from the `.proto` files at build time, and the
//! conversions between them and the domain's types. A receiver converts what it gets into the stricter domain type, or
//! says which field is wrong.
#![forbid(unsafe_code)]

mod error_convert;
mod expert_convert;
mod kv_convert;
mod router_convert;
mod scheduler_convert;
mod tensor_convert;

pub use error_convert::{from_status, into_status};
pub use expert_convert::{ComputeInput, put_routing, shares_from_wire, shares_to_wire};
pub use kv_convert::{MAX_BLOCK, MAX_CHAIN, Offered, chain_from_wire, offer_to_wire};
pub use router_convert::{hashes_from_wire, hashes_to_wire};
pub use tensor_convert::{
    WireDType, decode_tensor, decode_u32, decode_weights, encode_tensor, encode_u32, encode_weights,
};

/// All areas' file descriptors, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

macro_rules! area {
    ($(#[$doc:meta])* $area:ident) => {
        $(#[$doc])*
        pub mod $area {
            /// Version 1.
            #[allow(missing_docs, clippy::all, reason = "generated; the comments are in the proto")]
            pub mod v1 {
                include!(concat!(env!("OUT_DIR"), "/moesaic.", stringify!($area), ".v1.rs"));
            }
        }
    };
}

area!(
    /// Errors between services.
    error
);
area!(
    /// Experts: scheduler to expert-shard, router to expert-shard.
    expert
);
area!(
    /// The public door.
    inference
);
area!(
    /// KV blocks: scheduler to kv-store.
    kv
);
area!(
    /// Placement of requests: gateway to router.
    router
);
area!(
    /// Generation: gateway to scheduler.
    scheduler
);
area!(
    /// Pipeline stages: scheduler to scheduler.
    stage
);
area!(
    /// Matrices.
    tensor
);
