//! What a run's samples say.
use super::drive::{Run, Sample};
use super::slo::{Objective, Slo, gaps};
use crate::client::Answer;
use crate::stats::Summary;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What is left out at a run's begin.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum WarmUp {
    /// Requests that are scheduled before.
    Time(Duration),
    /// The first so many requests.
    Requests(usize),
}

/// The schedule was kept where 99 in 100 requests were sent within so long after their time.
const LATE: Duration = Duration::from_millis(10);

/// Answers came as fast as requests where at the end of the sending at most so many times as many requests were in flight
/// as at its half, and [`SPREAD`] of their usual deviation more. Where requests come faster for long, it is twice as many.
const GROWTH: f64 = 1.3;
/// In flight are of independent requests as many as a Poisson distribution says: the root of their mean is its deviation.
const SPREAD: f64 = 2.5;

/// How many requests met the objectives.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Goodput {
    /// The objectives.
    pub slo: String,
    /// Requests that met all.
    pub good: usize,
    /// Of all that were counted, those that failed among them.
    pub share: f64,
    /// Good requests a second: in an open loop their share of those that were offered, in a closed one those whose
    /// answers ended in the window, as rates are.
    pub requests_s: f64,
    /// Answers that missed each.
    pub missed: BTreeMap<Objective, usize>,
}

/// A run in numbers. Times in seconds; those of an open loop are from when a request was scheduled.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Measured {
    /// Requests that were counted.
    pub requests: usize,
    /// Requests before them, to warm up.
    pub warm_up_requests: usize,
    /// Answers, of those that were counted.
    pub answered: usize,
    /// Failures of all requests, by kind.
    pub errors: BTreeMap<String, usize>,
    /// The first failure of each kind in words.
    pub first_errors: BTreeMap<String, String>,
    /// What rates are over: from the first counted request to the last answer, or to the run's end in time.
    pub window_s: f64,
    /// Requests a second that were scheduled in it.
    pub offered_requests_s: f64,
    /// Answers a second that ended in it.
    pub answered_requests_s: f64,
    /// Prompt tokens a second, those from a prefix cache included.
    pub prompt_tok_s: f64,
    /// Tokens a second of all answers together.
    pub generation_tok_s: f64,
    /// Of the prompts' tokens, the share that came from a prefix cache.
    pub cached_share: f64,
    /// Time to the first token.
    pub ttft_s: Summary,
    /// Gaps between the events of answers, of all answers together.
    pub itl_s: Summary,
    /// Time for each token after the first, the mean of each answer.
    pub tpot_s: Summary,
    /// Time to the answer's end.
    pub e2e_s: Summary,
    /// Tokens of prompts.
    pub prompt_tokens: Summary,
    /// Tokens of answers.
    pub answer_tokens: Summary,
    /// Answers that are shorter than was asked for.
    pub short_answers: usize,
    /// Objectives.
    pub goodput: Option<Goodput>,
    /// How long after its time a request was sent.
    pub late_s: Summary,
    /// False: this program could not send requests at their times.
    pub kept_schedule: bool,
    /// Requests in flight at the half of the sending, and at its end.
    pub in_flight: [usize; 2],
    /// False: answers came more slowly than requests, of which more and more were in flight.
    pub kept_up: bool,
    /// False: the server did not tell the numbers of tokens of every answer; events were counted in their place, and
    /// prompts as they were made.
    pub told_usage: bool,
    /// Tokens of an event; above 1 gaps are between several tokens.
    pub tokens_an_event: f64,
}

fn is_counted(warm_up: WarmUp, sample: &Sample) -> bool {
    match warm_up {
        WarmUp::Time(time) => sample.scheduled >= time,
        WarmUp::Requests(count) => sample.index >= count,
    }
}

fn prompt_tokens(sample: &Sample, answer: &Answer) -> f64 {
    if answer.told_usage { answer.prompt_tokens as f64 } else { sample.prompt_tokens as f64 }
}

/// Requests that had been scheduled by then and had no end; one that failed until it did.
fn in_flight(run: &Run, at: Duration) -> usize {
    run.samples.iter().filter(|sample| sample.scheduled <= at && sample.ended > at).count()
}

/// What rates are over: from the first counted request to the last answer, or to the run's end in time.
#[derive(Clone, Copy)]
struct Window {
    from: Instant,
    to: Instant,
}

impl Window {
    fn of(run: &Run, first: Duration, last: Duration, duration: Option<Duration>) -> Self {
        let from = run.begun + first;
        let ended = |sample: &Sample| sample.outcome.as_ref().ok().map(|answer| answer.ended);
        let last_answer = run.samples.iter().filter_map(ended).max().unwrap_or(from);
        let to = duration.map_or(last_answer, |duration| (run.begun + duration).min(last_answer));
        Self { from, to: to.max(run.begun + last) }
    }

