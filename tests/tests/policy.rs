//! Policies on live nodes: who reaches whom, what is on the wire, and what a change does to traffic.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use harness::{
    Capture, Cluster, Listener, Options, TcpOutcome, Traffic, kernel_test, tcp_exchange, tcp_open, udp_exchange,
    wait_until,
};
use hostd::store::{
    Collection, Expect, FileStore, Key,
    records::{self, ModuleRecord, POLICY, Phase, PolicyRecord, Revision},
};
use std::{collections::BTreeMap, time::Duration};

const WAIT: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(90);

/// Pods of two tenants on two nodes, each listening on these ports.
fn two_tenants(ports: &[u16]) -> (Cluster, Vec<Listener>) {
    let mut cluster = Cluster::new().unwrap();
    for (node, name, app) in [
        (0, "red/frontend", "frontend"),
        (0, "red/backend", "backend"),
        (1, "red/db", "db"),
        (0, "blue/frontend", "frontend"),
        (1, "blue/backend", "backend"),
        (1, "shared-services/dns", "dns"),
    ] {
        cluster.add_pod(node, name, &[("app", app)]).unwrap();
    }
    cluster.settle().unwrap();
    let listeners = cluster
        .pods
        .iter()
        .flat_map(|pod| ports.iter().map(|port| Listener::new(pod.netns.name(), *port).unwrap()))
        .collect();
    (cluster, listeners)
}

/// Who reaches whom at a port, by TCP.
fn reachable(cluster: &Cluster, port: u16) -> Vec<(String, String)> {
    let reach = harness::reachable(cluster, port, WAIT).unwrap();
    reach
        .into_iter()
        .filter(|(_, reach)| reach.tcp)
        .map(|(pair, _)| pair)
        .collect()
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut pairs: Vec<_> = pairs
        .iter()
        .map(|(from, to)| ((*from).to_owned(), (*to).to_owned()))
        .collect();
    pairs.sort();
    pairs
}

const DNS: &str = "shared-services/dns";

fn within_tenants() -> Vec<(String, String)> {
    let red = ["red/frontend", "red/backend", "red/db"];
    let blue = ["blue/frontend", "blue/backend"];
    let mut expected = Vec::new();
    for tenant in [&red[..], &blue] {
        for from in tenant {
            expected.push((*from, DNS));
            expected.extend(tenant.iter().filter(|to| *to != from).map(|to| (*from, *to)));
        }
    }
    pairs(&expected)
}

#[test]
fn exactly_the_allowed_pairs_talk() {
    kernel_test!();
    let (cluster, _listeners) = two_tenants(&[53, 5432, 8080]);
    assert_eq!(reachable(&cluster, 8080), [], "before any policy");

    cluster.load("tenant-isolation").unwrap();
    assert_eq!(reachable(&cluster, 8080), within_tenants());

    cluster.load("web-app").unwrap();
    let to_backend = [("red/frontend", "red/backend"), ("blue/frontend", "blue/backend")];
    assert_eq!(reachable(&cluster, 8080), pairs(&to_backend));
    assert_eq!(reachable(&cluster, 5432), pairs(&[("red/backend", "red/db")]));
    let others = cluster.pods.iter().filter(|pod| pod.name != DNS);
    let to_dns: Vec<_> = others.map(|pod| (pod.name.as_str(), DNS)).collect();
    assert_eq!(reachable(&cluster, 53), pairs(&to_dns));
    let dns = cluster.pod(DNS);
    for pod in cluster.pods.iter().filter(|pod| pod.name != DNS) {
        assert!(
            udp_exchange(pod.netns.name(), dns.address, 53, WAIT).unwrap(),
            "{}: DNS by UDP",
            pod.name
        );
    }

    cluster.load("allow-all").unwrap();
    assert_eq!(reachable(&cluster, 8080).len(), 30);
}

