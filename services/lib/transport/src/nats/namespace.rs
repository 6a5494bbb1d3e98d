//! Keeps clusters apart that share one NATS: on the wire, subjects start with the cluster's own name in place of
//! `moesaic`, and nobody else sees that.
use crate::subjects;
use std::sync::Arc;

/// What subjects start with wherever they are written and read, and on the wire those of a cluster without a name.
const ROOT: &str = "moesaic";

/// What the subjects of one cluster start with on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Namespace(Arc<str>);

impl Default for Namespace {
    fn default() -> Self {
        Self::new(ROOT)
    }
}

impl Namespace {
    /// That of a cluster with this name. Escaped, it is one part of a subject, whatever stands in it.
    pub fn new(name: &str) -> Self {
        Self(subjects::escape(name).into())
    }

    /// A subject, or a pattern of subjects, as it goes over the wire; `None` where it is none of ours.
    pub fn outer(&self, subject: &str) -> Option<String> {
        replace(subject, ROOT, &self.0)
    }

    /// What came over the wire, as it was written; `None` where it is another cluster's.
    pub fn inner(&self, subject: &str) -> Option<String> {
        replace(subject, &self.0, ROOT)
    }

    /// The pattern of all subjects of the cluster.
    pub fn all(&self) -> String {
        format!("{}.>", self.0)
    }

    /// The name of the stream that holds a queue's jobs. A `_` of the cluster's name is escaped as well: where the queue's
    /// name begins is clear then.
    pub fn job_stream(&self, queue: &str) -> String {
        format!("{}_{}", self.0.replace('_', "=5f"), subjects::job_stream(queue))
    }
}

/// Puts another part in place of the first one.
fn replace(subject: &str, from: &str, to: &str) -> Option<String> {
    let rest = subject.strip_prefix(from)?;
    rest.starts_with('.').then(|| format!("{to}{rest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_name_subjects_go_as_they_are() {
        let namespace = Namespace::default();
        let subject = "moesaic.v1.kv.scheduler.r0.blocks";
        assert_eq!(namespace.outer(subject).as_deref(), Some(subject));
        assert_eq!(namespace.inner(subject).as_deref(), Some(subject));
        assert_eq!((&*namespace.all(), &*namespace.job_stream("a.b")), ("moesaic.>", "moesaic_jobs_a=2eb"));
    }

    #[test]
    fn with_a_name_they_are_read_back_as_written_and_others_are_not() {
        let subject = "moesaic.v1.kv.scheduler.r0.blocks";
        let outer = |name: &str| Namespace::new(name).outer(subject).unwrap();
        assert_eq!(outer("staging"), "staging.v1.kv.scheduler.r0.blocks");
        assert_eq!(outer("moesaic.eu-1"), "moesaic=2eeu-1.v1.kv.scheduler.r0.blocks");
        let names = ["moesaic", "moesaic.v1", "moesaic-2", "a", "a.b", "a_b", "a=2eb", "A"];
        for name in names {
            for other in names {
                let read = Namespace::new(other).inner(&outer(name));
                assert_eq!(read.as_deref(), (name == other).then_some(subject), "{name} {other}");
            }
        }
        for no_subject_of_ours in ["", "moesaic", "moesaic2.v1", "v1.kv"] {
            assert_eq!(Namespace::new("a").outer(no_subject_of_ours), None, "{no_subject_of_ours}");
        }
    }

    #[test]
    fn streams_have_the_name_of_one_cluster_and_one_queue() {
        let stream = |name: &str, queue| Namespace::new(name).job_stream(queue);
        assert_eq!(stream("a.b", "q"), "a=2eb_jobs_q");
        assert_ne!(stream("a", "b_jobs_c"), stream("a_jobs_b", "c"));
    }
}
