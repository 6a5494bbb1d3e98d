//! How owners of KV blocks tell which they have: in events that the bus takes, everything anew when asked, and a sign of
//! life now and then, by which a listener notices what it lost.
use crate::cues::{Cue, Cues};
use crate::subjects::Subject;
use moesaic_types::BlockHash;
use moesaic_types::boundary::{EventBus, KvEvent};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Blocks in one event: as JSON they stay well below what the bus takes.
const BLOCKS: usize = 512;

/// How often an owner shows that it is there.
const SIGN: Duration = Duration::from_secs(5);

/// Everything is not told anew more often than this.
const PAUSE: Duration = Duration::from_secs(1);

/// An event in parts that the bus takes.
pub fn in_parts(event: KvEvent) -> Vec<KvEvent> {
    let parts = |blocks: &[BlockHash], make: fn(Vec<BlockHash>) -> KvEvent| {
        blocks.chunks(BLOCKS).map(|part| make(part.to_vec())).collect()
    };
    match event {
        KvEvent::Stored { blocks } if blocks.len() > BLOCKS => parts(&blocks, |blocks| KvEvent::Stored { blocks }),
        KvEvent::Evicted { blocks } if blocks.len() > BLOCKS => parts(&blocks, |blocks| KvEvent::Evicted { blocks }),
        event => vec![event],
    }
}

/// An event that changes nothing: its number shows whether others were lost.
pub fn sign() -> KvEvent {
    KvEvent::Stored { blocks: Vec::new() }
}

/// When an owner is to tell something besides changes.
pub struct KvCues {
    cues: Cues,
    told_anew: Option<Instant>,
    /// It was asked a moment after it had told.
    is_due: bool,
}

/// What it is to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvCue {
    /// That it is there: [`sign`].
    Sign,
    /// Everything anew.
    Anew,
}

impl KvCues {
    /// The cues of an owner; `question` is the subject by which it is asked to tell everything anew.
    pub fn new(bus: Arc<dyn EventBus>, question: &Subject) -> Self {
        Self { cues: Cues::new(bus, question.to_string(), SIGN), told_anew: None, is_due: false }
    }

    /// Waits for the next one. Cancel-safe but for a sign of life, which may come one time later.
    pub async fn next(&mut self) -> KvCue {
        loop {
            if self.is_due {
                if let Some(told) = self.told_anew {
                    tokio::time::sleep_until(told + PAUSE).await;
                }
                (self.is_due, self.told_anew) = (false, Some(Instant::now()));
                return KvCue::Anew;
            }
            match self.cues.next().await {
                Cue::Time => return KvCue::Sign,
                Cue::Event(_) => self.is_due = true,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryBus;
    use bytes::Bytes;
    use moesaic_types::cluster::Service;

    #[test]
    fn long_events_come_in_parts_that_the_bus_takes() {
        let blocks: Vec<_> = (0..1300u32).map(|n| BlockHash((u128::MAX - u128::from(n)).to_le_bytes())).collect();
        for event in [KvEvent::Stored { blocks: blocks.clone() }, KvEvent::Evicted { blocks: blocks.clone() }] {
            let is_stored = matches!(event, KvEvent::Stored { .. });
            let mut got = Vec::new();
            for part in in_parts(event) {
                let json = serde_json::to_vec(&part).expect("plain data");
                assert!(json.len() <= crate::nats::MAX_PAYLOAD, "{} bytes", json.len());
                match part {
                    KvEvent::Stored { blocks } if is_stored => got.extend(blocks),
                    KvEvent::Evicted { blocks } if !is_stored => got.extend(blocks),
                    other => panic!("another event: {other:?}"),
                }
            }
            assert_eq!(got, blocks);
        }
        assert_eq!(in_parts(KvEvent::Cleared), [KvEvent::Cleared]);
        assert_eq!(in_parts(sign()), [sign()]);
    }

    #[tokio::test(start_paused = true)]
    async fn questions_that_come_together_are_answered_together() {
        let bus = Arc::new(MemoryBus::new());
        let question = Subject::kv_anew(Service::Scheduler, "a");
        let mut cues = KvCues::new(bus.clone(), &question);
        assert_eq!(cues.next().await, KvCue::Sign, "at once, subscribed");
        let ask = async || bus.publish("router", &question.to_string(), Bytes::new()).await.expect("in memory");
        ask().await;
        let start = Instant::now();
        assert_eq!(cues.next().await, KvCue::Anew);
        assert!(start.elapsed() < PAUSE);
        ask().await;
        ask().await;
        assert_eq!(cues.next().await, KvCue::Anew);
        assert!(start.elapsed() >= PAUSE);
        bus.publish("router", &Subject::kv_anew(Service::Scheduler, "b").to_string(), Bytes::new()).await.unwrap();
        let told = [cues.next().await, cues.next().await, cues.next().await];
        assert!(told[1..].iter().all(|cue| *cue == KvCue::Sign), "{told:?}");
        assert!(start.elapsed() >= SIGN);
    }
}
