//! moesaic-kv-store
