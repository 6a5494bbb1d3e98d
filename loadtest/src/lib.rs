//! moesaic-loadtest
