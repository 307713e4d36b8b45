//! What the demo prints.

use super::stage::Throughput;
use harness::{Cluster, Counts, Reach};
use std::{collections::BTreeMap, net::IpAddr};

/// Announces a step.
pub fn step(what: &str) {
    println!("\n== {what}\n");
}

/// The pods, by node.
pub fn pods(cluster: &Cluster) -> anyhow::Result<()> {
    for node in &cluster.nodes {
        println!("{} ({})", node.name, node.underlay);
        let listed = node.hostd(&["endpoint", "list"])?;
        for line in String::from_utf8_lossy(&listed.stdout).lines() {
            println!("  {line}");
        }
    }
    Ok(())
}

/// Runs a command of hostd on the first node and shows what it prints.
pub fn hostd(cluster: &Cluster, arguments: &[&str]) -> anyhow::Result<()> {
    let output = cluster.nodes[0].hostd(arguments)?;
    print!("{}", String::from_utf8_lossy(&output.stdout));
    anyhow::ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Who reaches whom: a row for each sender, a column for each receiver.
pub fn matrix(cluster: &Cluster, reach: &BTreeMap<(String, String), Reach>) {
    let names: Vec<&str> = cluster.pods.iter().map(|pod| pod.name.as_str()).collect();
    let width = names.iter().map(|name| name.len()).max().unwrap_or(0);
    print!("{:width$}", "from \\ to");
    for name in &names {
        print!("  {name}");
    }
    println!();
    for from in &names {
        print!("{from:width$}");
        for to in &names {
            let cell = match reach.get(&((*from).to_owned(), (*to).to_owned())) {
                None => "",
                Some(Reach { tcp: true, udp: true }) => "TCP UDP",
                Some(Reach { tcp: true, udp: false }) => "TCP",
                Some(Reach { tcp: false, udp: true }) => "UDP",
                Some(Reach { tcp: false, udp: false }) => "-",
            };
            print!("  {cell:width$}", width = to.len());
        }
        println!();
    }
}

/// VNIs on the wire, by sender.
pub fn vnis(seen: &BTreeMap<String, (u32, usize)>, identities: &BTreeMap<IpAddr, (String, u32)>) {
    println!("\n{:22} {:>9} {:>9} {:>8}", "SENDER", "IDENTITY", "VNI", "PACKETS");
    for (name, (vni, packets)) in seen {
        let identity = identities
            .values()
            .find(|(known, _)| known == name)
            .map_or(0, |(_, identity)| *identity);
        println!("{name:22} {identity:>9} {vni:>9} {packets:>8}");
    }
}

/// Connections to a service: by client, how many were tried, and how many each backend got.
pub fn service(backends: &[&str], clients: &[(&str, usize, Vec<usize>)]) {
    print!("\n{:16} {:>12}", "CLIENT", "CONNECTIONS");
    for backend in backends {
        print!("  {:>14}", format!("AT {backend}"));
    }
    println!("  {:>8}", "DENIED");
    for (client, attempts, at) in clients {
        print!("{client:16} {attempts:>12}");
        for count in at {
            print!("  {count:>14}");
        }
        println!("  {:>8}", attempts - at.iter().sum::<usize>());
    }
}

/// What iperf3 has measured.
pub fn throughput(results: &[(&str, &str, Throughput)]) {
    println!("{:16} {:14} {:>12} {:>12}", "PATH", "TO", "GBIT/S", "RETRANSMITS");
    for (what, to, result) in results {
        println!("{what:16} {to:14} {:>12.2} {:>12}", result.gigabits, result.retransmits);
    }
}

/// What stays allowed.
pub fn stays(streams: &[(&str, Throughput)], echoes: &[(&str, Counts)]) {
    println!("What stays allowed, while the policy changes:");
    println!(
        "{:14} {:>12} {:>12} {:>14} {:>10} {:>14}",
        "TO", "TCP GBIT/S", "RETRANSMITS", "UDP ANSWERED", "UDP LOST", "SLOWEST"
    );
    for ((name, stream), (_, echo)) in streams.iter().zip(echoes) {
        println!(
            "{name:14} {:>12.2} {:>12} {:>14} {:>10} {:>11.1} ms",
            stream.gigabits,
            stream.retransmits,
            echo.answered,
            echo.lost,
            echo.slowest.as_secs_f64() * 1000.0
        );
    }
}

/// What was revoked: bytes that had arrived at either end.
pub fn revoked(names: &[&str], before: &[[u64; 2]], after: &[[u64; 2]], later: &[[u64; 2]]) {
    println!("\nWhat was revoked, in bytes received so far (by the sender / by the receiver):");
    println!(
        "{:14} {:>18} {:>18} {:>18}",
        "TO", "BEFORE", "AFTER THE CHANGE", "1 s LATER"
    );
    for (index, name) in names.iter().enumerate() {
        let cell = |bytes: [u64; 2]| format!("{} / {}", bytes[0], bytes[1]);
        println!(
            "{name:14} {:>18} {:>18} {:>18}",
            cell(before[index]),
            cell(after[index]),
            cell(later[index])
        );
    }
}

/// What the nodes' daemons said last.
pub fn logs(cluster: &Cluster) {
    const LINES: usize = 12;
    for node in &cluster.nodes {
        let log = node.log();
        let lines: Vec<&str> = log.lines().collect();
        println!("\n{}, the last of what hostd said:", node.name);
        for line in &lines[lines.len().saturating_sub(LINES)..] {
            println!("  {line}");
        }
    }
}

/// Commands to play with.
pub fn commands(cluster: &Cluster) -> anyhow::Result<()> {
    let hostd = harness::hostd()?;
    step("it is up until Ctrl-C; in another terminal:");
    for node in &cluster.nodes {
        println!("export HOSTD_SOCKET={}   # {}", node.socket().display(), node.name);
    }
    println!();
    for arguments in [
        "status",
        "endpoint list",
        "policy show",
        "service list",
        "monitor",
        "endpoint label --namespace blue --name frontend tenant=red",
    ] {
        println!("{} {arguments}", hostd.display());
    }
    println!(
        "{} load-policy {}",
        hostd.display(),
        harness::policy("web-app")?.display()
    );
    println!();
    let others = cluster.pods.iter().cycle().skip(1);
    for (pod, other) in cluster.pods.iter().zip(others) {
        let (from, to) = (pod.netns.name(), other.address);
        println!(
            "ip netns exec {from} ping -c 1 -W 1 {to}   # {} to {}",
            pod.name, other.name
        );
    }
    Ok(())
}
