//! Loading through all layers.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)] // A test fails by panicking, in its helpers too.
use moesaic_config::{ByteSize, Error, HumanDuration, Sources, dump, load};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Config {
    name: String,
    gateway: Gateway,
    telemetry: Telemetry,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Gateway {
    http_port: u16,
    grpc_port: u16,
    body_limit: ByteSize,
    timeout: HumanDuration,
    ratio: f64,
    batch: bool,
    filters: Vec<String>,
    mode: Mode,
    limits: BTreeMap<String, u32>,
    tls: Option<Tls>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    Fast,
    Safe,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tls {
    cert: String,
}

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Telemetry {
    otlp_endpoint: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self { name: "moesaic".into(), gateway: Gateway::default(), telemetry: Telemetry::default() }
    }
}

impl Default for Gateway {
    fn default() -> Self {
        Self {
            http_port: 8000,
            grpc_port: 9000,
            body_limit: ByteSize::mib(4),
            timeout: HumanDuration::from_secs(30),
            ratio: 0.5,
            batch: true,
            filters: vec!["a".into(), "b".into(), "c".into()],
            mode: Mode::Safe,
            limits: BTreeMap::new(),
            tls: None,
        }
    }
}

fn env(pairs: &[(&str, &str)]) -> Sources {
    let env = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Sources { env, ..Sources::default() }
}

fn file(content: &str) -> (tempfile::NamedTempFile, Sources) {
    let mut file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    file.write_all(content.as_bytes()).unwrap();
    let sources = Sources { file: Some(file.path().to_owned()), required_file: true, ..Sources::default() };
    (file, sources)
}

#[test]
fn without_sources_the_defaults_stand() {
    assert_eq!(load::<Config>(&Sources::default()), Ok(Config::default()));
    let missing = Sources { file: Some("no-such-file.toml".into()), ..Sources::default() };
    assert_eq!(load::<Config>(&missing), Ok(Config::default()));
    let required = Sources { required_file: true, ..missing };
    assert!(matches!(load::<Config>(&required), Err(Error::File { .. })));
}

#[test]
fn each_layer_wins_over_the_one_below() {
    let (_file, mut sources) =
        file("name = 'file'\n[gateway]\nhttp_port = 1\ngrpc_port = 1\nratio = 1\nbatch = false\n");
    sources.env = env(&[("MOESAIC__GATEWAY__HTTP_PORT", "2"), ("MOESAIC__GATEWAY__GRPC_PORT", "2"), ("PATH", "x")]).env;
    sources.overrides = vec![("gateway.grpc_port".into(), "3".into())];
    let config: Config = load(&sources).unwrap();
    let gateway = &config.gateway;
    assert_eq!((config.name.as_str(), gateway.http_port, gateway.grpc_port), ("file", 2, 3));
    assert_eq!((gateway.ratio, gateway.batch), (1.0, false));
    assert_eq!(gateway.timeout, HumanDuration::from_secs(30));
}

#[test]
fn every_kind_of_value_comes_from_text() {
    let config: Config = load(&env(&[
        ("MOESAIC__NAME", "[not a list]"),
        ("MOESAIC__GATEWAY__BODY_LIMIT", "1GiB"),
        ("MOESAIC__GATEWAY__TIMEOUT", "500ms"),
        ("MOESAIC__GATEWAY__RATIO", "0.25"),
        ("MOESAIC__GATEWAY__BATCH", "false"),
        ("MOESAIC__GATEWAY__FILTERS", "x, y"),
        ("MOESAIC__GATEWAY__MODE", "fast"),
        ("MOESAIC__GATEWAY__LIMITS__ALICE", "7"),
        ("MOESAIC__GATEWAY__TLS__CERT", "c.pem"),
    ]))
    .unwrap();
    let gateway = config.gateway;
    assert_eq!(config.name, "[not a list]");
    assert_eq!((gateway.body_limit, gateway.timeout), (ByteSize::gib(1), HumanDuration::from_millis(500)));
    assert_eq!((gateway.ratio, gateway.batch, gateway.mode), (0.25, false, Mode::Fast));
    assert_eq!(gateway.filters, ["x", "y"]);
    assert_eq!(gateway.limits, BTreeMap::from([("alice".to_owned(), 7)]));
    assert_eq!(gateway.tls, Some(Tls { cert: "c.pem".into() }));
    let listed: Config = load(&env(&[("MOESAIC__GATEWAY__FILTERS", "['p,q']")])).unwrap();
    assert_eq!(listed.gateway.filters, ["p,q"]);
    let (_file, sources) = file("[gateway]\nfilters = []\nbody_limit = 17\n");
    let emptied: Config = load(&sources).unwrap();
    assert_eq!((emptied.gateway.filters, emptied.gateway.body_limit), (vec![], ByteSize(17)));
}

#[test]
fn an_unknown_key_is_named_with_the_nearest_and_its_source() {
    let (file, sources) = file("[gateway]\nhtp_port = 1\n");
    let message = load::<Config>(&sources).unwrap_err().to_string();
    let path = file.path().display();
    assert_eq!(message, format!("{path}: unknown key 'gateway.htp_port', did you mean 'gateway.http_port'?"));
    let message = load::<Config>(&env(&[("MOESAIC__GATWAY__HTTP_PORT", "1")])).unwrap_err().to_string();
    assert_eq!(
        message,
        "variable MOESAIC__GATWAY__HTTP_PORT: unknown key 'gatway.http_port', did you mean 'gateway.http_port'?"
    );
    let flags = Sources { overrides: vec![("nam".into(), "x".into())], ..Sources::default() };
    assert!(matches!(load::<Config>(&flags), Err(Error::Unknown { nearest: Some(near), .. }) if near == "name"));
    // Below an optional table, the struct itself refuses.
    let message = load::<Config>(&env(&[("MOESAIC__GATEWAY__TLS__CRT", "c")])).unwrap_err().to_string();
    assert!(message.contains("crt") && message.contains("MOESAIC__GATEWAY__TLS"), "{message}");
}

#[test]
fn what_others_read_is_passed_over_but_for_flags_and_own_sections() {
    let (_file, mut sources) = file("[router]\nany = 1\n[gateway]\nhttp_port = 1\n");
    assert!(load::<Config>(&sources).unwrap_err().to_string().contains("unknown key 'router'"));
    sources.others = &["router", "gateway"];
    sources.env = env(&[("MOESAIC__ROUTER__ANY", "2"), ("MOESAIC__GATEWAY__GRPC_PORT", "2")]).env;
    let gateway = load::<Config>(&sources).unwrap().gateway;
    assert_eq!((gateway.http_port, gateway.grpc_port), (1, 2));
    for wrong in ["[gateway]\nany = 1\n", "[rooter]\nany = 1\n"] {
        let (_file, strict) = file(wrong);
        assert!(load::<Config>(&Sources { others: sources.others, ..strict }).is_err(), "{wrong}");
    }
    sources.overrides = vec![("router.any".into(), "3".into())];
    assert!(load::<Config>(&sources).unwrap_err().to_string().contains("router.any"));
}

#[test]
fn a_wrong_value_names_its_key_and_source() {
    for (name, value, key, part) in [
        ("MOESAIC__GATEWAY__HTTP_PORT", "abc", "gateway.http_port", "abc"),
        ("MOESAIC__GATEWAY__HTTP_PORT", "70000", "gateway.http_port", "70000"),
        ("MOESAIC__GATEWAY__BODY_LIMIT", "12 parsecs", "gateway.body_limit", "12 parsecs"),
        ("MOESAIC__GATEWAY__TIMEOUT", "30", "gateway.timeout", "30"),
        ("MOESAIC__GATEWAY__MODE", "warp", "gateway.mode", "warp"),
        ("MOESAIC__GATEWAY__FILTERS", "[", "gateway.filters", ""),
    ] {
        let error = load::<Config>(&env(&[(name, value)])).unwrap_err();
        let Error::Invalid { key: named, source_name, reason } = &error else { panic!("{error}") };
        assert_eq!((named.as_str(), source_name), (key, &format!("variable {name}")), "{error}");
        assert!(reason.contains(part), "{error}");
    }
    let (file, sources) = file("[gateway]\ntimeout = 30\n");
    let message = load::<Config>(&sources).unwrap_err().to_string();
    assert!(message.starts_with(&format!("{}: 'gateway.timeout': ", file.path().display())), "{message}");
    let (_file, sources) = self::file("name = [1\n");
    assert!(matches!(load::<Config>(&sources), Err(Error::File { .. })));
}

#[test]
fn standard_variables_yield_to_our_own() {
    let standard = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317");
    let config: Config = load(&env(&[standard, ("NATS_URL", "no such key here")])).unwrap();
    assert_eq!(config.telemetry.otlp_endpoint.as_deref(), Some("http://127.0.0.1:4317"));
    let config: Config = load(&env(&[standard, ("MOESAIC__TELEMETRY__OTLP_ENDPOINT", "http://other")])).unwrap();
    assert_eq!(config.telemetry.otlp_endpoint.as_deref(), Some("http://other"));
}

#[test]
fn what_is_dumped_loads_again() {
    let mut config = Config::default();
    config.gateway.limits.insert("bob".into(), 3);
    config.gateway.tls = Some(Tls { cert: "c.pem".into() });
    config.gateway.timeout = HumanDuration::from_millis(90_250);
    let (_file, sources) = file(&dump(&config, &[]).unwrap());
    assert_eq!(load::<Config>(&sources), Ok(config));
}

#[test]
fn what_is_not_set_is_dumped_as_a_comment_in_its_section() {
    let unset = [("gateway.tls", "plain HTTP"), ("telemetry.otlp_endpoint", "no traces")];
    let text = dump(&Config::default(), &unset).unwrap();
    let under = |header: &str| text.split_once(&format!("[{header}]\n")).unwrap().1.lines().next().unwrap().to_owned();
    assert_eq!(under("gateway"), "# tls = # unset: plain HTTP");
    assert_eq!(under("telemetry"), "# otlp_endpoint = # unset: no traces");
    let (_file, sources) = file(&text);
    assert_eq!(load::<Config>(&sources), Ok(Config::default()));
    let text = dump(&BTreeMap::from([("telemetry", Telemetry::default())]), &[]).unwrap();
    assert!(text.contains("[telemetry]\n# otlp_endpoint = # unset: not set\n"), "{text}");
}

#[test]
fn what_toml_cannot_express_is_an_error() {
    let error = dump(&BTreeMap::from([("a", ())]), &[]).unwrap_err();
    assert!(matches!(&error, Error::Write(_)), "{error}");
}
