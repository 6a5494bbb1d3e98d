//! The server that is loaded, and how it is spoken to.
use super::workload::{Vocabulary, Wanted};
use crate::client::{Connection, Failure};
use crate::origin::Origin;
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use clap::ValueEnum;
use moesaic_model::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::Duration;

/// Which of the API's ways is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Api {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`: one message of a user, as text.
    Chat,
}

/// How prompts are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Prompts {
    /// As tokens where the server takes them, which one request tries, else as text.
    Auto,
    /// As tokens: their number is known.
    Tokens,
    /// As text, which has about as many tokens.
    Text,
}

/// Words of which text is made where there is no tokenizer: each with its space is one token of the usual vocabularies.
const WORDS: [&str; 64] = [
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he",
    "this", "are", "or", "his", "from", "at", "which", "but", "have", "an", "had", "they", "you", "were", "their",
    "one", "all", "we", "can", "her", "has", "there", "been", "if", "more", "when", "will", "would", "who", "so", "no",
    "time", "first", "people", "water", "house", "work", "world", "long", "way", "made", "over", "new", "also",
    "after", "two", "other",
];

/// How prompts become text.
#[derive(Clone)]
pub enum Writer {
    /// By the model's own tokenizer.
    Tokenizer(Arc<Tokenizer>),
    /// A word for each token.
    Words,
}

impl Writer {
    fn text(&self, tokens: &[u32]) -> Result<String> {
        match self {
            Self::Tokenizer(tokenizer) => Ok(tokenizer.decode(tokens, true)?),
            Self::Words => {
                let words: Vec<&str> = tokens.iter().map(|token| WORDS[*token as usize % WORDS.len()]).collect();
                Ok(words.join(" "))
            }
        }
    }
}

/// The server and what is said to it.
#[derive(Clone)]
pub struct Target {
    /// Where it is.
    pub origin: Origin,
    /// The model that is asked for, where the server wants one named.
    pub model: Option<String>,
    /// Which way.
    pub api: Api,
    /// `None`: prompts are sent as tokens.
    pub writer: Option<Writer>,
    /// Members of each request's body that are added to the usual ones, or stand in their place.
    pub body: Map<String, Value>,
    /// An answer of which nothing comes for so long is given up.
    pub patience: Duration,
}

/// What is asked for the trial of tokens.
const TRIAL_TOKENS: usize = 8;

impl Target {
    /// The path of a request.
    pub fn path(&self) -> String {
        self.origin.path(match self.api {
            Api::Completions => "completions",
            Api::Chat => "chat/completions",
        })
    }

    /// The body of a request.
    ///
    /// # Errors
    /// When the tokenizer cannot write a token.
    pub fn request(&self, wanted: &Wanted) -> Result<Bytes> {
        let mut body = json!({
            "max_tokens": wanted.answer_tokens, "temperature": 0, "ignore_eos": true,
            "stream": true, "stream_options": {"include_usage": true},
        });
        let text = self.writer.as_ref().map(|writer| writer.text(&wanted.tokens)).transpose()?;
        let (name, prompt) = match (self.api, text) {
            (Api::Chat, Some(text)) => ("messages", json!([{"role": "user", "content": text}])),
            (Api::Chat, None) => bail!("a chat takes no tokens; send text"),
            (Api::Completions, Some(text)) => ("prompt", json!(text)),
            (Api::Completions, None) => ("prompt", json!(wanted.tokens)),
        };
        body[name] = prompt;
        if let Some(model) = &self.model {
            body["model"] = json!(model);
        }
        for (name, value) in &self.body {
            body[name.as_str()] = value.clone();
        }
        Ok(Bytes::from(body.to_string()))
    }

    /// The first model of the server's list; `None` where it has no list.
    ///
    /// # Errors
    /// When it cannot be reached, or says nothing for too long.
    pub async fn served_model(&self) -> Result<Option<String>> {
        let asked = async {
            let mut connection = Connection::open(self.origin.clone()).await?;
            anyhow::Ok(connection.get(&self.origin.path("models")).await.ok())
        };
        let text = tokio::time::timeout(self.patience, asked).await.with_context(|| {
            let patience = self.patience.as_secs_f64();
            format!("ask for the server's models: nothing came for {patience:.1} s; --model names one without asking")
        })?;
        let Some(text) = text? else { return Ok(None) };
        let list: Value = serde_json::from_str(&text).unwrap_or_default();
        Ok(list["data"][0]["id"].as_str().map(str::to_owned))
    }

