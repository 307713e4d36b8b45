//! `cargo xtask bench path`: nanoseconds that a packet takes, by path.
//!
//! The programs as hostd loads them are run by `BPF_PROG_TEST_RUN` on packets that are made anew each time, in rounds that have
//! every path once, beside an empty program, a bare `bpf_redirect_peer`, and the yardstick of 16 look-ups. A path's figure is
//! what the kernel would take if it started the program itself: making the packet, measured in the same round, is taken off.
#![expect(
    clippy::cast_precision_loss,
    clippy::unwrap_used,
    reason = "a benchmark, which fails as a whole"
)]

mod cases;
mod stage;

use cases::Case;
use serde_json::{Value, json};
use std::{collections::BTreeMap, fs};

/// Times that everything is measured.
const ROUNDS: usize = 300;
/// The yardstick of the slower half of the run may be so many times that of the faster one.
const DRIFT: f64 = 1.25;

/// Nanoseconds of each round.
#[derive(Default)]
struct Samples(Vec<f64>);

impl Samples {
    fn at(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an index within the samples"
        )]
        let index = ((sorted.len() - 1) as f64 * share) as usize;
        sorted[index]
    }

    fn p10(&self) -> f64 {
        self.at(0.1)
    }

    fn median(&self) -> f64 {
        self.at(0.5)
    }
}

/// Whether the machine did the same work in the same time all along.
fn drift(yardstick: &Samples) -> f64 {
    let (first, second) = yardstick.0.split_at(yardstick.0.len() / 2);
    let (first, second) = (Samples(first.to_vec()).median(), Samples(second.to_vec()).median());
    first.max(second) / first.min(second)
}

/// What each case took beyond making its packets, in every round.
fn measure(cases: &mut [Case]) -> anyhow::Result<BTreeMap<&'static str, Samples>> {
    let mut all: BTreeMap<&'static str, Samples> = BTreeMap::new();
    for _ in 0..ROUNDS {
        for case in &mut *cases {
            let taken = case.round()?;
            all.entry(case.name).or_default().0.push(taken);
        }
    }
    Ok(all)
}

fn main() -> anyhow::Result<()> {
    // `cargo test` runs benchmarks too, to see that they run: this one takes its time.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if !arguments.iter().any(|argument| argument == "--bench") {
        return Ok(());
    }
    if let Err(unsupported) = harness::check_support() {
        anyhow::bail!("this machine can't run it: {unsupported}");
    }
    let mut cases = cases::all()?;
    let samples = measure(&mut cases)?;
    let yardstick = &samples[cases::YARDSTICK];
    let drift = drift(yardstick);
    println!(
        "\n{ROUNDS} rounds of {} packets a path; the yardstick is 16 look-ups in a hash map",
        stage::REPEAT
    );
    println!(
        "{:<28} {:>8} {:>10} {:>10}",
        "PATH", "P10 NS", "MEDIAN NS", "YARDSTICKS"
    );
    let mut paths = serde_json::Map::new();
    for case in &cases {
        let samples = &samples[case.name];
        let ratio = samples.median() / yardstick.median();
        println!(
            "{:<28} {:>8.0} {:>10.0} {ratio:>10.2}",
            case.name,
            samples.p10(),
            samples.median()
        );
        let figures: Value = json!({"p10_ns": samples.p10(), "median_ns": samples.median(), "yardsticks": ratio});
        paths.insert(case.name.to_owned(), figures);
    }
    anyhow::ensure!(
        drift <= DRIFT,
        "the machine was too noisy to compare anything: half of the run took {drift:.2} times as long as the other; again, please"
    );
    if let Some(file) = arguments
        .iter()
        .position(|one| one == "--json")
        .and_then(|at| arguments.get(at + 1))
    {
        let all = json!({"yardstick_ns": yardstick.median(), "drift": drift, "paths": paths});
        fs::write(file, format!("{all:#}\n"))?;
    }
    Ok(())
}
