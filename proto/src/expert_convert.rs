//! Experts' work and what shards hold.
use crate::expert::v1 as wire;
use crate::tensor::v1::DType;
use crate::{WireDType, decode_tensor, decode_u32, decode_weights, encode_u32, encode_weights};
use moesaic_types::cluster::Shares;
use moesaic_types::{Error, Routing};

/// Tokens of one layer for the experts of a shard.
#[derive(Clone, Debug, PartialEq)]
pub struct ComputeInput {
    /// The sender's number for it.
    pub tag: u64,
    /// The placement that the sender follows.
    pub epoch: u64,
    /// The decoder's index of the layer.
    pub layer: usize,
    /// `[tokens, hidden]`.
    pub x: Vec<f32>,
    /// Which experts each token goes to.
    pub routing: Routing,
    /// How the answer is to travel.
    pub reply: WireDType,
    /// The step's trace; empty where it is not traced.
    pub traceparent: String,
    /// The tokens were sent, and counted as load, before.
    pub is_again: bool,
}

impl ComputeInput {
    /// Checks a message against the model: `hidden` columns, and the number of experts of each layer (`None`: the layer
    /// has none).
    ///
    /// # Errors
    /// `InvalidArgument` naming the field.
    pub fn read(
        message: wire::ComputeRequest,
        hidden: usize,
        experts: impl FnOnce(usize) -> Option<usize>,
    ) -> Result<Self, Error> {
        let layer = message.layer as usize;
        let experts = experts(layer)
            .ok_or_else(|| Error::invalid("layer", format!("layer {layer} of the model has no experts")))?;
        let tensor = message.x.ok_or_else(|| Error::invalid("x", "x is not given; send [tokens, hidden]"))?;
        let x = decode_tensor("x", &tensor, hidden)?;
        let routing = Routing {
            offsets: decode_u32("offsets", &message.offsets)?,
            experts: decode_u32("experts", &message.experts)?,
            weights: decode_weights("weights", &message.weights)?,
        };
        routing.check(tensor.rows as usize, experts)?;
        let reply = DType::try_from(message.reply_dtype).unwrap_or_default();
        let reply = WireDType::try_from(reply).map_err(|error| Error { field: Some("reply_dtype".into()), ..error })?;
        let wire::ComputeRequest { tag, epoch, traceparent, is_again, .. } = message;
        Ok(Self { tag, epoch, layer, x, routing, reply, traceparent, is_again })
    }
}

/// Puts a routing into a message.
pub fn put_routing(message: &mut wire::ComputeRequest, routing: &Routing) {
    message.offsets = encode_u32(routing.offsets.iter().copied());
    message.experts = encode_u32(routing.experts.iter().copied());
    message.weights = encode_weights(routing.weights.iter().copied());
}

/// What a shard is to hold, as it travels.
pub fn shares_to_wire(shares: &Shares) -> Vec<wire::Share> {
    shares.iter().map(|(layer, experts)| wire::Share { layer: *layer as u32, experts: experts.clone() }).collect()
}

/// What a shard is to hold.
///
/// # Errors
/// `InvalidArgument` naming `shares` when a layer comes twice or its experts do not ascend.
pub fn shares_from_wire(shares: Vec<wire::Share>) -> Result<Shares, Error> {
    let mut found = Shares::new();
    for wire::Share { layer, experts } in shares {
        if !experts.is_sorted_by(|a, b| a < b) {
            let message = format!("shares: the experts of layer {layer} do not ascend");
            return Err(Error::invalid("shares", message));
        }
        if found.insert(layer as usize, experts).is_some() {
            return Err(Error::invalid("shares", format!("shares: layer {layer} comes twice")));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encode_tensor;

    const HIDDEN: usize = 4;

    fn message() -> (wire::ComputeRequest, Vec<f32>, Routing) {
        let x: Vec<f32> = (0..8).map(|i| i as f32 * 0.5 - 1.0).collect();
        let mut routing = Routing::new();
        routing.push([(2, 0.75), (0, 0.25)]);
        routing.push([(5, 1.0)]);
        let mut message = wire::ComputeRequest {
            tag: 7,
            epoch: 3,
            layer: 1,
            x: Some(encode_tensor(x.chunks_exact(HIDDEN), HIDDEN, WireDType::F32)),
            reply_dtype: DType::Bf16.into(),
            traceparent: "00-1-2-01".into(),
            is_again: true,
            ..Default::default()
        };
        put_routing(&mut message, &routing);
        (message, x, routing)
    }

    fn read(message: wire::ComputeRequest) -> Result<ComputeInput, Error> {
        ComputeInput::read(message, HIDDEN, |layer| (layer == 1).then_some(6))
    }

    #[test]
    fn work_survives_the_wire() {
        let (message, x, routing) = message();
        let (reply, traceparent) = (WireDType::Bf16, "00-1-2-01".into());
        let input = ComputeInput { tag: 7, epoch: 3, layer: 1, x, routing, reply, traceparent, is_again: true };
        assert_eq!(read(message), Ok(input));
    }

    #[test]
    fn work_that_does_not_fit_the_model_names_its_field() {
        let (good, ..) = message();
        let wrong = [
            ("layer", wire::ComputeRequest { layer: 0, ..good.clone() }),
            ("x", wire::ComputeRequest { x: None, ..good.clone() }),
            (
                "x",
                wire::ComputeRequest {
                    x: Some(encode_tensor([[0.0; 3].as_slice()].into_iter(), 3, WireDType::F32)),
                    ..good.clone()
                },
            ),
            ("offsets", wire::ComputeRequest { offsets: good.offsets.slice(4..), ..good.clone() }),
            ("experts", wire::ComputeRequest { experts: encode_u32([2, 0, 6]), ..good.clone() }),
            ("weights", wire::ComputeRequest { weights: good.weights.slice(..8), ..good.clone() }),
            ("reply_dtype", wire::ComputeRequest { reply_dtype: 0, ..good.clone() }),
            ("reply_dtype", wire::ComputeRequest { reply_dtype: 99, ..good.clone() }),
        ];
        for (field, message) in wrong {
            assert_eq!(read(message).unwrap_err().field.as_deref(), Some(field));
        }
    }

    #[test]
    fn shares_survive_the_wire_or_are_refused() {
        let shares = Shares::from([(1, vec![0, 3]), (4, vec![])]);
        let sent = shares_to_wire(&shares);
        assert_eq!(shares_from_wire(sent.clone()), Ok(shares));
        let twice = [sent.clone(), sent].concat();
        for wrong in [twice, vec![wire::Share { layer: 1, experts: vec![3, 3] }]] {
            assert_eq!(shares_from_wire(wrong).unwrap_err().field.as_deref(), Some("shares"));
        }
    }
}
