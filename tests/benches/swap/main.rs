//! `cargo xtask bench swap`: what a policy change every 100 ms costs the traffic of a node that has as much as it can carry.
//!
//! Eight TCP streams between two pods, and an echo every millisecond between two others, all the time: in one second with policy
//! changes, in the next without. Two modules take turns, which both allow what is sent.

use anyhow::{Context, ensure};
use harness::{Cluster, Listener, Program, Traffic, sent_bytes, tcp_duplicates, tcp_retransmits};
use serde_json::{Value, json};
use std::{
    fs,
    ops::Sub,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};
use wasmgate_tests::report::{self, Measured, Samples};

/// Seconds with changes, and as many without.
const SECONDS: usize = 30;
const SECOND: Duration = Duration::from_secs(1);
/// What does not count at the start of each.
const GUARD: Duration = Duration::from_millis(100);
const EVERY: Duration = Duration::from_millis(100);
/// Changes that the seconds with changes must have had, so that they are what they are called.
const CHANGES: u64 = 9 * SECONDS as u64;
/// The middle half of the differences between neighbouring seconds may be so wide.
const NOISE: f64 = 0.15;
const IPERF: u16 = 5201;
const ECHO: u16 = 7000;
const MODULES: [&str; 2] = ["allow-all", "tenant-isolation"];
/// Clock ticks a second in `/proc/PID/stat` (`USER_HZ`, proc(5)).
const TICKS: f64 = 100.0;

/// What is counted from the start on.
#[derive(Clone, Copy, Default)]
struct Counted {
    /// Processor seconds of hostd.
    processor: f64,
    bytes: u64,
    sent_again: u64,
    for_nothing: u64,
    /// Packets that the programs have dropped, for whatever reason.
    dropped: u64,
    /// Packets that the kernel has dropped for want of room in a processor's queue, on their way from one end of a pair to the
    /// other.
    overrun: u64,
}

impl Counted {
    fn now(cluster: &Cluster) -> anyhow::Result<Self> {
        let hostd = &cluster.nodes[0];
        let client = cluster.pod("red/client").netns.name();
        let status = hostd.json(&["status"])?;
        let drops = status["drops"].as_array().context("no counters")?;
        Ok(Self {
            processor: processor(hostd.pid().context("hostd does not run")?)?,
            bytes: sent_bytes(client)?,
            sent_again: tcp_retransmits(client)?,
            for_nothing: tcp_duplicates(client)?,
            dropped: drops.iter().filter_map(|counter| counter["packets"].as_u64()).sum(),
            overrun: overrun()?,
        })
    }
}

impl Sub for Counted {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            processor: self.processor - before.processor,
            bytes: self.bytes - before.bytes,
            sent_again: self.sent_again - before.sent_again,
            for_nothing: self.for_nothing - before.for_nothing,
            dropped: self.dropped - before.dropped,
            overrun: self.overrun - before.overrun,
        }
    }
}

/// What was seen in the seconds of one kind.
#[derive(Default)]
struct Seen {
    gbit_s: Samples,
    stall_ms: Samples,
    loads: u64,
    echoes_lost: u64,
    total: Counted,
}

impl Seen {
    fn json(&self) -> Value {
        json!({"gbit_s": self.gbit_s.json(), "mean_gbit_s": self.gbit_s.mean(), "stall_ms": self.stall_ms.json(),
               "loads": self.loads, "hostd_cpu_s": self.total.processor, "echoes_lost": self.echoes_lost,
               "dropped": self.total.dropped, "overrun": self.total.overrun,
               "segments_sent_again": self.total.sent_again, "of_them_for_nothing": self.total.for_nothing})
    }

    fn print(&self, name: &str) {
        println!(
            "{name:<8} {:>7.2} {:>10.1} {:>8} {:>12.2} {:>12} {:>8} {:>8} {:>15} {:>12}",
            self.gbit_s.mean(),
            self.stall_ms.most(),
            self.loads,
            self.total.processor,
            self.echoes_lost,
            self.total.dropped,
            self.total.overrun,
            self.total.sent_again,
            self.total.for_nothing,
        );
    }

