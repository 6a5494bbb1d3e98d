//! `moesaic check`: reference outputs against this build.
use crate::args::{self, ModelArgs};
use crate::commands::load_runner;
use anyhow::{Context, Result, bail};
use moesaic_model::golden::{self, Golden, Variant};
use moesaic_model::source::packed;
use moesaic_model::{Activations, BackendKind, demo};
use moesaic_types::{KvFormat, WeightFormat};
use std::process::ExitCode;

pub fn run(args: args::Check) -> Result<ExitCode> {
    if args.lora.is_some() {
        bail!("--lora: adapters are not built yet; run without it");
    }
    // exact by default: reference outputs are f32, and so are keys and values, whatever the weights are; but a packed
    // folder is what it was packed as
    let mut model = args.model;
    if model.weights.is_none() {
        model.weights = packed::format_of(&model.model.clone().map_or_else(demo::find, Ok)?)?;
    }
    let weights = *model.weights.get_or_insert(WeightFormat::F32);
    model.kv.get_or_insert(KvFormat::F32);
    let golden = Golden::read(&args.golden).context("read the golden file")?;
    let report = match weights {
        WeightFormat::F32 => golden::check(load_runner(&model)?.as_mut(), &golden)?,
        weights => golden::check_rounded(&golden, weights, |variant| load_runner(&as_variant(&model, variant)))?,
    };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("{report}");
    }
    Ok(if report.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn as_variant(model: &ModelArgs, variant: Variant) -> ModelArgs {
    let exact = ModelArgs { kv: Some(KvFormat::F32), ..model.clone() };
    match variant {
        Variant::Judged => model.clone(),
        Variant::Exact => ModelArgs { activations: Some(Activations::F32), ..model.clone() },
        Variant::Plain => {
            // either backend computes in f32 with the values that the rounded weights stand for
            let other = match model.backend.unwrap_or(BackendKind::Native) {
                BackendKind::Native => BackendKind::Candle,
                BackendKind::Candle => BackendKind::Native,
            };
            ModelArgs { backend: Some(other), ..exact }
        }
        Variant::Unrounded => ModelArgs { weights: Some(WeightFormat::F32), ..exact },
    }
}
