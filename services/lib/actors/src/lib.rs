//! moesaic-actors
