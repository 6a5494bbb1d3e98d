//! `moesaic up`: all services in one process, or in processes of their own.
use crate::{args, cluster, config, embedded};
use anyhow::{Context, Result};
use moesaic_gateway::Gateway;
use std::process::ExitCode;
use std::time::Instant;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

pub fn run(args: args::Up) -> Result<ExitCode> {
    let mut flags = args.model.overrides();
    flags.extend(args.http.map(|http| ("gateway.http".to_owned(), http)));
    flags.extend(args.grpc.map(|grpc| ("gateway.grpc".to_owned(), grpc)));
    let config = config::load(&args.settings, flags)?;
    if args.dump_config {
        print!("{}", super::config::dump(&config, None)?);
        return Ok(ExitCode::SUCCESS);
    }
    if args.cluster {
        return cluster::run(config, args.counts);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    let ended = runtime.block_on(serve(config));
    // a file that is still being read holds nothing up
    runtime.shutdown_background();
    ended.map(|()| ExitCode::SUCCESS)
}

async fn serve(config: config::Config) -> Result<()> {
    let _telemetry = moesaic_telemetry::init(&config.telemetry).context("set up telemetry")?;
    moesaic_telemetry::metrics::install().context("set up metrics")?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let gateway = Gateway::bind(config.gateway.clone()).await?;
    let (http, grpc) = (gateway.http_address()?, gateway.grpc_address()?);
    let core = gateway.core();
    let drain = config.gateway.drain_timeout.get();
    let (stop, stopped) = watch::channel(false);
    tracing::info!(%http, %grpc, "ports are bound; loading the model");
    // the doors answer (not ready) while the model loads
    let mut running = tokio::spawn(gateway.run(stopped));
    let loading = embedded::start(&config, &core);
    let doors = async {
        tokio::select! {
            _ = terminate.recv() => {}
            result = tokio::signal::ctrl_c() => result.context("listen for ctrl-c")?,
        }
        Ok::<_, anyhow::Error>(terminate)
    };
    tokio::pin!(doors);
    let services = tokio::select! {
        services = loading => services?,
        signal = &mut doors => return signal.map(|_| ()),
    };
    if let [model] = &core.models()[..] {
        tracing::info!(model = model.id, max_context = model.max_context, "ready: http://{http}/v1, grpc {grpc}");
    }
    let mut terminate = tokio::select! {
        result = &mut running => return Ok(result.context("run the gateway")??),
        signal = &mut doors => signal?,
    };
    tracing::info!(drain_s = drain.as_secs_f32(), "stopping: running requests may finish; a second signal ends now");
    // whoever listened may be gone already
    let _ = stop.send(true);
    tokio::select! {
        result = running => result.context("run the gateway")??,
        _ = terminate.recv() => return Ok(()),
        _ = tokio::signal::ctrl_c() => return Ok(()),
    }
    services.scheduler.drain(Instant::now() + drain).await;
    services.scheduler.stop();
    Ok(())
}
