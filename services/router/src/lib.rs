//! moesaic-router
