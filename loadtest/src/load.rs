//! Many clients at once: each with one request after another, or requests that come at times of their own.
use crate::client::{Answer, Completion, Connection};
use anyhow::{Context, Result, bail};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// A request and its answer, or why there is none.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The request's place in the list.
    pub index: usize,
    /// What came.
    pub answer: Result<Answer, String>,
}

/// Requests that come at times of their own.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// When, from the start.
    pub after: Duration,
    /// What is asked.
    pub completion: Completion,
}

/// So many clients take the next request of the list as soon as they have their answer. In the list's order.
///
/// # Errors
/// When a client cannot connect.
pub async fn closed(address: SocketAddr, clients: usize, requests: Vec<Completion>) -> Result<Vec<Outcome>> {
    let queue: VecDeque<_> = requests.into_iter().enumerate().collect();
    let queue = Arc::new(Mutex::new(queue));
    let mut tasks = JoinSet::new();
    let mut connections = Vec::new();
    for _ in 0..clients {
        connections.push(Connection::open(address).await?);
    }
    // none begins before all are connected, so that all begin at once
    for mut connection in connections {
        let queue = Arc::clone(&queue);
        tasks.spawn(async move {
            let mut outcomes = Vec::new();
            let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            while let Some((index, completion)) = next() {
                let answer = connection.complete(&completion).await.map_err(|error| format!("{error:#}"));
                outcomes.push(Outcome { index, answer });
            }
            outcomes
        });
    }
    let mut outcomes: Vec<Outcome> = tasks.join_all().await.into_iter().flatten().collect();
    outcomes.sort_by_key(|outcome| outcome.index);
    Ok(outcomes)
}

/// Each request at its time, whether or not others were answered. In the list's order.
///
/// # Errors
/// When a task of the load fails.
pub async fn open(address: SocketAddr, arrivals: Vec<Arrival>) -> Result<Vec<Outcome>> {
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for (index, Arrival { after, completion }) in arrivals.into_iter().enumerate() {
        tokio::time::sleep_until((begun + after).into()).await;
        tasks.spawn(async move {
            let ask = async { Connection::open(address).await?.complete(&completion).await };
            Outcome { index, answer: ask.await.map_err(|error| format!("{error:#}")) }
        });
    }
    let mut outcomes = tasks.join_all().await;
    outcomes.sort_by_key(|outcome| outcome.index);
    Ok(outcomes)
}

/// The answers, in order.
///
/// # Errors
/// When one request failed: a rate over those that did not says nothing.
pub fn answers(outcomes: Vec<Outcome>) -> Result<Vec<Answer>> {
    let failed: Vec<String> = outcomes.iter().filter_map(|outcome| outcome.answer.clone().err()).collect();
    if let Some(first) = failed.first() {
        bail!("{} of {} requests failed; the first: {first}", failed.len(), outcomes.len());
    }
    Ok(outcomes.into_iter().filter_map(|outcome| outcome.answer.ok()).collect())
}

/// Prompt tokens a second: from the first request to the last first token. Requests of one token each are nothing but
/// their prompts.
///
/// # Errors
/// When there are no answers.
pub fn prompt_rate(answers: &[Answer]) -> Result<f64> {
    let begun = answers.iter().map(|answer| answer.sent).min().context("no answers")?;
    let ended = answers.iter().map(Answer::first).max().context("no answers")?;
    let computed: usize = answers.iter().map(|answer| answer.prompt_tokens - answer.cached_tokens).sum();
    Ok(computed as f64 / (ended - begun).as_secs_f64())
}

/// Tokens generated a second while all answers were being written: from the last one's first token to the first one's
/// last.
///
/// # Errors
/// When they were never all being written.
pub fn generation_rate(answers: &[Answer]) -> Result<f64> {
    let begun = answers.iter().map(Answer::first).max().context("no answers")?;
    let ended = answers.iter().filter_map(|answer| answer.events.last().copied()).min().context("no answers")?;
    let window = ended.checked_duration_since(begun).filter(|window| !window.is_zero());
    let window = window.context("the answers were not all written at the same time; let them be longer")?;
    let of_answer = |answer: &Answer| {
        let within = answer.events.iter().filter(|event| (begun..ended).contains(*event)).count();
        // an event has more than one token where several came at once
        within as f64 * answer.completion_tokens as f64 / answer.events.len().max(1) as f64
    };
    Ok(answers.iter().map(of_answer).sum::<f64>() / window.as_secs_f64())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    fn answer(from: Instant, sent: u64, events: &[u64], prompt: usize) -> Answer {
        let at = |ms: u64| from + Duration::from_millis(ms);
        Answer {
            sent: at(sent),
            events: events.iter().copied().map(at).collect(),
            ended: at(*events.last().unwrap()),
            prompt_tokens: prompt,
            cached_tokens: 0,
            completion_tokens: events.len(),
            told_usage: true,
        }
    }

    #[test]
    fn prompts_are_counted_from_the_first_request_to_the_last_first_token() {
        let from = Instant::now();
        let answers = [answer(from, 0, &[1000], 300), answer(from, 500, &[2000], 100)];
        assert!((prompt_rate(&answers).unwrap() - 200.0).abs() < 1e-6);
        let cached = [Answer { cached_tokens: 200, ..answers[0].clone() }, answers[1].clone()];
        assert!((prompt_rate(&cached).unwrap() - 100.0).abs() < 1e-6, "what is cached is not computed");
        assert!(prompt_rate(&[]).is_err());
    }

    #[test]
    fn generation_is_counted_while_all_are_written() {
        let from = Instant::now();
        // all are written from 200 to 400 ms: there each has two events
        let answers = [answer(from, 0, &[100, 200, 300, 400], 1), answer(from, 0, &[200, 300, 400, 500], 1)];
        assert!((generation_rate(&answers).unwrap() - 4.0 / 0.2).abs() < 1e-6);
        let apart = [answer(from, 0, &[100, 200], 1), answer(from, 0, &[300, 400], 1)];
        assert!(generation_rate(&apart).unwrap_err().to_string().contains("longer"));
    }

    #[test]
    fn one_failure_spoils_a_rate() {
        let fine = Outcome { index: 0, answer: Ok(answer(Instant::now(), 0, &[1], 1)) };
        let failed = Outcome { index: 1, answer: Err("429".into()) };
        assert_eq!(answers(vec![fine.clone()]).unwrap().len(), 1);
        assert!(answers(vec![fine, failed]).unwrap_err().to_string().contains("1 of 2 requests failed"));
    }
}
