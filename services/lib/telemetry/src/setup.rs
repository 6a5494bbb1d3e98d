//! Installs the process's subscriber.
use crate::{Error, LogFormat, TelemetryConfig, json};
use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tokio::runtime::Runtime;
use tracing::Metadata;
use tracing_subscriber::filter::{EnvFilter, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry};

/// Keeps telemetry running; flushes the traces when dropped (for at most five seconds).
#[must_use = "traces are flushed when this is dropped"]
#[derive(Debug)]
pub struct Guard {
    _export: Option<Export>,
}

#[derive(Debug)]
struct Export {
    provider: SdkTracerProvider,
    /// Drives the exporter's connection: the caller may have no runtime, or may block the one that it has on the
    /// final flush.
    runtime: Option<Runtime>,
}

impl Drop for Export {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown() {
            tracing::warn!(%error, "the last traces could not be sent");
        }
        if let Some(runtime) = self.runtime.take() {
            // A plain drop is refused inside another runtime.
            runtime.shutdown_background();
        }
    }
}

/// Installs the process's subscriber; once only.
///
/// # Errors
/// When a setting is wrong, or a subscriber is there already.
pub fn init(config: &TelemetryConfig) -> Result<Guard, Error> {
    init_as(config, None)
}

/// The same for one of several processes of a service: traces name it as `service.instance.id`.
///
/// # Errors
/// As [`init`].
pub fn init_as(config: &TelemetryConfig, instance: Option<&str>) -> Result<Guard, Error> {
    let filter =
        EnvFilter::try_new(&config.log).map_err(|source| Error::Filter { filter: config.log.clone(), source })?;
    if !(0.0..=1.0).contains(&config.sample_ratio) {
        return Err(Error::SampleRatio(config.sample_ratio));
    }
    let export = match config.endpoint() {
        Some(endpoint) => Some(exporter(config, endpoint, instance)?),
        None => None,
    };
    let logs: Box<dyn Layer<Registry> + Send + Sync> = match config.log_format {
        LogFormat::Human => {
            let is_terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
            Box::new(tracing_subscriber::fmt::layer().with_ansi(is_terminal).with_writer(std::io::stderr))
        }
        LogFormat::Json => Box::new(json::layer(std::io::stderr)),
    };
    let traces = export.as_ref().map(|export| {
        let tracer = export.provider.tracer("moesaic");
        tracing_opentelemetry::layer().with_tracer(tracer).with_filter(filter_fn(is_ours))
    });
    // The trace layer stands before the logs, so that a log line sees its span's ids.
    let layers: Vec<Box<dyn Layer<Registry> + Send + Sync>> =
        traces.into_iter().map(|layer| Box::new(layer) as _).chain([logs]).collect();
    let subscriber = tracing_subscriber::registry().with(layers).with(filter);
    subscriber.try_init().map_err(|_| Error::AlreadySet("a tracing subscriber"))?;
    Ok(Guard { _export: export })
}

/// Whether a span is part of our traces; the transport's own would trace the exporter too.
fn is_ours(metadata: &Metadata<'_>) -> bool {
    let foreign =
        ["h2", "hyper", "hyper_util", "tonic", "tower", "opentelemetry", "opentelemetry_sdk", "opentelemetry_otlp"];
    let root = metadata.target().split("::").next().unwrap_or_default();
    !foreign.contains(&root)
}

fn exporter(config: &TelemetryConfig, endpoint: &str, instance: Option<&str>) -> Result<Export, Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("otlp")
        .enable_all()
        .build()
        .map_err(Error::Thread)?;
    let exporter = {
        let _inside = runtime.enter();
        opentelemetry_otlp::SpanExporter::builder().with_tonic().with_endpoint(endpoint).build()
    };
    let exporter =
        exporter.map_err(|error| Error::Endpoint { endpoint: endpoint.to_owned(), reason: error.to_string() })?;
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(
            Resource::builder()
                .with_service_name(config.name().to_owned())
                .with_attributes(instance.map(|id| KeyValue::new("service.instance.id", id.to_owned())))
                .build(),
        )
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(config.sample_ratio))))
        .build();
    Ok(Export { provider, runtime: Some(runtime) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_setting_is_named() {
        let filter = TelemetryConfig { log: "a=b=c".into(), ..TelemetryConfig::default() };
        assert!(init(&filter).unwrap_err().to_string().contains("a=b=c"));
        let endpoint = TelemetryConfig { otlp_endpoint: Some("not a url".into()), ..TelemetryConfig::default() };
        assert!(init(&endpoint).unwrap_err().to_string().contains("not a url"));
        let ratio = TelemetryConfig { log: "info".into(), sample_ratio: 2.0, ..filter };
        assert!(matches!(init(&ratio), Err(Error::SampleRatio(_))));
    }
}
