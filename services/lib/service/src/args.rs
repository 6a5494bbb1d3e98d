//! The command line that all services have.
use clap::{Args as ClapArgs, Parser};
use std::path::PathBuf;

/// Where settings come from.
#[derive(Clone, Debug, Default, ClapArgs)]
pub struct SettingsArgs {
    /// Configuration file; `moesaic.toml` in the working folder is read where it exists.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Set one value, as `--set scheduler.token_budget=256`; may be repeated.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
}

/// A service's command line.
#[derive(Debug, Parser)]
#[command(version, about, long_about = None)]
pub struct Args {
    /// Where settings come from.
    #[command(flatten)]
    pub settings: SettingsArgs,
    /// Print the effective configuration and exit.
    #[arg(long)]
    pub dump_config: bool,
}
