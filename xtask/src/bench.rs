//! Benchmarks. Each compares with an alternative in the same run, and prints a table and JSON.

use crate::{build, cargo, setup};
use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// What real traffic is made with, and Debian's package that has it; `setup` has iperf3.
const PROGRAMS: [(&str, &str); 1] = [("sockperf", "sockperf")];

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
    /// Two nodes among a thousand simulated ones in etcd: start, memory, changes until they hold, and the CNI plugin.
    Cluster,
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
            Self::Cluster => "cluster",
            Self::Verifier => "verifier",
        }
    }
}

pub fn run(bench: &Bench) -> anyhow::Result<()> {
    setup::programs(&PROGRAMS)?;
    build::run()?;
    let json = bench.json.as_ref().map(std::path::absolute).transpose()?;
    match bench.part {
        Some(part) => run_one(part, json.as_deref()),
        None => run_all(json.as_deref()),
    }
}

/// One after the other. One that refuses to compare keeps no other from being done.
fn run_all(json: Option<&Path>) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut all, mut failed) = (serde_json::Map::new(), Vec::new());
    for part in Part::value_variants() {
        let file = folder.path().join(part.name());
        let done = run_one(*part, Some(&file)).and_then(|()| Ok(serde_json::from_slice::<Value>(&fs::read(&file)?)?));
        match done {
            Ok(figures) => {
                all.insert(part.name().to_owned(), figures);
            }
            Err(error) => failed.push(format!("bench {}: {error:#}", part.name())),
        }
    }
    if let Some(json) = json {
        fs::write(json, format!("{:#}\n", Value::from(all))).with_context(|| json.display().to_string())?;
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

fn run_one(part: Part, json: Option<&Path>) -> anyhow::Result<()> {
    let mut command = cargo();
    command.args(["bench", "--package", "wasmgate-tests", "--bench", part.name(), "--"]);
    if let Some(path) = json {
        command.arg("--json").arg(path);
    }
    crate::run(&mut command)
}
