//! One request is one trace, through every service's process, as a real OTLP receiver gets it.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use moesaic_testkit::otlp::Receiver;
use moesaic_tests::cluster::Cluster;
use moesaic_tests::until;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// A span, and the service and instance that made it.
#[derive(Clone)]
struct Made {
    span: Span,
    service: String,
}

fn received(receiver: &Receiver) -> Vec<Made> {
    let made = |spans: opentelemetry_proto::tonic::trace::v1::ResourceSpans| {
        let attributes = spans.resource.unwrap().attributes;
        let name = attributes.into_iter().find(|attribute| attribute.key == "service.name").unwrap();
        let Some(Value::StringValue(service)) = name.value.unwrap().value else { panic!("service.name is text") };
        let spans = spans.scope_spans.into_iter().flat_map(|scope| scope.spans);
        spans.map(move |span| Made { span, service: service.clone() })
    };
    receiver.received().into_iter().flat_map(made).collect()
}

/// The trace as a tree: one line a span, equal siblings once with their number.
fn draw(spans: &[Made]) -> String {
    fn below(spans: &[Made], parent: &[u8], depth: usize, text: &mut String) {
        let mut kinds: BTreeMap<(u64, String), Vec<&Made>> = BTreeMap::new();
        let mut first: BTreeMap<String, u64> = BTreeMap::new();
        for made in spans.iter().filter(|made| made.span.parent_span_id == parent) {
            let label = format!("{}: {}", made.service.trim_start_matches("moesaic-"), made.span.name);
            let began = *first.entry(label.clone()).or_insert(made.span.start_time_unix_nano);
            kinds.entry((began, label)).or_default().push(made);
        }
        for ((_, label), made) in kinds {
            let count = if made.len() > 1 { format!(" x {}", made.len()) } else { String::new() };
            let _ = writeln!(text, "{:indent$}{label}{count}", "", indent = 2 * depth);
            let mut inner = String::new();
            below(spans, &made[0].span.span_id, depth + 1, &mut inner);
            text.push_str(&inner);
        }
    }
    let mut text = String::new();
    below(spans, &[], 0, &mut text);
    text
}

#[test]
fn one_request_is_one_trace_through_all_services() {
    let (receiver, endpoint) = Receiver::start();
    let telemetry = format!("[telemetry]\notlp_endpoint = \"{endpoint}\"");
    let mut cluster = Cluster::start_with_shards(1, 2, 1, &telemetry).unwrap();
    let mut store = cluster.add("moesaic-kv-store", "k0", &[]).unwrap();
    store.is_ready().unwrap();
    // the scheduler sees the store; a prompt that has full blocks is looked for there
    let prompt = "Once upon a time there was a little fox that lived in a wood. ".repeat(20);
    let services: BTreeSet<&str> =
        ["gateway", "router", "scheduler", "expert-shard", "kv-store"].map(|name| name).into();
    let trace = || {
        let spans = received(&receiver);
        let of_store = spans.iter().find(|made| made.service == "moesaic-kv-store")?;
        let trace: Vec<_> = spans.iter().filter(|made| made.span.trace_id == of_store.span.trace_id).cloned().collect();
        let found: BTreeSet<&str> = trace.iter().map(|made| made.service.trim_start_matches("moesaic-")).collect();
        (found == services).then_some(trace)
    };
    let mut number = 0;
    until("a trace through all services is received", || {
        number += 1;
        cluster.complete(&format!("{number} {prompt}"), 3)?;
        Ok(trace().is_some())
    })
    .unwrap();
    let members = [&mut cluster.gateway, &mut cluster.router, &mut store];
    for member in members.into_iter().chain(&mut cluster.schedulers).chain(&mut cluster.shards) {
        member.terminate().unwrap();
        assert!(member.ended().unwrap().success(), "{}", member.log());
    }
    let trace = trace().unwrap();
    println!("{}", draw(&trace));
    let ids: BTreeMap<&[u8], &Made> = trace.iter().map(|made| (&*made.span.span_id, made)).collect();
    let roots: Vec<_> = trace.iter().filter(|made| made.span.parent_span_id.is_empty()).collect();
    assert_eq!(roots.len(), 1, "{}", draw(&trace));
    assert_eq!(roots[0].service, "moesaic-gateway");
    let parent = |made: &Made| {
        ids.get(&*made.span.parent_span_id).map(|parent| (parent.service.clone(), parent.span.name.clone()))
    };
    for made in &trace {
        let parent = parent(made);
        assert!(parent.is_some() || made.span.parent_span_id.is_empty(), "{} has no parent here", made.span.name);
        let (service, name) = (made.service.as_str(), made.span.name.as_str());
        let from = parent.map(|(service, _)| service).unwrap_or_default();
        match service {
            "moesaic-router" => assert!(["moesaic-gateway", "moesaic-router"].contains(&&*from), "{name} of {from}"),
            "moesaic-expert-shard" => assert_eq!(from, "moesaic-scheduler", "{name}"),
            "moesaic-kv-store" => {
                assert!(["moesaic-scheduler", "moesaic-kv-store"].contains(&&*from), "{name} of {from}")
            }
            "moesaic-scheduler" => {
                assert!(["moesaic-gateway", "moesaic-scheduler"].contains(&&*from), "{name} of {from}")
            }
            _ => {}
        }
    }
    let shards: BTreeSet<_> =
        trace.iter().filter(|made| made.service == "moesaic-expert-shard").map(|made| &made.span.name).collect();
    assert_eq!(shards.into_iter().collect::<Vec<_>>(), ["experts"]);
}
