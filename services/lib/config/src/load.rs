//! Lays the sources over the defaults.
use crate::keys::{self, Key};
use crate::{ENV_PREFIX, Error, STANDARD_VARIABLES, text};
use config::{ConfigError, FileFormat, Map, Source, Value, ValueKind};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Where a configuration comes from, besides the defaults; later fields win over earlier ones.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sources {
    /// A TOML file.
    pub file: Option<PathBuf>,
    /// Whether the file must exist.
    pub required_file: bool,
    /// Environment variables; only [`STANDARD_VARIABLES`] and those that start with [`ENV_PREFIX`] matter.
    pub env: Vec<(String, String)>,
    /// Dotted keys with their values as text, from flags.
    pub overrides: Vec<(String, String)>,
    /// Sections that others read: a file and the environment may be shared, so what these set there is passed over,
    /// unless the configuration has such a section itself.
    pub others: &'static [&'static str],
}

impl Sources {
    /// This process's environment over a file.
    pub fn from_process(file: Option<PathBuf>, required_file: bool) -> Self {
        // A variable that is no Unicode cannot be one of ours; its value would be refused by any key.
        let env = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
        let env = env.map(|(name, value)| (name, value.to_string_lossy().into_owned())).collect();
        Self { file, required_file, env, overrides: Vec::new(), others: &[] }
    }
}

/// Reads a configuration: the defaults of `T`, with the sources over them.
pub fn load<T: Serialize + DeserializeOwned + Default>(sources: &Sources) -> Result<T, Error> {
    let defaults = serde_json::to_value(T::default()).map_err(|error| Error::Invalid {
        key: String::new(),
        source_name: "defaults".into(),
        reason: error.to_string(),
    })?;
    let others = sources.others;
    let mut layers = Layers { defaults: &defaults, others, entries: Vec::new(), origins: BTreeMap::new() };
    layers.add_standard_variables(&sources.env)?;
    if let Some(path) = &sources.file {
        layers.add_file(path, sources.required_file)?;
    }
    layers.add_environment(&sources.env)?;
    layers.add_overrides(&sources.overrides)?;
    layers.read()
}

struct Layers<'a> {
    defaults: &'a Json,
    others: &'a [&'a str],
    /// Dotted keys in the order in which they are set.
    entries: Vec<(String, Value)>,
    /// Who set a key last.
    origins: BTreeMap<String, String>,
}

