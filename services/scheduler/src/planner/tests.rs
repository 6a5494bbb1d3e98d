use super::*;
use proptest::prelude::*;

fn limits(available: usize) -> Limits {
    Limits { token_budget: 64, max_chunk: 64, max_running: 4, available }
}

fn running(key: u64, priority: i32, tokens: usize, computed: usize) -> Running {
    let held = blocks_for(computed);
    Running { key, priority: Priority(priority), promoted: false, tokens, computed, held, exclusive: held }
}

fn waiting(key: u64, priority: i32, tokens: usize) -> Waiting {
    Waiting { key, priority: Priority(priority), promoted: false, tokens, hits: 0, idle_hits: 0, fetched: 0 }
}

#[test]
fn decodes_go_before_prefill_and_share_the_budget() {
    let batch = [running(1, 0, 200, 0), running(2, 0, 11, 10)];
    assert_eq!(plan(&batch, &[], &limits(9)).chunks, vec![(1, 63), (2, 1)]);
}

#[test]
fn the_latest_of_the_lowest_priority_is_preempted() {
    let batch = [running(1, 0, 65, 64), running(2, 1, 65, 64), running(3, 0, 40, 39)];
    let plan = plan(&batch, &[], &limits(0));
    assert_eq!(plan.preempt, vec![3], "one block is enough; 1 keeps its own and waits for another");
    assert_eq!(plan.chunks, vec![(2, 1)]);
}

#[test]
fn higher_priority_is_admitted_first_and_a_large_head_blocks_the_queue() {
    let plan = plan(&[], &[waiting(1, 0, 10), waiting(2, 5, 20), waiting(3, 0, 300), waiting(4, 0, 1)], &limits(5));
    assert_eq!(plan.admit, vec![2, 1]);
}

#[test]
fn a_waiting_sequence_preempts_lower_priorities_only() {
    let batch = [running(1, 0, 100, 99), running(2, 0, 100, 99)];
    assert_eq!(plan(&batch, &[waiting(3, 0, 60)], &limits(0)).preempt, Vec::<u64>::new());
    let plan = plan(&batch, &[waiting(3, 1, 60)], &limits(0));
    assert_eq!((plan.preempt, plan.admit, plan.chunks), (vec![2], vec![3], vec![(1, 1), (3, 60)]));
}

#[test]
fn a_promoted_sequence_goes_first() {
    let old = Waiting { promoted: true, ..waiting(9, -1, 60) };
    let one = Limits { max_running: 1, ..limits(9) };
    assert_eq!(plan(&[], &[waiting(1, 5, 60), old], &one).admit, vec![9]);
}

#[test]
fn a_promoted_sequence_is_not_pushed_out_again() {
    let promoted = Running { promoted: true, ..running(9, -1, 60, 59) };
    let alone = Limits { max_running: 1, ..limits(9) };
    let plan = plan(&[promoted], &[waiting(1, 5, 60)], &alone);
    assert_eq!((plan.preempt, plan.chunks), (vec![], vec![(9, 1)]));
}

#[test]
fn a_higher_priority_is_admitted_before_a_running_prefill_goes_on() {
    let batch = [running(1, 0, 900, 64)];
    let found = plan(&batch, &[waiting(2, 1, 50), waiting(3, 0, 50)], &limits(40));
    assert_eq!((found.preempt, found.admit, found.chunks), (vec![], vec![2], vec![(1, 14), (2, 50)]));
}

#[test]
fn a_step_without_tokens_left_preempts_nobody() {
    let batch = [running(1, 0, 65, 64), running(2, 0, 11, 10), running(3, 0, 640, 576)];
    let none_left = Limits { token_budget: 2, max_chunk: 2, max_running: 3, available: 1 };
    let plan = plan(&batch, &[waiting(4, 7, 10)], &none_left);
    assert_eq!((plan.preempt, plan.admit, plan.chunks), (vec![], vec![], vec![(1, 1), (2, 1)]));
}

#[test]
fn a_step_without_tokens_left_preempts_nobody_for_a_prefill_without_room() {
    let batch = [running(1, 0, 11, 10), running(2, 0, 640, 576), running(3, 0, 640, 64)];
    let none_left = Limits { token_budget: 1, max_chunk: 64, max_running: 3, available: 0 };
    let plan = plan(&batch, &[], &none_left);
    assert_eq!((plan.preempt, plan.chunks), (vec![], vec![(1, 1)]));
}

#[test]
fn nobody_is_admitted_whose_blocks_the_batch_will_need_before_its_first_token() {
    // In the three steps of the candidate's prompt the decodes grow into a block each.
    let batch = [running(1, 0, 62, 61), running(2, 0, 63, 62)];
    assert_eq!(plan(&batch, &[waiting(3, 0, 190)], &limits(4)).admit, Vec::<u64>::new());
    assert_eq!(plan(&batch, &[waiting(3, 0, 190)], &limits(5)).admit, vec![3]);
}

