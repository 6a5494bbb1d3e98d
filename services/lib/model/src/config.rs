//! The `[model]` section: which model, and how it runs.
use crate::backend::native::NativeBackend;
use crate::backend::{Activations, BackendKind, check_threads};
use crate::source;
use crate::spec::{self, ModelSpec};
use crate::{Result, demo};
use moesaic_types::cluster::ServedAs;
use moesaic_types::{Digest, KvFormat, WeightFormat};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Which model, and how it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Folder or .gguf file; empty: the demo model.
    pub path: Option<PathBuf>,
    /// The name that clients use; empty: the folder's or file's name.
    pub name: Option<String>,
    /// `native` or `candle`.
    pub backend: BackendKind,
    /// f32, bf16, q8, q4, q4-g64, q4-g128; empty: as stored.
    pub weights: Option<WeightFormat>,
    /// Cached keys and values: f32, bf16 or int8.
    pub kv: KvFormat,
    /// What products take on the native backend: int8 (rounded in the groups of q8 and q4 weights, to bf16 for bf16
    /// weights) or f32 (exact, and several times as slow with q8 and q4).
    pub activations: Activations,
    /// Threads of the maths; 0: all cores.
    pub threads: usize,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            path: None,
            name: None,
            backend: BackendKind::Native,
            weights: None,
            kv: KvFormat::default(),
            activations: Activations::default(),
            threads: 0,
        }
    }
}

/// A model that was looked at.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its folder or file.
    pub path: PathBuf,
    /// Its architecture.
    pub spec: ModelSpec,
    /// What it is with these settings.
    pub served_as: ServedAs,
    /// Its weights as experts hold them: equal wherever they can compute for each other, on whatever backend.
    pub experts: Digest,
}

impl ModelConfig {
    /// Checks bounds.
    ///
    /// # Errors
    /// `InvalidArgument` naming the key and the limit.
    pub fn validate(&self) -> moesaic_types::Result<()> {
        let wrong = |reason| moesaic_types::Error::invalid("model.threads", format!("model.threads: {reason}"));
        check_threads(self.threads).map(|_| ()).map_err(wrong)
    }

    /// The folder or file that is in force.
    ///
    /// # Errors
    /// `Io` when none is named and the demo model is not here.
    pub fn find(&self) -> Result<PathBuf> {
        self.path.clone().map_or_else(demo::find, Ok)
    }

    /// The name that is in force, for the model at `path`.
    pub fn name_of(&self, path: &Path) -> String {
        let of_file = || {
            let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
            path.file_stem().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
        };
        self.name.clone().filter(|name| !name.is_empty()).unwrap_or_else(of_file)
    }

    /// The native backend with these settings.
    pub fn native(&self) -> NativeBackend {
        NativeBackend::new(self.threads(), self.activations)
    }

    /// The threads that are in force.
    pub fn threads(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        }
    }

    /// Finds the model and looks at it, without loading it.
    ///
    /// # Errors
    /// What is wrong with its files.
    pub fn look(&self) -> Result<Found> {
        let path = self.find()?;
        let source = source::open(&path)?;
        let spec = spec::read(&path, &*source)?;
        let digest = source::digest(&*source)?;
        let (served_as, experts) = (self.served_as(&digest), self.experts(&digest));
        Ok(Found { path, spec, served_as, experts })
    }

    /// How a model is served with these settings.
    fn served_as(&self, digest: &Digest) -> ServedAs {
        // "as stored" and a format that happens to be stored may differ, and backends lay blocks out in their own ways
        let stored = if self.weights.is_none() { " as stored" } else { "" };
        let digest = digest.tagged(&format!("{:?} {:?} blocks v3{stored}", self.backend, self.activations));
        ServedAs { digest, weights: self.weights, kv: self.kv }
    }

    fn experts(&self, digest: &Digest) -> Digest {
        let weights = self.weights.map_or_else(|| "as stored".into(), |weights| weights.to_string());
        digest.tagged(&format!("experts v1 {weights}"))
    }
}
