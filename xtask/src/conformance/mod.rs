//! `cargo xtask conformance`: who reaches whom under Kubernetes `NetworkPolicy`, by real probes from real pods.

mod probe;
mod stage;
mod suite;

use anyhow::Context;
use serde_json::json;
use stage::Stage;
use std::{
    collections::VecDeque,
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError, mpsc},
    thread,
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
    /// Play so many cases at once, each on a cluster of its own.
    #[arg(long, value_name = "N", default_value_t = JOBS)]
    jobs: NonZeroUsize,
    /// Write what was found to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

const JOBS: NonZeroUsize = NonZeroUsize::new(4).unwrap();

impl Arguments {
    /// All cases of a file, or of all files, on one node or two.
    pub const fn all(suite: Option<PathBuf>, two_nodes: bool) -> Self {
        Self {
            suite,
            two_nodes,
            filter: None,
            no_explain: false,
            jobs: JOBS,
            json: None,
        }
    }
}

/// The file of random cases.
pub fn random_suite() -> PathBuf {
    folder().join("networkpolicy-random.json.gz")
}

fn folder() -> PathBuf {
    toolchain::workspace_root().join("tests/conformance")
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

impl Found {
    fn add(&mut self, other: Self) {
        self.verdicts += other.verdicts;
        self.retried += other.retried;
        self.explained += other.explained;
        self.mismatches.extend(other.mismatches);
    }
}

/// What was found in one case, and how long it took.
struct Played {
    found: Found,
    seconds: f64,
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
    let found = run_all(arguments, &cases)?;
    report(arguments, &cases, &found, began.elapsed().as_secs_f64())
}

/// Runs cases on several clusters at once: what a case does most is wait for what should not arrive.
fn run_all(arguments: &Arguments, cases: &[Case]) -> anyhow::Result<Found> {
    let waiting = Mutex::new(cases.iter().enumerate().collect::<VecDeque<_>>());
    let (say, ended) = mpsc::channel();
    let mut found = Found::default();
    thread::scope(|scope| {
        for _ in 0..arguments.jobs.get() {
            let (waiting, say) = (&waiting, say.clone());
            scope.spawn(move || play(arguments, waiting, &say));
        }
        drop(say);
        for (index, played) in ended {
            let case = &cases[index];
            let played: Played = match played.with_context(|| format!("case {:?}", case.name)) {
                Ok(played) => played,
                Err(error) => {
                    // Nobody begins another one.
                    waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
                    return Err(error);
                }
            };
            println!(
                "{:4}/{} {:6} verdicts {:3} mismatches {:5.1} s  {}",
                index + 1,
                cases.len(),
                played.found.verdicts,
                played.found.mismatches.len(),
                played.seconds,
                case.name
            );
            found.add(played.found);
        }
        Ok(found)
    })
}

/// What came of a case, by its number.
type Ended = (usize, anyhow::Result<Played>);

/// Plays one case after the other, on the same cluster as long as it fits.
fn play(arguments: &Arguments, waiting: &Mutex<VecDeque<(usize, &Case)>>, say: &mpsc::Sender<Ended>) {
    let mut stage: Option<Stage> = None;
    loop {
        let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let Some((index, case)) = next else { return };
        let began = Instant::now();
        let mut try_to_play = || {
            let reused = stage.take().filter(|stage| stage.fits(case, arguments.two_nodes));
            let mut here = match reused {
                Some(stage) => stage,
                None => Stage::new(case, arguments.two_nodes)?,
            };
            let mut found = Found::default();
            run_case(case, &mut here, !arguments.no_explain, &mut found)?;
            stage = Some(here);
            Ok(Played {
                found,
                seconds: began.elapsed().as_secs_f64(),
            })
        };
        let played = try_to_play();
        // Nobody listens any more where another case has failed.
        if say.send((index, played)).is_err() {
            return;
        }
    }
}

fn suites(given: Option<&Path>) -> anyhow::Result<Vec<PathBuf>> {
    if let Some(path) = given {
        return Ok(vec![path.to_owned()]);
    }
    let folder = folder();
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
