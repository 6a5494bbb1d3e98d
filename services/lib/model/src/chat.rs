//! Chat templates: Jinja, rendered as Hugging Face's libraries render them.
use crate::{Error, Result};
use minijinja::{Environment, ErrorKind, syntax::SyntaxConfig, value::Serde};
use serde_json::{Map, Value};
use std::path::Path;

const NAME: &str = "chat";

/// A model's chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: Map<String, Value>,
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`.
    ///
    /// # Errors
    /// `Io`, `Corrupt` for a file that is broken, `Text` where the model has no template.
    pub fn from_dir(folder: &Path) -> Result<Self> {
        let config_path = folder.join("tokenizer_config.json");
        let config: Map<String, Value> = match std::fs::read(&config_path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| Error::Corrupt { path: config_path.clone(), reason: e.to_string() })?,
            Err(_) => Map::new(),
        };
        let path = folder.join("chat_template.jinja");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(_) => from_config(&config).ok_or_else(|| {
                Error::Text(format!("{} has no chat template; use completions instead of chat", folder.display()))
            })?,
        };
        Self::new(text, config).map_err(|e| Error::Corrupt { path, reason: e.to_string() })
    }

    /// Compiles a template; `special` may hold `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// `Text` with the line where the template is wrong.
    pub fn new(text: String, mut special: Map<String, Value>) -> Result<Self> {
        special.retain(|key, _| matches!(key.as_str(), "bos_token" | "eos_token" | "unk_token" | "pad_token"));
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
        environment.add_template_owned(NAME, text).map_err(|e| Error::Text(format!("chat template: {e:#}")))?;
        Ok(Self { environment, special })
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
        if let Some(tools) = tools {
            context.insert("tools".into(), tools.into());
        }
        let template = self.environment.get_template(NAME).map_err(|e| Error::Text(e.to_string()))?;
        template.render(Serde(&context)).map_err(|e| Error::Text(format!("messages cannot be rendered: {e:#}")))
    }
}

/// A text, or a list of named templates with one called `default`.
fn from_config(config: &Map<String, Value>) -> Option<String> {
    match config.get("chat_template")? {
        Value::String(text) => Some(text.clone()),
        Value::Array(list) => {
            let named = |entry: &&Value| entry["name"] == "default";
            list.iter().find(named)?["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}
