//! From tokens to what a client sees: text with the stop texts cut out, and tokens with their log-probabilities.
use super::stop::StopMatcher;
use moesaic_model::tokenizer::{DecodeStream, Tokenizer};
use moesaic_types::{SampledToken, TokenId};

/// A token of an answer with its bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenPiece {
    /// The token.
    pub token: SampledToken,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// One choice's text so far.
pub(super) struct Assembler {
    tokenizer: Tokenizer,
    decode: DecodeStream,
    stop: StopMatcher,
}

impl Assembler {
    /// `continues`: the answer goes on with the prompt's text (a completion), so a leading space is its own.
    pub(super) fn new(tokenizer: Tokenizer, skip_special: bool, continues: bool, stops: Vec<String>) -> Self {
        let decode = match continues {
            true => DecodeStream::continuing(tokenizer.clone(), skip_special),
            false => DecodeStream::new(tokenizer.clone(), skip_special),
        };
        Self { tokenizer, decode, stop: StopMatcher::new(stops) }
    }

    /// Text that a token makes visible, and whether a stop text ended the answer.
    pub(super) fn push(&mut self, token: TokenId) -> (String, bool) {
        let text = self.decode.push(token);
        self.stop.push(&text)
    }

    /// What is left at the end, and whether a stop text was in it.
    pub(super) fn finish(&mut self) -> String {
        let rest = self.decode.flush();
        let (mut text, stopped) = self.stop.push(&rest);
        if !stopped {
            text += &self.stop.flush();
        }
        text
    }

    pub(super) fn piece(&self, token: SampledToken) -> TokenPiece {
        let bytes = self.tokenizer.token_bytes(token.id).to_vec();
        TokenPiece { token, bytes }
    }
}
