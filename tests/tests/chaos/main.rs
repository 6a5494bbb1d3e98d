//! The chaos suite: faults in a cluster of real processes under a steady load of streams.
//!
//! Every accepted request ends with the text of an undisturbed run, or where the design says so with a clear error; no
//! token comes twice or is missing, and no stream stalls for ever. How long recovery takes is measured, not asserted:
//! `chaos/table.md` in the target folder has it. Faults of the network need `ip`, `tc` and `iptables`, and the right to
//! make network namespaces; where these are missing they are skipped, and the table says so.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
#![allow(clippy::print_stdout, reason = "the table is shown as it grows")]
mod clocks;
mod cluster;
mod copies;
mod disks;
mod hosts;
mod load;
mod network;
mod processes;
mod report;
mod stages;
mod suite;
