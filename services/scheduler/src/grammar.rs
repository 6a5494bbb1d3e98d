//! Structured output: compiles grammars with llguidance and says which tokens are allowed next.
//!
//! Compiling is bounded by the text's length, by llguidance's own limits on the grammar's and the lexer's size, and by
//! time; a few threads do it, away from the runtime's. What was compiled is kept by content.
mod cache;

use self::cache::Cache;
use crate::config::Config;
use crate::vocabulary::Vocabulary;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::{Matcher, ParserFactory};
use moesaic_types::{Error, Grammar, Result, TokenId};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;
use toktrie::{ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};

/// Longest part of llguidance's message that a client sees, in characters.
const MAX_MESSAGE: usize = 600;
/// Symbols of a compiled grammar; llguidance's default is five times as many, which takes seconds.
const MAX_GRAMMAR_SYMBOLS: usize = 100_000;
/// When a request may try again that found all compiling threads taken.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Compiles grammars for one vocabulary.
pub struct Compiler {
    factory: ParserFactory,
    max_bytes: usize,
    timeout: Duration,
    /// Places for compilations that run at once.
    workers: Arc<Semaphore>,
    cache: Mutex<Cache<Matcher>>,
    compiled: AtomicU64,
}

impl Compiler {
    /// For a vocabulary, within the configuration's limits.
    pub fn new(vocabulary: &Vocabulary, config: &Config) -> Result<Self> {
        let words: Vec<Vec<u8>> =
            (0..).zip(&vocabulary.token_bytes).map(|(id, text)| word(vocabulary, id, text)).collect();
        let eos = vocabulary.eos.first().copied().unwrap_or(INVALID_TOKEN);
        let mut trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, eos), &words);
        if vocabulary.eos.len() > 1 {
            trie = trie.with_eos_tokens(&vocabulary.eos);
        }
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
            .map_err(|error| Error::internal(format!("prepare the vocabulary for grammars: {error:#}")))?;
        factory.quiet();
        let limits =
            ParserLimits { max_grammar_size: MAX_GRAMMAR_SYMBOLS, verbose_errors: false, ..Default::default() };
        *factory.limits_mut() = limits;
        Ok(Self {
            factory,
            max_bytes: config.max_grammar_bytes,
            timeout: Duration::from_millis(config.grammar_timeout_ms),
            workers: Arc::new(Semaphore::new(config.grammar_workers)),
            cache: Mutex::new(Cache::new(config.grammar_cache)),
            compiled: AtomicU64::new(0),
        })
    }

    /// How many grammars were compiled, rather than found in the cache.
    pub fn compiled(&self) -> u64 {
        self.compiled.load(Ordering::Relaxed)
    }

    /// [`Self::compile`] on a thread that may block, within the time limit. Cancel-safe; a compilation that has begun
    /// goes on to its end, and is found in the cache afterwards.
    ///
    /// # Errors
    /// `InvalidArgument`, naming the field, for a grammar that is wrong, too large or takes too long;
    /// `ResourceExhausted` where other grammars keep all threads.
    pub async fn compile_aside(self: &Arc<Self>, grammar: Grammar, resumed: Vec<TokenId>) -> Result<State> {
        let field = field(&grammar);
        let timeout_ms = self.timeout.as_millis();
        let place = tokio::time::timeout(self.timeout, Arc::clone(&self.workers).acquire_owned()).await;
        let Ok(Ok(place)) = place else {
            let message = format!("no thread was free to compile {field} within {timeout_ms} ms; try again later");
            return Err(Error::exhausted(message, RETRY_AFTER));
        };
        let compiler = Arc::clone(self);
        let task = tokio::task::spawn_blocking(move || {
            let state = compiler.compile(&grammar, &resumed);
            drop(place);
            state
        });
        match tokio::time::timeout(self.timeout, task).await {
            Ok(Ok(state)) => state,
            Ok(Err(panic)) => {
                tracing::error!(field, %panic, "compile a grammar");
                Err(Error::invalid(field, format!("{field} cannot be compiled")))
            }
            Err(_) => {
                let message = format!("{field} takes longer than {timeout_ms} ms to compile: make it simpler");
                Err(Error::invalid(field, message))
            }
        }
    }

    /// Compiles a grammar and replays the tokens that were emitted before. Takes long for large schemas: call it
    /// where blocking is allowed.
    pub fn compile(&self, grammar: &Grammar, resumed: &[TokenId]) -> Result<State> {
        let field = field(grammar);
        let text: &str = match grammar {
            Grammar::JsonObject => "",
            Grammar::JsonSchema(text) | Grammar::Regex(text) | Grammar::Lark(text) => text,
        };
        if text.len() > self.max_bytes {
            let message = format!("{field} has {} bytes; the limit is {}", text.len(), self.max_bytes);
            return Err(Error::invalid(field, message));
        }
        let mut matcher = match self.cached(grammar) {
            Some(matcher) => matcher,
            None => self.parse(grammar, field)?,
        };
        if !resumed.is_empty() {
            matcher.consume_tokens(resumed).map_err(|error| {
                let reason: String = error.to_string().chars().take(MAX_MESSAGE).collect();
                Error::invalid(field, format!("the tokens emitted before do not follow {field}: {reason}"))
            })?;
        }
        Ok(State { matcher })
    }

    fn cached(&self, grammar: &Grammar) -> Option<Matcher> {
        // Copies made deeply share no state, which a lock would guard, between sequences.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).get(grammar).map(Matcher::deep_clone)
    }

    fn parse(&self, grammar: &Grammar, field: &'static str) -> Result<Matcher> {
        let invalid = |reason: String| {
            let reason: String = reason.chars().take(MAX_MESSAGE).collect();
            Error::invalid(field, format!("{field} cannot be compiled: {}", reason.trim_end()))
        };
        let top = match grammar {
            Grammar::JsonObject => TopLevelGrammar::from_json_schema(serde_json::json!({"type": "object"})),
            Grammar::JsonSchema(text) => {
                let schema = serde_json::from_str(text).map_err(|error| invalid(format!("not JSON: {error}")))?;
                TopLevelGrammar::from_json_schema(schema)
            }
            Grammar::Regex(text) => TopLevelGrammar::from_regex(text),
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text.to_string()),
        };
        let parser = self.factory.create_parser(top).map_err(|error| invalid(format!("{error:#}")))?;
        let matcher = Matcher::new(Ok(parser));
        if let Some(error) = matcher.get_error() {
            return Err(invalid(error));
        }
        self.compiled.fetch_add(1, Ordering::Relaxed);
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).insert(grammar.clone(), matcher.deep_clone());
        Ok(matcher)
    }
}

