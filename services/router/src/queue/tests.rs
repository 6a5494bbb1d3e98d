//! The order of the line.
use super::*;
use proptest::prelude::*;

fn tenant(number: u8) -> TenantId {
    TenantId([number; 16])
}

const AGE: Duration = Duration::from_secs(10);

/// A queue of numbered requests.
struct Line {
    queue: Queue<u32>,
    start: Instant,
}

impl Line {
    fn new() -> Self {
        Self { queue: Queue::new(AGE), start: Instant::now() }
    }

    fn at(&self, second: u64) -> Instant {
        self.start + Duration::from_secs(second)
    }

    fn push(&mut self, who: u8, priority: i32, cost: u64, number: u32, second: u64) {
        let now = self.at(second);
        self.queue.push(tenant(who), Priority(priority), cost, number, now);
    }

    /// Takes and charges the next one that may.
    fn serve(&mut self, second: u64, may: impl FnMut(&u32) -> bool) -> Option<u32> {
        let now = self.at(second);
        let taken = self.queue.take(now, may)?;
        self.queue.charge(&taken, now);
        Some(taken.request)
    }

    fn all(&mut self, second: u64) -> Vec<u32> {
        std::iter::from_fn(|| self.serve(second, |_| true)).collect()
    }
}

#[test]
fn tenants_take_turns_by_what_they_cost_and_each_is_first_come_first_served() {
    let mut line = Line::new();
    for number in 0..4 {
        line.push(1, 0, 100, number, 0);
    }
    line.push(2, 0, 100, 10, 1);
    line.push(2, 0, 100, 11, 1);
    line.push(3, 0, 50, 20, 2);
    line.push(3, 0, 50, 21, 2);
    line.push(3, 0, 50, 22, 2);
    assert_eq!(line.queue.len(), 9);
    assert_eq!(line.all(3), [0, 10, 20, 21, 1, 11, 22, 2, 3]);
    assert!(line.queue.is_empty() && line.queue.classes.is_empty());
}

#[test]
fn who_was_away_begins_where_the_others_are() {
    let mut line = Line::new();
    for number in 0..100 {
        line.push(1, 0, 100, number, 0);
    }
    for number in 0..50 {
        assert_eq!(line.serve(1, |_| true), Some(number));
    }
    line.push(2, 0, 1000, 200, 1);
    line.push(2, 0, 1000, 201, 1);
    assert_eq!(line.serve(1, |_| true), Some(200), "the tag served last is the newcomer's");
    for number in 50..59 {
        assert_eq!(line.serve(1, |_| true), Some(number), "it has no credit for the time before");
    }
    // as far as the other now, and came later
    assert_eq!((line.serve(1, |_| true), line.serve(1, |_| true)), (Some(59), Some(201)));
}

