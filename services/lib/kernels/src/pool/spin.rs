//! Bounded waiting by looking, and whether looking is a good thing now.
use std::time::{Duration, Instant};

/// How long a worker looks for a task in any case before it sleeps.
const WORKER: Duration = Duration::from_micros(20);
/// And how long in all while nobody else wants its core: longer than what a decoder does on one thread between two
/// regions, and short beside the pause between two tokens.
const WORKER_CALM: Duration = Duration::from_micros(100);
/// How long the caller looks for the last workers to sign out before it sleeps. Tasks are shorter, as a rule; what takes
/// longer is a worker that has lost its core, and a caller that sleeps leaves it its own.
pub(super) const CALLER: Duration = Duration::from_micros(50);

/// Looks between two looks at the clock: about a microsecond, some 30 times what the clock costs.
const LOOKS: usize = 32;
/// A gap between two looks at the clock that comes about only when the system gave the core to somebody else.
const CORE_LOST: Duration = Duration::from_micros(200);

/// Looks until it is `done`, the budget is used up, or the core was lost to somebody who wants it; says whether it is
/// done.
pub(super) fn until(budget: Duration, mut done: impl FnMut() -> bool) -> bool {
    let mut times = None::<(Instant, Instant)>;
    loop {
        for _ in 0..LOOKS {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        let now = Instant::now();
        let (begin, last) = times.unwrap_or((now, now));
        if now - begin >= budget || now - last >= CORE_LOST {
            return done();
        }
        times = Some((begin, now));
    }
}

/// A worker's waiting for a task: `until`, longer while its core is its own.
///
/// A worker that looks on a core that others want uses up its share there, and then loses the core in the middle of a
/// task, for which the caller waits a time slice. One that sleeps early keeps its share for the tasks.
pub(super) struct Waiting {
    core: Core<RunDelay>,
}

impl Waiting {
    /// For the thread that it is called on.
    pub(super) fn new() -> Self {
        Self { core: Core::new(RunDelay::open()) }
    }

    pub(super) fn until(&mut self, mut done: impl FnMut() -> bool) -> bool {
        until(WORKER, &mut done) || (!self.core.is_wanted(Instant::now()) && until(WORKER_CALM - WORKER, done))
    }
}

/// Where the system tells how long this thread was ready to run and did not: the second number of its `schedstat`.
struct RunDelay(Option<std::fs::File>);

impl RunDelay {
    fn open() -> Self {
        Self(if cfg!(target_os = "linux") { std::fs::File::open("/proc/thread-self/schedstat").ok() } else { None })
    }
}

impl Iterator for RunDelay {
    type Item = Duration;

    #[cfg(unix)]
    fn next(&mut self) -> Option<Duration> {
        let mut text = [0; 64];
        let length = std::os::unix::fs::FileExt::read_at(self.0.as_ref()?, &mut text, 0).ok()?;
        parse_run_delay(text.get(..length)?)
    }

    #[cfg(not(unix))]
    fn next(&mut self) -> Option<Duration> {
        self.0.as_ref().and_then(|_| parse_run_delay(&[]))
    }
}

/// Nanoseconds on a core, nanoseconds ready without one, time slices.
fn parse_run_delay(text: &[u8]) -> Option<Duration> {
    let nanos = std::str::from_utf8(text).ok()?.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(Duration::from_nanos(nanos))
}

/// Whether others want this thread's core, by how much of the last few milliseconds it stood in line for it.
struct Core<D> {
    /// How long it has stood in line so far, whenever it is asked; where that is not told, nobody wants the core.
    delays: D,
    looked: Option<(Instant, Duration)>,
    wanted: bool,
}

impl<D: Iterator<Item = Duration>> Core<D> {
    /// As long as a time slice or two: what is shorter may be one wake.
    const WINDOW: Duration = Duration::from_millis(5);
    /// One part in so many of a window in line means that the core is wanted.
    const SHARE: u32 = 20;

    fn new(delays: D) -> Self {
        Self { delays, looked: None, wanted: false }
    }

    fn is_wanted(&mut self, now: Instant) -> bool {
        if self.looked.is_none_or(|(then, _)| now - then >= Self::WINDOW)
            && let Some(delay) = self.delays.next()
        {
            let line = |(then, before): (Instant, Duration)| delay.saturating_sub(before) * Self::SHARE > now - then;
            self.wanted = self.looked.is_some_and(line);
            self.looked = Some((now, delay));
        }
        self.wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_is_wanted_while_its_thread_stands_in_line() {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let mut core = Core::new([0, 100, 1_100, 2_100, 2_100, 2_500].map(Duration::from_micros).into_iter());
        assert!(!core.is_wanted(at(0)), "nothing is known");
        assert!(!core.is_wanted(at(10)), "0.1 ms of 10");
        assert!(!core.is_wanted(at(12)), "not asked again so soon");
        assert!(core.is_wanted(at(20)), "1 ms of 10");
        assert!(core.is_wanted(at(24)), "not asked again so soon");
        assert!(core.is_wanted(at(30)), "1 ms of 10");
        assert!(!core.is_wanted(at(40)), "nothing of 10");
        assert!(!core.is_wanted(at(1000)), "0.4 ms of 960, most of them asleep");
        assert!(!core.is_wanted(at(2000)), "no longer told");
    }

    #[test]
    fn the_delay_is_the_second_number() {
        assert_eq!(parse_run_delay(b"218915 30713 12\n"), Some(Duration::from_nanos(30_713)));
        assert_eq!(parse_run_delay(b"218915"), None);
        assert_eq!(parse_run_delay(b"a b c"), None);
    }

    #[test]
    fn looking_ends_when_it_is_done_and_when_the_budget_is_used_up() {
        let mut looks = 0;
        let third = || {
            looks += 1;
            looks == 3
        };
        assert!(until(Duration::from_secs(60), third));
        assert_eq!(looks, 3);
        assert!(!until(Duration::from_micros(20), || false));
    }
}