/// The field that a grammar came in; the gateway names it as its client did.
fn field(grammar: &Grammar) -> &'static str {
    match grammar {
        Grammar::JsonObject | Grammar::JsonSchema(_) => "response_format",
        Grammar::Regex(_) => "regex",
        Grammar::Lark(_) => "grammar",
    }
}

/// A token's bytes as llguidance wants them: control tokens marked, so that text never matches them.
fn word(vocabulary: &Vocabulary, id: TokenId, text: &[u8]) -> Vec<u8> {
    if vocabulary.is_special(id) {
        let mut word = vec![TokTrie::SPECIAL_TOKEN_MARKER];
        // Two control tokens may have the same text; their ids keep them apart.
        word.extend(format!("<{id}:").into_bytes());
        word.extend(text.iter().filter(|byte| !matches!(byte, b'<' | b'>' | 0xff)));
        word.push(b'>');
        word
    } else if text.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) {
        // 0xff starts no UTF-8 text.
        Vec::new()
    } else {
        text.to_vec()
    }
}

/// Where one sequence is in its grammar.
pub struct State {
    matcher: Matcher,
}

impl State {
    /// Whether the output is complete and nothing but the end can follow.
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped() && !self.matcher.is_error()
    }

    /// A bit per token that may come next.
    pub fn mask(&mut self) -> Result<Vec<u32>> {
        match self.matcher.compute_mask() {
            Ok(mask) => Ok(mask.as_slice().to_vec()),
            Err(error) => Err(broken(&error.to_string())),
        }
    }

    /// Goes on by one token, which the last mask allowed.
    pub fn advance(&mut self, token: TokenId) -> Result<()> {
        self.matcher.consume_token(token).map_err(|error| broken(&error.to_string()))
    }
}

fn broken(reason: &str) -> Error {
    let reason: String = reason.chars().take(MAX_MESSAGE).collect();
    Error::internal(format!("the grammar cannot go on: {reason}"))
}

#[cfg(test)]
mod tests;