    /// Asks a short request, so that what is wrong with all of them is seen at once.
    ///
    /// # Errors
    /// With what the server says.
    pub async fn trial(&self, vocabulary: Vocabulary) -> Result<(), Failure> {
        let connect = |error: anyhow::Error| Failure::Connect(format!("{error:#}"));
        let tokens = (vocabulary.from..vocabulary.to).rev().take(TRIAL_TOKENS).collect();
        let body = self.request(&Wanted { tokens, answer_tokens: 1 }).map_err(connect)?;
        let mut connection = Connection::open_within(self.origin.clone(), self.patience).await?;
        match connection.ask(&self.path(), body, self.patience).await {
            // a first token that has no text is no reason not to go on
            Ok(_) | Err(Failure::Empty) => Ok(()),
            Err(failure) => Err(failure),
        }
    }

    /// Chooses how prompts are sent, and tries it.
    ///
    /// # Errors
    /// When the server takes no such request.
    pub async fn choose(&mut self, prompts: Prompts, writer: Writer, vocabulary: Vocabulary) -> Result<()> {
        let as_tokens = self.api == Api::Completions && prompts != Prompts::Text;
        self.writer = if as_tokens { None } else { Some(writer.clone()) };
        match self.trial(vocabulary).await {
            Ok(()) => Ok(()),
            Err(Failure::Refused { status, text }) if as_tokens && prompts == Prompts::Auto => {
                crate::tell(&format!("the server refuses a prompt of tokens ({status}: {text}); prompts are text"));
                self.writer = Some(writer);
                self.trial(vocabulary).await.context("try a request")
            }
            Err(failure) => Err(failure).context("try a request"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    fn target(api: Api, writer: Option<Writer>) -> Target {
        let origin = Origin::parse("http://h/x").unwrap();
        Target { origin, model: Some("m".into()), api, writer, body: Map::new(), patience: Duration::from_secs(1) }
    }

    fn body(target: &Target) -> Value {
        let wanted = Wanted { tokens: vec![64, 1, 66], answer_tokens: 5 };
        serde_json::from_slice(&target.request(&wanted).unwrap()).unwrap()
    }

    #[test]
    fn requests_have_what_each_way_needs() {
        let tokens = body(&target(Api::Completions, None));
        assert_eq!(
            (&tokens["prompt"], &tokens["max_tokens"], &tokens["model"]),
            (&json!([64, 1, 66]), &json!(5), &json!("m"))
        );
        assert_eq!(tokens["stream_options"]["include_usage"], true);
        assert_eq!(body(&target(Api::Completions, Some(Writer::Words)))["prompt"], "the of and");
        let chat = target(Api::Chat, Some(Writer::Words));
        assert_eq!(body(&chat)["messages"], json!([{"role": "user", "content": "the of and"}]));
        assert_eq!(chat.path(), "/x/v1/chat/completions");
        assert!(target(Api::Chat, None).request(&Wanted { tokens: vec![1], answer_tokens: 1 }).is_err());
    }

    #[tokio::test]
    async fn a_server_that_says_nothing_is_not_waited_for() {
        // connections are taken by the kernel, and nobody reads them
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut silent = target(Api::Completions, None);
        silent.origin = listener.local_addr().unwrap().into();
        silent.patience = Duration::from_millis(20);
        let error = format!("{:#}", silent.served_model().await.unwrap_err());
        assert!(error.contains("nothing came for 0.0 s") && error.contains("--model"), "{error}");
        let failure = silent.trial(Vocabulary { from: 0, to: 9 }).await.unwrap_err();
        assert_eq!(failure, Failure::Timeout(silent.patience));
    }

    #[test]
    fn own_members_replace_the_usual_ones() {
        let mut with = target(Api::Completions, None);
        with.body = json!({"temperature": 1, "cache_prompt": false}).as_object().unwrap().clone();
        let body = body(&with);
        assert_eq!((&body["temperature"], &body["cache_prompt"]), (&json!(1), &json!(false)));
    }
}
