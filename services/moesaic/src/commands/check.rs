//! `moesaic check`: reference outputs against this build.
use crate::{args, commands::load_runner};
use anyhow::{Context, Result, bail};
use moesaic_model::golden::{self, Golden};
use std::process::ExitCode;

pub fn run(args: args::Check) -> Result<ExitCode> {
    if args.lora.is_some() {
        bail!("--lora: adapters are not built yet; run without it");
    }
    // exact by default: reference outputs are f32
    let mut model = args.model;
    model.weights.get_or_insert(moesaic_types::WeightFormat::F32);
    if model.weights == Some(moesaic_types::WeightFormat::F32) {
        model.kv.get_or_insert(moesaic_types::KvFormat::F32);
    }
    let golden = Golden::read(&args.golden).context("read the golden file")?;
    let mut runner = load_runner(&model)?;
    let report = golden::check(runner.as_mut(), &golden, model.weights.unwrap_or_default())?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("{report}");
    }
    Ok(if report.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