proptest! {
    #[test]
    fn a_plan_keeps_the_limits_and_the_first_rank_advances(
        batch in prop::collection::vec((0i32..3, 1usize..400, 0usize..400), 0..8),
        queue in prop::collection::vec((0i32..3, 1usize..400), 0..8),
        spare in 0usize..10,
        chunk in 1usize..100,
    ) {
        let batch: Vec<_> = batch.iter().enumerate()
            .map(|(key, &(priority, tokens, computed))| running(key as u64, priority, tokens, computed.min(tokens - 1)))
            .collect();
        let queue: Vec<_> = queue.iter().enumerate()
            .map(|(key, &(priority, tokens))| waiting(100 + key as u64, priority, tokens)).collect();
        let limits = Limits { token_budget: 64, max_chunk: chunk, max_running: 8, available: spare };
        let plan = plan(&batch, &queue, &limits);
        check(&batch, &queue, &plan, &limits)?;
        let freed: usize = batch.iter().filter(|s| plan.preempt.contains(&s.key)).map(|s| s.exclusive).sum();
        let first = batch.iter().min_by_key(|s| (Reverse(s.priority), s.key));
        if let Some(first) = first.filter(|f| queue.iter().all(|w| w.priority <= f.priority)) {
            let alone = batch.len() == 1 && spare == 0 && first.computed % 64 == 0;
            let stuck = freed == 0 && spare == 0 && first.computed % 64 == 0;
            prop_assert!(alone || stuck || plan.chunks.iter().any(|c| c.0 == first.key));
        }
    }
}

#[test]
fn a_full_batch_ignores_those_who_may_not_push_anybody_out() {
    let full = Limits { max_running: 2, ..limits(9) };
    let batch = [running(1, 3, 60, 59), Running { promoted: true, ..running(2, 0, 60, 59) }];
    let ignores = |batch: &[Running], highest: Option<i32>| ignores_waiting(batch, highest.map(Priority), &full);
    assert!(ignores(&batch, Some(3)) && ignores(&batch, None));
    assert!(!ignores(&batch, Some(4)), "1 would be preempted");
    assert!(!ignores(&batch[..1], Some(0)), "there is a place");
}

proptest! {
    #[test]
    fn waiting_sequences_that_are_ignored_change_nothing(
        batch in prop::collection::vec((0i32..3, any::<bool>(), 1usize..400, 0usize..400), 0..8),
        queue in prop::collection::vec((0i32..3, any::<bool>(), 1usize..400), 0..8),
        max_running in 1usize..8,
        available in 0usize..10,
        token_budget in 1usize..100,
    ) {
        let batch: Vec<_> = batch.iter().enumerate()
            .map(|(key, &(priority, promoted, tokens, computed))| {
                Running { promoted, ..running(key as u64, priority, tokens, computed.min(tokens - 1)) }
            })
            .collect();
        let queue: Vec<_> = queue.iter().enumerate()
            .map(|(key, &(priority, promoted, tokens))| Waiting { promoted, ..waiting(100 + key as u64, priority, tokens) })
            .collect();
        let limits = Limits { token_budget, max_chunk: 64, max_running, available };
        if ignores_waiting(&batch, queue.iter().map(|s| s.priority).max(), &limits) {
            prop_assert_eq!(plan(&batch, &queue, &limits), plan(&batch, &[], &limits));
        }
    }
}

/// A request in the simulation.
#[derive(Clone, Debug)]
struct Job {
    arrives: usize,
    priority: i32,
    prompt: usize,
    output: usize,
}

fn jobs() -> impl Strategy<Value = Vec<Job>> {
    let job = (0usize..40, 0i32..3, 1usize..400, 1usize..80);
    let job = job.prop_map(|(arrives, priority, prompt, output)| Job { arrives, priority, prompt, output });
    prop::collection::vec(job, 1..10)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Waiting { since: usize },
    Running { promoted: bool, since: usize },
    Done,
}

