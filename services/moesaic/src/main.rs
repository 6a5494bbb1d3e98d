//! `moesaic`: all services in one process, and the tools.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line program speaks to its terminal")]

mod args;
mod cluster;
mod commands;
mod config;
mod embedded;
mod progress;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args = args::Args::parse();
    match commands::run(args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("moesaic: {error:#}");
            ExitCode::from(2)
        }
    }
}
