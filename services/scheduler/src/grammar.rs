//! Structured output: compiles grammars with llguidance and says which tokens are allowed next.
//!
//! Compiling is bounded by the text's length, by llguidance's own limits on the grammar's and the lexer's size, and by
//! time; a few threads do it, away from the runtime's. The first mask is part of it: many grammars that no text can
//! follow, or that are too complex, show so only there. What was compiled is kept by content.
//!
//! JSON between its values: a schema says by llguidance's `x-guidance` what may stand there; one that does not gets a
//! space or a line break with its indentation, once. Free white space is where models go round in circles.
mod cache;
mod multiples;

use self::cache::Cache;
use crate::config::Config;
use crate::vocabulary::Vocabulary;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::{Matcher, ParserFactory};
use moesaic_types::{Error, Grammar, Result, TokenId};
use serde_json::{Value, json};
use std::fmt::Display;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;
use toktrie::{ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};

/// Longest part of llguidance's message that a client sees, in characters.
const MAX_MESSAGE: usize = 600;
/// Symbols of a compiled grammar; llguidance's default is five times as many, which takes seconds.
const MAX_GRAMMAR_SYMBOLS: usize = 100_000;
/// Parser items that one token's mask may take: an ambiguous grammar ends with an error before its masks, which all
/// requests of a batch wait for, take long.
const MAX_STEP_ITEMS: usize = 10_000;
/// States of a grammar's lexer, of 1 to 2 kB each.
const MAX_LEXER_STATES: usize = 50_000;
/// When a request may try again that found all compiling threads taken.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// White space where a schema does not say what may stand between two values: a space, or a new line with its
/// indentation.
const JSON_SPACE: &str = r"( |\r?\n[ \t]{0,24})";

/// Compiles grammars for one vocabulary.
pub struct Compiler {
    factory: ParserFactory,
    /// A bit per token that is nothing but white space or ends the answer.
    blank: Arc<[u32]>,
    max_bytes: usize,
    timeout: Duration,
    /// Places for compilations that run at once.
    workers: Arc<Semaphore>,
    cache: Mutex<Cache<State>>,
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
        let limits = ParserLimits {
            max_grammar_size: MAX_GRAMMAR_SYMBOLS,
            step_max_items: MAX_STEP_ITEMS,
            max_lexer_states: MAX_LEXER_STATES,
            verbose_errors: false,
            ..Default::default()
        };
        *factory.limits_mut() = limits;
        Ok(Self {
            factory,
            blank: blank(vocabulary),
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
        let mut state = match self.cached(grammar) {
            Some(state) => state,
            None => self.first(grammar, field)?,
        };
        if !resumed.is_empty() {
            let matcher = &mut state.matcher;
            matcher.consume_tokens(resumed).map_err(|error| {
                Error::invalid(field, format!("the tokens emitted before do not follow {field}: {}", reason(&error)))
            })?;
            state.look_ahead()?;
        }
        Ok(state)
    }

    fn cached(&self, grammar: &Grammar) -> Option<State> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).get(grammar).map(State::apart)
    }

    /// The state before the first token.
    fn first(&self, grammar: &Grammar, field: &'static str) -> Result<State> {
        let matcher = self.parse(grammar, field)?;
        let json = matches!(grammar, Grammar::JsonObject | Grammar::JsonSchema(_));
        let blank = json.then(|| Arc::clone(&self.blank));
        let mut state = State { matcher, field, blank, ahead: None, complete: false };
        state.ahead = Some(state.compute()?);
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).insert(grammar.clone(), state.apart());
        Ok(state)
    }

    fn parse(&self, grammar: &Grammar, field: &'static str) -> Result<Matcher> {
        let invalid =
            |error: &dyn Display| Error::invalid(field, format!("{field} cannot be compiled: {}", reason(error)));
        let top = match grammar {
            Grammar::JsonObject => TopLevelGrammar::from_json_schema(spaced(json!({"type": "object"}))),
            Grammar::JsonSchema(text) => {
                let schema = serde_json::from_str(text).map_err(|error| invalid(&format!("not JSON: {error}")))?;
                multiples::check(&schema).map_err(|reason| invalid(&reason))?;
                TopLevelGrammar::from_json_schema(spaced(schema))
            }
            Grammar::Regex(text) => TopLevelGrammar::from_regex(text),
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text.to_string()),
        };
        let parser = self.factory.create_parser(top).map_err(|error| invalid(&format!("{error:#}")))?;
        let matcher = Matcher::new(Ok(parser));
        if let Some(error) = matcher.get_error() {
            return Err(invalid(&error));
        }
        self.compiled.fetch_add(1, Ordering::Relaxed);
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

