//! Reads the bodies of requests: within the limit of one and of all, in time.
use super::error::HttpError;
use crate::config::Config;
use crate::core::{Core, Held};
use axum::extract::{FromRequest, Request};
use axum::http::header;
use futures::StreamExt;
use moesaic_types::{Error, ErrorCode, Result};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tower_http::timeout::TimeoutError;

/// When a client may send a body again for which there was no memory.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A body, or why there is none: a handler decides what comes before a complaint about the body.
pub(super) struct Body(pub(super) Result<Whole, HttpError>);

/// A whole body. Its memory counts as taken as long as this lives.
pub(super) struct Whole {
    pub(super) bytes: Vec<u8>,
    _held: Held,
}

impl FromRequest<Arc<Core>> for Body {
    type Rejection = Infallible;

    async fn from_request(request: Request, core: &Arc<Core>) -> Result<Self, Infallible> {
        Ok(Self(read(request, core).await))
    }
}

async fn read(request: Request, core: &Core) -> Result<Whole, HttpError> {
    let limit = core.config.body_limit.as_usize();
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    if length.is_some_and(|length: usize| length > limit) {
        return Err(too_long(&core.config));
    }
    let (mut bytes, mut held) = (Vec::new(), core.bodies.held());
    let mut frames = request.into_body().into_data_stream();
    while let Some(frame) = frames.next().await {
        let frame = frame.map_err(|error| unreadable(&error, &core.config))?;
        if bytes.len() + frame.len() > limit {
            return Err(too_long(&core.config));
        }
        if !held.add(frame.len()) {
            let memory = core.config.body_memory.as_usize();
            let message =
                format!("the bodies of other requests take all of {memory} bytes (gateway.body_memory); try again");
            return Err(Error::exhausted(message, RETRY_AFTER).into());
        }
        bytes.extend_from_slice(&frame);
    }
    Ok(Whole { bytes, _held: held })
}

fn too_long(config: &Config) -> HttpError {
    let message = format!("body is over the limit of {} bytes (gateway.body_limit)", config.body_limit.as_usize());
    Error { field: Some("body".into()), ..Error::new(ErrorCode::PayloadTooLarge, message) }.into()
}

fn unreadable(error: &axum::Error, config: &Config) -> HttpError {
    if causes(error).any(|cause| cause.is::<TimeoutError>()) {
        return HttpError::too_slow(config.read_timeout.get());
    }
    Error::invalid("body", format!("body cannot be read: {error}")).into()
}

/// What an error comes from, step by step.
fn causes(error: &dyn std::error::Error) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(error.source(), |cause| cause.source())
}
