//! Clients that stream one answer after another: what is done to a cluster meanwhile hits some of them in mid-answer,
//! however fast the model is.
use crate::cluster::{Cluster, Streaming};
use crate::until;
use anyhow::{Context, Result, bail};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// Clients at work, of which each compares its answers with the one that is right. They end when it is dropped.
pub struct Steady {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<Result<()>>>,
}

struct Shared {
    http: SocketAddr,
    prompt: String,
    want: String,
    tokens: usize,
    is_over: AtomicBool,
    seen: Vec<Seen>,
}

/// What one client saw so far.
#[derive(Default)]
struct Seen {
    events: AtomicU64,
    begun: AtomicU64,
    answered: AtomicU64,
}

impl Steady {
    /// Starts clients that ask for `tokens` tokens, which are `want`, and waits until all are in an answer.
    ///
    /// # Errors
    /// When one of them gets no answer, or not the right one.
    pub fn start(cluster: &Cluster, clients: usize, prompt: &str, tokens: usize, want: &str) -> Result<Self> {
        let seen = (0..clients).map(|_| Seen::default()).collect();
        let (http, prompt, want) = (cluster.http, prompt.to_owned(), want.to_owned());
        let shared = Arc::new(Shared { http, prompt, want, tokens, is_over: AtomicBool::new(false), seen });
        let clients = (0..clients).map(|client| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || shared.ask_on_and_on(&shared.seen[client]))
        });
        let mut steady = Self { clients: clients.collect(), shared };
        let begin = steady.counts(|seen| &seen.events).into_iter().map(|events| events + 20).collect();
        steady.reach("all clients are in an answer", |seen| &seen.events, begin)?;
        Ok(steady)
    }

    /// Waits until each client has the answer that it is in, and a further one, whole and right.
    ///
    /// # Errors
    /// When one does not get them.
    pub fn go_on(&mut self) -> Result<()> {
        let begun = self.counts(|seen| &seen.begun).into_iter().map(|begun| begun + 1).collect();
        self.reach("each client gets whole answers", |seen| &seen.answered, begun)
    }

    /// Waits for the answers under way, and ends.
    ///
    /// # Errors
    /// When a client got no answer, or not the right one.
    pub fn finish(mut self) -> Result<()> {
        self.shared.is_over.store(true, Ordering::Release);
        self.clients.drain(..).try_for_each(ended)
    }

    fn counts(&self, of: fn(&Seen) -> &AtomicU64) -> Vec<u64> {
        self.shared.seen.iter().map(|seen| of(seen).load(Ordering::Acquire)).collect()
    }

    fn reach(&mut self, what: &str, of: fn(&Seen) -> &AtomicU64, wanted: Vec<u64>) -> Result<()> {
        until(what, || {
            if let Some(client) = self.clients.iter().position(JoinHandle::is_finished) {
                ended(self.clients.swap_remove(client))?;
                bail!("a client ended by itself");
            }
            Ok(self.counts(of).iter().zip(&wanted).all(|(count, wanted)| count >= wanted))
        })
    }
}

impl Drop for Steady {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Release);
    }
}

fn ended(client: JoinHandle<Result<()>>) -> Result<()> {
    client.join().unwrap_or_else(|_| bail!("a client panicked"))
}

impl Shared {
    fn ask_on_and_on(&self, seen: &Seen) -> Result<()> {
        while !self.is_over.load(Ordering::Acquire) {
            let number = seen.begun.fetch_add(1, Ordering::AcqRel) + 1;
            self.ask(seen).with_context(|| format!("a client's answer {number}"))?;
            seen.answered.fetch_add(1, Ordering::AcqRel);
        }
        Ok(())
    }

    fn ask(&self, seen: &Seen) -> Result<()> {
        let mut answer = Streaming::ask(self.http, &self.prompt, self.tokens)?;
        while answer.completion_tokens.is_none() {
            if !answer.event()? {
                bail!("the stream ended after {:?}", answer.text);
            }
            seen.events.fetch_add(1, Ordering::AcqRel);
        }
        answer.finish()?;
        if answer.text != self.want || answer.completion_tokens != Some(self.tokens as u64) {
            bail!("{:?} tokens: {:?} in place of {:?}", answer.completion_tokens, answer.text, self.want);
        }
        Ok(())
    }
}
