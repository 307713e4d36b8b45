//! `cargo xtask bench policy`: what a policy costs, by the number of identities.
//!
//! In this process, with a real module, real maps and the code that hostd runs: a full load, one identity more, one
//! less, one relabelled. In a real hostd, with so many pods in its store: its memory and a load. In the kernel: a packet
//! that policy denies, at 100 and at 60,000 identities in turn.
#![expect(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a benchmark, which fails as a whole"
)]

mod daemon;
mod engine;
mod packets;

use serde_json::json;
use std::{process::ExitCode, time::Instant};
use wasmgate_tests::report::{self, Measured};

/// Identities of this node's pods.
const LOCAL: usize = 250;
/// Times that everything is measured; the median is shown, with the range.
const ROUNDS: usize = 5;

/// Seconds that something takes.
fn timed<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let began = Instant::now();
    let result = work();
    (began.elapsed().as_secs_f64(), result)
}

fn main() -> ExitCode {
    report::run(bench)
}

fn bench() -> anyhow::Result<Measured> {
    let sizes = [100, 1000, 10_000];
    let loads = sizes
        .iter()
        .map(|size| engine::in_process(*size))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let hostd = [(100, 50), (1000, 100), (10_000, LOCAL)]
        .iter()
        .map(|(size, local)| daemon::in_hostd(*size, *local))
        .collect::<anyhow::Result<Vec<_>>>()?;
    Ok(json!({"loads": loads, "hostd": hostd, "packet": packets::per_packet()?}).into())
}
