//! Generation: gateway to scheduler. What a request asks for is checked by the scheduler's admission, as in one
//! process; here only what the domain's types cannot hold is refused.
use crate::scheduler::v1 as wire;
use moesaic_types::boundary::ReplicaLoad;
use moesaic_types::{
    Delta, Error, FinishReason, GenerateRequest, Grammar, Priority, RequestId, SampledToken, SamplingParams,
    StopConditions, TenantSalt, Usage,
};
use std::time::{Duration, Instant};

fn count(value: usize) -> u32 {
    value.try_into().unwrap_or(u32::MAX)
}

fn missing(field: &str) -> Error {
    Error::invalid(field, format!("{field} is missing"))
}

impl From<GenerateRequest> for wire::GenerateRequest {
    /// A deadline becomes the time that is left; the trace goes in the call's metadata.
    fn from(request: GenerateRequest) -> Self {
        let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now()).as_millis();
        Self {
            id: request.id.to_string(),
            prompt: request.prompt.to_vec(),
            resumed_tokens: count(request.resumed_tokens),
            sampling: Some(request.sampling.into()),
            stop: Some(request.stop.into()),
            top_logprobs: request.top_logprobs.map(u32::from),
            prompt_logprobs: request.prompt_logprobs,
            grammar: request.grammar.map(Into::into),
            priority: request.priority.0,
            deadline_ms: request.deadline.map(|deadline| left(deadline).try_into().unwrap_or(u64::MAX)),
            salt: request.salt.0.to_vec().into(),
        }
    }
}

impl TryFrom<wire::GenerateRequest> for GenerateRequest {
    type Error = Error;
    fn try_from(request: wire::GenerateRequest) -> Result<Self, Error> {
        let salt =
            request.salt.as_ref().try_into().map_err(|_| {
                Error::invalid("salt", format!("salt has {} bytes; it must have 16", request.salt.len()))
            })?;
        let top_logprobs = request.top_logprobs.map(|top| {
            u8::try_from(top).map_err(|_| Error::invalid("top_logprobs", format!("top_logprobs is {top}; use 0 to 20")))
        });
        Ok(Self {
            id: RequestId::new(request.id),
            prompt: request.prompt.into(),
            resumed_tokens: request.resumed_tokens as usize,
            sampling: request.sampling.ok_or_else(|| missing("sampling"))?.into(),
            stop: request.stop.ok_or_else(|| missing("stop"))?.into(),
            top_logprobs: top_logprobs.transpose()?,
            prompt_logprobs: request.prompt_logprobs,
            grammar: request.grammar.map(TryInto::try_into).transpose()?,
            priority: Priority(request.priority),
            // a deadline too far away to be told is none
            deadline: request.deadline_ms.and_then(|left| Instant::now().checked_add(Duration::from_millis(left))),
            salt: TenantSalt(salt),
            traceparent: None,
        })
    }
}

impl From<SamplingParams> for wire::SamplingParams {
    fn from(params: SamplingParams) -> Self {
        Self {
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            logit_bias: params.logit_bias.into_iter().collect(),
            seed: params.seed,
        }
    }
}

impl From<wire::SamplingParams> for SamplingParams {
    fn from(params: wire::SamplingParams) -> Self {
        Self {
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            logit_bias: params.logit_bias.into_iter().collect(),
            seed: params.seed,
        }
    }
}

impl From<StopConditions> for wire::StopConditions {
    fn from(stop: StopConditions) -> Self {
        Self {
            max_tokens: count(stop.max_tokens),
            min_tokens: count(stop.min_tokens),
            stop_token_ids: stop.stop_token_ids,
            ignore_eos: stop.ignore_eos,
        }
    }
}

impl From<wire::StopConditions> for StopConditions {
    fn from(stop: wire::StopConditions) -> Self {
        Self {
            max_tokens: stop.max_tokens as usize,
            min_tokens: stop.min_tokens as usize,
            stop_token_ids: stop.stop_token_ids,
            ignore_eos: stop.ignore_eos,
        }
    }
}

