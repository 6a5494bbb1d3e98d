//! Chat templates: Jinja, rendered as Hugging Face's libraries render them.
mod python;

use crate::source::gguf::{GgufSource, Metadata};
use crate::{Error, Result};
use minijinja::{Environment, ErrorKind, syntax::SyntaxConfig, value::Serde};
use serde_json::{Map, Value};
use std::path::Path;

const NAME: &str = "chat";
/// The template that is used when there are tools, where a model has one of its own.
const TOOLS_NAME: &str = "tool_use";
/// Special tokens that a template may name.
const SPECIAL: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];

/// A model's chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: Map<String, Value>,
}

impl ChatTemplate {
    /// Reads the template of a model: a folder or a `.gguf` file.
    ///
    /// # Errors
    /// As [`Self::from_dir`] and [`Self::from_gguf`].
    pub fn open(model: &Path) -> Result<Self> {
        if model.is_dir() { Self::from_dir(model) } else { Self::from_gguf(model, GgufSource::open(model)?.metadata()) }
    }

    /// Reads `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`.
    ///
    /// # Errors
    /// `Io`, `Corrupt` for a file that is broken, `Text` where the model has no template.
    pub fn from_dir(folder: &Path) -> Result<Self> {
        let config_path = folder.join("tokenizer_config.json");
        let config = match std::fs::read(&config_path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| Error::Corrupt { path: config_path.clone(), reason: e.to_string() })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Map::new(),
            Err(source) => return Err(Error::Io { path: config_path, source }),
        };
        let path = folder.join("chat_template.jinja");
        let (path, text, tools_text) = match std::fs::read_to_string(&path) {
            Ok(text) => (path, text, None),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let (text, tools_text) = from_config(&config).ok_or_else(|| none(folder))?;
                (config_path, text, tools_text)
            }
            Err(source) => return Err(Error::Io { path, source }),
        };
        let corrupt = |e: Error| Error::Corrupt { path: path.clone(), reason: e.to_string() };
        let mut template = Self::new(text, config).map_err(corrupt)?;
        if let Some(text) = tools_text {
            template.add(TOOLS_NAME, text).map_err(corrupt)?;
        }
        Ok(template)
    }

    /// Reads `tokenizer.chat_template` of GGUF metadata; `path` is for messages.
    ///
    /// # Errors
    /// `Corrupt` for a template that is broken, `Text` where there is none.
    pub fn from_gguf(path: &Path, metadata: &Metadata) -> Result<Self> {
        let text = metadata.get_str("tokenizer.chat_template").ok_or_else(|| none(path))?;
        let tokens = metadata.get_array_str("tokenizer.ggml.tokens").unwrap_or_default();
        let mut special = Map::new();
        for (name, key) in SPECIAL.iter().zip(["bos", "eos", "unknown", "padding"]) {
            let id = metadata.get_u64(&format!("tokenizer.ggml.{key}_token_id"));
            if let Some(token) = id.and_then(|id| tokens.get(usize::try_from(id).ok()?)) {
                special.insert((*name).to_owned(), (*token).into());
            }
        }
        let corrupt = |e: Error| Error::Corrupt { path: path.to_owned(), reason: e.to_string() };
        let mut template = Self::new(text.to_owned(), special).map_err(corrupt)?;
        if let Some(text) = metadata.get_str("tokenizer.chat_template.tool_use") {
            template.add(TOOLS_NAME, text.to_owned()).map_err(corrupt)?;
        }
        Ok(template)
    }

    /// Compiles a template; `special` may hold `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// `Text` with the line where the template is wrong.
    pub fn new(text: String, mut special: Map<String, Value>) -> Result<Self> {
        special.retain(|key, value| SPECIAL.contains(&key.as_str()) && !value.is_null());
        for value in special.values_mut() {
            // an added token may be an object with its text in `content`
            if let Some(content) = value.get("content").cloned() {
                *value = content;
            }
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::Text(e.to_string()))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", python::strftime_now);
        environment.add_filter("tojson", python::tojson);
        let mut template = Self { environment, special };
        template.add(NAME, text)?;
        Ok(template)
    }

    fn add(&mut self, name: &'static str, text: String) -> Result<()> {
        let added = self.environment.add_template_owned(name, text);
        added.map_err(|e| Error::Text(format!("chat template: {e:#}")))
    }

    /// Whether the template's own text, or that of the one for tools, has `text` in it. Shows which forms a model knows.
    pub fn mentions(&self, text: &str) -> bool {
        let templates = [NAME, TOOLS_NAME].into_iter().filter_map(|name| self.environment.get_template(name).ok());
        templates.into_iter().any(|template| template.source().contains(text))
    }

    /// The prompt of a conversation.
    ///
    /// # Errors
    /// `Text` with the template's own complaint (wrong roles, missing fields).
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String> {
        let mut context = self.special.clone();
        context.extend(extra.clone());
        context.insert("messages".into(), messages.into());
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        // `none` and not undefined: templates ask `tools is not none`
        context.insert("tools".into(), tools.map_or(Value::Null, Into::into));
        let for_tools = tools.and_then(|_| self.environment.get_template(TOOLS_NAME).ok());
        let template = match for_tools {
            Some(template) => template,
            None => self.environment.get_template(NAME).map_err(|e| Error::Text(e.to_string()))?,
        };
        template.render(Serde(&context)).map_err(|e| Error::Text(format!("messages cannot be rendered: {e:#}")))
    }
}

fn none(model: &Path) -> Error {
    Error::Text(format!("{} has no chat template; use completions instead of chat", model.display()))
}

/// A text, or a list of named templates: the one called `default` (else the first), and the one for tools.
fn from_config(config: &Map<String, Value>) -> Option<(String, Option<String>)> {
    match config.get("chat_template")? {
        Value::String(text) => Some((text.clone(), None)),
        Value::Array(list) => {
            let text = |entry: &Value| entry["template"].as_str().map(str::to_owned);
            let named = |name: &str| list.iter().find(|entry| entry["name"] == name).and_then(text);
            let default = named("default").or_else(|| list.first().and_then(text))?;
            Some((default, named(TOOLS_NAME)))
        }
        _ => None,
    }
}
