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
    instance: String,
}

fn received(receiver: &Receiver) -> Vec<Made> {
    let made = |spans: opentelemetry_proto::tonic::trace::v1::ResourceSpans| {
        let attributes = spans.resource.unwrap().attributes;
        let text = |key: &str| {
            let attribute = attributes.iter().find(|attribute| attribute.key == key).unwrap();
            let Some(Value::StringValue(text)) = attribute.value.clone().unwrap().value else {
                panic!("{key} is text")
            };
            text
        };
        let (service, instance) = (text("service.name"), text("service.instance.id"));
        let spans = spans.scope_spans.into_iter().flat_map(|scope| scope.spans);
        spans.map(move |span| Made { span, service: service.clone(), instance: instance.clone() })
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
    // at the end nobody takes the last shard's experts
    let brief = "[expert_shard]\ndrain_timeout = \"1s\"";
    let telemetry = format!("{brief}\n[telemetry]\notlp_endpoint = \"{endpoint}\"");
    let mut cluster = Cluster::start_with_shards(1, 2, 1, &telemetry).unwrap();
    let mut store = cluster.add("moesaic-kv-store", "k0", &[]).unwrap();
    store.is_ready().unwrap();
    // the scheduler sees the store; a prompt that has full blocks is looked for there
    let prompt = "Once upon a time there was a little fox that lived in a wood. ".repeat(20);
    // each shard has half of the experts, and each token goes to some of both
    let instances: BTreeSet<&str> = ["g0", "r0", "s0", "e0-0", "e1-0", "k0"].into();
    let trace = || {
        let mut traces: BTreeMap<Vec<u8>, Vec<Made>> = BTreeMap::new();
        for made in received(&receiver) {
            traces.entry(made.span.trace_id.clone()).or_default().push(made);
        }
        let is_through_all = |trace: &Vec<Made>| {
            let found: BTreeSet<&str> = trace.iter().map(|made| &*made.instance).collect();
            found == instances
        };
        traces.into_values().find(is_through_all)
    };
    let mut number = 0;
    until("a trace through all processes is received", || {
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
            "moesaic-expert-shard" => assert_eq!((&*from, name), ("moesaic-scheduler", "experts")),
            "moesaic-kv-store" => {
                assert!(["moesaic-scheduler", "moesaic-kv-store"].contains(&&*from), "{name} of {from}")
            }
            "moesaic-scheduler" => {
                assert!(["moesaic-gateway", "moesaic-scheduler"].contains(&&*from), "{name} of {from}")
            }
            _ => {}
        }
    }
}
