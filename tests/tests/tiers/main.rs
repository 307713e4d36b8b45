//! Many modules: tiers, tenants, changes of the set, what is shown of them, and what they may use.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

mod collection;
mod foresight;
mod order;
mod sandbox;

use harness::{Cluster, Listener, TcpOutcome, tcp_exchange};
use serde_json::Value;
use std::{fs, time::Duration};

const WAIT: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(90);

/// Pods of two tenants on two nodes, all listening on port 80.
fn two_tenants() -> (Cluster, Vec<Listener>) {
    let mut cluster = Cluster::new().unwrap();
    for (node, name) in [(0, "red/a"), (1, "red/b"), (0, "blue/a"), (1, "blue/b")] {
        cluster.add_pod(node, name, &[]).unwrap();
    }
    cluster.settle().unwrap();
    let listeners = cluster
        .pods
        .iter()
        .map(|pod| Listener::new(pod.netns.name(), 80).unwrap())
        .collect();
    (cluster, listeners)
}

fn reaches(cluster: &Cluster, from: &str, to: &str) -> bool {
    let outcome = tcp_exchange(cluster.pod(from).netns.name(), cluster.pod(to).address, 80, WAIT).unwrap();
    assert_ne!(outcome, TcpOutcome::Refused, "{from} -> {to}");
    outcome == TcpOutcome::Open
}

fn module(name: &str) -> String {
    harness::policy(name).unwrap().display().to_string()
}

fn load(cluster: &Cluster, file: &str, more: &[&str]) -> Value {
    let arguments = [&["load-policy", file], more].concat();
    cluster.nodes[0].json(&arguments).unwrap()
}

/// A configuration of the hostile module.
fn deed(cluster: &Cluster, deed: &str) -> String {
    let path = cluster.folder().join(format!("{}.json", deed.replace(' ', "-")));
    fs::write(&path, format!("{deed:?}")).unwrap();
    path.display().to_string()
}

fn write(cluster: &Cluster, name: &str, text: &str) -> String {
    let path = cluster.folder().join(name);
    fs::write(&path, text).unwrap();
    path.display().to_string()
}

fn names(cluster: &Cluster) -> Vec<String> {
    let list = cluster.nodes[1].json(&["policy", "list"]).unwrap();
    let modules = list["modules"].as_array().unwrap().iter();
    modules
        .map(|module| module["placement"]["name"].as_str().unwrap().to_owned())
        .collect()
}

fn cluster_identities(cluster: &Cluster, node: usize) -> Vec<String> {
    let identities = cluster.nodes[node].json(&["identity", "list"]).unwrap();
    let identities = identities.as_array().unwrap().iter();
    identities.map(|one| one["name"].as_str().unwrap().to_owned()).collect()
}
