//! Many modules: tiers, tenants, changes of the set, and what is shown of them.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use harness::{
    Cluster, Listener, Options, TcpOutcome, kernel_test, tcp_exchange, tcp_open, test_policy, udp_exchange, wait_until,
};
use serde_json::Value;
use std::{fs, os::unix::fs::MetadataExt, time::Duration};

const WAIT: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(20);

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

#[test]
fn admin_before_tenant_before_baseline() {
    kernel_test!();
    let (cluster, _listeners) = two_tenants();
    load(
        &cluster,
        &module("allow-all"),
        &["--name", "open", "--tier", "baseline"],
    );
    assert!(reaches(&cluster, "red/a", "blue/b"));
    // A tenant tier that passes leaves the baseline its word, an admin tier that denies does not.
    load(&cluster, &module("tenant-isolation"), &["--name", "tenants"]);
    assert!(reaches(&cluster, "red/a", "blue/b"));
    let rules = "
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: apart}
spec:
  tier: Admin
  priority: 1
  subject: {namespaces: {matchLabels: {team: red}}}
  egress:
  - {action: Pass, to: [{namespaces: {matchLabels: {team: red}}}]}
  - {action: Deny, to: [{namespaces: {}}]}
";
    let rules = write(&cluster, "admin.yaml", rules);
    let cnp = module("cluster-network-policy");
    load(
        &cluster,
        &cnp,
        &["--name", "cnp", "--tier", "admin", "--config", &rules],
    );
    assert_eq!(names(&cluster), ["cnp", "tenants", "open"]);
    assert!(reaches(&cluster, "red/a", "blue/b"), "no namespace has the label yet");
    cluster.nodes[0]
        .json(&["namespace", "label", "red", "team=red"])
        .unwrap();
    cluster.agree().unwrap();
    for (from, to, expected) in [
        ("red/a", "blue/b", false),
        ("red/b", "blue/a", false),
        ("blue/b", "red/a", true),
        ("red/a", "red/b", true),
    ] {
        assert_eq!(reaches(&cluster, from, to), expected, "{from} -> {to}");
    }
    // Explained with the admin's words, on the node that enforces it.
    let why = cluster.nodes[0]
        .json(&[
            "policy",
            "explain",
            "red/a",
            "blue/b",
            "--protocol",
            "tcp",
            "--port",
            "80",
        ])
        .unwrap();
    assert_eq!(
        (&why["verdict"], &why["agrees"]),
        (&Value::Bool(false), &Value::Bool(true))
    );
    let egress = &why["sides"][0];
    let decides = egress["steps"]
        .as_array()
        .unwrap()
        .iter()
        .find(|step| step["decides"] == true);
    let decides = decides.unwrap();
    assert_eq!(decides["module"], "cnp");
    assert_eq!(decides["reason"], "ClusterNetworkPolicy apart, egress[1]");
    assert_eq!(egress["kernel"]["cell"], "deny");
    assert_eq!(why["sides"][1]["node"], "node2", "the other end is the other node's");
    // Unloaded and put back.
    cluster.nodes[1].json(&["policy", "unload", "cnp"]).unwrap();
    assert!(reaches(&cluster, "red/a", "blue/b"));
    cluster.nodes[0].json(&["policy", "rollback"]).unwrap();
    assert_eq!(names(&cluster), ["cnp", "tenants", "open"]);
    assert!(!reaches(&cluster, "red/a", "blue/b"));
    let earlier = cluster.nodes[0].json(&["policy", "list"]).unwrap()["earlier"].clone();
    let first = earlier.as_array().unwrap().last().unwrap();
    assert_eq!(first["modules"], serde_json::json!(["open"]));
    let serial = first["serial"].to_string();
    cluster.nodes[0].json(&["policy", "rollback", "--to", &serial]).unwrap();
    assert_eq!(names(&cluster), ["open"]);
}

