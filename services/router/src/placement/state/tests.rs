//! Without shards or a clock: what is done next.
use super::*;
use crate::placement::shard::Report;
use moesaic_types::cluster::ShardInfo;
use moesaic_types::{Digest, Error};

const SECOND: Duration = Duration::from_secs(1);

fn config() -> Config {
    Config { min_load: 0, ..Config::default() }
}

/// A shard that holds these experts of layer 0, of four.
fn seen(group: usize, epoch: u64, experts: &[u32]) -> Seen {
    let report = Report { epoch, held: Shares::from([(0, experts.to_vec())]), load: Load::from([(0, vec![1; 4])]) };
    let info = ShardInfo { model: Digest::default(), group, rank: 0, ranks: 1 };
    Seen { id: format!("s{group}").into(), generation: 1, info, leaves: false, report: Ok(report) }
}

fn silent(group: usize) -> Seen {
    Seen { report: Err(Error::unavailable("it is silent")), ..seen(group, 0, &[]) }
}

fn failed(group: Option<usize>) -> Result<Option<Placement>, Failure> {
    Err(Failure { group, error: Error::unavailable("a shard failed") })
}

fn placement(epoch: u64) -> Placement {
    let layers = Layers::from([(0, vec![vec![0], vec![0], vec![1], vec![1]])]);
    Placement { epoch, model: Digest::default(), groups: 2, layers }
}

fn found(shards: &[Seen], epoch: Option<u64>) -> Found {
    let standing = epoch.map(|epoch| Standing { placement: Some(placement(epoch)), version: 100 + epoch });
    Found { shards: shards.to_vec(), standing }
}

fn both(epoch: u64) -> [Seen; 2] {
    [seen(0, epoch, &[0, 1]), seen(1, epoch, &[2, 3])]
}

#[test]
fn the_first_placement_waits_until_no_group_comes_any_longer() {
    let (mut model, now, config) = (Model::new(None), Instant::now(), config());
    let one = [seen(0, 0, &[])];
    assert_eq!(model.next(now, &config, found(&one, None)), Steps::default());
    let two = [seen(0, 0, &[]), seen(1, 0, &[])];
    assert_eq!(model.next(now + config.settle.get(), &config, found(&two, None)), Steps::default(), "one more came");
    let steps = model.next(now + 2 * config.settle.get(), &config, found(&two, None));
    let change = steps.change.unwrap();
    assert!(change.is_planned && !change.is_renumbered);
    assert_eq!((change.groups, change.present, change.floor, change.version), (BTreeSet::from([0, 1]), None, 0, None));
    let steps = model.next(now + 3 * config.settle.get(), &config, found(&two, None));
    assert_eq!(steps, Steps::default(), "one change at a time");
}

#[test]
fn experts_are_placed_by_the_load_when_it_is_due_and_all_are_there() {
    let (mut model, now, config) = (Model::new(None), Instant::now(), config());
    assert_eq!(model.next(now, &config, found(&both(7), Some(7))), Steps::default());
    model.rebalance();
    let missing = [both(7)[0].clone(), silent(1)];
    assert_eq!(model.next(now, &config, found(&missing, Some(7))), Steps::default(), "one does not answer");
    let change = model.next(now, &config, found(&both(7), Some(7))).change.unwrap();
    assert_eq!((change.is_planned, change.is_renumbered, change.version), (true, false, Some(107)));
    assert_eq!(change.load, Load::from([(0, vec![2; 4])]));
    model.changed(now, &config, failed(None));
    assert_eq!(model.next(now, &config, found(&both(7), Some(7))), Steps::default(), "a pause");
    let now = now + config.retry_pause.get();
    assert!(model.next(now, &config, found(&both(7), Some(7))).change.is_some(), "it is tried again");
    model.changed(now, &config, failed(None));
    let now = now + config.retry_pause.get();
    assert_eq!(model.next(now, &config, found(&both(7), Some(7))), Steps::default(), "a longer pause");
    let now = now + config.retry_pause.get();
    assert!(model.next(now, &config, found(&both(7), Some(7))).change.is_some());
    model.changed(now, &config, Ok(None));
    assert_eq!(model.next(now, &config, found(&both(7), Some(7))), Steps::default(), "it is done");
}

