//! `cargo xtask bench path`: nanoseconds that a packet takes, by path.
//!
//! The programs as hostd loads them are run by `BPF_PROG_TEST_RUN` on packets that are made anew each time, in rounds that have
//! every path once, beside an empty program, a bare `bpf_redirect_peer`, and the yardstick of 16 look-ups. A path's figure is
//! what the kernel would take if it started the program itself: making the packet, measured in the same round, is taken off.
mod cases;

use cases::Case;
use serde_json::json;
use std::{collections::BTreeMap, process::ExitCode};
use wasmgate_tests::{
    report::{self, Measured, Samples},
    stage::REPEAT,
};

/// Times that everything is measured.
const ROUNDS: usize = 300;
/// The yardstick of the slower half of the run may be so many times that of the faster one.
const DRIFT: f64 = 1.25;

/// What each case took beyond making its packets, in every round.
fn measure(cases: &mut [Case]) -> anyhow::Result<BTreeMap<&'static str, Samples>> {
    let mut all: BTreeMap<&'static str, Samples> = BTreeMap::new();
    for _ in 0..ROUNDS {
        for case in &mut *cases {
            let taken = case.round()?;
            all.entry(case.name).or_default().push(taken);
        }
    }
    Ok(all)
}

fn main() -> ExitCode {
    report::run(bench)
}

fn bench() -> anyhow::Result<Measured> {
    let mut cases = cases::all()?;
    let samples = measure(&mut cases)?;
    let yardstick = &samples[cases::YARDSTICK];
    let drift = yardstick.drift();
    println!("\n{ROUNDS} rounds of {REPEAT} packets a path; the yardstick is 16 look-ups in a hash map");
    println!(
        "{:<28} {:>8} {:>10} {:>10}",
        "PATH", "P10 NS", "MEDIAN NS", "YARDSTICKS"
    );
    let mut paths = serde_json::Map::new();
    for case in &cases {
        let samples = &samples[case.name];
        let (p10, median) = (samples.at(0.1), samples.median());
        let yardsticks = median / yardstick.median();
        println!("{:<28} {p10:>8.0} {median:>10.0} {yardsticks:>10.2}", case.name);
        let figures = json!({"p10_ns": p10, "median_ns": median, "yardsticks": yardsticks});
        paths.insert(case.name.to_owned(), figures);
    }
    let not_comparable = (drift > DRIFT)
        .then(|| format!("all of it: half of the run took {drift:.2} times as long as the other ({DRIFT} may be)"));
    Ok(Measured {
        figures: json!({"yardstick_ns": yardstick.median(), "drift": drift, "paths": paths}),
        not_comparable: not_comparable.into_iter().collect(),
    })
}
