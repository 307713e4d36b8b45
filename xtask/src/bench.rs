//! Benchmarks. Each compares with an alternative in the same run, and prints a table and JSON.

use crate::{build, cargo};
use clap::Subcommand;
use std::path::{Path, PathBuf};

#[derive(Subcommand)]
pub enum Bench {
    /// What a packet costs, by path, in nanoseconds and in yardsticks. Needs root.
    Path {
        /// Write what was measured to this file, as JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// What a policy costs at 100, 1,000 and 10,000 identities: loads, changes, memory, and a packet. Needs root.
    Policy {
        /// Write what was measured to this file, as JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// What the tc programs cost to load: size, instructions that the verifier looks at, time. Needs root.
    Verifier {
        /// Write what was measured to this file, as JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
}

pub fn run(bench: &Bench) -> anyhow::Result<()> {
    build::run()?;
    match bench {
        Bench::Path { json } => run_one("path", json.as_deref()),
        Bench::Policy { json } => run_one("policy", json.as_deref()),
        Bench::Verifier { json } => run_one("verifier", json.as_deref()),
    }
}

fn run_one(name: &str, json: Option<&Path>) -> anyhow::Result<()> {
    let mut command = cargo();
    command.args(["bench", "--package", "wasmgate-tests", "--bench", name, "--"]);
    if let Some(path) = json {
        command.arg("--json").arg(std::path::absolute(path)?);
    }
    crate::run(&mut command)
}
