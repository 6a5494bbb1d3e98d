//! moesaic-config
