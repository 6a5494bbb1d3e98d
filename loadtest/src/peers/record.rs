//! What the record says of a measurement: its tables, and what must be known to read them.
use super::engine::{Kv, Way};
use super::{Bench, PREFIX, SERVED};
use crate::model::Shape;
use crate::report::{Section, Table, number};
use crate::stats::median;

/// Of one model.
pub(super) fn section(bench: &Bench<'_>, shape: &Shape, file_bytes: u64, large: bool) -> Section {
    let Bench { args, engines, results, ceilings, .. } = bench;
    let mut flags = Table::new("Engines", &["engine", "built of", "flags alone", "flags of the server"]);
    for engine in *engines {
        let bench = engine.flags(Way::usual(Kv::Bf16)).join(" ");
        let server = engine.server_form(args.threads.into());
        flags.row([engine.name.to_owned(), engine.version.clone(), bench, server]);
    }
    let gb = |bytes: f64| number(bytes / 1e9);
    let method = format!(
        "{} with random weights ({:.2} GB, matrices Q4_0, embedding and output Q8_0), the same GGUF file for all, {} \
         threads each, {} rounds in turns. Alone: `moesaic bench` and `llama-bench`, each a process of its own, in which a \
         whole run of the test warms up and a second one is timed: llama-bench has `-r 2`, since its own warm-up is one \
         token, and its first repetition is dropped. Servers: a closed loop over /v1/completions, prompts of {} tokens and \
         answers of {}, {} requests of each client after one to warm up.",
        shape.name,
        file_bytes as f64 / 1e9,
        args.threads,
        args.rounds,
        SERVED.0,
        SERVED.1,
        args.requests,
    );
    let int8_source = if args.int8_gops.is_some() { "as was given" } else { "measured in this run" };
    let mut notes = vec![
        format!(
            "The machine's limits: memory was read with at most {} GB/s by {} threads in this run; {}. A generated token \
             reads {} MB of matrices and its context's keys and values; a prompt's token is {} MFLOP.",
            gb(ceilings.read_bytes_s),
            args.threads,
            ceilings.int8_ops_s.map_or_else(
                || "int8 was not measured, for this processor's instructions are not known here, so prompts have no share \
                    (--int8-gops gives it)"
                    .to_owned(),
                |ops| format!("int8 is {} GOP/s, {int8_source}", gb(ops)),
            ),
            number(shape.bytes_a_token() as f64 / 1e6),
            number(shape.operations_a_token() as f64 / 1e6),
        ),
        "A cell is the median of the rounds; a ratio is taken within each round, to the peer that was better in it, and \
         the table has the ratios' median and their range. A round in which a peer failed that was measured in others has \
         no ratio to the better. With a context, a peer has its better way of f16 and q8_0 keys and values, and no share \
         of the limit; with a prompt of more than 512 tokens, the better of `-ub 512` and `-ub 2048`. The target of a row \
         with a busy core is to be no worse than without."
            .to_owned(),
        "CONTEXT is what all CLIENTS need together. ik_llama.cpp's server runs with `-fa on` for one client, and with \
         `-fa off` for more: with flash attention it ends at an assertion when a batch has several sequences."
            .to_owned(),
        "Both peers were built for this processor (GGML_NATIVE=ON) from their source distributions; llama.cpp repacks \
         weights at load by default, ik_llama.cpp with -rtr."
            .to_owned(),
    ];
    for engine in engines.iter().filter(|engine| engine.without_amx) {
        notes.push(format!(
            "{} was built without AMX: the C compiler here breaks it (GCC's bug 114098), and the program would end by a \
             signal where the processor has it.",
            engine.name
        ));
    }
    if !bench.load_s.is_empty() {
        notes.push(format!(
            "Moesaic loaded the GGUF file in {} s (median) and had {:.2} GB resident at most, {:.2} times the file.",
            number(median(&bench.load_s)),
            bench.peak_rss_bytes as f64 / 1e9,
            bench.peak_rss_bytes as f64 / file_bytes as f64,
        ));
    }
    if !bench.load_prepared_s.is_empty() {
        notes.push(format!(
            "From a folder that `moesaic quantize` made of it, Moesaic loaded it in {} s (median of {}; the target is 1 s).",
            number(median(&bench.load_prepared_s)),
            bench.load_prepared_s.len(),
        ));
    }
    if args.only_peers {
        notes.push("Moesaic was left out (--only-peers).".into());
    }
    let line = |text: &String| text.split_whitespace().collect::<Vec<_>>().join(" ");
    notes.extend(results.tried_again.iter().map(|first| format!("Tried again with another seed: {}", line(first))));
    notes.extend(results.failures.iter().map(|failure| format!("**Failed**: {}", line(failure))));
    let mut values = results.values(shape, ceilings);
    values["ceilings"] = serde_json::to_value(ceilings).unwrap_or_default();
    values["engines"] = serde_json::to_value(engines).unwrap_or_default();
    values["model"] = serde_json::json!({"name": shape.name, "file_bytes": file_bytes});
    values["moesaic"] = serde_json::json!({
        "peak_rss_bytes": bench.peak_rss_bytes, "load_s": bench.load_s, "load_prepared_s": bench.load_prepared_s,
    });
    values["int8_limit"] = serde_json::json!(ceilings.int8_ops_s.map(|_| int8_source));
    let title = format!("Peers: {}", shape.name);
    let mut tables = vec![results.table("Rates", shape, ceilings, large)];
    if !bench.prefix.is_empty() {
        values["prefix"] = bench.prefix.values(PREFIX);
        tables.push(bench.prefix.table(&format!("A shared prefix of {PREFIX} tokens"), engines));
    }
    if !bench.quality.is_empty() {
        values["quality"] = serde_json::to_value(&bench.quality).unwrap_or_default();
        tables.push(bench.quality.table());
    }
    tables.push(flags);
    Section { title, method, tables, notes, values }
}
