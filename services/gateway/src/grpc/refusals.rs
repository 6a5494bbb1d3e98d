//! Calls that tonic refuses before a method sees them: a message that is too long, or that is none. They get what every
//! other error has: the field, the details and the request's id.
use super::status;
use crate::request_id;
use futures::future::BoxFuture;
use moesaic_types::{Error, ErrorCode};
use std::convert::Infallible;
use std::task::{Context, Poll};
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::server::NamedService;
use tonic::{Code, Status};

/// A service whose refusals are complete.
#[derive(Clone, Debug)]
pub struct Refusals<S> {
    service: S,
    limit: usize,
}

impl<S> Refusals<S> {
    /// Around a service that takes messages of so many bytes.
    pub fn new(service: S, limit: usize) -> Self {
        Self { service, limit }
    }
}

impl<S: NamedService> NamedService for Refusals<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Refusals<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let given = request.headers().get(request_id::NAME).map(|id| id.as_bytes().to_vec());
        let (answer, limit) = (self.service.call(request), self.limit);
        Box::pin(async move {
            let answer = answer.await?;
            if answer.headers().contains_key(request_id::NAME) {
                return Ok(answer);
            }
            let Some(refused) = Status::from_header_map(answer.headers()).filter(|s| s.code() != Code::Ok) else {
                return Ok(answer);
            };
            let mut told = complete(refused, limit);
            let id = MetadataValue::try_from(request_id::choose(given.as_deref()));
            told.metadata_mut().insert(request_id::NAME, id.expect("only characters of a header are chosen"));
            Ok(told.into_http())
        })
    }
}

/// The same refusal with a field and details, where it is one of a message.
fn complete(refused: Status, limit: usize) -> Status {
    let error = match refused.code() {
        Code::OutOfRange => {
            let message = format!("the message is over the limit of {limit} bytes (gateway.body_limit)");
            Error { field: Some("body".into()), ..Error::new(ErrorCode::PayloadTooLarge, message) }
        }
        Code::Internal => Error::invalid("body", format!("the message cannot be read: {}", refused.message())),
        _ => return Status::with_metadata(refused.code(), refused.message(), MetadataMap::new()),
    };
    status(error)
}
