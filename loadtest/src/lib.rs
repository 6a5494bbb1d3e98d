//! The load generator; its scenarios and comparisons come with the speed issue.
#![forbid(unsafe_code)]
