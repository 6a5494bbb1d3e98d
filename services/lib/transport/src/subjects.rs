//! The names of events, `moesaic.v1.<plane>.<service>.<instance>.<event>`, and of jobs,
//! `moesaic.v1.jobs.<queue>.<id>`: built here and nowhere else. On the wire, another first part may stand for the
//! cluster's name: `nats` puts it there.
use moesaic_types::cluster::Service;
use std::fmt::Write;

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Plane {
    /// Which KV blocks a replica holds; the payload is a `KvEvent`.
    Kv,
    /// How busy a replica or shard is.
    Load,
    /// Who is there.
    Membership,
    /// Which groups hold which experts.
    Placement,
}

impl Plane {
    const ALL: [Self; 4] = [Self::Kv, Self::Load, Self::Membership, Self::Placement];

    /// As it stands in a subject.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kv => "kv",
            Self::Load => "load",
            Self::Membership => "membership",
            Self::Placement => "placement",
        }
    }

    /// The start of all the plane's subjects, for a subscription.
    pub fn prefix(self) -> String {
        format!("moesaic.v1.{}.", self.name())
    }
}

/// A subject, taken apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Subject {
    /// What it is about.
    pub plane: Plane,
    /// The sender's service, such as `scheduler`.
    pub service: String,
    /// The sender's id, such as a replica's.
    pub instance: String,
    /// What happened.
    pub event: String,
}

impl Subject {
    /// The KV events of a replica.
    pub fn kv(replica: &str) -> Self {
        Self::new(Plane::Kv, "scheduler", replica, "blocks")
    }

    /// The KV events of a kv-store's tier, `ram` or `disk`.
    pub fn kv_store(node: &str, tier: &str) -> Self {
        Self::new(Plane::Kv, Service::KvStore.name(), node, tier)
    }

    /// Asks a replica, or a kv-store, to say anew which blocks it has.
    pub fn kv_anew(service: Service, id: &str) -> Self {
        Self::new(Plane::Kv, service.name(), id, "anew")
    }

    /// A member came, went or changed.
    pub fn membership(service: Service, id: &str) -> Self {
        Self::new(Plane::Membership, service.name(), id, "member")
    }

    /// A replica's load.
    pub fn load(replica: &str) -> Self {
        Self::new(Plane::Load, "scheduler", replica, "load")
    }

    /// A model's placement was written; `model` is its digest.
    pub fn placement(model: &str) -> Self {
        Self::new(Plane::Placement, "router", model, "placed")
    }

    /// Any subject.
    pub fn new(plane: Plane, service: &str, instance: &str, event: &str) -> Self {
        Self { plane, service: service.into(), instance: instance.into(), event: event.into() }
    }

    /// Reads a subject; `None` if it is not one of ours.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.strip_prefix("moesaic.v1.")?.split('.');
        let plane = parts.next()?;
        let plane = Plane::ALL.into_iter().find(|known| known.name() == plane)?;
        let (service, instance, event) = (unescape(parts.next()?)?, unescape(parts.next()?)?, unescape(parts.next()?)?);
        parts.next().is_none().then_some(Self { plane, service, instance, event })
    }
}

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (service, instance, event) = (escape(&self.service), escape(&self.instance), escape(&self.event));
        write!(f, "moesaic.v1.{}.{service}.{instance}.{event}", self.plane.name())
    }
}

/// All jobs of a queue, for a subscription.
pub fn jobs(queue: &str) -> String {
    format!("moesaic.v1.jobs.{}.>", escape(queue))
}

/// A job.
pub fn job(queue: &str, id: &str) -> String {
    format!("moesaic.v1.jobs.{}.{}", escape(queue), escape(id))
}

/// A job's id; `None` if the subject is no job's.
pub fn job_id(subject: &str) -> Option<String> {
    let mut parts = subject.strip_prefix("moesaic.v1.jobs.")?.split('.');
    let (_queue, id) = (parts.next()?, unescape(parts.next()?)?);
    parts.next().is_none().then_some(id)
}

/// The end of the name of the stream that holds a queue's jobs; the cluster's name stands before it.
pub(crate) fn job_stream(queue: &str) -> String {
    format!("jobs_{}", escape(queue))
}

/// Ids may hold dots and wildcards, subjects' parts may not: such bytes become `=` and two hex digits.
pub(crate) fn escape(part: &str) -> String {
    let mut escaped = String::with_capacity(part.len());
    for byte in part.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' {
            escaped.push(char::from(byte));
        } else {
            let _ = write!(escaped, "={byte:02x}");
        }
    }
    escaped
}

fn unescape(part: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(part.len());
    let mut rest = part.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'=' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            byte => byte,
        });
    }
    (!bytes.is_empty()).then(|| String::from_utf8(bytes).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_are_read_back_whatever_the_id() {
        assert_eq!(Subject::kv("r0").to_string(), "moesaic.v1.kv.scheduler.r0.blocks");
        for id in ["r0", "host.example:9020", "a*b>c d", "=2e", "é"] {
            let subject = Subject::load(id);
            let text = subject.to_string();
            assert!(text.starts_with(&Plane::Load.prefix()));
            assert_eq!(text.split('.').count(), 6, "{text}");
            assert_eq!(Subject::parse(&text), Some(subject));
        }
    }

    #[test]
    fn jobs_are_read_back_whatever_the_id() {
        assert_eq!(job("batch", "b1-0"), "moesaic.v1.jobs.batch.b1-0");
        assert!(job("batch.dead", "1").starts_with(jobs("batch.dead").trim_end_matches('>')));
        assert_eq!(job_stream("batch.dead"), "jobs_batch=2edead");
        for id in ["1", "a.b", "a*b>c d", "\u{e9}"] {
            assert_eq!(job_id(&job("q.x", id)).as_deref(), Some(id));
        }
        for other in ["moesaic.v1.kv.q.1", "moesaic.v1.jobs.q", "moesaic.v1.jobs.q.1.2", "moesaic.v1.jobs.q."] {
            assert_eq!(job_id(other), None, "{other}");
        }
    }

    #[test]
    fn other_subjects_are_refused() {
        for text in ["", "moesaic.v1.kv", "moesaic.v1.kv.s.i", "moesaic.v1.kv.s.i.e.x", "moesaic.v1.x.s.i.e"] {
            assert_eq!(Subject::parse(text), None, "{text}");
        }
        for text in ["moesaic.v2.kv.s.i.e", "moesaic.v1.kv.s.=.e", "moesaic.v1.kv..i.e", "moesaic.v1.kv.s.=ff.e"] {
            assert_eq!(Subject::parse(text), None, "{text}");
        }
    }
}
