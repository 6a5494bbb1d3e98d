//! One request is one trace, through every service's process, as a real OTLP receiver gets it; what its root tells of it,
//! and where a migration shows.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use futures::StreamExt;
use moesaic_proto::inference::v1 as wire;
use moesaic_proto::inference::v1::inference_service_client::InferenceServiceClient;
use moesaic_testkit::otlp::Receiver;
use moesaic_tests::cluster::{Cluster, Member};
use moesaic_tests::{http, root, until};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// A span, and the service and instance that made it.
#[derive(Clone, Debug)]
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

/// Operation, model, input and output tokens, and why the answers ended.
type Asked<'a> = (Option<&'a str>, Option<&'a str>, Option<i64>, Option<i64>, Vec<&'a str>);

impl Made {
    fn label(&self) -> String {
        format!("{}: {}", self.service.trim_start_matches("moesaic-"), self.span.name)
    }

    fn attribute(&self, key: &str) -> Option<&Value> {
        let mut found = self.span.attributes.iter().filter(|attribute| attribute.key == key);
        let value = found.next()?.value.as_ref()?.value.as_ref();
        assert!(found.next().is_none(), "{} has {key} twice", self.span.name);
        value
    }

    fn text(&self, key: &str) -> Option<&str> {
        match self.attribute(key) {
            Some(Value::StringValue(text)) => Some(text),
            _ => None,
        }
    }

    fn number(&self, key: &str) -> Option<i64> {
        match self.attribute(key) {
            Some(Value::IntValue(number)) => Some(*number),
            _ => None,
        }
    }

    /// What a root tells of a request.
    fn asked(&self) -> Asked<'_> {
        let reasons = match self.attribute("gen_ai.response.finish_reasons") {
            Some(Value::ArrayValue(array)) => array.values.iter().map(|value| match value.value.as_ref() {
                Some(Value::StringValue(text)) => text.as_str(),
                other => panic!("a reason is {other:?}"),
            }),
            other => panic!("finish_reasons of {} is {other:?}", self.span.name),
        };
        (
            self.text("gen_ai.operation.name"),
            self.text("gen_ai.request.model"),
            self.number("gen_ai.usage.input_tokens"),
            self.number("gen_ai.usage.output_tokens"),
            reasons.collect(),
        )
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Ends processes, which send what spans they have.
fn end<'a>(members: impl IntoIterator<Item = &'a mut Member>) {
    for member in members {
        member.terminate().unwrap();
        assert!(member.ended().unwrap().success(), "{}", member.log());
    }
}

/// The trace as ARCHITECTURE.md shows it, without its remark.
fn promised() -> String {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let section = text.split("## A request's trace").nth(1).unwrap();
    let lines =
        section.lines().skip_while(|line| !line.starts_with("    ")).take_while(|line| line.starts_with("    "));
    lines.map(|line| format!("{}\n", line[4..].split(" (").next().unwrap().trim_end())).collect()
}

/// Which spans are whose children in a drawn tree: (parent, child).
fn pairs(tree: &str) -> BTreeSet<(Option<String>, String)> {
    let mut above: Vec<String> = Vec::new();
    let mut pairs = BTreeSet::new();
    for line in tree.lines() {
        let label = line.trim_start();
        above.truncate((line.len() - label.len()) / 2);
        pairs.insert((above.last().cloned(), label.to_owned()));
        above.push(label.to_owned());
    }
    pairs
}

