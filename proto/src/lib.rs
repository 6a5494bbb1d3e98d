//! moesaic-proto
