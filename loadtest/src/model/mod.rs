//! Benchmark models: random weights in the shapes of real ones, as GGUF files.
//!
//! The architecture is Qwen3-MoE; matrices are Q4_0, the embedding and the output Q8_0, norms and gates f32: types that
//! every engine reads as they are. What the weights say is noise, but what runs is what a trained model of the shape
//! would run, with experts chosen about evenly.
mod gguf;
mod vocabulary;

use crate::random::Random;
use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use gguf::{Fill, Header, Tensor, Value};
use moesaic_model::tokenizer::Tokenizer;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Values of a block, and so what every row's length is a multiple of.
const BLOCK: usize = gguf::BLOCK;

/// Shapes with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// 2.5 billion parameters, 0.25 billion active: 16 layers, 128 experts, 8 chosen.
    #[value(name = "moe-2b")]
    Moe2b,
    /// 30.5 billion parameters, 3.3 billion active, the shape of Qwen3-30B-A3B: 48 layers, 128 experts, 8 chosen.
    #[value(name = "moe-30b")]
    Moe30b,
    /// 0.1 billion parameters: 8 layers, 32 experts, 4 chosen.
    MoeSmall,
    /// For tests: 2 layers, 8 experts, 2 chosen.
    MoeTiny,
}

/// A model's shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The model's name.
    pub name: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Experts of each layer.
    pub experts: usize,
    /// Experts that a token goes to.
    pub top_k: usize,
    /// Inner width of an expert.
    pub expert_inner: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// The longest context, in tokens.
    pub context: usize,
}

impl Preset {
    /// Its shape.
    pub fn shape(self) -> Shape {
        let name = self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        match self {
            Self::Moe2b => Shape {
                name,
                hidden: 1024,
                layers: 16,
                experts: 128,
                top_k: 8,
                expert_inner: 384,
                heads: 16,
                kv_heads: 4,
                head_dim: 64,
                vocab: 32_768,
                context: 8192,
            },
            Self::Moe30b => Shape {
                name,
                hidden: 2048,
                layers: 48,
                experts: 128,
                top_k: 8,
                expert_inner: 768,
                heads: 32,
                kv_heads: 4,
                head_dim: 128,
                vocab: 151_936,
                context: 40_960,
            },
            Self::MoeSmall => Shape {
                name,
                hidden: 512,
                layers: 8,
                experts: 32,
                top_k: 4,
                expert_inner: 256,
                heads: 8,
                kv_heads: 2,
                head_dim: 64,
                vocab: 8000,
                context: 8192,
            },
            Self::MoeTiny => Shape {
                name,
                hidden: 64,
                layers: 2,
                experts: 8,
                top_k: 2,
                expert_inner: 32,
                heads: 4,
                kv_heads: 2,
                head_dim: 32,
                vocab: 512,
                context: 1024,
            },
        }
    }
}