/// The trace as a tree: one line a span, equal siblings once.
fn draw(spans: &[Made]) -> String {
    fn below(spans: &[Made], parent: &[u8], depth: usize, text: &mut String) {
        let mut children: Vec<&Made> = spans.iter().filter(|made| made.span.parent_span_id == parent).collect();
        children.sort_by_key(|made| made.span.start_time_unix_nano);
        let mut drawn = BTreeSet::new();
        for made in children {
            if drawn.insert(made.label()) {
                let _ = writeln!(text, "{:indent$}{}", "", made.label(), indent = 2 * depth);
                below(spans, &made.span.span_id, depth + 1, text);
            }
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
    end(members.into_iter().chain(&mut cluster.schedulers).chain(&mut cluster.shards));
    let trace = trace().unwrap();
    assert_eq!(draw(&trace), promised(), "as ARCHITECTURE.md shows it");
    // those that are not drawn are no others
    let promised = pairs(&promised());
    let ids: BTreeMap<&[u8], &Made> = trace.iter().map(|made| (&*made.span.span_id, made)).collect();
    for made in &trace {
        let parent = ids.get(&*made.span.parent_span_id).map(|parent| parent.label());
        assert!(promised.contains(&(parent.clone(), made.label())), "{} of {parent:?}", made.label());
    }
}

#[test]
fn a_migration_is_a_link_to_the_attempt_that_failed() {
    let (receiver, endpoint) = Receiver::start();
    let telemetry = format!("[telemetry]\nlog_format = \"json\"\notlp_endpoint = \"{endpoint}\"");
    let mut cluster = Cluster::start(2, &telemetry).unwrap();
    let mut stream = cluster.stream("Once upon a time", 500).unwrap();
    stream.read(3).unwrap();
    let busy = cluster.becomes_busy().unwrap();
    cluster.schedulers[busy].kill().unwrap();
    stream.finish().unwrap();
    assert_eq!(stream.completion_tokens, Some(500));
    end([&mut cluster.gateway]);

    let spans = received(&receiver);
    let place = format!("s{busy}");
    let attempts: Vec<&Made> = spans.iter().filter(|made| made.label() == "gateway: attempt").collect();
    let (first, later): (Vec<&Made>, Vec<&Made>) =
        attempts.iter().copied().partition(|made| made.number("moesaic.attempt") == Some(1));
    assert_eq!(first.len(), 1, "{attempts:?}");
    let first = first[0];
    assert_eq!((first.text("moesaic.replica"), first.span.links.len()), (Some(&*place), 0));
    let other = format!("s{}", 1 - busy);
    let took_over = later.iter().find(|made| made.text("moesaic.replica") == Some(&*other)).unwrap();
    let links: Vec<_> = took_over.span.links.iter().map(|link| (&link.trace_id, &link.span_id)).collect();
    assert_eq!(links, [(&first.span.trace_id, &first.span.span_id)]);
    assert!(took_over.number("moesaic.resumed_tokens") > Some(0));

    let request = spans.iter().find(|made| made.span.span_id == first.span.parent_span_id).unwrap();
    assert_eq!(took_over.span.parent_span_id, request.span.span_id);
    let (operation, model, _, output, reasons) = request.asked();
    assert_eq!((operation, model, output), (Some("text_completion"), Some("demo-moe"), Some(500)));
    assert_eq!(reasons, ["length"]);

    let log = cluster.gateway.log();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let of_failure =
        lines.filter(|line| line["message"].as_str().is_some_and(|text| text.starts_with("replica failed")));
    let ids: Vec<_> = of_failure.map(|line| line["trace_id"].as_str().map(str::to_owned)).collect();
    assert_eq!(ids, [Some(hex(&first.span.trace_id))], "{log}");
}

#[test]
fn the_root_tells_what_was_asked_and_how_it_ended_at_both_doors() {
    let (receiver, endpoint) = Receiver::start();
    let mut cluster = Cluster::start(1, &format!("[telemetry]\notlp_endpoint = \"{endpoint}\"")).unwrap();
    let messages = json!([{"role": "user", "content": "Hello"}]);
    let chat = json!({"messages": messages, "max_tokens": 5, "n": 2, "ignore_eos": true});
    let (status, answer) = http::post(cluster.http, "/v1/chat/completions", &chat).unwrap();
    assert_eq!(status, 200, "{answer}");
    let chat_input = answer["usage"]["prompt_tokens"].as_i64();
    let texts = json!({"prompt": ["Once upon", "a time there was"], "max_tokens": 4, "ignore_eos": true});
    let (status, answer) = http::post(cluster.http, "/v1/completions", &texts).unwrap();
    assert_eq!(status, 200, "{answer}");
    let texts_input = answer["usage"]["prompt_tokens"].as_i64();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let address = format!("http://{}", cluster.gateway.grpc);
    runtime.block_on(async {
        let mut client = InferenceServiceClient::connect(address).await.unwrap();
        let sampling = Some(wire::SamplingParams { max_tokens: Some(3), ignore_eos: true, ..Default::default() });
        let tokens = vec![10, 11, 12, 13];
        let request = wire::GenerateRequest { tokens, sampling: sampling.clone(), ..Default::default() };
        let mut pieces = client.generate(request).await.unwrap().into_inner();
        while let Some(piece) = pieces.next().await {
            piece.unwrap();
        }
        let hello = wire::ChatMessage { role: "user".into(), content: "Hello".into(), ..Default::default() };
        let request = wire::ChatRequest { messages: vec![hello], sampling, ..Default::default() };
        let mut pieces = client.chat(request).await.unwrap().into_inner();
        while let Some(piece) = pieces.next().await {
            piece.unwrap();
        }
    });
    end(std::iter::once(&mut cluster.gateway).chain(&mut cluster.schedulers));

    let spans = received(&receiver);
    let root = |key: &str, value: &str| {
        let is_it = |made: &&Made| made.span.parent_span_id.is_empty() && made.text(key) == Some(value);
        let found: Vec<&Made> = spans.iter().filter(is_it).collect();
        assert_eq!(found.len(), 1, "{key} {value}");
        found[0]
    };
    let model = Some("demo-moe");
    for (key, value, operation, input, output, reasons) in [
        ("http.route", "/v1/chat/completions", "chat", chat_input, 10, vec!["length"; 2]),
        ("http.route", "/v1/completions", "text_completion", texts_input, 8, vec!["length"; 2]),
        ("rpc.method", "Generate", "text_completion", Some(4), 3, vec!["length"]),
        ("rpc.method", "Chat", "chat", chat_input, 3, vec!["length"]),
    ] {
        let root = root(key, value);
        assert_eq!(root.asked(), (Some(operation), model, input, Some(output), reasons), "{key} {value}");
        assert!(input.is_some() && root.text("gen_ai.provider.name") == Some("moesaic"), "{key} {value}");
    }
    // a scheduler's span says the same of its part
    let whole = &root("rpc.method", "Generate").span.trace_id;
    let part = spans.iter().find(|made| made.label() == "scheduler: generate" && made.span.trace_id == *whole);
    let (operation, _, _, output, reasons) = part.unwrap().asked();
    assert_eq!((operation, output, reasons), (None, Some(3), vec!["length"]), "only the root knows the operation");
}
