//! Micro-batches overlap: one's experts are under way while another is at its attention.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
use moesaic_model::backend::Backend;
use moesaic_model::backend::native::NativeBackend;
use moesaic_model::decoder::{ExpertStore, LoadOptions, load_decoder, load_experts};
use moesaic_model::expert_pool::{ExpertPool, Ticket};
use moesaic_model::{Activations, LogitsWanted, Result, Runner, SequenceChunk, source, spec};
use moesaic_types::Routing;
use std::path::Path;
use std::sync::{Arc, Mutex};

type Tensor = <NativeBackend as Backend>::Tensor;

/// What happened to a micro-batch of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Event {
    Dispatch(usize),
    Combine(usize),
}

/// Experts that note when they are asked and awaited.
struct Noted {
    inner: ExpertStore<NativeBackend>,
    events: Arc<Mutex<Vec<Event>>>,
}

impl ExpertPool<NativeBackend> for Noted {
    fn dispatch(&self, layer: usize, x: &Tensor, routing: &Routing) -> Result<Ticket<NativeBackend>> {
        self.events.lock().unwrap().push(Event::Dispatch(layer));
        let (ticket, events) = (self.inner.dispatch(layer, x, routing)?, Arc::clone(&self.events));
        Ok(Ticket::Pending(Box::new(move || {
            events.lock().unwrap().push(Event::Combine(layer));
            ticket.combine()
        })))
    }

    fn micro_batches(&self, _tokens: usize) -> usize {
        2
    }
}

#[test]
fn the_second_micro_batch_of_a_layer_is_dispatched_before_the_first_is_awaited() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/goldens/mixtral");
    let source = source::open(&path).unwrap();
    let spec = spec::read(&path, &*source).unwrap();
    let backend = Arc::new(NativeBackend::new(1, Activations::F32));
    let options = LoadOptions { threads: 1, ..LoadOptions::default() };
    let inner = load_experts(&*source, &spec, backend.clone(), &options).unwrap();
    let events = Arc::new(Mutex::new(Vec::new()));
    let pool = Noted { inner, events: Arc::clone(&events) };
    let layers: Vec<usize> = spec.moe_layers().collect();
    let mut model = load_decoder(&*source, spec, backend, &options, Arc::new(pool)).unwrap();
    model.allocate_kv(2).unwrap();
    let tokens: Vec<u32> = (5..13).collect();
    let chunk =
        |block: &'static [u32]| SequenceChunk { tokens: &tokens, start: 0, blocks: block, logits: LogitsWanted::All };
    model.forward(&[chunk(&[0]), chunk(&[1])], &mut Vec::new()).unwrap();
    let events = events.lock().unwrap().clone();
    for layer in layers {
        let of_layer: Vec<Event> = events
            .iter()
            .copied()
            .filter(|event| [Event::Dispatch(layer), Event::Combine(layer)].contains(event))
            .collect();
        let (dispatch, combine) = (Event::Dispatch(layer), Event::Combine(layer));
        assert_eq!(of_layer, [dispatch, dispatch, combine, combine], "layer {layer}: {events:?}");
    }
}
