//! moesaic-kernels
