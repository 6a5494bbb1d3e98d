//! moesaic-tests