#[test]
fn a_tenants_module_decides_over_its_own_ends_alone() {
    kernel_test!();
    let (cluster, _listeners) = two_tenants();
    let hostile = test_policy("hostile").unwrap().display().to_string();
    load(&cluster, &module("tenant-isolation"), &[]);
    // It says allow to everything, and that all pods are red's.
    let conquer = deed(&cluster, "conquer");
    load(
        &cluster,
        &hostile,
        &["--name", "red", "--tenant", "red", "--config", &conquer],
    );
    let identities = cluster.nodes[0].json(&["endpoint", "list"]).unwrap();
    for pod in identities.as_array().unwrap() {
        let tenant = pod["identity_name"]
            .as_str()
            .unwrap()
            .split('{')
            .next()
            .unwrap()
            .to_owned();
        assert_eq!(pod["pod"]["namespace"], tenant.as_str());
    }
    assert!(!reaches(&cluster, "red/a", "blue/b"), "blue does not let it in");
    assert!(!reaches(&cluster, "blue/a", "red/b"), "blue does not let it out");
    assert!(reaches(&cluster, "blue/a", "blue/b") && reaches(&cluster, "red/a", "red/b"));
    // When blue's own module agrees, both ends do.
    load(
        &cluster,
        &hostile,
        &["--name", "blue", "--tenant", "blue", "--config", &conquer],
    );
    assert!(reaches(&cluster, "red/a", "blue/b") && reaches(&cluster, "blue/a", "red/b"));
    cluster.nodes[0].json(&["policy", "unload", "red"]).unwrap();
    assert!(!reaches(&cluster, "red/a", "blue/b") && !reaches(&cluster, "blue/a", "red/b"));
}

#[test]
fn a_tenants_module_that_fails_harms_nobody_else() {
    kernel_test!();
    let (mut cluster, _listeners) = two_tenants();
    let hostile = test_policy("hostile").unwrap().display().to_string();
    load(&cluster, &module("tenant-isolation"), &["--tier", "baseline"]);
    for name in ["blue/a", "blue/b"] {
        cluster.remove_pod(name).unwrap();
    }
    // Loaded while only red's pods are there, it behaves; then it meets another tenant's.
    for (what, name) in [("foreign trap", "trap"), ("refuse foreign", "refuse")] {
        let config = deed(&cluster, what);
        load(
            &cluster,
            &hostile,
            &["--name", "red", "--tenant", "red", "--config", &config],
        );
        let (one, other) = (format!("{name}/a"), format!("{name}/b"));
        cluster.add_pod(0, &one, &[]).unwrap();
        cluster.add_pod(1, &other, &[]).unwrap();
        cluster.agree().unwrap();
        let _listener = Listener::new(cluster.pod(&other).netns.name(), 80).unwrap();
        assert!(reaches(&cluster, &one, &other), "{what}");
        assert!(reaches(&cluster, "red/a", "red/b"), "{what}");
        // Others go on changing their policy.
        load(&cluster, &module("tenant-isolation"), &["--tier", "baseline"]);
        assert!(reaches(&cluster, &one, &other), "{what}");
        for name in [&one, &other] {
            cluster.remove_pod(name).unwrap();
        }
        cluster.agree().unwrap();
    }
}

#[test]
fn what_is_asked_for_wrongly_is_refused() {
    kernel_test!();
    let (cluster, _listeners) = two_tenants();
    let node = &cluster.nodes[0];
    let file = module("allow-all");
    load(&cluster, &file, &["--name", "taken", "--tier", "admin"]);
    let before = node.json(&["policy", "list"]).unwrap();
    let broken = write(&cluster, "broken", "red never reaches");
    for (arguments, expected) in [
        (
            &["load-policy", &file, "--name", "taken", "--tier", "baseline"][..],
            "the name taken is taken",
        ),
        (&["load-policy", &file, "--name", "Taken"], "--name"),
        (
            &["load-policy", &file, "--tenant", "green"],
            "no pod belongs to the tenant \"green\"",
        ),
        (
            &["load-policy", &file, "--tier", "admin", "--tenant", "red"],
            "--tenant goes with the tier `tenant`",
        ),
        (
            &["load-policy", &file, "--limit", "cores=3"],
            "a limit is one of fuel_per_call",
        ),
        (&["policy", "unload", "nobody"], "no module is named \"nobody\""),
        (&["policy", "inspect", "nobody"], "no module is named \"nobody\""),
        (&["policy", "rollback"], "no earlier policy"),
        (&["policy", "rollback", "--to", "99"], "no policy of change 99"),
        (&["policy", "explain", "red/a", "nobody"], "\"nobody\" is no pod"),
        (
            &["policy", "explain", "red/a", "red/b", "--protocol", "tcp"],
            "tcp needs a port",
        ),
        (&["policy", "explain", "red/a", "4711"], "nobody has identity 4711"),
        (&["policy", "verify", &broken], "line 1"),
        (&["policy", "verify", "/nonexistent"], "/nonexistent"),
        (
            &["namespace", "label", "red", "team-"],
            "namespace red has no label team",
        ),
        (&["namespace", "label", "RED", "a=b"], "namespace \"RED\""),
    ] {
        let refusal = node.refusal(arguments).unwrap();
        assert!(refusal.contains(expected), "{arguments:?}: {refusal}");
    }
    assert_eq!(node.json(&["policy", "list"]).unwrap(), before);
}

