//! moesaic-transport
