//! moesaic-gateway