#[test]
fn invariants_stop_a_policy_that_breaks_them() {
    kernel_test!();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("invariants");
    fs::write(&file, "tenant red never reaches tenant blue\n").unwrap();
    let options = Options {
        nodes: 1,
        keys: format!("invariants = {:?}", file.display().to_string()),
        ..Options::default()
    };
    let mut cluster = Cluster::with(&options).unwrap();
    for name in ["red/a", "blue/a"] {
        cluster.add_pod(0, name, &[]).unwrap();
    }
    cluster.load("tenant-isolation").unwrap();
    let refusal = cluster.load("allow-all").unwrap_err().to_string();
    assert!(
        refusal
            .contains("`tenant red never reaches tenant blue`: red/a may reach blue/a on tcp, udp, sctp, icmp, icmpv6"),
        "{refusal}"
    );
    // The file is read at each change; what it says can be asked of what is in force, too.
    let asked = write(
        &cluster,
        "asked",
        "tenant red never reaches tenant blue\nhost reaches everything\n",
    );
    let verified = cluster.nodes[0].json(&["policy", "verify", &asked]).unwrap();
    assert_eq!(verified["broken"], serde_json::json!([]));
    fs::write(&file, "").unwrap();
    cluster.load("allow-all").unwrap();
    let output = cluster.nodes[0].hostd(&["policy", "verify", &asked]).unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        text.contains("broken: `tenant red never reaches tenant blue`: red/a may reach blue/a"),
        "{text}"
    );
}

#[test]
fn an_audited_module_enforces_nothing_and_reports_what_it_would_deny() {
    kernel_test!();
    let (cluster, _listeners) = two_tenants();
    load(&cluster, &module("allow-all"), &["--tier", "baseline"]);
    let deny = write(
        &cluster,
        "deny.yaml",
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: closed, namespace: blue}\nspec: {podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}",
    );
    let np = module("network-policy");
    load(&cluster, &np, &["--name", "np", "--audit", "--config", &deny]);
    assert!(reaches(&cluster, "red/a", "blue/b"), "it enforces nothing");
    assert!(reaches(&cluster, "blue/a", "blue/b"));
    let findings = || cluster.nodes[1].json(&["policy", "audit"]).unwrap();
    assert!(
        wait_until(LONG, || findings() != serde_json::json!([])),
        "{}",
        findings()
    );
    let found = findings();
    assert_eq!(found.as_array().unwrap().len(), 1, "{found}");
    let found = &found[0];
    assert_eq!(
        (&found["module"], &found["protocol"], &found["port"]),
        (&"np".into(), &"tcp".into(), &80.into())
    );
    assert!(found["from"].as_str().unwrap().starts_with("red"), "{found}");
    // Enforced, it does.
    load(&cluster, &np, &["--name", "np", "--config", &deny]);
    assert!(
        reaches(&cluster, "red/a", "blue/b"),
        "loaded again, it is audited still"
    );
    load(&cluster, &np, &["--name", "np", "--enforce", "--config", &deny]);
    assert!(!reaches(&cluster, "red/a", "blue/b"));
    assert!(reaches(&cluster, "blue/a", "blue/b"));
}

#[test]
fn a_dry_run_against_flows_names_those_that_would_end() {
    kernel_test!();
    let (cluster, _listeners) = two_tenants();
    load(&cluster, &module("allow-all"), &[]);
    let blue = cluster.pod("blue/b").address;
    let _stream = tcp_open(cluster.pod("red/a").netns.name(), blue, 80, WAIT).unwrap();
    let red = cluster.pod("red/b").address;
    assert!(udp_exchange(cluster.pod("red/a").netns.name(), red, 80, WAIT).unwrap());
    let report = load(
        &cluster,
        &module("tenant-isolation"),
        &["--dry-run", "--against", "flows"],
    );
    let flows = report["flows"].as_array().unwrap();
    assert_eq!(flows.len(), 1, "{report}");
    assert!(flows[0]["from"].as_str().unwrap().starts_with("red/a"));
    assert!(flows[0]["to"].as_str().unwrap().starts_with("blue/b"));
    assert_eq!((&flows[0]["protocol"], &flows[0]["port"]), (&"tcp".into(), &80.into()));
}

