//! The tools over broken files and wrong flags: an error that names what is wrong, never a panic.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use moesaic_testkit::servers::ports;
use moesaic_tests::process::binary;
use moesaic_tests::{http, root};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn run(arguments: &[&str]) -> Output {
    Command::new(binary().unwrap()).args(arguments).current_dir(std::env::temp_dir()).output().unwrap()
}

/// Runs and expects a clear error that contains `expected`.
fn refuses(arguments: &[&str], expected: &str) {
    let output = run(arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
    assert!(error.contains(expected) && !error.contains("panicked"), "{arguments:?}: {error}");
}

/// A copy of a reference checkpoint.
fn copy() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(root().join("tests/goldens/mixtral")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    folder
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn check_tells_a_match_from_a_mismatch() {
    let golden = |name: &str| root().join(format!("tests/goldens/{name}/golden.json"));
    let mixtral = root().join("tests/goldens/mixtral");
    let own = golden("mixtral");
    let good = run(&["check", "--model", text(&mixtral), "--golden", text(&own), "--json"]);
    assert_eq!(good.status.code(), Some(0));
    let report: serde_json::Value = serde_json::from_slice(&good.stdout).unwrap();
    assert_eq!(report["passed"], true);
    let keys: Vec<_> = report.as_object().unwrap().keys().cloned().collect();
    assert_eq!(keys, ["cases", "max_abs_logit_diff", "mean_kl", "greedy_match", "passed"]);
    let other = golden("olmoe");
    let bad = run(&["check", "--model", text(&mixtral), "--golden", text(&other), "--json"]);
    assert_eq!(bad.status.code(), Some(1), "another model's reference does not match");
}

#[test]
fn broken_models_are_refused_by_file_and_tensor() {
    let folder = copy();
    let path = folder.path();
    let golden = path.join("golden.json");
    let check = ["check", "--model", text(path), "--golden", text(&golden)];
    let weights = path.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();

    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    refuses(&check, "model.safetensors");
    std::fs::remove_file(&weights).unwrap();
    refuses(&check, "model.safetensors");
    std::fs::write(&weights, &bytes).unwrap();

    let config = std::fs::read_to_string(path.join("config.json")).unwrap();
    let change = |from: &str, to: &str| {
        assert!(config.contains(from), "{from}");
        std::fs::write(path.join("config.json"), config.replace(from, to)).unwrap();
    };
    change("\"model_type\": \"mixtral\"", "\"model_type\": \"unheard_of\"");
    refuses(&check, "unheard_of");
    change("\"intermediate_size\": 96", "\"intermediate_size\": 97");
    refuses(&check, "experts.0.w");
    change("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4");
    refuses(&check, "model.layers.3.");
    change("\"hidden_size\": 64", "\"hidden_size\": 99999999999");
    refuses(&check, "hidden_size");
    std::fs::write(path.join("config.json"), "{").unwrap();
    refuses(&check, "config.json");
    refuses(&["check", "--model", text(path), "--golden", "no-such-file"], "no-such-file");
}

#[test]
fn up_refuses_wrong_settings_and_broken_tokenizers() {
    refuses(&["up", "--set", "scheduler.token_bugdet=3"], "token_budget");
    refuses(&["up", "--set", "gateway.max_n=0"], "gateway.max_n");
    refuses(&["up", "--http", "nowhere"], "gateway.http");
    refuses(&["up", "--set", "scheduler.kv_blocks=4000000000"], "kv_blocks is 4000000000; it must be from 1 to");
    refuses(&["up", "--set", "scheduler.max_waiting=18446744073709551615"], "max_waiting");
    refuses(&["up", "--set", "model.threads=100000"], "at most 1024");
    refuses(&["up", "--threads", "100000"], "at most 1024");
    let model = root().join("deploy/models/demo-moe");
    let up = ["up", "--model", text(&model), "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--set"];
    refuses(&[&up[..], &["scheduler.kv_memory_bytes=900TiB"]].concat(), "kv_memory_bytes asks for");
    refuses(&["config", "--service", "nonsense"], "--service nonsense");
    refuses(&["up", "--model", "no-such-folder", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"], "no-such-folder");
    let folder = copy();
    std::fs::write(folder.path().join("tokenizer.json"), "{\"model\": 3}").unwrap();
    let up = ["up", "--model", text(folder.path()), "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    refuses(&up, "tokenizer.json");
}

#[test]
fn quantize_writes_a_folder_that_checks_and_refuses_to_overwrite() {
    let model = root().join("deploy/models/demo-moe");
    let out = tempfile::tempdir().unwrap();
    let packed = out.path().join("packed");
    let arguments = ["quantize", "--model", text(&model), "--out", text(&packed), "--weights", "q4", "--group", "64"];
    let output = run(&arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    refuses(&arguments, "not empty");
    let golden = model.join("golden.json");
    let check = run(&["check", "--model", text(&packed), "--golden", text(&golden), "--weights", "q4-g64"]);
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    let check = run(&["check", "--model", text(&packed), "--golden", text(&golden)]);
    assert!(check.status.success(), "judged as what it is: {}", String::from_utf8_lossy(&check.stdout));
    refuses(&["quantize", "--model", text(&model), "--out", "x", "--weights", "bf16"], "q4 or q8");
    refuses(&["quantize", "--model", text(&model), "--out", "x", "--weights", "q4", "--group", "7"], "--group 7");
}

#[test]
fn a_model_whose_files_are_slow_holds_up_neither_the_doors_nor_the_end() {
    let folder = copy();
    let slow = folder.path().join("tokenizer.json");
    std::fs::remove_file(&slow).unwrap();
    assert!(Command::new("mkfifo").arg(&slow).status().unwrap().success());
    let [http, grpc] = [ports::free(), ports::free()].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let mut up = Command::new(binary().unwrap())
        .args(["up", "--model", text(folder.path()), "--http", &http.to_string(), "--grpc", &grpc.to_string()])
        .current_dir(folder.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // waits until the server reads
    let writer = std::fs::File::options().write(true).open(&slow).unwrap();
    assert!(http::get(http, "/live").is_ok());
    assert!(http::get(http, "/ready").unwrap_err().to_string().contains("503"));
    assert!(Command::new("kill").args(["-TERM", &up.id().to_string()]).status().unwrap().success());
    assert_eq!(up.wait().unwrap().code(), Some(0));
    drop(writer);
}