#[test]
fn a_shard_that_is_behind_is_mended_and_those_that_fail_are_tried_again() {
    let (mut model, now, config) = (Model::new(None), Instant::now(), config());
    let behind = [both(7)[0].clone(), seen(1, 0, &[])];
    let mend = Mend { id: "s1".into(), generation: 1, epoch: 7, shares: Shares::from([(0, vec![2, 3])]) };
    let steps = model.next(now, &config, found(&behind, Some(7)));
    assert_eq!(steps, Steps { change: None, mends: vec![mend.clone()] });
    model.rebalance();
    assert_eq!(model.next(now, &config, found(&behind, Some(7))), Steps::default(), "it loads, and so nothing changes");
    model.mended(now, &config, "s1", 2, false);
    assert_eq!(model.next(now, &config, found(&behind, Some(7))), Steps::default(), "that was another life");
    model.mended(now, &config, "s1", 1, false);
    model.is_due = false;
    assert_eq!(model.next(now, &config, found(&behind, Some(7))), Steps::default(), "a pause");
    let restarted = [both(7)[0].clone(), Seen { generation: 2, ..behind[1].clone() }];
    let steps = model.next(now, &config, found(&restarted, Some(7)));
    assert_eq!(steps.mends, [Mend { generation: 2, ..mend.clone() }], "a new life has no failures");
    model.mended(now, &config, "s1", 2, false);
    let steps = model.next(now + config.retry_pause.get(), &config, found(&restarted, Some(7)));
    assert_eq!(steps.mends.len(), 1);
}

#[test]
fn one_that_restarts_does_not_wait_for_the_end_of_a_change() {
    let (mut model, now, config) = (Model::new(None), Instant::now(), config());
    model.next(now, &config, found(&both(7), Some(7)));
    model.rebalance();
    assert!(model.next(now, &config, found(&both(7), Some(7))).change.is_some());
    let restarted = [both(7)[0].clone(), Seen { generation: 2, ..seen(1, 0, &[]) }];
    let mend = Mend { id: "s1".into(), generation: 2, epoch: 7, shares: Shares::from([(0, vec![2, 3])]) };
    let steps = model.next(now, &config, found(&restarted, Some(7)));
    assert_eq!(steps, Steps { change: None, mends: vec![mend] });
    assert_eq!(model.next(now, &config, found(&restarted, Some(7))), Steps::default(), "it loads");
    model.mended(now, &config, "s1", 2, true);
    // the change was written meanwhile: it is taken there next
    model.changed(now, &config, Ok(Some(placement(8))));
    let moved = [seen(0, 8, &[0, 1]), Seen { generation: 2, ..seen(1, 7, &[2, 3]) }];
    let epochs = |steps: Steps| steps.mends.iter().map(|mend| mend.epoch).collect::<Vec<_>>();
    assert_eq!(epochs(model.next(now, &config, found(&moved, Some(8)))), [8]);
}

#[test]
fn what_stands_is_mended_before_it_is_bettered_and_what_a_change_prepares_is_left_to_it() {
    let (mut model, now, config) = (Model::new(None), Instant::now(), config());
    let behind = [both(7)[0].clone(), seen(1, 0, &[])];
    model.rebalance();
    let steps = model.next(now, &config, found(&behind, Some(7)));
    assert_eq!((steps.change, steps.mends.len()), (None, 1));
    model.mended(now, &config, "s1", 1, true);
    assert!(model.next(now, &config, found(&both(7), Some(7))).change.is_some(), "then experts are placed by the load");

    // one that has nothing yet takes part in a change at once; what it loads for that is all that it needs
    let mut model = Model::new(None);
    let new = [both(7)[0].clone(), both(7)[1].clone(), seen(2, 0, &[])];
    model.rebalance();
    let steps = model.next(now, &config, found(&new, Some(7)));
    assert!(steps.change.is_some_and(|change| change.groups.contains(&2)) && steps.mends.is_empty());
    assert_eq!(model.next(now, &config, found(&new, Some(7))), Steps::default());
}

