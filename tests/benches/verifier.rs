//! `cargo xtask bench verifier`: what the tc programs cost to load. For each: its size as the kernel runs it, how many
//! instructions the verifier has looked at (of a million that it allows), and how long that took.

use abi::Hook;
use anyhow::Context;
use aya::{Ebpf, EbpfLoader, programs::SchedClassifier};
use hostd::{config::Maps, datapath::shape};
use serde_json::json;
use std::{fs, time::Instant};

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

fn main() -> anyhow::Result<()> {
    // `cargo test --all-targets` runs benchmarks, too, to see that they run: this one is for `cargo bench`.
    if !std::env::args().any(|argument| argument == "--bench") {
        return Ok(());
    }
    if let Err(unsupported) = harness::check_support() {
        anyhow::bail!("this machine can't run it: {unsupported}");
    }
    let mut arguments = std::env::args().skip_while(|argument| argument != "--json").skip(1);
    let mut rows = Vec::new();
    for name in Hook::ALL.map(Hook::name) {
        let mut times = Vec::new();
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
        times.sort_by(f64::total_cmp);
        rows.push((name, sizes, times));
    }
    println!("\nPROGRAM       VERIFIED  OF LIMIT  INSTRUCTIONS  JITTED BYTES  LOAD MS (RANGE)");
    for (name, (verified, translated, jitted), times) in &rows {
        let share = f64::from(*verified) * 100.0 / f64::from(LIMIT);
        println!(
            "{name:<12}  {verified:>8}  {share:>6.1} %  {translated:>12}  {jitted:>12}  {:.0} ({:.0} - {:.0})",
            times[ROUNDS / 2],
            times[0],
            times[ROUNDS - 1]
        );
    }
    if let Some(path) = arguments.next() {
        let programs: Vec<_> = rows
            .iter()
            .map(|(name, (verified, translated, jitted), times)| {
                json!({"program": name, "verified_instructions": verified, "instructions": translated,
                       "jitted_bytes": jitted, "load_ms": {"median": times[ROUNDS / 2], "all": times}})
            })
            .collect();
        let text = serde_json::to_string_pretty(&json!({ "limit": LIMIT, "programs": programs }))?;
        fs::write(&path, text).with_context(|| path.clone())?;
    }
    Ok(())
}
