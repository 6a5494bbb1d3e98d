//! Structured output: compiles grammars with llguidance and says which tokens are allowed next.
use crate::vocabulary::Vocabulary;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::{Matcher, ParserFactory};
use moesaic_types::{Error, Grammar, Result, TokenId};
use std::sync::Arc;
use toktrie::{ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};

/// Longest part of llguidance's message that a client sees, in characters.
const MAX_MESSAGE: usize = 600;

/// Compiles grammars for one vocabulary.
pub struct Compiler {
    factory: ParserFactory,
    max_bytes: usize,
}

impl Compiler {
    /// For a vocabulary; grammars longer than `max_bytes` are refused.
    pub fn new(vocabulary: &Vocabulary, max_bytes: usize) -> Result<Self> {
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
        *factory.limits_mut() = ParserLimits { verbose_errors: false, ..ParserLimits::default() };
        Ok(Self { factory, max_bytes })
    }

    /// Compiles a grammar and replays the tokens that were emitted before. Takes long for large schemas: call it
    /// where blocking is allowed.
    pub fn compile(&self, grammar: &Grammar, resumed: &[TokenId]) -> Result<State> {
        let (field, text): (_, &str) = match grammar {
            Grammar::JsonObject => ("response_format", ""),
            Grammar::JsonSchema(text) => ("response_format", text),
            Grammar::Regex(text) => ("regex", text),
            Grammar::Lark(text) => ("grammar", text),
        };
        if text.len() > self.max_bytes {
            let message = format!("{field} has {} bytes; the limit is {}", text.len(), self.max_bytes);
            return Err(Error::invalid(field, message));
        }
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
        let mut matcher = Matcher::new(Ok(parser));
        if let Some(error) = matcher.get_error() {
            return Err(invalid(error));
        }
        if !resumed.is_empty() {
            matcher.consume_tokens(resumed).map_err(|error| {
                let reason: String = error.to_string().chars().take(MAX_MESSAGE).collect();
                Error::invalid(field, format!("the tokens emitted before do not follow {field}: {reason}"))
            })?;
        }
        Ok(State { matcher })
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
mod tests {
    use super::*;
    use moesaic_types::ErrorCode;

    fn bytes() -> Vocabulary {
        let mut token_bytes: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        token_bytes.push(b"<end>".to_vec());
        token_bytes.push(b"<turn>".to_vec());
        Vocabulary { token_bytes, special: vec![], eos: vec![256, 257] }
    }

    fn allowed(state: &mut State) -> Vec<TokenId> {
        let mask = state.mask().unwrap();
        (0..258).filter(|&id| mask[id as usize / 32] >> (id % 32) & 1 == 1).collect()
    }

    #[test]
    fn a_regex_allows_what_matches_and_ends() {
        let compiler = Compiler::new(&bytes(), 1000).unwrap();
        let mut state = compiler.compile(&Grammar::Regex("a(b|c)?/".into()), &[]).unwrap();
        assert_eq!(allowed(&mut state), [97]);
        state.advance(97).unwrap();
        assert_eq!(allowed(&mut state), [47, 98, 99]);
        state.advance(99).unwrap();
        assert!(!state.is_complete());
        state.advance(47).unwrap();
        assert!(state.is_complete());
        let mut resumed = compiler.compile(&Grammar::Regex("ab*".into()), &[97, 98]).unwrap();
        assert_eq!(allowed(&mut resumed), [98, 256, 257]);
        resumed.advance(257).unwrap();
        assert!(resumed.is_complete());
    }

    #[test]
    fn bad_grammars_are_refused_with_their_field() {
        let compiler = Compiler::new(&bytes(), 50).unwrap();
        let long: Arc<str> = "a".repeat(51).into();
        let cases = [
            (Grammar::JsonSchema("{".into()), "response_format"),
            (Grammar::JsonSchema("{\"type\": \"unknown\"}".into()), "response_format"),
            (Grammar::Regex("(".into()), "regex"),
            (Grammar::Regex(long), "regex"),
            (Grammar::Lark("start: missing".into()), "grammar"),
        ];
        for (grammar, field) in cases {
            let error = compiler.compile(&grammar, &[]).err().unwrap_or_else(|| panic!("{grammar:?} compiled"));
            assert_eq!((error.code, error.field.as_deref()), (ErrorCode::InvalidArgument, Some(field)), "{error}");
        }
        assert!(compiler.compile(&Grammar::Regex("ab".into()), &[120]).is_err());
    }

    #[test]
    fn a_schema_admits_its_documents_only() {
        let compiler = Compiler::new(&bytes(), 1000).unwrap();
        let schema = r#"{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}"#;
        let follow = |text: &str| -> Result<()> {
            let mut state = compiler.compile(&Grammar::JsonSchema(schema.into()), &[])?;
            for byte in text.bytes() {
                let mask = state.mask()?;
                if mask[byte as usize / 32] >> (byte % 32) & 1 == 0 {
                    return Err(Error::internal(format!("{byte} is not allowed")));
                }
                state.advance(byte as TokenId)?;
            }
            Ok(())
        };
        follow(r#"{"a": 12}"#).unwrap();
        assert!(follow(r#"{"a": "x"}"#).is_err());
        assert!(follow("[1]").is_err());
    }
}