#[test]
fn a_group_that_is_lost_for_long_is_given_up() {
    let (mut model, now, config) = (Model::new(None), Instant::now(), config());
    let alone = [both(7)[0].clone(), silent(1)];
    assert_eq!(model.next(now, &config, found(&alone, Some(7))), Steps::default());
    let later = now + config.lost_after.get();
    assert_eq!(model.next(later - SECOND, &config, found(&alone, Some(7))), Steps::default());
    let change = model.next(later, &config, found(&alone, Some(7))).change.unwrap();
    assert_eq!((change.is_planned, &change.groups), (true, &BTreeSet::from([0])));
    assert_eq!(change.shards, [("s0".into(), 0)]);
    model.changed(later, &config, failed(None));
    // it was back meanwhile: its time begins anew
    let back = later + config.retry_pause.get();
    assert_eq!(model.next(back, &config, found(&both(7), Some(7))), Steps::default());
    assert_eq!(model.next(back + SECOND, &config, found(&alone, Some(7))), Steps::default());
}

#[test]
fn what_only_a_group_has_that_leaves_goes_to_the_others_at_once() {
    let (mut model, now, config) = (Model::new(None), Instant::now(), config());
    model.next(now, &config, found(&both(7), Some(7)));
    let leaves = |seen: &Seen| Seen { leaves: true, ..seen.clone() };
    let leaving = [both(7)[0].clone(), leaves(&both(7)[1])];
    let change = model.next(now, &config, found(&leaving, Some(7))).change.expect("it does not wait until it is gone");
    assert_eq!((change.is_planned, &change.groups), (true, &BTreeSet::from([0])));
    assert_eq!(change.shards, [("s0".into(), 0)], "the one that leaves goes on as it is");
    assert_eq!(change.load, Load::from([(0, vec![2; 4])]), "what it measured counts");
    // it is not taken to the next placement
    model.changed(now, &config, Ok(Some(placement(8))));
    let moved = [seen(0, 8, &[0, 1, 2, 3]), leaves(&seen(1, 7, &[2, 3]))];
    let mut standing = found(&moved, Some(8));
    let layers = Layers::from([(0, vec![vec![0]; 4])]);
    standing.standing = standing.standing.map(|standing| Standing {
        placement: standing.placement.map(|placement| Placement { layers: layers.clone(), ..placement }),
        ..standing
    });
    assert_eq!(model.next(now, &config, standing), Steps::default());

    // others have all that it has, or it is replaced: nothing moves for a restart
    let copied = |shards: &[Seen]| {
        let mut found = found(shards, Some(7));
        let layers = Layers::from([(0, vec![vec![0], vec![0], vec![0, 1], vec![0, 1]])]);
        found.standing = found.standing.map(|standing| Standing {
            placement: standing.placement.map(|placement| Placement { layers: layers.clone(), ..placement }),
            ..standing
        });
        found
    };
    let mut model = Model::new(None);
    assert_eq!(model.next(now, &config, copied(&leaving)), Steps::default());
    let replaced = [both(7)[0].clone(), leaves(&both(7)[1]), Seen { id: "new".into(), ..both(7)[1].clone() }];
    assert_eq!(Model::new(None).next(now, &config, found(&replaced, Some(7))), Steps::default());
    // and where all leave there is nobody to move to
    let all = [leaves(&both(7)[0]), leaves(&both(7)[1])];
    assert_eq!(Model::new(None).next(now, &config, found(&all, Some(7))), Steps::default());
}

/// Experts of layer 0 that these groups hold.
fn placed(shards: &[Seen], holders: &[&[usize]]) -> Found {
    let mut found = found(shards, Some(7));
    let standing = found.standing.as_mut().and_then(|standing| standing.placement.as_mut());
    let layers = Layers::from([(0, holders.iter().map(|groups| groups.to_vec()).collect())]);
    standing.expect("one stands").layers = layers;
    found
}

