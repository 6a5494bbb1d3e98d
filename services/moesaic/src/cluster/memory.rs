//! What memory the schedulers of one host may take for keys and values.
use moesaic_config::ByteSize;
use moesaic_model::spec::ModelSpec;
use moesaic_scheduler::Config;
use std::path::Path;

/// The least that a scheduler takes by itself.
const LEAST: u64 = 512 << 20;

/// Requests of the model's context that a scheduler's pool holds by itself, where memory allows.
const CONTEXTS: u64 = 2;

/// Bytes of a cached value at most.
const VALUE: u64 = 4;

/// The KV memory of each of several schedulers, where their own choice could be too much: each takes up to half of what
/// is available as it starts, which all of them see. `None`: let each choose, or the settings have chosen.
pub fn of_each(config: &Config, spec: &ModelSpec, weights: u64, available: u64, schedulers: usize) -> Option<ByteSize> {
    if schedulers < 2 || config.kv_blocks.is_some() || config.kv_memory_bytes.is_some() {
        return None;
    }
    let of_token = |layer: &moesaic_model::spec::LayerSpec| {
        let (heads, key, value, is_in_key) = layer.attention.cached();
        (heads * (key + if is_in_key { 0 } else { value })) as u64 * VALUE
    };
    let token: u64 = spec.layers.iter().map(of_token).sum();
    let wanted = token.saturating_mul(spec.max_context as u64).saturating_mul(CONTEXTS);
    let share = (available.saturating_sub(weights) / 2 / schedulers as u64).max(LEAST);
    (wanted > share).then_some(ByteSize(share))
}

/// The size of a file, or of all files of a folder; 0 for what cannot be read.
pub fn size_of(path: &Path) -> u64 {
    let files = std::fs::read_dir(path).into_iter().flatten().flatten();
    match path.metadata() {
        Ok(meta) if meta.is_file() => meta.len(),
        _ => files.filter_map(|file| file.path().metadata().ok()).map(|meta| meta.len()).sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_model::ModelConfig;

    const GIB: u64 = 1 << 30;

    #[test]
    fn several_schedulers_share_what_one_would_take() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/models/demo-moe");
        let model = ModelConfig { path: Some(path.clone()), ..ModelConfig::default() };
        let mut spec = model.look().expect("it is in the checkout").spec;
        let config = Config::default();
        assert_eq!(of_each(&config, &spec, 0, 100 * GIB, 2), None, "it needs little");
        spec.max_context = 10_000_000;
        assert_eq!(of_each(&config, &spec, 20 * GIB, 100 * GIB, 1), None, "it is alone");
        assert_eq!(of_each(&config, &spec, 20 * GIB, 100 * GIB, 4), Some(ByteSize(10 * GIB)));
        assert_eq!(of_each(&config, &spec, 20 * GIB, GIB, 4), Some(ByteSize(LEAST)));
        let set = Config { kv_blocks: Some(7), ..Config::default() };
        assert_eq!(of_each(&set, &spec, 0, GIB, 4), None, "it was set");

        let weights = path.join("model.safetensors");
        assert!(size_of(&weights) > 1 << 20 && size_of(&path) > size_of(&weights));
        assert_eq!(size_of(Path::new("/no/such/folder")), 0);
    }
}