impl Layers<'_> {
    /// Checks a key and says what its default is.
    fn known(&self, key: &str, origin: &str) -> Result<Option<&Json>, Error> {
        let path: Vec<&str> = key.split('.').collect();
        match keys::find(self.defaults, &path) {
            Key::Known(default) => Ok(Some(default)),
            Key::Open => Ok(None),
            Key::Unknown => {
                let keys::Hint { nearest, known } = keys::hint(self.defaults, key);
                Err(Error::Unknown { key: key.to_owned(), source_name: origin.to_owned(), nearest, known })
            }
        }
    }

    /// Whether somebody else reads this key.
    fn is_others(&self, key: &str) -> bool {
        let section = key.split('.').next().unwrap_or_default();
        self.others.contains(&section) && keys::find(self.defaults, &[section]) == Key::Unknown
    }

    fn add_text(&mut self, key: String, value: &str, origin: String) -> Result<(), Error> {
        let kind = text::parse(value, self.known(&key, &origin)?, &origin).map_err(|reason| Error::Invalid {
            key: key.clone(),
            source_name: origin.clone(),
            reason,
        })?;
        self.origins.insert(key.clone(), origin.clone());
        self.entries.push((key, Value::new(Some(&origin), kind)));
        Ok(())
    }

    fn add_standard_variables(&mut self, env: &[(String, String)]) -> Result<(), Error> {
        for (variable, key) in STANDARD_VARIABLES {
            let path: Vec<&str> = key.split('.').collect();
            let set = env.iter().find(|(name, value)| name == variable && !value.is_empty());
            if let (Some((_, value)), Key::Known(_)) = (set, keys::find(self.defaults, &path)) {
                self.add_text((*key).to_owned(), value, format!("variable {variable}"))?;
            }
        }
        Ok(())
    }

    fn add_environment(&mut self, env: &[(String, String)]) -> Result<(), Error> {
        for (name, value) in env {
            if let Some(rest) = name.strip_prefix(ENV_PREFIX) {
                let key = rest.split("__").map(str::to_ascii_lowercase).collect::<Vec<_>>().join(".");
                if self.is_others(&key) {
                    continue;
                }
                self.add_text(key, value, format!("variable {name}"))?;
            }
        }
        Ok(())
    }

    fn add_overrides(&mut self, overrides: &[(String, String)]) -> Result<(), Error> {
        for (key, value) in overrides {
            self.add_text(key.clone(), value, "flag".to_owned())?;
        }
        Ok(())
    }

    fn add_file(&mut self, path: &Path, required: bool) -> Result<(), Error> {
        let failed = |reason: String| Error::File { path: path.to_owned(), reason };
        let content = match std::fs::read_to_string(path) {
            Ok(content) => content,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => return Ok(()),
            Err(error) => return Err(failed(error.to_string())),
        };
        let origin = path.display().to_string();
        let table = config::File::from_str(&content, FileFormat::Toml).collect().map_err(|e| failed(e.to_string()))?;
        let mut keys: Vec<_> = table.into_iter().collect();
        keys.sort_by(|a, b| a.0.cmp(&b.0));
        for (key, value) in keys {
            if self.is_others(&key) {
                continue;
            }
            self.check(&key, &value, &origin)?;
            self.entries.push((key, value));
        }
        Ok(())
    }

    /// Checks a file's value and everything in it.
    fn check(&mut self, key: &str, value: &Value, origin: &str) -> Result<(), Error> {
        let open = self.known(key, origin)?.is_none();
        match &value.kind {
            ValueKind::Table(table) if !open => {
                let mut children: Vec<_> = table.iter().collect();
                children.sort_by(|a, b| a.0.cmp(b.0));
                for (name, child) in children {
                    self.check(&format!("{key}.{name}"), child, origin)?;
                }
            }
            _ => {
                self.origins.insert(key.to_owned(), origin.to_owned());
            }
        }
        Ok(())
    }

    fn read<T: DeserializeOwned>(self) -> Result<T, Error> {
        let Self { defaults, entries, origins, .. } = self;
        let origin = "defaults".to_owned();
        let base = defaults.as_object().into_iter().flatten();
        let base = base.map(|(key, value)| (key.clone(), Value::new(Some(&origin), text::from_json(value, &origin))));
        let mut builder = config::Config::builder().add_source(Entries(base.collect()));
        for entry in entries {
            builder = builder.add_source(Entries(vec![entry]));
        }
        builder.build().and_then(config::Config::try_deserialize).map_err(|error| explain(error, &origins))
    }
}

/// Values under dotted keys, as a source of the `config` crate.
#[derive(Clone, Debug)]
struct Entries(Vec<(String, Value)>);

impl Source for Entries {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, ConfigError> {
        Ok(self.0.iter().cloned().collect())
    }
}

/// Names the key and who set it.
fn explain(error: ConfigError, origins: &BTreeMap<String, String>) -> Error {
    let (key, reason) = match error {
        ConfigError::Type { unexpected, expected, key, .. } => {
            (key.unwrap_or_default(), format!("expected {expected}, found {unexpected}"))
        }
        ConfigError::At { error, key, .. } => (key.unwrap_or_default(), innermost(*error)),
        ConfigError::NotFound(key) => (key, "is missing".to_owned()),
        other => (String::new(), other.to_string()),
    };
    // The key may lie below what was set (`a[0].b` of an array) or above it (a table whose parts were set).
    let below = origins.iter().filter(|(set, _)| key.starts_with(set.as_str())).max_by_key(|(set, _)| set.len());
    let above = || origins.iter().find(|(set, _)| set.starts_with(&key));
    let source_name = below.or_else(above).map_or_else(|| "defaults".to_owned(), |(_, origin)| origin.clone());
    Error::Invalid { key, source_name, reason }
}

fn innermost(error: ConfigError) -> String {
    match error {
        ConfigError::At { error, .. } => innermost(*error),
        ConfigError::Type { unexpected, expected, .. } => format!("expected {expected}, found {unexpected}"),
        other => other.to_string(),
    }
}
