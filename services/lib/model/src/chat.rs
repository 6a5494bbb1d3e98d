//! Chat templates: Jinja, rendered as Hugging Face's libraries render them.
mod python;

use crate::source::gguf::{Head, Metadata};
use crate::source::gguf_file;
use crate::{Error, Result};
use minijinja::{Environment, ErrorKind, syntax::SyntaxConfig, value::Serde};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

const NAME: &str = "chat";
/// The template that is used when there are tools, where a model has one of its own.
const TOOLS_NAME: &str = "tool_use";
/// Special tokens that a template may name.
const SPECIAL: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];
const FILE: &str = "chat_template.jinja";
/// Holds further templates, each under its name.
const FOLDER: &str = "additional_chat_templates";
const CONFIG: &str = "tokenizer_config.json";

/// A model's chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: Map<String, Value>,
    /// Why no conversation can be rendered.
    problem: Option<String>,
}

/// A model's templates as texts.
struct Texts {
    /// Where they stand, for messages.
    path: PathBuf,
    default: String,
    tools: Option<String>,
}

impl ChatTemplate {
    /// Reads the template of a model: a folder or a `.gguf` file.
    ///
    /// # Errors
    /// As [`Self::from_dir`] and [`Self::from_gguf`].
    pub fn open(model: &Path) -> Result<Self> {
        match gguf_file(model) {
            Some(file) => Self::from_gguf(&file, &Head::read(&file)?.metadata),
            None => Self::from_dir(model),
        }
    }

    /// Reads `chat_template.jinja` and `additional_chat_templates/`, else `chat_template` of `tokenizer_config.json`
    /// (a text, or a list of named ones). A template that does not compile is a [`Self::problem`].
    ///
    /// # Errors
    /// `Io`, `Corrupt` for a file that is broken, `Text` where the model has no template.
    pub fn from_dir(folder: &Path) -> Result<Self> {
        let config_path = folder.join(CONFIG);
        let config = match std::fs::read(&config_path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| Error::Corrupt { path: config_path.clone(), reason: e.to_string() })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Map::new(),
            Err(source) => return Err(Error::Io { path: config_path, source }),
        };
        let (path, additional) = (folder.join(FILE), folder.join(FOLDER));
        let texts = match read_text(&path)? {
            Some(default) => Some(Texts { default, tools: read_text(&named(&additional, TOOLS_NAME))?, path }),
            None => match read_text(&named(&additional, "default"))? {
                Some(default) => {
                    Some(Texts { default, tools: read_text(&named(&additional, TOOLS_NAME))?, path: additional })
                }
                None => from_config(&config, config_path),
            },
        };
        Ok(Self::of(texts.ok_or_else(|| none(folder))?, config))
    }

    /// Reads `tokenizer.chat_template` of GGUF metadata; `path` is for messages. A template that does not compile is a
    /// [`Self::problem`].
    ///
    /// # Errors
    /// `Text` where there is none.
    pub fn from_gguf(path: &Path, metadata: &Metadata) -> Result<Self> {
        let key = "tokenizer.chat_template";
        let default = metadata.get_str(key).ok_or_else(|| none(path))?.to_owned();
        let tokens = metadata.get_array_str("tokenizer.ggml.tokens").unwrap_or_default();
        let mut special = Map::new();
        for (name, key) in SPECIAL.iter().zip(["bos", "eos", "unknown", "padding"]) {
            let id = metadata.get_u64(&format!("tokenizer.ggml.{key}_token_id"));
            if let Some(token) = id.and_then(|id| tokens.get(usize::try_from(id).ok()?)) {
                special.insert((*name).to_owned(), (*token).into());
            }
        }
        let tools = metadata.get_str(&format!("{key}.{TOOLS_NAME}")).map(str::to_owned);
        Ok(Self::of(Texts { path: path.to_owned(), default, tools }, special))
    }

    /// Compiles what was read.
    fn of(texts: Texts, special: Map<String, Value>) -> Self {
        let Texts { path, default, tools } = texts;
        let compiled = Self::new(default, special).and_then(|mut template| match tools {
            Some(text) => template.add(TOOLS_NAME, text).map(|()| template),
            None => Ok(template),
        });
        compiled.unwrap_or_else(|error| Self {
            environment: Environment::new(),
            special: Map::new(),
            problem: Some(format!("the model's chat template cannot be used: {}: {error}", path.display())),
        })
    }

    /// Why no conversation can be rendered, where the model's template does not compile; names the file.
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
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
        let mut template = Self { environment, special, problem: None };
        template.add(NAME, text)?;
        Ok(template)
    }

    fn add(&mut self, name: &'static str, text: String) -> Result<()> {
        let added = self.environment.add_template_owned(name, without_generation(&text));
        added.map_err(|e| Error::Text(one_line(&format!("chat template: {e}"))))
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
        if let Some(problem) = &self.problem {
            return Err(Error::Text(problem.clone()));
        }
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
        template
            .render(Serde(&context))
            .map_err(|e| Error::Text(one_line(&format!("messages cannot be rendered: {e}"))))
    }
}

fn none(model: &Path) -> Error {
    Error::Text(format!("{} has no chat template; use completions instead of chat", model.display()))
}

fn named(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.jinja"))
}

/// A file's text; `None` where there is no such file.
fn read_text(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Io { path: path.to_owned(), source }),
    }
}

/// A text, or a list of named templates: the one called `default` (else the first), and the one for tools.
fn from_config(config: &Map<String, Value>, path: PathBuf) -> Option<Texts> {
    match config.get("chat_template")? {
        Value::String(text) => Some(Texts { path, default: text.clone(), tools: None }),
        Value::Array(list) => {
            let text = |entry: &Value| entry["template"].as_str().map(str::to_owned);
            let named = |name: &str| list.iter().find(|entry| entry["name"] == name).and_then(text);
            let default = named("default").or_else(|| list.first().and_then(text))?;
            Some(Texts { path, default, tools: named(TOOLS_NAME) })
        }
        _ => None,
    }
}

/// A message for a client: line breaks are spaces.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The template with `{% generation %}` and `{% endgeneration %}`, which mark answers for training, as blocks that are
/// always shown, so that the tags' control of white space stays.
fn without_generation(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let inside = tag.find("%}").map_or(tag, |end| &tag[..end]);
        let name = inside.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        let instead = match name {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        match instead {
            Some(instead) => out.push_str(&inside.replacen(name, instead, 1)),
            None => out.push_str(inside),
        }
        rest = &tag[inside.len()..];
    }
    out.push_str(rest);
    out
}