impl Shape {
    /// Checks that a model can have it.
    ///
    /// # Errors
    /// Names what is wrong.
    pub fn validate(&self) -> Result<()> {
        let rows = [("hidden", self.hidden), ("expert-inner", self.expert_inner), ("head-dim", self.head_dim)];
        for (name, value) in rows {
            ensure!(value > 0 && value.is_multiple_of(BLOCK), "{name} is {value}; use a multiple of {BLOCK}");
        }
        ensure!(self.layers > 0 && self.context > 0, "layers and context must be 1 or more");
        ensure!(
            (1..=self.experts).contains(&self.top_k),
            "top-k is {} of {} experts; use 1 to all of them",
            self.top_k,
            self.experts
        );
        ensure!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads) && self.heads > 0,
            "heads is {}; use a multiple of kv-heads, {}",
            self.heads,
            self.kv_heads
        );
        let (least, most) = (vocabulary::LEAST, vocabulary::MOST);
        ensure!((least..=most).contains(&self.vocab), "vocab is {}; use {least} to {most}", self.vocab);
        Ok(())
    }

    /// Parameters in all, and those that a token meets; the embedding counts in neither's maths but in both.
    pub fn parameters(&self) -> (u64, u64) {
        let attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads);
        let expert = 3 * self.hidden * self.expert_inner;
        let shared = self.layers * (attention + self.hidden * self.experts) + 2 * self.vocab * self.hidden;
        let with = |experts: usize| (shared + self.layers * experts * expert) as u64;
        (with(self.experts), with(self.top_k))
    }

    /// Bytes of the matrices that one token's pass reads: the chosen experts', and all others but the embedding, of which
    /// it is one row.
    pub fn bytes_a_token(&self) -> u64 {
        let read = |tensor: &Tensor| match &tensor.name {
            name if name.starts_with("token_embd") || tensor.shape.len() == 1 => 0,
            name if name.contains("_exps.") => tensor.bytes() / self.experts as u64 * self.top_k as u64,
            _ => tensor.bytes(),
        };
        self.tensors().iter().map(read).sum()
    }

    /// Operations of the matrices for a prompt's token, 2 for each parameter that it meets; the output is computed once
    /// for a prompt and counts in none.
    pub fn operations_a_token(&self) -> u64 {
        2 * (self.parameters().1 - (2 * self.vocab * self.hidden) as u64)
    }

    fn header(&self) -> Header {
        let architecture = "qwen3moe";
        let number = |value: usize| Value::U32(value as u32);
        let mut metadata = vec![
            ("general.architecture".to_owned(), Value::Text(architecture.into())),
            ("general.name".to_owned(), Value::Text(self.name.clone())),
            ("general.quantization_version".to_owned(), Value::U32(2)),
            // mostly Q4_0
            ("general.file_type".to_owned(), Value::U32(2)),
        ];
        let sizes = [
            ("block_count", self.layers),
            ("context_length", self.context),
            ("embedding_length", self.hidden),
            ("feed_forward_length", self.expert_inner),
            ("vocab_size", self.vocab),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
            ("attention.key_length", self.head_dim),
            ("attention.value_length", self.head_dim),
            ("rope.dimension_count", self.head_dim),
            ("expert_count", self.experts),
            ("expert_used_count", self.top_k),
            ("expert_feed_forward_length", self.expert_inner),
        ];
        metadata.extend(sizes.map(|(key, value)| (format!("{architecture}.{key}"), number(value))));
        let floats = [("attention.layer_norm_rms_epsilon", 1e-6), ("rope.freq_base", 1_000_000.0)];
        metadata.extend(floats.map(|(key, value)| (format!("{architecture}.{key}"), Value::F32(value))));
        metadata.extend(vocabulary::metadata(self.vocab));
        Header { metadata, tensors: self.tensors() }
    }

    fn tensors(&self) -> Vec<Tensor> {
        let Self { hidden, experts, expert_inner: inner, head_dim, vocab, .. } = *self;
        let (q, kv) = (self.heads * head_dim, self.kv_heads * head_dim);
        // rows keep the size of what goes in; what is added to the stream is less, so that layers do not blow it up
        let keep = |cols: usize| Fill::Blocks { deviation: 1.0 / (cols as f32).sqrt() };
        let added = (2.0 * self.layers as f32).sqrt();
        let add = |cols: usize| Fill::Blocks { deviation: 1.0 / (cols as f32).sqrt() / added };
        let mut tensors = vec![
            Tensor::new("token_embd.weight", &[vocab, hidden], Fill::ByteBlocks { deviation: 1.0 }),
            Tensor::new("output_norm.weight", &[hidden], Fill::Ones),
            Tensor::new(
                "output.weight",
                &[vocab, hidden],
                Fill::ByteBlocks { deviation: 1.0 / (hidden as f32).sqrt() },
            ),
        ];
        for layer in 0..self.layers {
            let mut tensor = |name: &str, shape: &[usize], fill: Fill| {
                tensors.push(Tensor::new(&format!("blk.{layer}.{name}.weight"), shape, fill));
            };
            tensor("attn_norm", &[hidden], Fill::Ones);
            tensor("attn_q", &[q, hidden], keep(hidden));
            tensor("attn_k", &[kv, hidden], keep(hidden));
            tensor("attn_v", &[kv, hidden], keep(hidden));
            tensor("attn_output", &[hidden, q], add(q));
            tensor("attn_q_norm", &[head_dim], Fill::Ones);
            tensor("attn_k_norm", &[head_dim], Fill::Ones);
            tensor("ffn_norm", &[hidden], Fill::Ones);
            tensor("ffn_gate_inp", &[experts, hidden], Fill::Normal { deviation: 1.0 / (hidden as f32).sqrt() });
            tensor("ffn_gate_exps", &[experts, inner, hidden], keep(hidden));
            tensor("ffn_up_exps", &[experts, inner, hidden], keep(hidden));
            tensor("ffn_down_exps", &[experts, hidden, inner], add(inner));
        }
        tensors
    }
}

