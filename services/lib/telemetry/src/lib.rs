//! moesaic-telemetry