    /// A second, with changes or without.
    fn look(&mut self, cluster: &Cluster, changes: bool) -> anyhow::Result<()> {
        let (asks, answers) = (cluster.pod("red/asks"), cluster.pod("red/answers"));
        let wait = Duration::from_secs(1);
        let pause = Duration::from_millis(1);
        let echoes = Traffic::paced(asks.netns.name(), answers.address, ECHO, wait, pause);
        let all = Counted::now(cluster)?;
        let until = Instant::now() + GUARD + SECOND;
        let loads = thread::scope(|scope| {
            let changing = changes.then(|| scope.spawn(|| change(cluster, until)));
            thread::sleep(GUARD);
            let client = cluster.pod("red/client").netns.name();
            let (began, before) = (Instant::now(), sent_bytes(client)?);
            thread::sleep(until.saturating_duration_since(Instant::now()));
            let (bytes, taken) = (sent_bytes(client)? - before, began.elapsed());
            #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
            self.gbit_s.push(bytes as f64 * 8.0 / 1e9 / taken.as_secs_f64());
            let loads = changing.map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            loads.unwrap_or(Ok(0))
        })?;
        let spent = Counted::now(cluster)? - all;
        let counts = echoes.stop()?;
        self.loads += loads;
        self.echoes_lost += counts.lost;
        self.stall_ms.push(counts.slowest.as_secs_f64() * 1e3);
        let total = &mut self.total;
        total.processor += spent.processor;
        total.sent_again += spent.sent_again;
        total.for_nothing += spent.for_nothing;
        total.dropped += spent.dropped;
        total.overrun += spent.overrun;
        Ok(())
    }
}

/// Loads one module after the other until then; the answer is how many.
fn change(cluster: &Cluster, until: Instant) -> anyhow::Result<u64> {
    let mut loads = 0;
    let mut next = Instant::now();
    while Instant::now() < until {
        cluster.load(MODULES[usize::from(loads % 2 == 0)])?;
        loads += 1;
        next += EVERY;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(loads)
}

/// Processor seconds of a process and of the children that it has waited for.
fn processor(pid: u32) -> anyhow::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Behind the program's name, which may have spaces.
    let (_, rest) = stat.rsplit_once(')').context("no name")?;
    let ticks = rest.split_whitespace().skip(11).take(4).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>()? / TICKS)
}

/// What the processors' queues had no room for, in hexadecimal (`softnet_seq_show`, `net/core/net-procfs.c`).
fn overrun() -> anyhow::Result<u64> {
    let processors = fs::read_to_string("/proc/net/softnet_stat")?;
    let dropped = processors.lines().filter_map(|line| line.split_whitespace().nth(1));
    let dropped = dropped.map(|count| u64::from_str_radix(count, 16));
    Ok(dropped.sum::<Result<u64, _>>()?)
}

fn main() -> ExitCode {
    report::run(bench)
}

fn bench() -> anyhow::Result<Measured> {
    let mut cluster = Cluster::one_node()?;
    for name in ["red/client", "red/server", "red/asks", "red/answers"] {
        cluster.add_pod(0, name, &[])?;
    }
    cluster.settle()?;
    for module in MODULES {
        cluster.load(module)?;
    }
    let (client, server) = (cluster.pod("red/client"), cluster.pod("red/server"));
    let _server = Program::listening(&server.netns, "iperf3", &["-s"], IPERF)?;
    let _echo = Listener::new(cluster.pod("red/answers").netns.name(), ECHO)?;
    let to = server.address.to_string();
    // Longer than all of it takes: it is ended with the rest.
    let _streams = Program::start(&client.netns, "iperf3", &["-c", &to, "-t", "3600", "-P", "8"])?;
    thread::sleep(2 * SECOND);
    let (mut with, mut without) = (Seen::default(), Seen::default());
    for _ in 0..SECONDS {
        with.look(&cluster, true)?;
        without.look(&cluster, false)?;
    }
    let carried = with.gbit_s.over(&without.gbit_s);
    let lost = 1.0 - with.gbit_s.mean() / without.gbit_s.mean();
    let noise = carried.at(0.75) - carried.at(0.25);
    let error = carried.standard_error();
    println!("\n{SECONDS} seconds with a policy change every {EVERY:?}, and {SECONDS} without, in turn");
    println!(
        "          GBIT/S  LONGEST MS  CHANGES  HOSTD CPU S  ECHOES LOST  DROPPED  OVERRUN  SEGMENTS AGAIN  FOR NOTHING"
    );
    with.print("with");
    without.print("without");
    println!(
        "throughput lost: {:.2} % ± {:.2} (standard error)",
        lost * 100.0,
        error * 100.0
    );
    ensure!(
        with.loads >= CHANGES,
        "only {} policy changes in {SECONDS} seconds: they take longer than {EVERY:?} here",
        with.loads
    );
    let mut not_comparable = Vec::new();
    if noise > NOISE {
        let (noise, may) = (noise * 100.0, NOISE * 100.0);
        not_comparable.push(format!(
            "throughput: of neighbouring seconds the middle half differs by {noise:.0} % ({may:.0} % may be)"
        ));
    }
    Ok(Measured {
        figures: json!({"without": without.json(), "with": with.json(), "throughput_lost": lost, "standard_error": error}),
        not_comparable,
    })
}
