//! From tokens to what a client sees: text with the stop texts cut out, and tokens with their log-probabilities.
use super::job::Job;
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
    pub(super) fn new(job: &Job) -> Self {
        let tokenizer = job.model.tokenizer.clone();
        let decode = match job.continues {
            // a space at its start is the answer's own
            true => DecodeStream::continuing(tokenizer.clone(), job.skip_special),
            false => DecodeStream::new(tokenizer.clone(), job.skip_special),
        };
        Self { tokenizer, decode, stop: StopMatcher::new(job.stop_texts.clone(), job.include_stop_text) }
    }

    /// Text that a token makes visible, and whether a stop text ended the answer, which it may.
    pub(super) fn push(&mut self, token: TokenId, may_end: bool) -> (String, bool) {
        let text = self.decode.push(token);
        self.stop.push(&text, may_end)
    }

    /// What is left at the end, and whether a stop text was in it.
    pub(super) fn finish(&mut self, may_end: bool) -> (String, bool) {
        let rest = self.decode.flush();
        let (mut text, stopped) = self.stop.push(&rest, may_end);
        if !stopped {
            text += &self.stop.flush();
        }
        (text, stopped)
    }

    pub(super) fn piece(&self, token: SampledToken) -> TokenPiece {
        let bytes = self.tokenizer.token_bytes(token.id).to_vec();
        TokenPiece { token, bytes }
    }
}
