//! moesaic-scheduler