#[test]
fn what_a_group_takes_along_stays_with_it_where_the_others_have_no_room() {
    let now = Instant::now();
    let leaving = [both(7)[0].clone(), Seen { leaves: true, ..both(7)[1].clone() }];
    let limited = |max_experts: usize| Config { max_experts, ..config() };
    let next = |model: &mut Model, config: &Config, now: Instant, shards: &[Seen]| {
        model.next(now, config, found(shards, Some(7))).change.map(|change| change.groups)
    };
    let roomy = limited(4);
    assert_eq!(next(&mut Model::new(None), &roomy, now, &leaving), Some(BTreeSet::from([0])), "all four just fit");

    let (mut model, tight) = (Model::new(None), limited(3));
    assert_eq!(next(&mut model, &tight, now, &both(7)), None);
    assert_eq!(next(&mut model, &tight, now, &leaving), None);
    // however long it takes to go, it serves
    let late = now + 10 * tight.lost_after.get();
    assert_eq!(next(&mut model, &tight, late, &leaving), None);
    let gone = [both(7)[0].clone()];
    assert_eq!(next(&mut model, &tight, late + SECOND, &gone), None, "it may be about to start again");
    assert_eq!(next(&mut model, &tight, late + SECOND, &both(7)), None, "so it did");
    assert_eq!(next(&mut model, &tight, late + 2 * SECOND, &gone), None);
    let lost = late + SECOND + tight.lost_after.get();
    assert_eq!(next(&mut model, &tight, lost, &gone), Some(BTreeSet::from([0])), "an expert is somewhere, room or not");

    // a third group has room for them
    let three = [leaving[0].clone(), leaving[1].clone(), seen(2, 0, &[])];
    assert_eq!(next(&mut Model::new(None), &limited(2), now, &three), Some(BTreeSet::from([0, 2])));
    assert_eq!(next(&mut Model::new(None), &limited(1), now, &three), None);
    // but not while it refuses
    let mut model = Model::new(None);
    model.changed(now, &limited(2), failed(Some(2)));
    model.retry = Retry::default();
    assert_eq!(next(&mut model, &limited(2), now, &three), None);
}

#[test]
fn one_that_leaves_waits_for_others_only_where_they_alone_have_something() {
    let (now, config) = (Instant::now(), config());
    let shards = [seen(0, 7, &[0, 1]), Seen { leaves: true, ..seen(1, 7, &[2, 3]) }, silent(2)];
    let copied: [&[usize]; 4] = [&[0], &[0, 2], &[1], &[1]];
    let change = Model::new(None).next(now, &config, placed(&shards, &copied)).change;
    assert_eq!(change.map(|change| change.groups), Some(BTreeSet::from([0])), "its copies are elsewhere");
    let alone: [&[usize]; 4] = [&[0], &[2], &[1], &[1]];
    assert_eq!(Model::new(None).next(now, &config, placed(&shards, &alone)), Steps::default(), "it may come back");
    // without one that leaves, copies that are away are waited for as before
    let stays = [shards[0].clone(), seen(1, 7, &[2, 3]), silent(2)];
    let mut model = Model::new(None);
    model.rebalance();
    assert_eq!(model.next(now, &config, placed(&stays, &copied)), Steps::default());
}

