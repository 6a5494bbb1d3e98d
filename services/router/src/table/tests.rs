//! The line before replicas with room for some.
use super::*;
use crate::Config;
use moesaic_types::{RequestId, TenantId};
use proptest::prelude::*;

fn id(number: usize) -> ReplicaId {
    ReplicaId::new(format!("r{number}"))
}

fn request(prompt_tokens: usize) -> PlaceRequest {
    PlaceRequest::new(RequestId::new("r"), prompt_tokens, 16)
}

/// Its batch has places, and so many blocks are free.
fn with_blocks(free: usize) -> ReplicaLoad {
    ReplicaLoad { running: 1, max_running: 8, kv_blocks_total: 100, kv_blocks_used: 100 - free, ..Default::default() }
}

/// Its batch is full, and as many wait as may.
fn full(rules: &Rules) -> ReplicaLoad {
    ReplicaLoad { running: 8, waiting: rules.ahead, ..with_blocks(50) }
}

#[test]
fn requests_alike_for_which_nobody_has_room_cost_one_look_together() {
    let (config, now) = (Config::default(), Instant::now());
    let rules = config.rules();
    let mut table: Table<usize> = Table::new(rules.clone());
    // one has shown that it works, and has no room; another has room, and has shown nothing
    for number in 0..2 {
        table.add(id(number), None);
    }
    table.heard(&id(0), Ok(full(&rules)), now, now);
    table.heard(&id(1), Ok(ReplicaLoad { running: 0, ..with_blocks(100) }), now, now);
    for number in 0..1000 {
        table.wait(Arc::new(request(100 + number % 7)), number, now).unwrap();
    }
    table.looks.set(0);
    assert!(table.next(now).is_none());
    assert_eq!(table.looks.get(), 1);
    // there is room, for whoever needs few blocks
    table.replica_mut(&id(1)).unwrap().check.works(now);
    let used = ReplicaLoad { waiting: rules.ahead, ..with_blocks(3) };
    table.heard(&id(1), Ok(used), now, now);
    table.heard(&id(0), Ok(with_blocks(3)), now, now);
    let few = table.next(now).map(|waiting| waiting.request.reply);
    assert_eq!(few, Some(0), "two blocks of the prompt, and one of the answer");
}

#[test]
fn a_tenant_s_share_hardly_depends_on_how_much_it_lets_be_generated() {
    let (rules, now) = (Config::default().rules(), Instant::now());
    let mut table: Table<usize> = Table::new(Rules { canary_interval: None, ..rules.clone() });
    table.add(id(0), None);
    table.heard(&id(0), Ok(full(&rules)), now, now);
    let of =
        |tenant: u8, max_tokens: usize| PlaceRequest { max_tokens, tenant: TenantId([tenant; 16]), ..request(1000) };
    for number in 0..40 {
        let asked = if number % 2 == 0 { of(0, 16) } else { of(1, 100_000) };
        table.wait(Arc::new(asked), number % 2, now).unwrap();
    }
    table.heard(&id(0), Ok(ReplicaLoad::default()), now, now);
    let mut served = [0; 2];
    for _ in 0..20 {
        let waiting = table.next(now).unwrap();
        served[waiting.request.reply] += 1;
        assert!(table.bind(waiting, &Prefixes::default(), now, |_, _| true).is_some());
    }
    // 1016 tokens against 1256
    assert_eq!(served, [11, 9]);
}

proptest! {
    /// Who is taken is the first who would be placed, and where nobody is, nobody would.
    #[test]
    fn the_next_is_the_first_that_would_be_placed(
        replicas in prop::collection::vec(
            (0usize..3, 0usize..12, 0usize..4, 0usize..4, 0usize..4, any::<bool>()), 1..6),
        asked in prop::collection::vec((0usize..800, 0usize..3, 0usize..6), 1..20),
    ) {
        let (now, rules) = (Instant::now(), Config::default().rules());
        let models = [None, Some(Digest::of(b"a")), Some(Digest::of(b"b"))];
        let build = || {
            let mut table: Table<usize> = Table::new(rules.clone());
            for (number, (model, free, context, waiting, fresh, is_proven)) in replicas.iter().enumerate() {
                table.add(id(number), models[*model]);
                let load = ReplicaLoad { waiting: *waiting, max_context: 200 * context, ..with_blocks(*free) };
                // running requests alone would show that it works
                table.heard(&id(number), Ok(ReplicaLoad { running: 0, ..load }), now, now);
                let entry = table.replicas.get_mut(&id(number)).unwrap();
                entry.check.is_proven = *is_proven;
                (0..*fresh).for_each(|_| entry.recent.add(now, 1));
            }
            table
        };
        let mut table = build();
        let mut expected = None;
        for (number, (prompt, model, exclude)) in asked.iter().enumerate() {
            let exclude = if *exclude < 2 { vec![id(*exclude)] } else { Vec::new() };
            let asked = PlaceRequest { model: models[*model], exclude, ..request(*prompt) };
            if expected.is_none() && matches!(build().decide(&asked, &Prefixes::default(), now), Decision::Placed(_)) {
                expected = Some(number);
            }
            prop_assert!(table.wait(Arc::new(asked), number, now).is_ok());
        }
        prop_assert_eq!(table.next(now).map(|waiting| waiting.request.reply), expected);
    }
}
