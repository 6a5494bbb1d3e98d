//! moesaic-testkit
