//! `cargo xtask bench verifier`: what the tc programs cost to load. For each: its size as the kernel runs it, how many
//! instructions the verifier has looked at (of a million that it allows), and how long that took.

use abi::Hook;
use anyhow::Context;
use aya::{Ebpf, EbpfLoader, programs::SchedClassifier};
use hostd::{config::Maps, datapath::shape};
use serde_json::json;
use std::{process::ExitCode, time::Instant};
use wasmgate_tests::report::{self, Measured, Samples};

/// Times that each is loaded; the median is shown, with the range.
const ROUNDS: usize = 7;
/// Instructions that the verifier looks at before it gives up (`BPF_COMPLEXITY_LIMIT_INSNS`, `include/linux/bpf.h`).
const LIMIT: u32 = 1_000_000;

/// The object with its maps, as hostd sets it up.
fn object() -> anyhow::Result<Ebpf> {
    let path = toolchain::target_dir().join("bpf/bpfel-unknown-none/release/datapath");
    let shape = shape(&Maps::default());
    let mut loader = EbpfLoader::new();
    loader
        .override_global("POLICY_ROWS", &shape.rows, true)
        .override_global("POLICY_COLUMNS", &shape.columns, true);
    Ok(loader.load_file(path)?)
}

fn main() -> ExitCode {
    report::run(bench)
}

fn bench() -> anyhow::Result<Measured> {
    let mut rows = Vec::new();
    for name in Hook::ALL.map(Hook::name) {
        let mut times = Samples::default();
        let mut sizes = (0, 0, 0);
        for _ in 0..ROUNDS {
            let mut ebpf = object()?;
            let program: &mut SchedClassifier = ebpf.program_mut(name).context("no program")?.try_into()?;
            let began = Instant::now();
            program.load()?;
            times.push(began.elapsed().as_secs_f64() * 1000.0);
            let info = program.info()?;
            sizes = (
                info.verified_instruction_count().unwrap_or(0),
                info.size_translated().unwrap_or(0) / 8,
                info.size_jitted(),
            );
        }
        rows.push((name, sizes, times));
    }
    println!("\nPROGRAM       VERIFIED  OF LIMIT  INSTRUCTIONS  JITTED BYTES  LOAD MS (RANGE)");
    for (name, (verified, translated, jitted), times) in &rows {
        let share = f64::from(*verified) * 100.0 / f64::from(LIMIT);
        println!(
            "{name:<12}  {verified:>8}  {share:>6.1} %  {translated:>12}  {jitted:>12}  {:.0} ({:.0} - {:.0})",
            times.median(),
            times.least(),
            times.most()
        );
    }
    let programs: Vec<_> = rows
        .iter()
        .map(|(name, (verified, translated, jitted), times)| {
            json!({"program": name, "verified_instructions": verified, "instructions": translated,
                   "jitted_bytes": jitted, "load_ms": times.json()})
        })
        .collect();
    Ok(json!({"limit": LIMIT, "programs": programs}).into())
}
