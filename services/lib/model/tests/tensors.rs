//! Other layouts of the same tensors (GGUF's names, stacking and permutation), and files that are wrong.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
use moesaic_model::backend::native::NativeBackend;
use moesaic_model::decoder::{LoadOptions, load_decoder, load_experts};
use moesaic_model::source::{Dtype, TensorInfo, WeightSource, open};
use moesaic_model::spec::{ModelSpec, gguf::from_gguf, read_folder};
use moesaic_model::{Error, LogitsWanted, Result, Runner, SequenceChunk};
use moesaic_types::{KvFormat, WeightFormat};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Tensors in memory.
struct Memory {
    infos: Vec<TensorInfo>,
    values: BTreeMap<String, Vec<f32>>,
}

impl WeightSource for Memory {
    fn path(&self) -> &Path {
        Path::new("memory.gguf")
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn read_f32(&self, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
        out.copy_from_slice(&self.values[name][start..start + out.len()]);
        Ok(())
    }

    fn stored(&self, name: &str) -> Result<Vec<&[u8]>> {
        Ok(vec![bytemuck::cast_slice(&self.values[name])])
    }
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn memory(tensors: Tensors) -> Memory {
    let info = |(name, (shape, _)): (&String, &(Vec<usize>, Vec<f32>))| TensorInfo {
        name: name.clone(),
        shape: shape.clone(),
        dtype: Dtype::F32,
    };
    let infos = tensors.iter().map(info).collect();
    Memory { infos, values: tensors.into_iter().map(|(name, (_, values))| (name, values)).collect() }
}

fn folder(name: &str) -> PathBuf {
    let default = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../tests/goldens");
    std::env::var_os("MOESAIC_GOLDENS").map_or_else(default, PathBuf::from).join(name)
}

fn tensors(name: &str) -> Tensors {
    let source = open(&folder(name)).unwrap();
    let read = |info: &TensorInfo| {
        let mut values = vec![0.0; info.shape.iter().product()];
        source.read_f32(&info.name, 0, &mut values).unwrap();
        (info.name.clone(), (info.shape.clone(), values))
    };
    source.tensors().iter().map(read).collect()
}

fn build(source: &Memory, spec: ModelSpec) -> Result<Box<dyn Runner>> {
    let options = LoadOptions {
        weights: Some(WeightFormat::F32),
        kv: KvFormat::F32,
        threads: 2,
        activations: moesaic_model::Activations::F32,
        progress: None,
    };
    let backend = Arc::new(NativeBackend::new(2, moesaic_model::Activations::F32));
    let pool = Arc::new(load_experts(source, &spec, backend.clone(), &options)?);
    Ok(Box::new(load_decoder(source, spec, backend, &options, pool)?))
}

/// As llama.cpp's converter names, stacks and permutes.
fn to_gguf(name: &str, config: &Value) -> Tensors {
    let permute_heads = |width: &str| config[width].as_u64().unwrap() as usize;
    let permuted = config["model_type"] == "llama" || config["model_type"] == "mixtral";
    let mut out = Tensors::new();
    for (name, (shape, values)) in tensors(name) {
        let (stem, suffix) = name.rsplit_once('.').unwrap();
        let flat = match stem {
            "model.embed_tokens" => "token_embd".to_owned(),
            "model.norm" => "output_norm".to_owned(),
            "lm_head" => "output".to_owned(),
            _ => {
                let (layer, part) = stem.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
                let part =
                    part.replace("block_sparse_moe", "mlp").replace("w1", "gate_proj").replace("w2", "down_proj");
                let part = part.replace("w3", "up_proj");
                if let Some((expert, matrix)) = part.strip_prefix("mlp.experts.").and_then(|p| p.split_once('.')) {
                    let matrix = matrix.trim_end_matches("_proj");
                    let stacked = out.entry(format!("blk.{layer}.ffn_{matrix}_exps.weight"));
                    let (stack, all) = stacked.or_insert_with(|| (vec![0, shape[0], shape[1]], Vec::new()));
                    // Experts come in the order of their names; put each at its place.
                    let (expert, size) = (expert.parse::<usize>().unwrap(), values.len());
                    stack[0] = stack[0].max(expert + 1);
                    all.resize(all.len().max((expert + 1) * size), 0.0);
                    all[expert * size..][..size].copy_from_slice(&values);
                    continue;
                }
                let part = match part.as_str() {
                    "input_layernorm" => "attn_norm",
                    "post_attention_layernorm" => "ffn_norm",
                    "self_attn.q_proj" => "attn_q",
                    "self_attn.k_proj" => "attn_k",
                    "self_attn.v_proj" => "attn_v",
                    "self_attn.o_proj" => "attn_output",
                    "self_attn.q_norm" => "attn_q_norm",
                    "self_attn.k_norm" => "attn_k_norm",
                    "mlp.gate" => "ffn_gate_inp",
                    "mlp.shared_expert_gate" => "ffn_gate_inp_shexp",
                    "mlp.shared_expert.gate_proj" => "ffn_gate_shexp",
                    "mlp.shared_expert.up_proj" => "ffn_up_shexp",
                    "mlp.shared_expert.down_proj" => "ffn_down_shexp",
                    "mlp.gate_proj" => "ffn_gate",
                    "mlp.up_proj" => "ffn_up",
                    "mlp.down_proj" => "ffn_down",
                    other => panic!("{other}"),
                };
                format!("blk.{layer}.{part}")
            }
        };
        let heads = if flat.ends_with("attn_q") { "num_attention_heads" } else { "num_key_value_heads" };
        let (shape, values) = if permuted && (flat.ends_with("attn_q") || flat.ends_with("attn_k")) {
            let (cols, head_dim) = (shape[1], shape[0] / permute_heads(heads));
            let source = |row: usize| {
                let (head, within) = (row / head_dim, row % head_dim);
                head * head_dim + within % 2 * (head_dim / 2) + within / 2
            };
            let rows = (0..shape[0]).flat_map(|row| values[source(row) * cols..][..cols].to_vec());
            let rows = rows.collect();
            (shape, rows)
        } else if flat.ends_with("ffn_gate_inp_shexp") {
            (vec![shape[1]], values)
        } else {
            (shape, values)
        };
        out.insert(format!("{flat}.{suffix}"), (shape, values));
    }
    out
}

fn metadata(config: &Value) -> Value {
    let architecture = match config["model_type"].as_str().unwrap() {
        "mixtral" => "llama",
        "qwen3_moe" => "qwen3moe",
        "qwen2_moe" => "qwen2moe",
        other => other,
    };
    let mut metadata = json!({"general.architecture": architecture, "tokenizer.ggml.eos_token_id": 2});
    let mut put = |key: &str, value: &Value| {
        if !value.is_null() {
            metadata[format!("{architecture}.{key}")] = value.clone();
        }
    };
    put("block_count", &config["num_hidden_layers"]);
    put("context_length", &config["max_position_embeddings"]);
    put("embedding_length", &config["hidden_size"]);
    put("feed_forward_length", &config["intermediate_size"]);
    put("attention.head_count", &config["num_attention_heads"]);
    put("attention.head_count_kv", &config["num_key_value_heads"]);
    put("attention.layer_norm_rms_epsilon", &config["rms_norm_eps"]);
    put("attention.key_length", &config["head_dim"]);
    put("attention.value_length", &config["head_dim"]);
    put("expert_used_count", &config["num_experts_per_tok"]);
    put(
        "expert_count",
        if config["num_experts"].is_null() { &config["num_local_experts"] } else { &config["num_experts"] },
    );
    let theta = &config["rope_parameters"]["rope_theta"];
    put("rope.freq_base", if theta.is_null() { &config["rope_theta"] } else { theta });
    metadata
}

#[test]
fn gguf_files_of_the_same_weights_match_the_references() {
    for name in ["llama_dense", "mixtral", "qwen3_moe", "qwen3_dense", "qwen2_moe", "olmoe"] {
        let json =
            |file: &str| -> Value { serde_json::from_slice(&std::fs::read(folder(name).join(file)).unwrap()).unwrap() };
        let config = json("config.json");
        let source = memory(to_gguf(name, &config));
        let spec = from_gguf(&metadata(&config), &source).unwrap();
        assert_eq!(spec.tied, config["tie_word_embeddings"] == true);
        let mut model = build(&source, spec).unwrap();
        model.allocate_kv(4).unwrap();
        let golden = json("golden.json");
        let tolerance = 2e-3 * (golden["logit_std"].as_f64().unwrap() as f32).max(1.0);
        let case = &golden["cases"][2];
        let list = |key: &str| case[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32);
        let tokens: Vec<u32> = list("prompt_ids").map(|id| id as u32).collect();
        let mut logits = Vec::new();
        let chunk = SequenceChunk { tokens: &tokens, start: 0, blocks: &[2, 0], logits: LogitsWanted::Last };
        model.forward(&[chunk], &mut logits).unwrap();
        let reference: Vec<f32> = list("last_logits").collect();
        assert_eq!(logits.len(), reference.len());
        for (i, (got, want)) in logits.iter().zip(&reference).enumerate() {
            assert!((got - want).abs() <= tolerance, "{name}: logit {i} is {got}, not {want}");
        }
    }
}

#[test]
fn missing_and_misshapen_tensors_are_errors_that_name_them() {
    for name in ["qwen3_moe", "deepseek_v3", "gpt_oss", "granite_moe", "bloom_alibi", "mixtral", "glm4_moe"] {
        let spec = read_folder(&folder(name)).unwrap();
        let all = tensors(name);
        // One tensor of each kind: layers' and experts' numbers apart.
        let kind =
            |name: &str| name.split('.').filter(|part| part.parse::<u32>().is_err()).collect::<Vec<_>>().join(".");
        let kinds: BTreeMap<String, String> = all.keys().map(|name| (kind(name), name.clone())).collect();
        for tensor in kinds.values() {
            let mut missing = all.clone();
            missing.remove(tensor);
            let mut longer = all.clone();
            let (shape, values) = longer.get_mut(tensor).unwrap();
            shape[0] += 1;
            values.resize(shape.iter().product(), 0.0);
            for (source, word) in [(missing, "is missing"), (longer, "has shape")] {
                match build(&memory(source), spec.clone()).map(|_| ()) {
                    Err(Error::Tensor { tensor: named, reason, .. }) => {
                        assert_eq!(named, *tensor);
                        assert!(reason.contains(word), "{reason}");
                    }
                    other => panic!("{name} with {tensor} {word}: {other:?}"),
                }
            }
        }
    }
}

#[test]
fn gguf_metadata_that_is_wrong_names_the_key() {
    let config = serde_json::from_slice(&std::fs::read(folder("qwen3_moe").join("config.json")).unwrap()).unwrap();
    let source = memory(to_gguf("qwen3_moe", &config));
    for (key, value) in [
        ("general.architecture", json!("bert")),
        ("qwen3moe.block_count", json!(1u64 << 40)),
        ("qwen3moe.expert_used_count", json!(200)),
        ("qwen3moe.attention.head_count_kv", json!(3)),
        ("qwen3moe.rope.scaling.type", json!("longrope")),
        ("qwen3moe.attention.value_length", json!(8)),
        ("qwen3moe.embedding_length", Value::Null),
    ] {
        let mut metadata = metadata(&config);
        metadata[key] = value;
        let error = from_gguf(&metadata, &source).unwrap_err().to_string();
        assert!(error.contains("memory.gguf") && error.contains(key), "{error}");
    }
}