#[test]
fn the_node_reaches_its_own_pods_under_every_policy_that_does_not_forbid_it() {
    kernel_test!();
    let (cluster, _listeners) = two_tenants(&[8080]);
    let from_the_node = || {
        for pod in &cluster.pods {
            let node = &cluster.nodes[pod.node];
            let outcome = tcp_exchange(node.netns.name(), pod.address, 8080, WAIT).unwrap();
            assert_eq!(outcome, TcpOutcome::Open, "{} -> {}", node.name, pod.name);
        }
    };
    from_the_node();
    cluster.load("web-app").unwrap();
    from_the_node();
    // The other way only where policy says so.
    let node = &cluster.nodes[0];
    let _host = Listener::new(node.netns.name(), 9000).unwrap();
    let to_the_node = || tcp_exchange(cluster.pod("red/frontend").netns.name(), node.underlay, 9000, WAIT).unwrap();
    assert_eq!(to_the_node(), TcpOutcome::Silence);
    cluster.load("allow-all").unwrap();
    assert_eq!(to_the_node(), TcpOutcome::Open);
}

#[test]
fn each_vni_on_the_wire_is_the_senders_identity_on_every_node() {
    kernel_test!();
    let (cluster, _listeners) = two_tenants(&[8080]);
    cluster.load("tenant-isolation").unwrap();
    let identities = |node: usize| -> BTreeMap<String, u64> {
        let entries = cluster.nodes[node].json(&["ipcache", "list"]).unwrap();
        let entries = entries.as_array().unwrap().iter();
        entries
            .map(|entry| {
                (
                    entry["address"].as_str().unwrap().to_owned(),
                    entry["identity"].as_u64().unwrap(),
                )
            })
            .filter(|(address, _)| address.starts_with("10."))
            .collect()
    };
    assert_eq!(identities(0), identities(1));
    let capture = Capture::start(&cluster.nodes[0].netns, "underlay").unwrap();
    assert_eq!(reachable(&cluster, 8080), within_tenants());
    let packets = capture.stop().unwrap();
    let by_address = identities(0);
    for packet in &packets {
        assert_eq!(
            u64::from(packet.vni),
            by_address[&packet.source.to_string()],
            "{packet:?}"
        );
    }
    let senders: std::collections::BTreeSet<_> = packets.iter().map(|packet| packet.source).collect();
    assert_eq!(
        senders.len(),
        6,
        "every pod has a partner on the other node: {senders:?}"
    );
}

#[test]
fn a_change_ends_what_is_revoked_and_loses_nothing_of_what_stays() {
    kernel_test!();
    let (cluster, _listeners) = two_tenants(&[8080]);
    cluster.load("allow-all").unwrap();
    let pod = |name: &str| cluster.pod(name);
    let mut revoked = Vec::new();
    for to in ["blue/frontend", "blue/backend"] {
        let stream = tcp_open(pod("red/frontend").netns.name(), pod(to).address, 8080, WAIT).unwrap();
        revoked.push((to, stream));
    }
    for (to, stream) in &mut revoked {
        assert!(stream.exchange(WAIT).unwrap(), "to {to} while it is allowed");
    }
    let stays: Vec<Traffic> = ["red/backend", "red/db", DNS]
        .iter()
        .map(|to| {
            Traffic::start(
                pod("red/frontend").netns.name(),
                pod(to).address,
                8080,
                Duration::from_secs(1),
            )
        })
        .collect();
    for policy in ["tenant-isolation", "allow-all", "tenant-isolation"] {
        std::thread::sleep(Duration::from_millis(200));
        cluster.load(policy).unwrap();
    }
    std::thread::sleep(Duration::from_millis(200));
    for traffic in stays {
        let counts = traffic.stop().unwrap();
        assert!(counts.answered > 100, "{counts:?}");
        assert_eq!(counts.lost, 0, "{counts:?}");
    }
    for (to, stream) in &mut revoked {
        assert!(!stream.exchange(WAIT).unwrap(), "to {to} after it was revoked");
    }
}