#[test]
fn lost_metadata_get_what_is_known_best_with_a_later_epoch() {
    let (now, config) = (Instant::now(), config());
    let renumbered = |model: &mut Model, found: Found| {
        let change = model.next(now, &config, found).change.expect("it must be written again");
        assert!(change.is_renumbered);
        (change.present.unwrap(), change.floor, change.version)
    };
    let layers = placement(7).layers;
    let mut led = Model::new(None);
    led.next(now, &config, found(&both(7), Some(7)));
    let silent = [both(7)[0].clone(), silent(1)];
    assert_eq!(renumbered(&mut led, found(&silent, None)), (layers.clone(), 7, None), "its own word");
    let mut fresh = Model::new(None);
    assert_eq!(renumbered(&mut fresh, found(&both(7), None)), (layers.clone(), 7, None), "the shards' word");
    let mut older = Model::new(None);
    assert_eq!(renumbered(&mut older, found(&both(7), Some(5))), (layers.clone(), 7, Some(105)), "they went on since");
    let mut stale = Model::new(Some(placement(3)));
    assert_eq!(renumbered(&mut stale, found(&both(7), None)), (layers, 7, None), "another led meanwhile");
    let mut half = Model::new(None);
    assert_eq!(half.next(now, &config, found(&silent, None)), Steps::default(), "the rest may be about to come");
    let steps = half.next(now + config.lost_after.get(), &config, found(&silent, None));
    assert!(steps.change.is_some_and(|change| change.is_planned && change.present.is_some()));
}

#[test]
fn ranks_of_a_group_are_counted_once_and_hold_what_all_of_them_hold() {
    let rank = |rank: usize, experts: &[u32]| {
        let seen = seen(0, 7, experts);
        Seen { id: format!("r{rank}").into(), info: ShardInfo { rank, ranks: 2, ..seen.info.clone() }, ..seen }
    };
    let half = [rank(0, &[0, 1])];
    assert_eq!(whole(&half), BTreeSet::new());
    let both = [rank(0, &[0, 1, 2]), rank(1, &[1, 2, 3])];
    let load = load(&both);
    assert_eq!((whole(&both), &load), (BTreeSet::from([0]), &Load::from([(0, vec![1; 4])])));
    let gathered = gathered(&both, &whole(&both), &load);
    assert_eq!(gathered[&0], [vec![], vec![0], vec![0], vec![]]);
}

#[test]
fn a_group_that_cannot_load_is_left_out_for_a_while_and_given_up_where_it_held_something() {
    let (mut model, now, config) = (Model::new(None), Instant::now(), config());
    let three = [both(7)[0].clone(), both(7)[1].clone(), seen(2, 7, &[])];
    let groups = |model: &mut Model, now| model.next(now, &config, found(&three, Some(7))).change.map(|c| c.groups);
    model.next(now, &config, found(&three, Some(7)));
    model.rebalance();
    assert_eq!(groups(&mut model, now), Some(BTreeSet::from([0, 1, 2])));
    model.changed(now, &config, failed(Some(2)));
    model.retry = Retry::default();
    assert_eq!(groups(&mut model, now), Some(BTreeSet::from([0, 1])), "the others go on");
    model.changed(now, &config, failed(Some(1)));
    model.retry = Retry::default();
    assert_eq!(groups(&mut model, now), Some(BTreeSet::from([0, 1])), "one that holds something cannot be left out");
    model.changed(now, &config, Ok(None));
    let later = now + config.retry_pause.get();
    model.rebalance();
    assert_eq!(groups(&mut model, later), Some(BTreeSet::from([0, 1, 2])), "it is tried again");

    // a shard that restarted, and cannot load
    let (mut model, empty) = (Model::new(None), [both(7)[0].clone(), seen(1, 0, &[])]);
    let mut next = |now: Instant| {
        let steps = model.next(now, &config, found(&empty, Some(7)));
        steps.mends.iter().for_each(|mend| model.mended(now, &config, &mend.id, mend.generation, false));
        steps
    };
    assert_eq!(next(now).mends.len(), 1);
    let change = next(now + config.lost_after.get()).change.expect("it is given up");
    assert_eq!((change.is_planned, change.groups), (true, BTreeSet::from([0])));

    // it switched by itself meanwhile: there was nothing to mend
    let mut model = Model::new(None);
    let mend = model.next(now, &config, found(&empty, Some(7))).mends.remove(0);
    model.mended(now, &config, &mend.id, mend.generation, false);
    assert_eq!(model.next(now, &config, found(&both(7), Some(7))), Steps::default());
    let later = now + config.lost_after.get();
    assert_eq!(model.next(later, &config, found(&both(7), Some(7))), Steps::default());
    assert_eq!(model.whole().collect::<Vec<_>>(), [0, 1]);
}