    fn has(&self, at: Instant) -> bool {
        (self.from..=self.to).contains(&at)
    }

    fn seconds(&self) -> f64 {
        (self.to - self.from).as_secs_f64().max(1e-9)
    }
}

/// Tokens of an answer that came in a time: an event has more than one where several came at once.
fn tokens_in(answer: &Answer, window: Window) -> f64 {
    let tokens = answer.completion_tokens as f64;
    if answer.events.is_empty() {
        return if window.has(answer.ended) { tokens } else { 0.0 };
    }
    let within = answer.events.iter().filter(|event| window.has(**event)).count();
    within as f64 * tokens / answer.events.len() as f64
}

impl Measured {
    /// Of a run that ended sending after `duration`, where it has one. `open`: there is a schedule to keep.
    pub fn of(run: &Run, warm_up: WarmUp, duration: Option<Duration>, slo: &Slo, open: bool) -> Self {
        let (counted, before): (Vec<&Sample>, Vec<&Sample>) =
            run.samples.iter().partition(|sample| is_counted(warm_up, sample));
        let answers: Vec<(&Sample, &Answer)> =
            counted.iter().filter_map(|sample| Some((*sample, sample.outcome.as_ref().ok()?))).collect();
        let mut measured = Self {
            requests: counted.len(),
            warm_up_requests: before.len(),
            answered: answers.len(),
            kept_schedule: true,
            kept_up: true,
            told_usage: answers.iter().all(|(_, answer)| answer.told_usage),
            ..Self::default()
        };
        for failure in run.samples.iter().filter_map(|sample| sample.outcome.as_ref().err()) {
            *measured.errors.entry(failure.kind()).or_default() += 1;
            measured.first_errors.entry(failure.kind()).or_insert_with(|| failure.to_string());
        }
        let scheduled = || counted.iter().map(|sample| sample.scheduled);
        let Some((first, last)) = scheduled().min().zip(scheduled().max()) else { return measured };
        let window = Window::of(run, first, last, duration);
        measured.times(run.begun, &answers);
        measured.rates(run, window, last - first);
        let late = counted.iter().map(|sample| sample.sent.saturating_sub(sample.scheduled).as_secs_f64());
        measured.late_s = Summary::of(late);
        if open {
            measured.kept_schedule = measured.late_s.p99 <= LATE.as_secs_f64();
            measured.in_flight = [first + (last - first) / 2, last].map(|at| in_flight(run, at));
            let [half, end] = measured.in_flight.map(|count| count as f64);
            measured.kept_up = end <= half * GROWTH + SPREAD * half.sqrt().max(1.0);
        }
        if !slo.0.is_empty() {
            measured.goodput = Some(measured.good(run, slo, &answers, if open { None } else { Some(window) }));
        }
        measured
    }

    fn times(&mut self, begun: Instant, answers: &[(&Sample, &Answer)]) {
        let since = |sample: &Sample, at: Instant| at.saturating_duration_since(begun + sample.scheduled).as_secs_f64();
        self.ttft_s = Summary::of(answers.iter().map(|(sample, answer)| since(sample, answer.first())));
        self.e2e_s = Summary::of(answers.iter().map(|(sample, answer)| since(sample, answer.ended)));
        self.itl_s = Summary::of(answers.iter().flat_map(|(_, answer)| gaps(answer)));
        self.tpot_s = Summary::of(answers.iter().filter_map(|(_, answer)| answer.time_per_token()));
        self.prompt_tokens = Summary::of(answers.iter().map(|(sample, answer)| prompt_tokens(sample, answer)));
        self.answer_tokens = Summary::of(answers.iter().map(|(_, answer)| answer.completion_tokens as f64));
        self.short_answers =
            answers.iter().filter(|(sample, answer)| answer.completion_tokens < sample.answer_tokens).count();
        let sum = |of: &dyn Fn(&Answer) -> usize| answers.iter().map(|(_, answer)| of(answer)).sum::<usize>() as f64;
        let (tokens, events) = (sum(&|answer| answer.completion_tokens), sum(&|answer| answer.events.len()));
        self.tokens_an_event = tokens / events.max(1.0);
        self.cached_share = sum(&|answer| answer.cached_tokens) / sum(&|answer| answer.prompt_tokens).max(1.0);
    }