#[test]
fn a_dry_run_says_what_would_change_and_touches_nothing() {
    kernel_test!();
    let (cluster, _listeners) = two_tenants(&[8080]);
    cluster.load("tenant-isolation").unwrap();
    let node = &cluster.nodes[0];
    let store = || -> Vec<String> {
        let listed = harness::run("find", &[&cluster.folder().join("store").display().to_string()]).unwrap();
        listed.lines().map(str::to_owned).collect()
    };
    let before = (node.json(&["policy", "show"]).unwrap(), store());
    let file = harness::policy("web-app").unwrap().display().to_string();
    let report = node.json(&["load-policy", &file, "--dry-run"]).unwrap();
    let changed = report["changed"].as_array().unwrap();
    let find = |from: &str, to: &str| changed.iter().find(|pair| pair["from"] == from && pair["to"] == to);
    let to_backend = find("red{app=frontend}", "red{app=backend}").expect("the frontend keeps one port only");
    assert_eq!(to_backend["before"], "allow");
    assert_eq!(to_backend["after"], "allow tcp/8080");
    assert_eq!(
        find("red{app=frontend}", "red{app=db}").expect("it loses the database")["after"],
        "deny"
    );
    assert!(
        find("red{app=frontend}", "blue{app=backend}").is_none(),
        "denied before and after"
    );
    let after = (node.json(&["policy", "show"]).unwrap(), store());
    assert_eq!(before, after);
    // The load itself counts the same changes.
    let loaded = cluster.load("web-app").unwrap();
    assert_eq!(loaded["changed"].as_array().unwrap().len(), changed.len());
    assert_eq!(loaded["nodes"].as_array().unwrap().len(), 2);
    let again = cluster.load("web-app").unwrap();
    assert_eq!(again["changed"], serde_json::json!([]));
}

#[test]
fn where_one_node_refuses_no_node_changes() {
    kernel_test!();
    let options = Options {
        // Room for two identities on a node.
        tables: "[maps]\nlocal_identities = 2".to_owned(),
        ..Options::default()
    };
    let mut cluster = Cluster::with(&options).unwrap();
    for name in ["a/pod", "b/pod", "c/pod"] {
        cluster.add_pod(1, name, &[]).unwrap();
    }
    cluster.settle().unwrap();
    let error = cluster.load("tenant-isolation").unwrap_err().to_string();
    assert!(
        error.contains("no node has changed its policy: node node2 refuses"),
        "{error}"
    );
    assert!(
        error.contains("3 identities on this node, but `maps.local_identities` allows 2"),
        "{error}"
    );
    for node in &cluster.nodes {
        assert_eq!(node.json(&["status"]).unwrap()["modules"], serde_json::json!([]));
    }
    // With one pod less it fits.
    cluster.nodes[1]
        .json(&["endpoint", "delete", "--namespace", "c", "--name", "pod"])
        .unwrap();
    cluster.load("tenant-isolation").unwrap();
    // A pod that would be one identity too many is refused, and leaves nothing.
    let error = cluster.add_pod(1, "d/pod", &[]).unwrap_err().to_string();
    assert!(error.contains("`maps.local_identities` allows 2"), "{error}");
    assert_eq!(
        cluster.nodes[1]
            .json(&["endpoint", "list"])
            .unwrap()
            .as_array()
            .unwrap()
            .len(),
        2
    );
}

