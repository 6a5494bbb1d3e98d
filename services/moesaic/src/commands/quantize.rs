//! `moesaic quantize`: packs weights, tensor by tensor.
use crate::{args, progress::Bar};
use anyhow::{Result, bail};
use moesaic_types::WeightFormat;
use std::process::ExitCode;

pub fn run(args: args::Quantize) -> Result<ExitCode> {
    let format = match (args.weights, args.group) {
        (Some(WeightFormat::Q4 { .. }), Some(group @ (32 | 64 | 128))) => Some(WeightFormat::Q4 { group }),
        (Some(WeightFormat::Q4 { .. }), Some(group)) => bail!("--group {group}: use 32, 64 or 128"),
        (format @ (Some(WeightFormat::Q4 { .. }) | None), None) => format,
        (Some(WeightFormat::Q8), None | Some(32)) => Some(WeightFormat::Q8),
        (Some(WeightFormat::Q8), Some(group)) => bail!("--group {group}: q8 has groups of 32"),
        (Some(format), _) => bail!("--weights {format}: use q4 or q8"),
        (None, Some(group)) => bail!("--group {group}: is for --weights q4"),
    };
    let bar = Bar::new("quantize");
    let report = moesaic_model::quantize::quantize(&args.model, &args.out, format, &|done, total, _tensor| {
        bar.set(done, total);
    })?;
    bar.finish();
    println!(
        "{}: {} tensors, {:.1} MiB -> {:.1} MiB ({}), peak memory {:.1} MiB",
        args.out.display(),
        report.tensors,
        report.bytes_in as f64 / 1048576.0,
        report.bytes_out as f64 / 1048576.0,
        format.map_or_else(|| "as stored".to_owned(), |format| format.to_string()),
        super::bench::peak_rss_bytes()? as f64 / 1048576.0,
    );
    Ok(ExitCode::SUCCESS)
}
