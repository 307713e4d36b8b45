//! `cargo xtask conformance`: who reaches whom under Kubernetes `NetworkPolicy`, by real probes from real pods.

mod probe;
mod stage;
mod suite;

use anyhow::Context;
use serde_json::json;
use stage::Stage;
use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};
use suite::{Case, Verdict};

/// What to run.
#[derive(clap::Args)]
pub struct Arguments {
    /// A file of cases, JSON or gzip, in the format of `tests/conformance/README.md`; without it, those there.
    #[arg(long, value_name = "FILE")]
    suite: Option<PathBuf>,
    /// Put the pods on the nodes that the cases name, so that probes cross VXLAN. Without it all are on one node.
    #[arg(long)]
    two_nodes: bool,
    /// Only cases whose name contains this.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Do not ask `hostd policy explain` after each step whether it agrees.
    #[arg(long)]
    no_explain: bool,
    /// Write what was found to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl Arguments {
    /// All cases, on one node or two.
    pub const fn all(two_nodes: bool) -> Self {
        Self {
            suite: None,
            two_nodes,
            filter: None,
            no_explain: false,
            json: None,
        }
    }
}

/// A verdict that was not as it should be.
struct Mismatch {
    case: String,
    step: usize,
    verdict: Verdict,
    found: String,
}

/// What was found.
#[derive(Default)]
struct Found {
    verdicts: usize,
    retried: usize,
    explained: usize,
    mismatches: Vec<Mismatch>,
}

/// Runs all cases; an error where one verdict is not as it should be.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    harness::use_release();
    let began = Instant::now();
    let mut cases = Vec::new();
    for path in suites(arguments.suite.as_deref())? {
        cases.extend(suite::read(&path)?);
    }
    if let Some(filter) = &arguments.filter {
        cases.retain(|case| case.name.contains(filter));
    }
    anyhow::ensure!(!cases.is_empty(), "no case to run");
    let mut found = Found::default();
    let mut stage: Option<Stage> = None;
    for (index, case) in cases.iter().enumerate() {
        let began = Instant::now();
        let before = (found.verdicts, found.mismatches.len());
        let reused = stage.take().filter(|stage| stage.fits(case, arguments.two_nodes));
        let mut here = match reused {
            Some(stage) => stage,
            None => Stage::new(case, arguments.two_nodes).with_context(|| format!("case {:?}", case.name))?,
        };
        run_case(case, &mut here, !arguments.no_explain, &mut found)
            .with_context(|| format!("case {:?}", case.name))?;
        stage = Some(here);
        println!(
            "{:4}/{} {:6} verdicts {:3} mismatches {:5.1} s  {}",
            index + 1,
            cases.len(),
            found.verdicts - before.0,
            found.mismatches.len() - before.1,
            began.elapsed().as_secs_f64(),
            case.name
        );
    }
    drop(stage);
    report(arguments, &cases, &found, began.elapsed().as_secs_f64())
}

fn suites(given: Option<&Path>) -> anyhow::Result<Vec<PathBuf>> {
    if let Some(path) = given {
        return Ok(vec![path.to_owned()]);
    }
    let folder = toolchain::workspace_root().join("tests/conformance");
    let mut suites = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.to_string_lossy().ends_with(".json.gz") {
            suites.push(path);
        }
    }
    suites.sort();
    Ok(suites)
}

fn run_case(case: &Case, stage: &mut Stage, explain: bool, found: &mut Found) -> anyhow::Result<()> {
    for (index, step) in case.steps.iter().enumerate() {
        let place = || format!("step {} {}", index + 1, step.note);
        stage.become_step(step).with_context(place)?;
        let mut wrong = |verdict: &Verdict, what: String| {
            found.mismatches.push(Mismatch {
                case: case.name.clone(),
                step: index + 1,
                verdict: verdict.clone(),
                found: what,
            });
        };
        let outcomes = stage.probe(step).with_context(place)?;
        for (verdict, outcome) in step.expect.iter().zip(&outcomes.all) {
            if !outcome.is(verdict.4) {
                wrong(verdict, outcome.to_string());
            }
        }
        if explain {
            for (verdict, said) in step.expect.iter().zip(stage.explain(step).with_context(place)?) {
                match said {
                    None => {}
                    Some(Ok(allowed)) if allowed == verdict.4 => found.explained += 1,
                    Some(Ok(allowed)) => {
                        found.explained += 1;
                        wrong(verdict, format!("explain says {allowed}"));
                    }
                    Some(Err(problem)) => wrong(verdict, problem),
                }
            }
        }
        found.verdicts += step.expect.len();
        found.retried += outcomes.retried;
    }
    Ok(())
}

fn report(arguments: &Arguments, cases: &[Case], found: &Found, seconds: f64) -> anyhow::Result<()> {
    println!();
    for mismatch in &found.mismatches {
        let Verdict(from, to, protocol, port, expected) = &mismatch.verdict;
        let expected = if *expected { "allowed" } else { "denied" };
        println!(
            "{}, step {}: {from} -> {to} {protocol}/{port} should be {expected}: {}",
            mismatch.case, mismatch.step, mismatch.found
        );
    }
    if let Some(path) = &arguments.json {
        let mismatches: Vec<_> = found
            .mismatches
            .iter()
            .map(|one| {
                let Verdict(from, to, protocol, port, expected) = &one.verdict;
                json!({
                    "case": one.case, "step": one.step, "from": from, "to": to, "protocol": protocol, "port": port,
                    "expected": expected, "found": one.found,
                })
            })
            .collect();
        let all = json!({
            "two_nodes": arguments.two_nodes, "cases": cases.len(), "verdicts": found.verdicts,
            "explained": found.explained, "retried": found.retried, "seconds": seconds, "mismatches": mismatches,
        });
        fs::write(path, format!("{all:#}\n")).with_context(|| path.display().to_string())?;
    }
    let where_ = if arguments.two_nodes { "two nodes" } else { "one node" };
    println!(
        "{} cases on {where_}, {} verdicts explained, {} probes sent again, {seconds:.0} s",
        cases.len(),
        found.explained,
        found.retried
    );
    println!("{} verdicts, {} mismatches", found.verdicts, found.mismatches.len());
    anyhow::ensure!(found.mismatches.is_empty(), "not all verdicts are as they should be");
    Ok(())
}