    /// Rates over the window: what all requests got in it, also those that are not counted, which took their part of the
    /// server. `sent_for`: from the first counted request to the last.
    fn rates(&mut self, run: &Run, window: Window, sent_for: Duration) {
        let seconds = window.seconds();
        let rate = |of: &dyn Fn(&Sample, &Answer) -> f64| {
            let of = |sample: &Sample| sample.outcome.as_ref().map_or(0.0, |answer| of(sample, answer));
            run.samples.iter().map(of).sum::<f64>() / seconds
        };
        let within = |at: Instant, amount: f64| if window.has(at) { amount } else { 0.0 };
        self.window_s = seconds;
        // the gap before the first request belongs to it, as that before each other one does
        self.offered_requests_s = match self.requests {
            0 | 1 => self.requests as f64 / seconds,
            _ if !sent_for.is_zero() => (self.requests - 1) as f64 / sent_for.as_secs_f64(),
            more => more as f64 / seconds,
        };
        self.answered_requests_s = rate(&|_, answer| within(answer.ended, 1.0));
        self.prompt_tok_s = rate(&|sample, answer| within(answer.first(), prompt_tokens(sample, answer)));
        self.generation_tok_s = rate(&|_, answer| tokens_in(answer, window));
    }

    /// `window`: that of a closed loop, whose clients offer only what is answered; what all requests got in it counts, as
    /// for rates.
    fn good(&self, run: &Run, slo: &Slo, answers: &[(&Sample, &Answer)], window: Option<Window>) -> Goodput {
        let missed_by = |sample: &Sample, answer: &Answer| slo.missed(run.begun + sample.scheduled, answer);
        let mut missed: BTreeMap<Objective, usize> = slo.0.iter().map(|(objective, _)| (*objective, 0)).collect();
        let mut good = 0;
        for (sample, answer) in answers {
            let of_answer = missed_by(sample, answer);
            good += usize::from(of_answer.is_empty());
            of_answer.into_iter().for_each(|objective| *missed.entry(objective).or_default() += 1);
        }
        let share = good as f64 / self.requests.max(1) as f64;
        let requests_s = window.map_or(share * self.offered_requests_s, |window| {
            let is_good = |sample: &&Sample| {
                let answer = sample.outcome.as_ref().ok().filter(|answer| window.has(answer.ended));
                answer.is_some_and(|answer| missed_by(sample, answer).is_empty())
            };
            run.samples.iter().filter(is_good).count() as f64 / window.seconds()
        });
        Goodput { slo: slo.to_string(), good, share, requests_s, missed }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;
    use crate::client::Failure;

    /// Scheduled, sent, events in ms; the answer ends with its last event.
    fn sample(begun: Instant, index: usize, scheduled: u64, sent: u64, events: &[u64]) -> Sample {
        let at = |ms: &u64| begun + Duration::from_millis(*ms);
        let outcome = match events.last() {
            None => Err(Failure::Refused { status: 429, text: format!("busy {index}") }),
            Some(last) => Ok(Answer {
                sent: at(&sent),
                events: events.iter().map(at).collect(),
                ended: at(last),
                prompt_tokens: 100,
                cached_tokens: 25,
                completion_tokens: events.len(),
                told_usage: true,
            }),
        };
        // what fails does so 700 ms after it was sent
        let ended = events.last().copied().unwrap_or(sent + 700);
        let [scheduled, sent, ended] = [scheduled, sent, ended].map(Duration::from_millis);
        Sample { index, scheduled, sent, ended, prompt_tokens: 90, answer_tokens: 3, outcome }
    }

    fn run() -> Run {
        let begun = Instant::now();
        let samples = vec![
            sample(begun, 0, 0, 0, &[50, 60, 1200]),
            sample(begun, 1, 1000, 1004, &[1100, 1200, 1300]),
            sample(begun, 2, 1500, 1500, &[]),
            sample(begun, 3, 2000, 2001, &[2400, 2500]),
        ];
        Run { begun, samples }
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-6
    }

    #[test]
    fn times_are_from_the_schedule_and_warm_up_is_left_out() {
        let slo = "ttft=200ms,itl=100ms".parse().unwrap();
        for warm_up in [WarmUp::Time(Duration::from_millis(500)), WarmUp::Requests(1)] {
            let measured = Measured::of(&run(), warm_up, None, &slo, true);
            assert_eq!((measured.requests, measured.warm_up_requests, measured.answered), (3, 1, 2));
            let Measured { ttft_s, itl_s, tpot_s, e2e_s, .. } = &measured;
            assert!(close(ttft_s.min, 0.1) && close(ttft_s.max, 0.4), "{ttft_s:?}");
            assert!(close(e2e_s.min, 0.3) && close(e2e_s.max, 0.5), "{e2e_s:?}");
            assert!(itl_s.count == 3 && close(itl_s.p50, 0.1) && close(tpot_s.mean, 0.1), "{itl_s:?}");
            assert_eq!((measured.short_answers, measured.errors["http 429"]), (1, 1));
            assert_eq!(measured.first_errors["http 429"], "429: busy 2");
            assert!(close(measured.cached_share, 0.25) && measured.kept_schedule && measured.told_usage);
            let goodput = measured.goodput.unwrap();
            assert_eq!((goodput.good, goodput.missed[&Objective::Ttft], goodput.missed[&Objective::Itl]), (1, 1, 0));
            assert!(close(goodput.share, 1.0 / 3.0), "what failed is not good");
            assert!(close(goodput.requests_s, 2.0 / 3.0), "a third of two a second that were offered");
        }
    }

    #[test]
    fn goodput_of_a_closed_loop_is_what_ended_well_in_the_window() {
        let slo: Slo = "e2e=700ms".parse().unwrap();
        let good = |until: Option<u64>| {
            let until = until.map(Duration::from_millis);
            let measured = Measured::of(&run(), WarmUp::Requests(1), until, &slo, false);
            let goodput = measured.goodput.unwrap();
            (goodput.good, goodput.requests_s * measured.window_s)
        };
        let all = good(None);
        assert!(all.0 == 2 && close(all.1, 2.0), "{all:?}");
        // the second good answer ends after it
        let cut = good(Some(2400));
        assert!(cut.0 == 2 && close(cut.1, 1.0), "{cut:?}");
    }

    #[test]
    fn a_request_is_in_flight_until_it_failed() {
        let at = |ms: u64| in_flight(&run(), Duration::from_millis(ms));
        // the third is sent at 1500 and refused at 2200, the fourth is sent at 2000
        assert_eq!([1400, 1500, 2100, 2200, 2500].map(at), [0, 1, 2, 1, 0]);
    }

    #[test]
    fn rates_are_over_the_window_and_count_what_all_requests_got_in_it() {
        let measured = Measured::of(&run(), WarmUp::Requests(1), None, &Slo::default(), true);
        // from 1000 to 2500 ms: six tokens, one of which is the warm-up request's; three answers end, two prompts
        assert!(close(measured.window_s, 1.5));
        assert!(close(measured.generation_tok_s, 6.0 / 1.5), "{measured:?}");
        assert!(close(measured.answered_requests_s, 3.0 / 1.5) && close(measured.prompt_tok_s, 200.0 / 1.5));
        assert!(close(measured.offered_requests_s, 2.0));
        // and until its end in time, or the last request's
        let until = Some(Duration::from_millis(2400));
        let cut = Measured::of(&run(), WarmUp::Requests(1), until, &Slo::default(), true);
        assert!(close(cut.window_s, 1.4) && close(cut.generation_tok_s, 5.0 / 1.4), "{cut:?}");
        assert!(cut.goodput.is_none());
    }

    #[test]
    fn a_schedule_that_was_not_kept_is_told_and_a_server_that_did_not_keep_up() {
        let begun = Instant::now();
        // one request each 10 ms, one answer each 50 ms
        let late: Vec<Sample> =
            (0..40).map(|n| sample(begun, n as usize, n * 10, n * 10 + n, &[n * 50 + 60])).collect();
        let run = Run { begun, samples: late };
        let measured = Measured::of(&run, WarmUp::Requests(0), None, &Slo::default(), true);
        assert!(!measured.kept_schedule && !measured.kept_up, "{measured:?}");
        assert_eq!(measured.in_flight, [17, 33]);
        // slow answers, but as many as requests
        let steady = (0..40).map(|n| sample(begun, n as usize, n * 10, n * 10, &[n * 10 + 100])).collect();
        let steady = Run { begun, samples: steady };
        let measured = Measured::of(&steady, WarmUp::Requests(0), None, &Slo::default(), true);
        assert!(measured.kept_schedule && measured.kept_up, "{measured:?}");
        // a closed loop has no schedule
        let closed = Measured::of(&run, WarmUp::Requests(0), None, &Slo::default(), false);
        assert!(closed.kept_schedule && closed.kept_up);
    }

    #[test]
    fn tokens_are_events_where_no_usage_is_told() {
        let mut run = run();
        if let Ok(answer) = &mut run.samples[1].outcome {
            answer.told_usage = false;
        }
        let measured = Measured::of(&run, WarmUp::Requests(1), None, &Slo::default(), true);
        assert!(
            !measured.told_usage && close(measured.prompt_tokens.min, 90.0) && close(measured.tokens_an_event, 1.0)
        );
    }

    #[test]
    fn nothing_counted_is_nothing() {
        let measured = Measured::of(&run(), WarmUp::Requests(9), None, &Slo::default(), true);
        assert_eq!((measured.requests, measured.answered, measured.ttft_s.count), (0, 0, 0));
        assert_eq!(measured.errors["http 429"], 1, "failures are never left out");
    }
}
