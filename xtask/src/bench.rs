//! Benchmarks. Each compares with an alternative in the same run, and prints a table and JSON.

use crate::{build, cargo};
use anyhow::Context;
use clap::{Args, ValueEnum};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

#[derive(Args)]
pub struct Bench {
    /// Only this one; all of them without.
    part: Option<Part>,
    /// Write what was measured to this file, as JSON; by part, where all are run.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Part {
    /// What a packet costs, by path, in nanoseconds and in yardsticks.
    Path,
    /// Real traffic between pods, beside a bare pair of interfaces, a bridge with nftables, and a bridge with vxlan.
    Net,
    /// What a policy change every 100 ms costs the traffic.
    Swap,
    /// What a policy costs at 100, 1,000 and 10,000 identities: loads, changes, memory, and a packet.
    Policy,
    /// What hostd and its maps take, by pods and identities.
    Memory,
    /// What the tc programs cost to load: size, instructions that the verifier looks at, time.
    Verifier,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Path => "path",
            Self::Net => "net",
            Self::Swap => "swap",
            Self::Policy => "policy",
            Self::Memory => "memory",
            Self::Verifier => "verifier",
        }
    }
}

pub fn run(bench: &Bench) -> anyhow::Result<()> {
    build::run()?;
    let json = bench.json.as_ref().map(std::path::absolute).transpose()?;
    if let Some(part) = bench.part {
        return run_one(part, json.as_deref());
    }
    let Some(json) = json else {
        return Part::value_variants().iter().try_for_each(|part| run_one(*part, None));
    };
    let folder = tempfile::tempdir()?;
    let mut all = serde_json::Map::new();
    for part in Part::value_variants() {
        let file = folder.path().join(part.name());
        run_one(*part, Some(&file))?;
        let figures: Value = serde_json::from_slice(&fs::read(file)?)?;
        all.insert(part.name().to_owned(), figures);
    }
    fs::write(&json, format!("{:#}\n", Value::from(all))).with_context(|| json.display().to_string())
}

fn run_one(part: Part, json: Option<&Path>) -> anyhow::Result<()> {
    let mut command = cargo();
    command.args(["bench", "--package", "wasmgate-tests", "--bench", part.name(), "--"]);
    if let Some(path) = json {
        command.arg("--json").arg(path);
    }
    crate::run(&mut command)
}
