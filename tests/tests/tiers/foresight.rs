//! Known before: invariants, audited modules, dry runs.

use crate::{LONG, WAIT, load, module, reaches, two_tenants, write};
use abi::policy::CELL_ALLOW;
use harness::{Cluster, Options, kernel_test, run, tcp_open, udp_exchange, wait_until};
use serde_json::json;
use std::fs;

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
fn what_is_explained_is_what_the_kernel_holds() {
    kernel_test!();
    let (cluster, _listeners) = two_tenants();
    load(&cluster, &module("tenant-isolation"), &[]);
    let explain = |node: usize| {
        let question = [
            "policy",
            "explain",
            "red/a",
            "blue/a",
            "--protocol",
            "tcp",
            "--port",
            "80",
        ];
        cluster.nodes[node].json(&question).unwrap()
    };
    for node in 0..2 {
        let why = explain(node);
        assert_eq!(
            (&why["verdict"], &why["agrees"]),
            (&json!(false), &json!(true)),
            "node {node}"
        );
    }
    // Behind hostd's back: both ends of red/a and blue/a are on the first node, which alone can see it.
    let maps = cluster.nodes[0].bpffs().join("maps");
    for side in explain(0)["sides"].as_array().unwrap() {
        let kernel = &side["kernel"];
        let pin = maps.join(kernel["map"].as_str().unwrap()).display().to_string();
        let index = kernel["index"].as_u64().unwrap();
        // Four cells of 16 bits are one value of the array.
        let word = (index / 4).to_le_bytes()[..4]
            .iter()
            .map(u8::to_string)
            .collect::<Vec<_>>();
        let allow_all = [CELL_ALLOW; 4]
            .iter()
            .flat_map(|cell| cell.to_le_bytes())
            .map(|byte| byte.to_string());
        let mut arguments = vec![
            "map".to_owned(),
            "update".to_owned(),
            "pinned".to_owned(),
            pin,
            "key".to_owned(),
        ];
        arguments.extend(word);
        arguments.push("value".to_owned());
        arguments.extend(allow_all);
        run("bpftool", &arguments.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    }
    assert!(reaches(&cluster, "red/a", "blue/a"));
    let why = explain(0);
    assert_eq!((&why["verdict"], &why["agrees"]), (&json!(true), &json!(false)));
}
