//! The dashboard, the alerts and what Prometheus asks name things that exist: metrics by their kind, labels, services,
//! data sources, files.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use moesaic_telemetry::metrics;
use moesaic_tests::root;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

const FOLDER: &str = "deploy/observability";

/// Metrics that are not ours, and whether they are counters.
const OTHERS: [(&str, bool); 4] =
    [("up", false), ("ALERTS", false), ("process_resident_memory_bytes", false), ("process_cpu_seconds_total", true)];

/// Labels that Prometheus or its histograms add, or that others' metrics have.
const LABELS: [&str; 5] = ["job", "instance", "le", "alertname", "alertstate"];

fn text(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn yaml(path: &str) -> Value {
    let mut value: serde_yaml_ng::Value =
        serde_yaml_ng::from_str(&text(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    value.apply_merge().unwrap();
    serde_json::to_value(value).unwrap()
}

fn dashboard() -> Value {
    serde_json::from_str(&text(&format!("{FOLDER}/grafana/dashboards/moesaic.json"))).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// Every expression, with where it stands.
fn expressions() -> Vec<(String, String)> {
    let dashboard = dashboard();
    let panels = list(&dashboard["panels"]).iter().flat_map(|panel| {
        let title = panel["title"].as_str().unwrap();
        list(&panel["targets"]).iter().map(move |target| (format!("panel {title}"), target["expr"].clone()))
    });
    let alerts = yaml(&format!("{FOLDER}/alerts.yml"));
    let groups = list(&alerts["groups"]).to_vec();
    let rules = groups.iter().flat_map(|group| list(&group["rules"]));
    let rules = rules.map(|rule| (format!("alert {}", rule["alert"].as_str().unwrap()), rule["expr"].clone()));
    let all: Vec<_> = panels.chain(rules).map(|(at, expr)| (at, expr.as_str().unwrap().to_owned())).collect();
    assert!(all.len() > 60, "{}", all.len());
    all
}

/// A metric in an expression.
#[derive(Debug, PartialEq)]
struct Selected {
    name: String,
    /// The function that it stands in, if any.
    within: String,
}

/// The metrics and labels of a PromQL expression.
fn selected(expression: &str) -> (Vec<Selected>, BTreeSet<String>) {
    const WORDS: [&str; 7] = ["and", "or", "unless", "bool", "offset", "inf", "nan"];
    const BEFORE_LABELS: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];
    let is_first = |c: char| c.is_ascii_alphabetic() || c == '_' || c == ':';
    let (mut metrics, mut labels) = (Vec::new(), BTreeSet::new());
    let (mut functions, mut last) = (Vec::<String>::new(), String::new());
    let mut rest = expression;
    while let Some(c) = rest.chars().next() {
        let word: usize = rest.find(|c: char| !is_first(c) && !c.is_ascii_digit()).unwrap_or(rest.len());
        rest = match c {
            '"' | '\'' => &rest[2 + rest[1..].find(c).unwrap()..],
            '[' => &rest[1 + rest.find(']').unwrap()..],
            '{' => {
                let inside = &rest[1..rest.find('}').unwrap()];
                let names = inside.split(',').filter_map(|pair| pair.split(['=', '!']).next());
                labels.extend(names.map(|name| name.trim().to_owned()));
                &rest[2 + inside.len()..]
            }
            '(' if BEFORE_LABELS.contains(&&*last) => {
                let inside = &rest[1..rest.find(')').unwrap()];
                labels.extend(inside.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()));
                last.clear();
                &rest[2 + inside.len()..]
            }
            '(' => {
                functions.push(std::mem::take(&mut last));
                &rest[1..]
            }
            ')' => {
                functions.pop().unwrap();
                &rest[1..]
            }
            c if is_first(c) => {
                let (name, after) = rest.split_at(word);
                let is_function = after.trim_start().starts_with('(');
                if is_function || WORDS.contains(&name) || BEFORE_LABELS.contains(&name) || after.starts_with('(') {
                    last = if WORDS.contains(&name) { String::new() } else { name.to_owned() };
                } else if !is_aggregation(after) {
                    let within = functions.iter().rev().find(|function| !function.is_empty());
                    metrics.push(Selected { name: name.to_owned(), within: within.cloned().unwrap_or_default() });
                }
                after
            }
            c if c.is_ascii_digit() => &rest[word.max(1)..],
            _ => &rest[c.len_utf8()..],
        };
    }
    assert!(functions.is_empty(), "{expression}");
    (metrics, labels)
}

/// Whether the word before is an aggregation whose labels come next.
fn is_aggregation(after: &str) -> bool {
    let after = after.trim_start();
    ["by ", "by(", "without ", "without("].iter().any(|start| after.starts_with(start))
}

/// Kind and labels of each of our series, as Prometheus sees them.
fn series() -> BTreeMap<String, (&'static str, BTreeSet<String>)> {
    let mut known = BTreeMap::new();
    for (name, kind, help) in metrics::ALL {
        let labels: BTreeSet<String> = help.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        match *kind {
            "histogram" => {
                for end in ["bucket", "sum", "count"] {
                    known.insert(format!("{name}_{end}"), ("counter", labels.clone()));
                }
            }
            kind => {
                known.insert((*name).to_owned(), (kind, labels.clone()));
                if kind == "counter" && !name.ends_with("_total") {
                    known.insert(format!("{name}_total"), (kind, labels));
                }
            }
        }
    }
    for (name, is_counter) in OTHERS {
        known.insert(name.to_owned(), (if is_counter { "counter" } else { "gauge" }, BTreeSet::new()));
    }
    known
}

#[test]
fn expressions_name_metrics_that_exist_and_read_them_by_their_kind() {
    let known = series();
    let mut seen = 0;
    for (at, expression) in expressions() {
        let (metrics, labels) = selected(&expression);
        assert!(!metrics.is_empty(), "{at}: {expression}");
        let mut own = BTreeSet::new();
        for Selected { name, within } in metrics {
            let Some((kind, labels)) = known.get(&name) else { panic!("{at}: no metric {name}: {expression}") };
            // or compared with itself before
            let is_rate =
                ["rate", "increase", "irate"].contains(&&*within) || expression.contains(&format!("{name} offset"));
            assert_eq!(*kind == "counter", is_rate, "{at}: {name} is a {kind} in {within:?}: {expression}");
            own.extend(labels.clone());
            seen += 1;
        }
        for label in labels {
            let is_known = LABELS.contains(&&*label) || own.contains(&label);
            assert!(is_known, "{at}: no label {label} ({own:?}): {expression}");
        }
    }
    assert!(seen > 60, "{seen}");
}

#[test]
fn metrics_and_labels_are_found_in_expressions() {
    let found = |expression: &str| {
        let (metrics, labels) = selected(expression);
        let metrics: Vec<_> = metrics.into_iter().map(|m| format!("{} in {}", m.name, m.within)).collect();
        (metrics.join("; "), labels.into_iter().collect::<Vec<_>>().join(" "))
    };
    let quantile = "histogram_quantile(0.5, sum by (le) (rate(a:b_bucket{x=\"y(z\", w!~'5..'}[5m])))";
    assert_eq!(found(quantile), ("a:b_bucket in rate".into(), "le w x".into()));
    let both = "sum(a) > 8 and deriv(sum(b)[5m:15s]) > 0 unless on () max(c) > 1e3";
    assert_eq!(found(both), ("a in sum; b in sum; c in max".into(), String::new()));
    assert_eq!(found("count by (job) (up == 1) or vector(0)"), ("up in ".into(), "job".into()));
    assert_eq!(found("a / on (l) group_left (m) b").1, "l m");
}

#[test]
fn prometheus_asks_each_service_of_the_compose_file() {
    let compose = yaml("docker-compose.yml");
    let mut expected: BTreeSet<String> = BTreeSet::from(["otel-collector:8888".to_owned()]);
    for (name, service) in compose["services"].as_object().unwrap() {
        if let [_, program, port] = list(&service["healthcheck"]["test"])
            && program == "moesaic-ready"
        {
            expected.insert(format!("{name}:{}", port.as_str().unwrap()));
        }
    }
    assert_eq!(expected.len(), 11, "{expected:?}");
    let prometheus = yaml(&format!("{FOLDER}/prometheus.yml"));
    let mut asked = BTreeSet::new();
    for job in list(&prometheus["scrape_configs"]) {
        for targets in list(&job["static_configs"]) {
            for target in list(&targets["targets"]) {
                let target = target.as_str().unwrap();
                assert!(target.starts_with(job["job_name"].as_str().unwrap()), "{target} is asked as {job}");
                asked.insert(target.to_owned());
            }
        }
    }
    assert_eq!(asked, expected);
}

#[test]
fn the_profile_is_pinned_and_locked_down_and_its_files_exist() {
    let compose = yaml("docker-compose.yml");
    let mut seen = BTreeSet::new();
    for (name, service) in compose["services"].as_object().unwrap() {
        if service["profiles"].is_null() {
            continue;
        }
        seen.insert(name.as_str());
        assert_eq!(service["profiles"], serde_json::json!(["observability"]), "{name}");
        let tag = service["image"].as_str().unwrap().split_once(':').unwrap().1;
        assert!(tag.trim_start_matches('v').split('.').count() == 3, "{name}: {tag}");
        assert!(service["user"].as_str().is_some_and(|user| !user.starts_with('0')), "{name}");
        assert_eq!((&service["read_only"], &service["cap_drop"][0]), (&true.into(), &"ALL".into()), "{name}");
        assert_eq!(service["healthcheck"].is_null(), name == "otel-collector", "{name}");
        for volume in list(&service["volumes"]) {
            let (host, _) = volume.as_str().unwrap().split_once(':').unwrap();
            let is_there = host.strip_prefix("./").map_or_else(
                || compose["volumes"].as_object().unwrap().contains_key(host),
                |path| root().join(path).exists(),
            );
            assert!(is_there, "{name}: {host}");
        }
        for port in list(&service["ports"]) {
            assert!(port.as_str().unwrap().contains(":-127.0.0.1:"), "{name}: {port} is open to other hosts");
        }
    }
    assert_eq!(seen, BTreeSet::from(["grafana", "jaeger", "otel-collector", "prometheus"]));
    let collector = yaml(&format!("{FOLDER}/otel-collector.yaml"));
    let settings = text(&format!("{FOLDER}/compose.env"));
    assert!(settings.contains("MOESAIC_OTLP_ENDPOINT=http://otel-collector:4317\n"), "{settings}");
    assert_eq!(collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"], "0.0.0.0:4317");
}

#[test]
fn panels_have_their_own_place_and_a_data_source() {
    let sources = yaml(&format!("{FOLDER}/grafana/provisioning/datasources/moesaic.yaml"));
    let uids: Vec<_> = list(&sources["datasources"]).iter().map(|source| source["uid"].clone()).collect();
    let dashboard = dashboard();
    let (mut ids, mut places) = (BTreeSet::new(), BTreeSet::new());
    for panel in list(&dashboard["panels"]) {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{panel}");
        let at = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        assert!(at("x") + at("w") <= 24);
        for x in at("x")..at("x") + at("w") {
            for y in at("y")..at("y") + at("h") {
                assert!(places.insert((x, y)), "two panels at {x}, {y}: {}", panel["title"]);
            }
        }
        if panel["type"] != "row" {
            assert!(uids.contains(&panel["datasource"]["uid"]), "{panel}");
            assert!(!list(&panel["targets"]).is_empty(), "{panel}");
        }
    }
}
