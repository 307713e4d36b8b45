//! What the demo is played with.

use super::Interrupted;
use anyhow::{Context, ensure};
use harness::{Cluster, Namespace, Pod};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    net::IpAddr,
    process::{Child, Stdio},
    time::Duration,
};

/// Who sends, in all that is measured.
pub const SENDER: &str = "red/frontend";
/// Pods of the sender's tenant that stand behind its service.
pub const BACKENDS: [&str; 2] = [NEAR, FAR];
/// A pod of the sender's tenant on its node.
pub const NEAR: &str = "red/backend";
/// A pod of the sender's tenant on the other node.
pub const FAR: &str = "red/db";
/// A pod of another tenant on the sender's node.
pub const STRANGER: &str = "blue/frontend";
/// A pod of another tenant on the other node.
pub const ACROSS: &str = "blue/backend";

const SHARED: &str = "shared-services";

/// Two nodes and their pods.
pub fn build(interrupted: &Interrupted) -> anyhow::Result<Cluster> {
    let mut cluster = Cluster::new()?;
    for (node, name) in [
        (0, SENDER),
        (0, NEAR),
        (0, STRANGER),
        (0, "shared-services/dns"),
        (1, FAR),
        (1, ACROSS),
        (1, "blue/db"),
    ] {
        interrupted.check()?;
        let app = name.split('/').nth(1).unwrap_or(name);
        let tier = if app == "frontend" { "front" } else { "back" };
        cluster.add_pod(node, name, &[("app", app), ("tier", tier)])?;
    }
    cluster.settle()?;
    Ok(cluster)
}

/// Path of a policy's module.
pub fn policy(name: &str) -> anyhow::Result<String> {
    Ok(harness::policy(name)?.display().to_string())
}

/// What tenant-isolation allows.
pub fn isolated(from: &str, to: &str) -> bool {
    let tenant = |pod: &str| pod.split('/').next().unwrap_or(pod).to_owned();
    tenant(from) == tenant(to) || tenant(to) == SHARED
}

/// Name and identity of every pod, by address.
pub fn identities(cluster: &Cluster) -> anyhow::Result<BTreeMap<IpAddr, (String, u32)>> {
    let listed = cluster.nodes[0].json(&["ipcache", "list"])?;
    let entries = listed.as_array().context("no ipcache")?;
    entries
        .iter()
        .map(|entry| {
            let text = |key: &str| entry[key].as_str().context("an ipcache entry");
            let identity = u32::try_from(entry["identity"].as_u64().context("an identity")?)?;
            Ok((text("address")?.parse()?, (text("name")?.to_owned(), identity)))
        })
        .collect()
}

/// iperf3 that is running.
pub struct Iperf {
    server: Child,
    client: Child,
}

/// What it has measured.
pub struct Throughput {
    pub gigabits: f64,
    pub retransmits: u64,
}

/// Where iperf3 runs.
#[derive(Clone, Copy)]
pub struct End<'a> {
    netns: &'a Namespace,
    address: IpAddr,
}

impl<'a> From<&'a Pod> for End<'a> {
    fn from(pod: &'a Pod) -> Self {
        Self {
            netns: &pod.netns,
            address: pod.address,
        }
    }
}

/// The same measurement between two namespaces that a veth pair joins, and nothing else.
pub fn bare_pair(seconds: u32) -> anyhow::Result<Throughput> {
    let (one, other) = (Namespace::new("bare")?, Namespace::new("bare")?);
    let (here, there) = (one.name(), other.name());
    let pair = [
        "link", "add", "eth0", "netns", here, "type", "veth", "peer", "name", "eth0", "netns", there,
    ];
    harness::run("ip", &pair)?;
    let end = |netns, address: &str| -> anyhow::Result<End> {
        Namespace::ip(netns, &["addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
        Namespace::ip(netns, &["link", "set", "eth0", "mtu", "1450", "up"])?;
        Ok(End {
            netns,
            address: address.parse()?,
        })
    };
    // TEST-NET-2 (RFC 5737).
    iperf3(end(&one, "198.51.100.1")?, end(&other, "198.51.100.2")?, seconds)?.finish()
}

/// Starts iperf3 from one end to another.
pub fn iperf3(from: End, to: End, seconds: u32) -> anyhow::Result<Iperf> {
    let server = to
        .netns
        .command("iperf3")
        .args(["--server", "--one-off"])
        .stdout(Stdio::null())
        .spawn()
        .context("iperf3")?;
    let listening = harness::wait_until(Duration::from_secs(5), || {
        let sockets = to.netns.command("ss").args(["-Hltn", "sport = :5201"]).output();
        sockets.is_ok_and(|sockets| !sockets.stdout.is_empty())
    });
    ensure!(listening, "iperf3 does not listen in {}", to.netns.name());
    let client = from
        .netns
        .command("iperf3")
        .args([
            "--json",
            "--time",
            &seconds.to_string(),
            "--client",
            &to.address.to_string(),
        ])
        .stdout(Stdio::piped())
        .spawn()?;
    Ok(Iperf { server, client })
}

impl Iperf {
    /// Waits for the end.
    pub fn finish(mut self) -> anyhow::Result<Throughput> {
        let mut output = Vec::new();
        if let Some(stdout) = &mut self.client.stdout {
            std::io::Read::read_to_end(stdout, &mut output)?;
        }
        let status = self.client.wait()?;
        ensure!(status.success(), "iperf3 failed: {}", String::from_utf8_lossy(&output));
        let report: Value = serde_json::from_slice(&output)?;
        let sent = &report["end"]["sum_sent"];
        let received = &report["end"]["sum_received"]["bits_per_second"];
        Ok(Throughput {
            gigabits: received.as_f64().context("iperf3 names no throughput")? / 1e9,
            retransmits: sent["retransmits"].as_u64().context("iperf3 names no retransmits")?,
        })
    }
}

impl Drop for Iperf {
    fn drop(&mut self) {
        for child in [&mut self.client, &mut self.server] {
            // It may have ended already.
            let _ = child.kill();
            if let Err(error) = child.wait() {
                eprintln!("ending iperf3: {error}");
            }
        }
    }
}