#[test]
fn identities_that_nobody_uses_are_collected_and_others_are_not() {
    kernel_test!();
    let options = Options {
        tables: "[vni]\ncollect_seconds = 1".to_owned(),
        ..Options::default()
    };
    let mut cluster = Cluster::with(&options).unwrap();
    cluster.load("web-app").unwrap();
    cluster.add_pod(0, "red/stays", &[("app", "stays")]).unwrap();
    cluster.add_pod(1, "red/goes", &[("app", "goes")]).unwrap();
    cluster.settle().unwrap();
    let listed = |node: usize| -> Vec<String> {
        let all = cluster_identities(&cluster, node);
        all.into_iter().filter(|name| name.starts_with("red")).collect()
    };
    assert_eq!(listed(0).len(), 2);
    let goes = cluster.nodes[1].json(&["endpoint", "list"]).unwrap()[0]["identity"].clone();
    let pod = ["--namespace", "red", "--name", "goes"];
    cluster.nodes[1]
        .json(&[&["endpoint", "label"][..], &pod, &["app=other"]].concat())
        .unwrap();
    let collected = wait_until(LONG, || {
        (0..2).all(|node| !listed(node).contains(&"red{app=goes}".to_owned()))
    });
    assert!(collected, "{:?}", listed(0));
    assert_eq!(listed(1), listed(0));
    assert_eq!(listed(0).len(), 2, "those in use stay: {:?}", listed(0));
    // The same labels get the same number again: it was free.
    cluster.nodes[1]
        .json(&[&["endpoint", "label"][..], &pod, &["app=goes"]].concat())
        .unwrap();
    assert_eq!(
        cluster.nodes[1].json(&["endpoint", "list"]).unwrap()[0]["identity"],
        goes
    );
}

