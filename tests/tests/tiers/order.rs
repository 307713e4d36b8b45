//! Tiers and tenants: who is asked first, and over whom a module decides.

use crate::{deed, load, module, names, reaches, two_tenants, write};
use harness::{Listener, kernel_test, test_policy};
use serde_json::Value;

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