/// A schema that says what may stand between its values.
fn spaced(schema: Value) -> Value {
    let mut schema = match schema {
        // the same, in a form that has room for it
        Value::Bool(true) => json!({}),
        schema => schema,
    };
    if let Value::Object(schema) = &mut schema {
        schema.entry("x-guidance").or_insert_with(|| json!({"whitespace_pattern": JSON_SPACE}));
    }
    schema
}

/// A bit per token that is nothing but white space, or that ends an answer.
fn blank(vocabulary: &Vocabulary) -> Arc<[u32]> {
    let mut bits = vec![0; vocabulary.token_bytes.len().div_ceil(32)];
    for (id, text) in vocabulary.token_bytes.iter().enumerate() {
        let ends = TokenId::try_from(id).is_ok_and(|id| vocabulary.eos.contains(&id));
        if ends || text.iter().all(u8::is_ascii_whitespace) {
            bits[id / 32] |= 1 << (id % 32);
        }
    }
    bits.into()
}

/// Where one sequence is in its grammar.
pub struct State {
    matcher: Matcher,
    /// The field that the grammar came in.
    field: &'static str,
    /// Of JSON: tokens that add nothing to a value.
    blank: Option<Arc<[u32]>>,
    /// The next mask, where it was needed before.
    ahead: Option<Vec<u32>>,
    complete: bool,
}

impl State {
    /// Whether the output is complete and nothing but the end, or white space, can follow.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// A bit per token that may come next.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field: no token may, or finding them takes more than llguidance's limits allow.
    pub fn mask(&mut self) -> Result<Vec<u32>> {
        match self.ahead.take() {
            Some(mask) => Ok(mask),
            None => self.compute(),
        }
    }

    /// Goes on by one token, which the last mask allowed.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field, where llguidance's limits do not allow to go on.
    pub fn advance(&mut self, token: TokenId) -> Result<()> {
        self.matcher.consume_token(token).map_err(|error| self.broken(&error))?;
        self.look_ahead()
    }

    /// Finds out whether the output is complete. In JSON this may need the next mask, which is kept.
    fn look_ahead(&mut self) -> Result<()> {
        self.ahead = None;
        self.complete = self.matcher.is_stopped() && !self.matcher.is_error();
        let Some(blank) = self.blank.clone().filter(|_| !self.complete) else { return Ok(()) };
        if self.matcher.is_accepting().map_err(|error| self.broken(&error))? {
            let mask = self.compute()?;
            self.complete = mask.iter().zip(blank.iter()).all(|(allowed, blank)| allowed & !blank == 0);
            self.ahead = Some(mask);
        }
        Ok(())
    }

    fn compute(&mut self) -> Result<Vec<u32>> {
        match self.matcher.compute_mask() {
            Ok(mask) => Ok(mask.as_slice().to_vec()),
            Err(error) => Err(self.broken(&error)),
        }
    }

    /// What the client's own grammar led to.
    fn broken(&self, error: &dyn Display) -> Error {
        let (field, reason) = (self.field, reason(error));
        let message = match reason.as_str() {
            "NoExtensionBias" => format!("{field} leads to a place where no text can follow: nothing matches it"),
            _ => format!("{field} is too complex to follow: {reason}; make it simpler"),
        };
        Error::invalid(field, message)
    }

    /// A copy that shares no state, which a lock would guard, with this one.
    fn apart(&self) -> Self {
        let Self { matcher, field, blank, ahead, complete } = self;
        let (field, blank, ahead, complete) = (*field, blank.clone(), ahead.clone(), *complete);
        Self { matcher: matcher.deep_clone(), field, blank, ahead, complete }
    }
}

/// What llguidance complains of, as short as a client needs it.
fn reason(error: &dyn Display) -> String {
    let text = error.to_string();
    let text = text.split("<non-verbose/>").next().unwrap_or_default().trim_end();
    text.chars().take(MAX_MESSAGE).collect()
}

#[cfg(test)]
mod tests;
