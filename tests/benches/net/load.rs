//! What is sent, and how it is measured.

use super::worlds::{PORTS, World};
use anyhow::{Context, ensure};
use harness::{Program, answer_each, ask, iperf3, short_connections};
use serde_json::Value;
use std::{fs, net::SocketAddr, time::Instant};

/// One measurement, which has one value or more.
pub type Load = fn(&World<'_>) -> anyhow::Result<Vec<f64>>;

/// All of them, each with the names of its values.
pub const ALL: [(&[&str], Load); 7] = [
    (&["tcp_1_gbit_s", "tcp_1_cpu_s_per_gb"], |world| tcp(world, 1)),
    (&["tcp_8_gbit_s", "tcp_8_cpu_s_per_gb"], |world| tcp(world, 8)),
    (&["udp_64_1_kpps", "udp_64_1_cpu_s_per_gb"], |world| udp(world, 1)),
    (&["udp_64_8_kpps", "udp_64_8_cpu_s_per_gb"], |world| udp(world, 8)),
    (&["latency_p50_us", "latency_p99_us", "latency_p99.9_us"], latency),
    (&["connections_1_per_s"], |world| connections(world, 1)),
    (&["connections_8_per_s"], |world| connections(world, 8)),
];

const IPERF: u16 = PORTS[0];
const SHORT: u16 = PORTS[1];
const ECHO: u16 = PORTS[2];
/// Connections that a measurement opens.
const COUNT: u64 = 8000;
/// Clock ticks a second in `/proc/stat` (`USER_HZ`, proc(5)).
const TICKS: f64 = 100.0;

/// What answers at a world's server.
pub fn serve(world: &World<'_>) -> anyhow::Result<[Program; 2]> {
    answer_each(world.server.name(), SHORT)?;
    Ok([
        Program::listening(world.server, "iperf3", &["-s"], IPERF)?,
        Program::listening(world.server, "sockperf", &["server", "--tcp", "-p", "11111"], ECHO)?,
    ])
}

/// Seconds that all processors have worked since the start: all columns but `idle`, `iowait`, and what is counted elsewhere.
fn busy() -> anyhow::Result<f64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().context("no processors")?;
    let columns: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        .filter_map(|ticks| ticks.parse().ok())
        .collect();
    let [user, nice, system, _, _, irq, softirq, ..] = columns[..] else {
        anyhow::bail!("/proc/stat has too few columns");
    };
    Ok((user + nice + system + irq + softirq) / TICKS)
}

/// A client's report, and the seconds of processor time that went by meanwhile.
fn measured(world: &World<'_>, more: &[&str]) -> anyhow::Result<(Value, f64)> {
    let before = busy()?;
    let report = iperf3(world.client, world.address, 1, more)?;
    Ok((serde_json::from_str(&report)?, busy()? - before))
}

fn number(report: &Value, pointer: &str) -> anyhow::Result<f64> {
    let value = report.pointer(pointer).and_then(Value::as_f64);
    value.with_context(|| format!("iperf3 says nothing of {pointer}"))
}

fn tcp(world: &World<'_>, streams: u32) -> anyhow::Result<Vec<f64>> {
    let (report, work) = measured(world, &["-P", &streams.to_string()])?;
    let bits = number(&report, "/end/sum_received/bits_per_second")?;
    let bytes = number(&report, "/end/sum_received/bytes")?;
    Ok(vec![bits / 1e9, work / (bytes / 1e9)])
}

/// As many datagrams of 64 bytes as the sender can send; those count that arrive.
fn udp(world: &World<'_>, streams: u32) -> anyhow::Result<Vec<f64>> {
    let (report, work) = measured(world, &["-u", "-b", "0", "-l", "64", "-P", &streams.to_string()])?;
    let sent = number(&report, "/end/sum/packets")?;
    let arrived = sent - number(&report, "/end/sum/lost_packets")?;
    let seconds = number(&report, "/end/sum/seconds")?;
    ensure!(arrived > 0.0, "no datagram has arrived");
    let rate = arrived / seconds / 1e3;
    Ok(vec![rate, work / (arrived * 64.0 / 1e9)])
}

/// Half of the time from a request of 14 bytes to its answer, one after the other, by TCP.
fn latency(world: &World<'_>) -> anyhow::Result<Vec<f64>> {
    let to = world.address.to_string();
    let arguments = ["ping-pong", "--tcp", "-i", &to, "-p", "11111", "-t", "1"];
    let report = ask(world.client, "sockperf", &arguments)?;
    let percentile = |text: &str| -> anyhow::Result<f64> {
        let line = report
            .lines()
            .find(|line| line.contains(text))
            .context("no percentile")?;
        Ok(line.rsplit('=').next().context("no value")?.trim().parse()?)
    };
    Ok(vec![
        percentile("percentile 50.000")?,
        percentile("percentile 99.000")?,
        percentile("percentile 99.900")?,
    ])
}

/// Connections, each with a request and its answer, to the end.
fn connections(world: &World<'_>, clients: u64) -> anyhow::Result<Vec<f64>> {
    let began = Instant::now();
    let outcome = short_connections(
        world.client.name(),
        SocketAddr::new(world.address, SHORT),
        COUNT,
        clients,
    )?;
    let seconds = began.elapsed().as_secs_f64();
    ensure!(
        outcome.problems.is_empty(),
        "connections failed: {}",
        outcome.problems[0]
    );
    #[expect(clippy::cast_precision_loss, reason = "thousands")]
    let rate = outcome.done as f64 / seconds;
    Ok(vec![rate])
}