impl From<Grammar> for wire::Grammar {
    fn from(grammar: Grammar) -> Self {
        use wire::grammar::Kind;
        let kind = match grammar {
            Grammar::JsonObject => Kind::JsonObject(true),
            Grammar::JsonSchema(text) => Kind::JsonSchema(text.to_string()),
            Grammar::Regex(text) => Kind::Regex(text.to_string()),
            Grammar::Lark(text) => Kind::Lark(text.to_string()),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<wire::Grammar> for Grammar {
    type Error = Error;
    fn try_from(grammar: wire::Grammar) -> Result<Self, Error> {
        use wire::grammar::Kind;
        Ok(match grammar.kind.ok_or_else(|| missing("grammar"))? {
            Kind::JsonObject(_) => Self::JsonObject,
            Kind::JsonSchema(text) => Self::JsonSchema(text.into()),
            Kind::Regex(text) => Self::Regex(text.into()),
            Kind::Lark(text) => Self::Lark(text.into()),
        })
    }
}

impl From<SampledToken> for wire::Token {
    fn from(token: SampledToken) -> Self {
        let alternative = |(id, logprob)| wire::Alternative { id, logprob };
        Self {
            id: token.id,
            logprob: token.logprob,
            alternatives: token.top_logprobs.into_iter().map(alternative).collect(),
        }
    }
}

impl From<wire::Token> for SampledToken {
    fn from(token: wire::Token) -> Self {
        let alternative = |a: wire::Alternative| (a.id, a.logprob);
        Self {
            id: token.id,
            logprob: token.logprob,
            top_logprobs: token.alternatives.into_iter().map(alternative).collect(),
        }
    }
}

impl From<Delta> for wire::GenerateResponse {
    fn from(delta: Delta) -> Self {
        let tokens = |tokens: Vec<SampledToken>| tokens.into_iter().map(Into::into).collect();
        Self {
            tokens: tokens(delta.tokens),
            prompt_logprobs: delta.prompt_logprobs.map(|rows| wire::PromptLogprobs { tokens: tokens(rows) }),
            finish: delta.finish.map(|(reason, usage)| wire::Finish {
                reason: match reason {
                    // tool calls are found by the gateway, after the wire
                    FinishReason::Stop | FinishReason::ToolCalls => wire::FinishReason::Stop,
                    FinishReason::Length => wire::FinishReason::Length,
                }
                .into(),
                prompt_tokens: count(usage.prompt_tokens),
                cached_tokens: count(usage.cached_tokens),
                completion_tokens: count(usage.completion_tokens),
            }),
            cached_tokens: delta.cached_tokens.map(count),
        }
    }
}

impl TryFrom<wire::GenerateResponse> for Delta {
    type Error = Error;
    fn try_from(delta: wire::GenerateResponse) -> Result<Self, Error> {
        let tokens = |tokens: Vec<wire::Token>| tokens.into_iter().map(Into::into).collect();
        let finish = delta.finish.map(|finish| {
            let reason = match wire::FinishReason::try_from(finish.reason) {
                Ok(wire::FinishReason::Stop) => FinishReason::Stop,
                Ok(wire::FinishReason::Length) => FinishReason::Length,
                _ => return Err(Error::internal(format!("finish.reason {} is unknown", finish.reason))),
            };
            let usage = Usage {
                prompt_tokens: finish.prompt_tokens as usize,
                cached_tokens: finish.cached_tokens as usize,
                completion_tokens: finish.completion_tokens as usize,
            };
            Ok((reason, usage))
        });
        Ok(Self {
            tokens: tokens(delta.tokens),
            prompt_logprobs: delta.prompt_logprobs.map(|rows| tokens(rows.tokens)),
            finish: finish.transpose()?,
            cached_tokens: delta.cached_tokens.map(|tokens| tokens as usize),
        })
    }
}

impl From<ReplicaLoad> for wire::GetLoadResponse {
    fn from(load: ReplicaLoad) -> Self {
        Self {
            running: count(load.running),
            waiting: count(load.waiting),
            kv_blocks_total: count(load.kv_blocks_total),
            kv_blocks_used: count(load.kv_blocks_used),
            max_context: count(load.max_context),
            max_running: count(load.max_running),
        }
    }
}

impl From<wire::GetLoadResponse> for ReplicaLoad {
    fn from(load: wire::GetLoadResponse) -> Self {
        Self {
            running: load.running as usize,
            waiting: load.waiting as usize,
            kv_blocks_total: load.kv_blocks_total as usize,
            kv_blocks_used: load.kv_blocks_used as usize,
            max_context: load.max_context as usize,
            max_running: load.max_running as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn request() -> GenerateRequest {
        GenerateRequest {
            id: RequestId::new("r"),
            prompt: vec![1, 2, 3].into(),
            resumed_tokens: 1,
            sampling: SamplingParams {
                temperature: 0.5,
                top_k: Some(4),
                top_p: 0.9,
                min_p: 0.1,
                repetition_penalty: 1.1,
                presence_penalty: -0.2,
                frequency_penalty: 0.3,
                logit_bias: BTreeMap::from([(7, -100.0)]),
                seed: u64::MAX,
            },
            stop: StopConditions { max_tokens: 9, min_tokens: 2, stop_token_ids: vec![5], ignore_eos: true },
            top_logprobs: Some(3),
            prompt_logprobs: true,
            grammar: Some(Grammar::Regex("a+".into())),
            priority: Priority(-3),
            deadline: Some(Instant::now() + Duration::from_secs(60)),
            salt: TenantSalt([9; 16]),
            traceparent: None,
        }
    }

    #[test]
    fn a_request_survives_the_wire() {
        let sent = request();
        let got = GenerateRequest::try_from(wire::GenerateRequest::from(sent.clone())).expect("it is complete");
        let (was, is) = (sent.deadline.expect("it has one"), got.deadline.expect("it has one"));
        assert!(is <= was + Duration::from_secs(1) && was <= is + Duration::from_secs(1));
        let plain = |request: &GenerateRequest| format!("{:?}", GenerateRequest { deadline: None, ..request.clone() });
        assert_eq!(plain(&got), plain(&sent));
    }

    #[test]
    fn what_the_domain_cannot_hold_names_its_field() {
        let good = wire::GenerateRequest::from(request());
        let broken = [
            (wire::GenerateRequest { salt: vec![1; 3].into(), ..good.clone() }, "salt"),
            (wire::GenerateRequest { sampling: None, ..good.clone() }, "sampling"),
            (wire::GenerateRequest { stop: None, ..good.clone() }, "stop"),
            (wire::GenerateRequest { grammar: Some(wire::Grammar { kind: None }), ..good.clone() }, "grammar"),
            (wire::GenerateRequest { top_logprobs: Some(300), ..good.clone() }, "top_logprobs"),
        ];
        for (request, field) in broken {
            let error = GenerateRequest::try_from(request).expect_err("it is broken");
            assert_eq!(error.field.as_deref(), Some(field));
        }
        let eternal = wire::GenerateRequest { deadline_ms: Some(u64::MAX), ..good };
        assert!(GenerateRequest::try_from(eternal).is_ok());
    }

    #[test]
    fn a_delta_survives_the_wire() {
        let token = SampledToken { id: 4, logprob: Some(-0.5), top_logprobs: vec![(4, -0.5), (5, -1.5)] };
        let usage = Usage { prompt_tokens: 3, cached_tokens: 2, completion_tokens: 1 };
        let delta = Delta {
            tokens: vec![token.clone()],
            prompt_logprobs: Some(vec![token]),
            finish: Some((FinishReason::Length, usage)),
            cached_tokens: Some(2),
        };
        assert_eq!(Delta::try_from(wire::GenerateResponse::from(delta.clone())), Ok(delta));
        assert_eq!(Delta::try_from(wire::GenerateResponse::default()), Ok(Delta::default()));
        let unknown = wire::GenerateResponse { finish: Some(wire::Finish::default()), ..Default::default() };
        assert!(Delta::try_from(unknown).is_err());
    }

    #[test]
    fn load_survives_the_wire() {
        let load = ReplicaLoad {
            running: 1,
            waiting: 2,
            kv_blocks_total: 3,
            kv_blocks_used: 4,
            max_context: 5,
            max_running: 6,
        };
        assert_eq!(ReplicaLoad::from(wire::GetLoadResponse::from(load.clone())), load);
    }
}
