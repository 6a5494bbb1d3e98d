//! One choice under way: its tokens become text, and when its replica fails it goes on at another.
use super::answer::{Backend, Piece, PieceStream};
use super::deadline;
use super::job::Job;
use super::place::{Placed, seek};
use super::text::Assembler;
use crate::actors::admission::Permit;
use futures::StreamExt;
use futures::stream;
use moesaic_telemetry::metrics::MIGRATIONS_TOTAL;
use moesaic_types::{Delta, Error, ErrorCode, FinishReason, ReplicaId, Result, TokenId, Usage};
use std::sync::Arc;

pub(super) struct Choice {
    /// As it was when the choice began: another model must not go on with it.
    backend: Arc<Backend>,
    job: Arc<Job>,
    index: usize,
    placed: Placed,
    /// Replicas that failed it since the last token, the latest last.
    failed: Vec<ReplicaId>,
    /// How often that was.
    losses: usize,
    emitted: Vec<TokenId>,
    /// Of these, tokens of earlier replicas.
    resumed: usize,
    /// Prompt tokens that the first replica had in its prefix cache.
    cached: Option<usize>,
    text: Assembler,
    done: bool,
    _permit: Arc<Permit>,
}

impl Choice {
    /// Returns when a replica has accepted the choice.
    pub(super) async fn start(backend: Arc<Backend>, job: Arc<Job>, index: usize, permit: Arc<Permit>) -> Result<Self> {
        let text = Assembler::new(&job);
        let mut failed = Vec::new();
        let placed = seek(&backend, &job, index, &[], &mut failed, None).await?;
        let (losses, resumed, emitted, cached, done) = (0, 0, Vec::new(), None, false);
        let _permit = permit;
        Ok(Self { backend, job, index, placed, failed, losses, emitted, resumed, cached, text, done, _permit })
    }

    pub(super) fn into_stream(self) -> PieceStream {
        stream::unfold(self, |mut choice| async move { choice.next().await.map(|piece| (piece, choice)) }).boxed()
    }

    async fn next(&mut self) -> Option<Result<Piece>> {
        while !self.done {
            let event = deadline::by(self.job.deadline, self.placed.deltas.next()).await;
            let event = event.and_then(|event| event.unwrap_or_else(|| Err(broken_off())));
            let error = match event {
                Ok(delta) => {
                    let piece = self.take(delta);
                    if piece.finish.is_some() || !piece.tokens.is_empty() || piece.prompt_logprobs.is_some() {
                        return Some(Ok(piece));
                    }
                    continue;
                }
                Err(error) => error,
            };
            if error.code == ErrorCode::Unavailable {
                if let Some(reason) = self.complete() {
                    let piece = Piece { choice: self.index, ..Piece::default() };
                    return Some(Ok(self.end(piece, reason)));
                }
                match self.migrate(error).await {
                    Ok(()) => continue,
                    Err(error) => return Some(Err(self.give_up(error))),
                }
            }
            return Some(Err(self.give_up(error)));
        }
        None
    }

    /// Asks another replica to go on with the prompt and the tokens so far. A request that takes down one replica after
    /// the other, without a token from any, is given up.
    async fn migrate(&mut self, error: Error) -> Result<()> {
        let from = self.placed.replica.clone();
        tracing::warn!(id = %self.job.id, %from, %error, "replica failed; going on elsewhere");
        if self.emitted.len() > self.resumed {
            // those that failed before may be back
            self.failed.clear();
            (self.losses, self.resumed) = (0, self.emitted.len());
        }
        self.failed.push(from);
        self.losses += 1;
        if self.losses >= self.backend.attempts {
            return Err(error);
        }
        let earlier = Some((&self.placed.attempt, error));
        let placed = seek(&self.backend, &self.job, self.index, &self.emitted, &mut self.failed, earlier).await?;
        metrics::counter!(MIGRATIONS_TOTAL).increment(1);
        self.placed = placed;
        Ok(())
    }

    /// The end that the tokens so far make by themselves, where a replica failed before it could say so.
    fn complete(&self) -> Option<FinishReason> {
        let stop = &self.job.stop;
        let last = self.emitted.last()?;
        if self.ends_sequence(*last) && self.emitted.len() >= stop.min_tokens {
            return Some(FinishReason::Stop);
        }
        (self.emitted.len() >= stop.max_tokens).then_some(FinishReason::Length)
    }

    fn take(&mut self, delta: Delta) -> Piece {
        let mut piece = Piece { choice: self.index, prompt_logprobs: delta.prompt_logprobs, ..Piece::default() };
        self.cached = self.cached.or(delta.cached_tokens);
        let count = delta.tokens.len();
        for (i, token) in delta.tokens.into_iter().enumerate() {
            self.emitted.push(token.id);
            let last = i + 1 == count;
            let stopped = matches!(delta.finish, Some((FinishReason::Stop, _)));
            if last && stopped && self.ends_sequence(token.id) {
                continue;
            }
            let (text, stop_text) = self.text.push(token.id, self.may_end());
            piece.text += &text;
            piece.tokens.push(self.text.piece(token));
            if stop_text {
                self.placed.enough();
                piece.finish = Some((FinishReason::Stop, self.usage()));
                self.close();
                return piece;
            }
        }
        match delta.finish {
            None => piece,
            Some((reason, usage)) => {
                // an answer without a token has told nothing before
                self.cached = self.cached.or(Some(usage.cached_tokens));
                self.end(piece, reason)
            }
        }
    }

    /// The choice's last piece.
    fn end(&mut self, mut piece: Piece, reason: FinishReason) -> Piece {
        let (text, stop_text) = self.text.finish(self.may_end());
        piece.text += &text;
        piece.finish = Some((if stop_text { FinishReason::Stop } else { reason }, self.usage()));
        self.close();
        piece
    }

    fn give_up(&mut self, error: Error) -> Error {
        self.close();
        self.job.names.apply(error)
    }

    /// Whether a stop text that the last token completed ends the answer: not before `min_tokens` and one more.
    fn may_end(&self) -> bool {
        match self.job.stop.min_tokens {
            0 => true,
            least => self.emitted.len() > least,
        }
    }

    /// Nothing more comes; dropping the replica's stream cancels what still runs there.
    fn close(&mut self) {
        self.done = true;
        self.placed.deltas = stream::empty().boxed();
    }

    fn ends_sequence(&self, token: TokenId) -> bool {
        let stop = &self.job.stop;
        stop.stop_token_ids.contains(&token) || (!stop.ignore_eos && self.job.model.eos.contains(&token))
    }

    /// The whole request's usage, whatever number of replicas had a part in it.
    fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.job.prompt.len(),
            cached_tokens: self.cached.unwrap_or(0).min(self.job.prompt.len()),
            completion_tokens: self.emitted.len(),
        }
    }
}

fn broken_off() -> Error {
    Error::unavailable("the replica's stream ended early; send the request again")
}