/// Writes a model; the same bytes for one shape and seed. `progress(bytes done, bytes in all)`. The file is there when
/// it is whole.
///
/// # Errors
/// When the shape is impossible or the file cannot be written.
pub fn write(shape: &Shape, seed: u64, path: &Path, progress: &dyn Fn(u64, u64)) -> Result<u64> {
    shape.validate()?;
    let header = shape.header();
    let total = header.data_bytes();
    let unfinished = path.with_extension("gguf.part");
    let write = || -> Result<()> {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&unfinished)?);
        header.write(&mut out)?;
        let mut done = 0;
        for tensor in &header.tensors {
            let mut random = Random::named(seed, &tensor.name);
            tensor.write(&mut random, &mut out, &mut |bytes| {
                done += bytes;
                progress(done, total);
            })?;
        }
        out.flush()?;
        std::fs::rename(&unfinished, path)?;
        Ok(())
    };
    let written = write().with_context(|| format!("write {}", path.display()));
    if written.is_err() {
        // it may not be there
        let _ = std::fs::remove_file(&unfinished);
    }
    written.map(|()| total)
}

/// The seed of models that are made where none is given.
pub const SEED: u64 = 1;

/// The file of a preset's model in the system's folder for temporary files; made where it is not there yet.
///
/// # Errors
/// When it cannot be written.
pub fn stored(preset: Preset) -> Result<PathBuf> {
    stored_in(preset, &std::env::temp_dir().join("moesaic-loadtest"))
}

/// The same in another folder.
///
/// # Errors
/// When it cannot be written.
pub fn stored_in(preset: Preset, folder: &Path) -> Result<PathBuf> {
    let shape = preset.shape();
    // a file of another version of the shape has another size
    let folder = folder.join(format!("{:x}", shape.header().data_bytes()));
    let path = folder.join(format!("{}.gguf", shape.name));
    if !path.is_file() {
        crate::tell(&format!("make {}", path.display()));
        std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        write(&shape, SEED, &path, &|_, _| ())?;
    }
    Ok(path)
}

/// Prompts for a model are made of tokens below this: all but the special ones at the vocabulary's end.
///
/// # Errors
/// When the model has no tokenizer that can be read.
pub fn vocabulary_of(model: &Path) -> Result<usize> {
    let tokenizer = Tokenizer::open(model)?;
    let is_ordinary = |token: &usize| !tokenizer.is_special(*token as u32);
    let last = (0..tokenizer.vocab_size()).rev().find(is_ordinary);
    Ok(last.context("the vocabulary has special tokens only")? + 1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn moe_2b_has_the_size_of_its_name() {
        let (all, active) = Preset::Moe2b.shape().parameters();
        assert_eq!((all / 100_000_000, active / 10_000_000), (25, 26), "{all} {active}");
        let shape = Preset::Moe2b.shape();
        // attention and 8 experts at 4.5 bits, gates at 32, the output at 8.5
        assert_eq!(shape.bytes_a_token() / 100_000, 1525, "{}", shape.bytes_a_token());
        assert_eq!(shape.operations_a_token() / 1_000_000, 390, "{}", shape.operations_a_token());
    }

    #[test]
    fn moe_30b_has_the_size_of_qwen3_30b_a3b() {
        let (all, active) = Preset::Moe30b.shape().parameters();
        assert_eq!((all / 100_000_000, active / 100_000_000), (305, 33), "{all} {active}");
        Preset::Moe30b.shape().validate().unwrap();
        let gib = Preset::Moe30b.shape().header().data_bytes() as f64 / f64::from(1 << 30);
        assert!((16.0..16.5).contains(&gib), "{gib}");
    }

    #[test]
    fn impossible_shapes_are_refused_by_name() {
        let tiny = Preset::MoeTiny.shape();
        tiny.validate().unwrap();
        let wrong = [
            (Shape { hidden: 65, ..tiny.clone() }, "hidden"),
            (Shape { expert_inner: 0, ..tiny.clone() }, "expert-inner"),
            (Shape { top_k: 9, ..tiny.clone() }, "top-k"),
            (Shape { kv_heads: 3, ..tiny.clone() }, "kv-heads"),
            (Shape { vocab: 100, ..tiny.clone() }, "vocab"),
            (Shape { layers: 0, ..tiny }, "layers"),
        ];
        for (shape, named) in wrong {
            assert!(shape.validate().unwrap_err().to_string().contains(named), "{shape:?}");
        }
    }

    #[test]
    fn a_seed_s_file_is_the_same_bytes_and_another_seed_s_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = |seed: u64, name: &str| {
            let path = folder.path().join(name);
            let seen = std::cell::Cell::new((0, 0));
            write(&Preset::MoeTiny.shape(), seed, &path, &|done, total| seen.set((done, total))).unwrap();
            let (done, total) = seen.get();
            assert!(done == total && total > 0, "progress ends at the end: {done} of {total}");
            std::fs::read(path).unwrap()
        };
        let first = bytes(7, "a.gguf");
        assert_eq!(first, bytes(7, "b.gguf"));
        assert_ne!(first, bytes(8, "c.gguf"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3, "nothing unfinished is left");
    }
}
