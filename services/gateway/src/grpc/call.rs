//! What every method does around its work.
use super::status;
use crate::core::{SamplingInput, request_span};
use crate::request_id;
use futures::FutureExt;
use moesaic_telemetry::metrics::GRPC_REQUESTS_TOTAL;
use moesaic_telemetry::propagation;
use moesaic_types::{Error, Result};
use std::panic::AssertUnwindSafe;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Response, Status};
use tracing::Instrument;

/// Runs a method in a span under the caller's trace, counts it, and tells the request's id.
pub(super) async fn around<T>(
    method: &'static str,
    metadata: MetadataMap,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<Response<T>, Status> {
    let id = request_id::choose(metadata.get(request_id::NAME).map(MetadataValue::as_encoded_bytes));
    let span = request_span!("grpc_request", rpc.method = method, request_id = id,);
    propagation::set_parent(&span, propagation::extract_metadata(&metadata));
    let result = AssertUnwindSafe(work.instrument(span)).catch_unwind().await;
    // the panic itself is in the log
    let result = result.unwrap_or_else(|_| Err(Error::internal("the request failed by a fault of the server")));
    let mut result = result.map(Response::new).map_err(status);
    let code = result.as_ref().err().map_or(tonic::Code::Ok, Status::code);
    ::metrics::counter!(GRPC_REQUESTS_TOTAL, "method" => method, "code" => format!("{code:?}")).increment(1);
    let id = MetadataValue::try_from(id).expect("only characters of a header are chosen");
    match &mut result {
        Ok(response) => response.metadata_mut().insert(request_id::NAME, id),
        Err(status) => status.metadata_mut().insert(request_id::NAME, id),
    };
    result
}

/// The API key of a call.
pub(super) fn key(metadata: &MetadataMap) -> Option<&str> {
    metadata.get("authorization")?.to_str().ok()?.strip_prefix("Bearer ").map(str::trim)
}

/// The deadline that the caller's own library set, `grpc-timeout`, rounded up.
pub(super) fn timeout_ms(metadata: &MetadataMap) -> Option<u64> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (count, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let count: u64 = count.parse().ok()?;
    match unit {
        "H" => count.checked_mul(3_600_000),
        "M" => count.checked_mul(60_000),
        "S" => count.checked_mul(1000),
        "m" => Some(count),
        "u" => Some(count.div_ceil(1000)),
        "n" => Some(count.div_ceil(1_000_000)),
        _ => None,
    }
}

/// The input with the nearer of its own deadline and the call's. A call without time left has a millisecond.
pub(super) fn within(input: SamplingInput, timeout_ms: Option<u64>) -> SamplingInput {
    let own = input.deadline_ms.filter(|ms| *ms > 0);
    let nearer = match (own, timeout_ms.map(|ms| ms.max(1))) {
        (Some(own), Some(call)) => Some(own.min(call)),
        (own, call) => own.or(call),
    };
    SamplingInput { deadline_ms: nearer, ..input }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_in_all_units() {
        let read = |text: &'static str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", MetadataValue::from_static(text));
            timeout_ms(&metadata)
        };
        assert_eq!(["1H", "2M", "3S", "4m"].map(read), [Some(3_600_000), Some(120_000), Some(3000), Some(4)]);
        assert_eq!(["1500u", "1n", "", "S", "5x"].map(read), [Some(2), Some(1), None, None, None]);
        let nearer = |own, call| within(SamplingInput { deadline_ms: own, ..Default::default() }, call).deadline_ms;
        assert_eq!(nearer(Some(0), None), None);
        assert_eq!(nearer(Some(0), Some(0)), Some(1));
        assert_eq!(nearer(Some(5), Some(9)), Some(5));
        assert_eq!(nearer(Some(9), Some(5)), Some(5));
    }

    #[tokio::test]
    async fn a_panic_is_the_requests_own_fault_and_is_told() {
        let faulty = async { panic!("a fault that a test asked for") };
        let told = around::<()>("Generate", MetadataMap::new(), faulty).await.expect_err("it panicked");
        assert_eq!(told.code(), tonic::Code::Internal);
        assert!(told.metadata().get(request_id::NAME).is_some());
    }
}
