//! Benchmarks. Each compares with an alternative in the same run, and prints a table and JSON.

use crate::cargo;
use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
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

/// Status of a benchmark that has measured, but on a machine that did other things meanwhile (`tests/src/report.rs`).
const NOT_COMPARABLE: u8 = 3;

/// Runs one benchmark or all of them; the status is [`NOT_COMPARABLE`] where that is the worst that has happened.
pub fn run(bench: &Bench) -> anyhow::Result<ExitCode> {
    let json = bench.json.as_ref().map(std::path::absolute).transpose()?;
    let comparable = match bench.part {
        Some(part) => run_one(part, json.as_deref())?,
        None => run_all(json.as_deref())?,
    };
    Ok(ExitCode::from(if comparable { 0 } else { NOT_COMPARABLE }))
}

/// One after the other. One that fails keeps no other from being done.
fn run_all(json: Option<&Path>) -> anyhow::Result<bool> {
    let folder = tempfile::tempdir()?;
    let (mut all, mut failed, mut comparable) = (serde_json::Map::new(), Vec::new(), true);
    for part in Part::value_variants() {
        let file = folder.path().join(part.name());
        let done = run_one(*part, Some(&file)).and_then(|can_be_compared| {
            let figures: Value = serde_json::from_slice(&fs::read(&file)?)?;
            Ok((can_be_compared, figures))
        });
        match done {
            Ok((can_be_compared, figures)) => {
                comparable &= can_be_compared;
                all.insert(part.name().to_owned(), figures);
            }
            Err(error) => failed.push(format!("{error:#}")),
        }
    }
    if let Some(json) = json {
        fs::write(json, format!("{:#}\n", Value::from(all))).with_context(|| json.display().to_string())?;
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(comparable)
}

/// Whether what it has measured can be compared.
fn run_one(part: Part, json: Option<&Path>) -> anyhow::Result<bool> {
    let name = part.name();
    let built = cargo::build(&["bench", "--package", "wasmgate-tests", "--no-run", "--bench", name])?;
    let mut programs = built.into_iter().filter(|unit| unit.is_own() && unit.name == name);
    let program = programs.find_map(|unit| unit.executable);
    let mut command = Command::new(program.with_context(|| format!("cargo has built no benchmark {name}"))?);
    command.current_dir(toolchain::workspace_root()).arg("--bench");
    if let Some(path) = json {
        command.arg("--json").arg(path);
    }
    let status = command
        .status()
        .with_context(|| format!("running the benchmark {name}"))?;
    match status.code() {
        Some(0) => Ok(true),
        Some(code) if code == i32::from(NOT_COMPARABLE) => Ok(false),
        _ => anyhow::bail!("the benchmark {name} could not measure ({status})"),
    }
}