#[test]
fn a_node_that_is_down_holds_a_load_up_unless_it_may_be_skipped() {
    kernel_test!();
    let options = Options {
        tables: "[lease]\nttl_seconds = 1\nload_seconds = 6".to_owned(),
        ..Options::default()
    };
    let mut cluster = Cluster::with(&options).unwrap();
    cluster.add_pod(0, "red/a", &[]).unwrap();
    cluster.add_pod(1, "red/b", &[]).unwrap();
    cluster.settle().unwrap();
    cluster.nodes[1].stop(true).unwrap();
    let stale = wait_until(LONG, || {
        let status = cluster.nodes[0].json(&["status"]).unwrap();
        status["nodes"][1]["state"] == "stale"
    });
    assert!(stale, "its lease expires");
    let error = cluster.load("allow-all").unwrap_err().to_string();
    assert!(error.contains("node node2 does not answer"), "{error}");
    assert!(error.contains("--skip-unreachable"), "{error}");

    let file = harness::policy("allow-all").unwrap().display().to_string();
    let output = cluster.nodes[0]
        .hostd(&["--json", "load-policy", &file, "--skip-unreachable"])
        .unwrap();
    assert!(!output.status.success(), "it says that a node was left out");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["nodes"][0]["result"]["Ok"].is_object());
    assert!(
        report["nodes"][1]["result"]["Err"]
            .as_str()
            .unwrap()
            .contains("skipped")
    );

    cluster.nodes[1].start().unwrap();
    let status = cluster.nodes[1].json(&["status"]).unwrap();
    assert_eq!(
        status["modules"][0]["file"], "allow-all",
        "back, it enforces what the cluster does"
    );
    let (a, b) = (cluster.pod("red/a"), cluster.pod("red/b"));
    let _listener = Listener::new(b.netns.name(), 80).unwrap();
    assert_eq!(
        tcp_exchange(a.netns.name(), b.address, 80, WAIT).unwrap(),
        TcpOutcome::Open
    );
}

/// The same modules, as if from other files.
fn renamed(revision: &Revision, serial: u64, file: &str) -> Revision {
    let rename = |module: &ModuleRecord| ModuleRecord {
        file: file.to_owned(),
        ..module.clone()
    };
    Revision {
        serial,
        origin: serial,
        modules: revision.modules.iter().map(rename).collect(),
        ..revision.clone()
    }
}

#[test]
fn a_load_that_its_coordinator_left_unfinished_is_finished_by_others() {
    kernel_test!();
    let options = Options {
        tables: "[lease]\nload_seconds = 6".to_owned(),
        ..Options::default()
    };
    let mut cluster = Cluster::with(&options).unwrap();
    cluster.add_pod(0, "red/a", &[]).unwrap();
    cluster.add_pod(1, "blue/b", &[]).unwrap();
    cluster.settle().unwrap();
    cluster.load("tenant-isolation").unwrap();
    let store = FileStore::open(&cluster.folder().join("store")).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let key = Key::new(Collection::Policy, POLICY);
    let record = || {
        runtime
            .block_on(records::get::<PolicyRecord>(&store, &key))
            .unwrap()
            .unwrap()
    };
    let in_force = |node: usize| cluster.nodes[node].json(&["status"]).unwrap()["modules"][0]["file"].clone();

    // As if a coordinator had died: before its commit the load is aborted, after it is retired. What is loaded is the
    // same module under another name.
    for (left_in, ends_in, name) in [
        (Phase::Prepare, Phase::Aborted, "tenant-isolation"),
        (Phase::Commit, Phase::Retired, "renamed"),
    ] {
        let (last, revision) = record();
        let load = PolicyRecord {
            phase: left_in,
            next: renamed(&last.next, last.serial() + 1, "renamed"),
            previous: last.in_force().clone(),
            history: Vec::new(),
            coordinator: "gone".to_owned(),
            deadline_ms: 0,
        };
        let put = records::put(&store, &key, &load, Expect::Revision(revision));
        runtime.block_on(put).unwrap();
        // Others wait longer than a coordinator that is there would take.
        assert!(wait_until(2 * LONG, || record().0.phase == ends_in), "{:?}", record());
        assert!(
            wait_until(LONG, || (0..2).all(|node| in_force(node) == name)),
            "{left_in:?}"
        );
    }

    // A node that saw only the last of several states of the record enforces what came before it all the same.
    let (last, revision) = record();
    let load = PolicyRecord {
        phase: Phase::Aborted,
        next: renamed(&last.next, last.serial() + 2, "aborted"),
        previous: renamed(&last.next, last.serial() + 1, "skipped"),
        ..last
    };
    runtime
        .block_on(records::put(&store, &key, &load, Expect::Revision(revision)))
        .unwrap();
    assert!(wait_until(LONG, || (0..2).all(|node| in_force(node) == "skipped")));
    cluster.load("allow-all").unwrap();
    assert_eq!(in_force(1), "allow-all");
}