/// Runs plan after plan until all jobs are done, without a prefix cache; checks each plan on the way.
fn simulate(jobs: &[Job], limits: Limits, promote_after: usize) -> Result<(), TestCaseError> {
    let pool = limits.available;
    let mut places: Vec<Place> = jobs.iter().map(|job| Place::Waiting { since: job.arrives }).collect();
    let mut tokens: Vec<usize> = jobs.iter().map(|job| job.prompt).collect();
    let mut computed = vec![0; jobs.len()];
    // Each job's tokens once, one after another, many times over: far more than any fair order needs.
    let patience: usize = 40 + jobs.iter().map(|job| job.prompt + job.output).sum::<usize>() * jobs.len();
    let mut promoted = vec![false; jobs.len()];
    let mut disturbed = true;
    for step in 0..patience {
        if places.iter().all(|place| *place == Place::Done) {
            return Ok(());
        }
        let (mut batch, mut queue) = (Vec::new(), Vec::new());
        for (n, place) in places.iter().enumerate() {
            let (key, priority) = (n as u64, jobs[n].priority);
            match *place {
                Place::Running { promoted, .. } => {
                    batch.push(Running { promoted, ..running(key, priority, tokens[n], computed[n]) });
                }
                Place::Waiting { since } if since <= step => {
                    let now = step - since > promote_after;
                    disturbed |= since == step || now != promoted[n];
                    promoted[n] |= now;
                    queue.push(Waiting { promoted: promoted[n], ..waiting(key, priority, tokens[n]) });
                }
                _ => {}
            }
        }
        let held: usize = computed.iter().map(|computed| blocks_for(*computed)).sum();
        let now = Limits { available: pool - held, ..limits };
        let plan = plan(&batch, &queue, &now);
        check(&batch, &queue, &plan, &now)?;
        for key in &plan.preempt {
            let n = *key as usize;
            let admitted = matches!(places[n], Place::Running { since, .. } if since + 1 == step);
            prop_assert!(disturbed || !admitted, "{n} was admitted in step {} and preempted in step {step}", step - 1);
            places[n] = Place::Waiting { since: step };
            promoted[n] = false;
            computed[n] = 0;
        }
        for key in &plan.admit {
            places[*key as usize] = Place::Running { promoted: promoted[*key as usize], since: step };
        }
        for &(key, chunk) in &plan.chunks {
            let n = key as usize;
            computed[n] += chunk;
            if computed[n] == tokens[n] {
                tokens[n] += 1;
                if tokens[n] == jobs[n].prompt + jobs[n].output {
                    (places[n], computed[n]) = (Place::Done, 0);
                }
            }
        }
        let some_wait = places.iter().any(|place| matches!(place, Place::Running { .. }));
        prop_assert!(!some_wait || !plan.chunks.is_empty(), "nobody advances in step {step}");
        disturbed = false;
    }
    Err(TestCaseError::fail(format!("after {patience} steps: {places:?}")))
}

/// What holds of every plan.
fn check(batch: &[Running], queue: &[Waiting], plan: &Plan, limits: &Limits) -> Result<(), TestCaseError> {
    prop_assert!(plan.chunks.iter().map(|c| c.1).sum::<usize>() <= limits.token_budget);
    prop_assert!(plan.chunks.iter().all(|c| c.1 >= 1 && c.1 <= limits.max_chunk));
    prop_assert!(batch.len() - plan.preempt.len() + plan.admit.len() <= limits.max_running);
    let preempted: Vec<_> = batch.iter().filter(|s| plan.preempt.contains(&s.key)).collect();
    let freed: usize = preempted.iter().map(|s| s.exclusive).sum();
    let mut taken = 0;
    for (key, tokens) in &plan.chunks {
        prop_assert!(!plan.preempt.contains(key));
        taken += match batch.iter().find(|s| s.key == *key) {
            Some(s) => blocks_for(s.computed + tokens).saturating_sub(s.held),
            None => blocks_for(*tokens),
        };
    }
    prop_assert!(taken <= limits.available + freed);
    // Nobody goes on while a higher rank is put back, and nobody is admitted past a higher rank.
    let stays = batch.iter().filter(|s| !plan.preempt.contains(&s.key)).map(Running::rank).max();
    prop_assert!(preempted.iter().all(|s| stays.is_none_or(|stays| s.rank() > stays)));
    let last = queue.iter().filter(|w| plan.admit.contains(&w.key)).map(Waiting::rank).max();
    let passed = queue.iter().filter(|w| !plan.admit.contains(&w.key)).map(Waiting::rank);
    let passed = passed.chain(preempted.iter().map(|s| s.rank())).min();
    prop_assert!(last.is_none_or(|last| passed.is_none_or(|passed| last < passed)));
    // Whoever is admitted is there for an equal or higher class than the ones that it pushed out.
    prop_assert!(plan.admit.iter().all(|_| preempted.iter().all(|s| !s.promoted)));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..Default::default() })]
    #[test]
    fn every_job_ends_whatever_the_limits(
        jobs in jobs(),
        spare in 0usize..12,
        max_running in 1usize..6,
        budget in 0usize..200,
        max_chunk in 1usize..200,
        promote_after in prop::sample::select(vec![3usize, 50, usize::MAX]),
    ) {
        let largest = jobs.iter().map(|job| blocks_for(job.prompt + job.output)).max().unwrap();
        let token_budget = budget.max(max_running);
        let limits = Limits { token_budget, max_chunk, max_running, available: largest + spare };
        simulate(&jobs, limits, promote_after)?;
    }
}
