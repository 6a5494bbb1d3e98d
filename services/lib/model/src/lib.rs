//! Models: architectures as data, weights, tokenizer, chat template, and the decoder that runs them.
//!
//! Synchronous; knows no network and no runtime. A model is loaded in three steps: a [`source::WeightSource`] opens
//! the files, [`spec`] turns `config.json` or GGUF metadata into a [`spec::ModelSpec`], and [`decoder`] builds the
//! layers on a [`backend::Backend`].
#![forbid(unsafe_code)]

pub mod backend;
pub mod chat;
pub mod config;
pub mod decoder;
pub mod demo;
pub mod error;
pub mod expert_pool;
pub mod gate;
pub mod generation_config;
pub mod golden;
pub mod memory;
pub mod pipeline;
pub mod quantize;
pub mod runner;
pub mod source;
pub mod spec;
pub mod tokenizer;

pub use backend::{Activations, BackendKind};
pub use config::ModelConfig;
pub use decoder::{LoadOptions, load};
pub use error::{Error, Result};
pub use runner::{LogitsWanted, Profile, Runner, SequenceChunk, StepPart};