fn cluster_identities(cluster: &Cluster, node: usize) -> Vec<String> {
    let identities = cluster.nodes[node].json(&["identity", "list"]).unwrap();
    let identities = identities.as_array().unwrap().iter();
    identities.map(|one| one["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn an_identity_stays_while_a_node_that_may_hold_it_is_silent() {
    kernel_test!();
    let options = Options {
        tables: "[vni]\ncollect_seconds = 1\n[lease]\nttl_seconds = 1".to_owned(),
        ..Options::default()
    };
    let mut cluster = Cluster::with(&options).unwrap();
    cluster.load("web-app").unwrap();
    cluster.add_pod(0, "red/goes", &[("app", "goes")]).unwrap();
    cluster.settle().unwrap();
    cluster.nodes[1].stop(true).unwrap();
    cluster.nodes[0]
        .json(&["endpoint", "label", "--namespace", "red", "--name", "goes", "app=other"])
        .unwrap();
    std::thread::sleep(Duration::from_secs(5));
    let name = "red{app=goes}".to_owned();
    assert!(
        cluster_identities(&cluster, 0).contains(&name),
        "node2's kernel may hold it"
    );
    cluster.nodes[1].start().unwrap();
    let collected = wait_until(LONG, || !cluster_identities(&cluster, 0).contains(&name));
    assert!(collected, "once all nodes are there");
    // A tenant goes with its last identity, and another may have its number.
    let tenants = || fs::read_dir(cluster.folder().join("store/tenants")).unwrap().count();
    assert_eq!(tenants(), 1);
    let pod = ["endpoint", "delete", "--namespace", "red", "--name", "goes"];
    cluster.nodes[0].json(&pod).unwrap();
    assert!(wait_until(LONG, || tenants() == 0), "{}", tenants());
}

#[test]
fn the_second_load_of_a_module_comes_from_the_cache() {
    kernel_test!();
    let mut cluster = Cluster::with(&Options {
        nodes: 1,
        ..Options::default()
    })
    .unwrap();
    cluster.load("tenant-isolation").unwrap();
    let cache = cluster.folder().join("node1/state/compiled");
    let files = || -> Vec<std::path::PathBuf> {
        let entries = fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<_> = entries
            .filter(|path| path.extension().is_some_and(|end| end == "compiled"))
            .collect();
        files.sort();
        files
    };
    let compiled = files();
    assert_eq!(compiled.len(), 1);
    let whole = fs::read(&compiled[0]).unwrap();
    // A file that was changed is noticed and made anew.
    let mut changed = whole.clone();
    let middle = changed.len() / 2;
    changed[middle] ^= 0x40;
    fs::write(&compiled[0], &changed).unwrap();
    cluster.nodes[0].stop(false).unwrap();
    cluster.nodes[0].start().unwrap();
    assert!(
        cluster.nodes[0].log().contains("torn, foreign or of another hostd"),
        "{}",
        cluster.nodes[0].log()
    );
    assert_eq!(
        fs::read(&compiled[0]).unwrap(),
        whole,
        "compiled anew, to the same bytes"
    );
    // Left alone it is used: were it compiled again, it would be written again.
    let written = fs::metadata(&compiled[0]).unwrap().ino();
    cluster.nodes[0].stop(false).unwrap();
    cluster.nodes[0].start().unwrap();
    cluster.load("tenant-isolation").unwrap();
    assert_eq!(fs::metadata(&compiled[0]).unwrap().ino(), written);
}

#[test]
fn a_module_can_not_flood_the_log() {
    kernel_test!();
    let (cluster, _listeners) = two_tenants();
    let hostile = test_policy("hostile").unwrap().display().to_string();
    let flood = deed(&cluster, "flood");
    load(&cluster, &hostile, &["--config", &flood]);
    let log = cluster.nodes[0].log();
    let lines = log.lines().filter(|line| line.contains("flood")).count();
    assert!((1..200).contains(&lines), "{lines} lines");
}

#[test]
fn limits_of_one_module_are_its_own() {
    kernel_test!();
    let (cluster, _listeners) = two_tenants();
    let file = module("tenant-isolation");
    let refusal = cluster.nodes[0]
        .refusal(&["load-policy", &file, "--limit", "fuel_per_call=1000"])
        .unwrap();
    assert!(refusal.contains("used up its fuel of 1000"), "{refusal}");
    load(
        &cluster,
        &file,
        &["--limit", "memory_mib=8", "--limit", "evaluate_ms=500"],
    );
    let inspected = cluster.nodes[1].json(&["policy", "inspect", "default"]).unwrap();
    assert_eq!(inspected["limits"][1], 500);
    assert_eq!(inspected["limits"][2], 8 << 20);
}

#[test]
fn what_a_tenants_module_may_take_of_others_room_is_bounded() {
    kernel_test!();
    let mut cluster = Cluster::with(&Options {
        nodes: 1,
        ..Options::default()
    })
    .unwrap();
    cluster.add_pod(0, "red/a", &[]).unwrap();
    load(&cluster, &module("tenant-isolation"), &[]);
    let hostile = test_policy("hostile").unwrap().display().to_string();
    for (what, expected) in [
        ("scattered ports", "a tenant's module may have 256 and 2048"),
        ("many tenants blocks", "a tenant's module may name 64 of them"),
    ] {
        let config = deed(&cluster, what);
        let arguments = [
            "load-policy",
            &hostile,
            "--name",
            "red",
            "--tenant",
            "red",
            "--config",
            &config,
        ];
        let refusal = cluster.nodes[0].refusal(&arguments).unwrap();
        assert!(refusal.contains(expected), "{what}: {refusal}");
    }
    // Every pod an identity of its own: of its own pods it may, of others' it is not asked.
    let explode = deed(&cluster, "explode");
    load(
        &cluster,
        &hostile,
        &["--name", "red", "--tenant", "red", "--config", &explode],
    );
    for number in 0..5 {
        cluster.add_pod(0, &format!("blue/pod-{number}"), &[]).unwrap();
        cluster.add_pod(0, &format!("red/pod-{number}"), &[]).unwrap();
    }
    let count = |tenant: &str| {
        let identities = cluster_identities(&cluster, 0).into_iter();
        identities.filter(|name| name.starts_with(tenant)).count()
    };
    assert_eq!(
        (count("blue"), count("red")),
        (1, 7),
        "red's five, its first with and without a class"
    );
}