#[test]
fn a_request_that_leaves_costs_nothing() {
    let mut line = Line::new();
    for number in 0..3 {
        line.push(1, 0, 1000, number, 0);
    }
    line.push(2, 0, 10, 10, 0);
    line.push(2, 0, 10, 11, 0);
    let gone = line.queue.remove(|waiting| waiting.request < 2);
    assert_eq!(gone.iter().map(|waiting| waiting.request).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(line.queue.len(), 3);
    assert_eq!(line.all(0), [2, 10, 11], "its third is as far ahead as its first was");
}

#[test]
fn higher_priorities_go_first_and_the_lowest_is_not_forgotten() {
    let mut line = Line::new();
    line.push(1, -100, 10, 0, 0);
    line.push(1, -100, 10, 1, 0);
    line.push(1, 5, 10, 2, 0);
    assert_eq!(line.serve(0, |_| true), Some(2));
    for second in 1..30 {
        line.push(2, 0, 10, 100 + second as u32, second);
        line.push(2, 0, 10, 200 + second as u32, second);
    }
    let served: Vec<_> = (1..30).map(|second| line.serve(second, |_| true).unwrap()).collect();
    let aged: Vec<_> = served.iter().enumerate().filter(|(_, number)| **number < 2).collect();
    assert_eq!(aged, [(9, &0), (19, &1)], "one each 10 seconds: {served:?}");
}

#[test]
fn who_may_not_go_holds_nobody_up() {
    let mut line = Line::new();
    line.push(1, 9, 10, 0, 0);
    line.push(1, 0, 10, 1, 0);
    line.push(1, 0, 10, 2, 0);
    line.push(2, 0, 10, 3, 0);
    assert_eq!(line.serve(99, |number| *number >= 2), Some(2), "behind others of its tenant");
    assert_eq!(line.serve(99, |number| *number >= 2), Some(3));
    assert_eq!(line.serve(99, |number| *number >= 2), None);
    assert_eq!(line.all(99), [0, 1]);
}

#[test]
fn one_that_is_put_back_stands_where_it_stood() {
    let mut line = Line::new();
    for number in 0..3 {
        line.push(1, 0, 10, number, 0);
    }
    let now = line.at(1);
    let first = line.queue.take(now, |_| true).unwrap();
    line.push(1, 0, 10, 3, 1);
    line.push(2, 0, 10, 4, 1);
    line.queue.put_back(first, now);
    assert_eq!(line.all(1), [0, 4, 1, 2, 3]);
    line.push(1, 0, 10, 5, 2);
    let only = line.queue.take(now, |_| true).unwrap();
    assert_eq!(line.queue.len(), 0);
    line.queue.put_back(only, now);
    assert_eq!(line.all(2), [5]);
}

#[test]
fn a_newcomer_displaces_the_newest_of_the_longest_lane_of_the_lowest_priority() {
    let mut line = Line::new();
    let displace = |line: &mut Line, who: u8, priority: i32| {
        line.queue.displace(tenant(who), Priority(priority)).map(|displaced| displaced.request)
    };
    assert_eq!(displace(&mut line, 1, 0), None, "nobody is there");
    for number in 0..4 {
        line.push(1, 0, 10, number, 0);
    }
    line.push(2, 0, 10, 10, 0);
    line.push(3, 5, 10, 20, 0);
    line.push(3, 5, 10, 21, 0);
    assert_eq!(displace(&mut line, 1, 0), None, "it has the most itself");
    assert_eq!(displace(&mut line, 3, -1), None, "all others go before it");
    assert_eq!(displace(&mut line, 4, 0), Some(3), "it has none");
    assert_eq!(displace(&mut line, 2, 0), Some(2), "it has fewer, and no more after");
    line.push(2, 0, 10, 11, 0);
    assert_eq!(displace(&mut line, 2, 0), None, "they are even");
    line.push(4, 0, 10, 30, 0);
    assert_eq!(displace(&mut line, 4, 0), None, "they would only change places");
    assert_eq!(displace(&mut line, 1, 1), Some(11), "of two as long, the one whose last came last; priority counts");
    for _ in 0..4 {
        assert!(displace(&mut line, 9, 9).is_some_and(|number| number < 20 || number == 30), "the lowest first");
    }
    assert_eq!((displace(&mut line, 9, 9), displace(&mut line, 9, 4)), (Some(21), None));
    assert_eq!((line.queue.len(), line.all(0)), (1, vec![20]));
}

#[test]
fn tenants_that_left_are_forgotten() {
    let mut line = Line::new();
    line.push(0, 0, 1, 0, 0);
    for number in 1..=u32::from(u16::MAX) {
        let now = line.at(0);
        let mut id = [0; 16];
        id[..4].copy_from_slice(&number.to_le_bytes());
        line.queue.push(TenantId(id), Priority(0), 1, number, now);
        line.serve(0, |_| true);
    }
    let class = line.queue.classes.values().next().unwrap();
    assert!(class.tenants.len() <= IDLE_TENANTS + 2 * class.present.heads.len(), "{}", class.tenants.len());
}

proptest! {
    /// Whatever happens: the counts are right, each tenant's requests of one priority go in their order, and no tenant
    /// with a request in line falls behind another's service by more than what one request of each costs.
    #[test]
    fn the_line_is_fair_and_loses_nobody(
        steps in prop::collection::vec((0u8..9, 0u8..4, -1i32..2, 1u64..50), 1..200),
    ) {
        let mut line = Line::new();
        let (mut pushed, mut out) = (0u32, Vec::new());
        for (second, (action, who, priority, cost)) in steps.into_iter().enumerate() {
            let second = second as u64;
            match action {
                0 | 1 => out.extend(line.serve(second, |_| true)),
                2 => out.extend(line.serve(second, |number| number % 2 == 0)),
                3 => {
                    let now = line.at(second);
                    if let Some(taken) = line.queue.take(now, |_| true) {
                        line.queue.put_back(taken, now);
                    }
                }
                4 => out.extend(line.queue.remove(|w| w.request % 7 == 3).into_iter().map(|w| w.request)),
                5 => out.extend(line.queue.displace(tenant(who), Priority(priority)).map(|w| w.request)),
                _ => {
                    line.push(who, priority, cost, pushed, second);
                    pushed += 1;
                }
            }
            let in_lanes: usize =
                line.queue.classes.values().flat_map(|class| class.tenants.values()).map(|lane| lane.waiting.len()).sum();
            prop_assert_eq!(line.queue.len(), in_lanes);
            prop_assert_eq!(out.len() + in_lanes, pushed as usize);
            for class in line.queue.classes.values() {
                let lanes: BTreeSet<_> = class.tenants.iter().filter(|(_, lane)| !lane.waiting.is_empty())
                    .map(|(tenant, lane)| lane.head(*tenant)).collect();
                prop_assert_eq!(&lanes, &class.present.heads);
                let sizes: BTreeSet<_> = class.tenants.iter().filter(|(_, lane)| !lane.waiting.is_empty())
                    .map(|(tenant, lane)| lane.size(*tenant)).collect();
                prop_assert_eq!(&sizes, &class.present.sizes);
                for lane in class.tenants.values() {
                    prop_assert!(lane.waiting.iter().map(|waiting| waiting.arrival).is_sorted());
                    // start tags stay within one request of the tag served last
                    prop_assert!(lane.waiting.is_empty() || lane.start < class.now + 50);
                }
            }
        }
        out.extend(line.all(1_000_000));
        out.sort_unstable();
        prop_assert_eq!(out, (0..pushed).collect::<Vec<_>>());
    }
}
