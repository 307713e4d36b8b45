//! Modules that are no modules, that want what they may not have, or that misbehave: each is refused with what is wrong
//! and where, within two seconds, the policy in force is untouched, and hostd goes on.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use harness::{Cluster, Listener, Options, TcpOutcome, kernel_test, tcp_exchange, test_policy};
use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const WAIT: Duration = Duration::from_millis(500);

/// A module has to be refused within this time, however busy the machine is: the limits say how long it takes.
const REFUSED_WITHIN: Duration = Duration::from_secs(20);

fn one_node() -> Cluster {
    let options = Options {
        nodes: 1,
        tables: "[wasm]\ncompile_seconds = 1\nevaluate_ms = 15000".to_owned(),
        ..Options::default()
    };
    let mut cluster = Cluster::with(&options).unwrap();
    cluster.add_pod(0, "red/a", &[]).unwrap();
    cluster.add_pod(0, "red/b", &[]).unwrap();
    cluster
}

/// Loads each module, expects its refusal, and checks that nothing has changed.
fn all_refused(cluster: &Cluster, modules: &[(PathBuf, Option<&str>, &str)]) {
    let node = &cluster.nodes[0];
    cluster.load("tenant-isolation").unwrap();
    let policy = node.json(&["policy", "show"]).unwrap();
    let mut wrong = Vec::new();
    for (file, deed, expected) in modules {
        let file = file.display().to_string();
        let config = cluster.folder().join("deed.json");
        fs::write(&config, format!("{:?}", deed.unwrap_or_default())).unwrap();
        let config = config.display().to_string();
        let mut arguments = vec!["load-policy", &file];
        if deed.is_some() {
            arguments.extend(["--config", &config]);
        }
        for dry_run in [true, false] {
            let mut arguments = arguments.clone();
            if dry_run {
                arguments.push("--dry-run");
            }
            let began = Instant::now();
            let refusal = node.refusal(&arguments).unwrap();
            let took = began.elapsed();
            if !refusal.contains(expected) || took > REFUSED_WITHIN {
                wrong.push(format!("{deed:?} {file} after {took:?}: {refusal}"));
            }
        }
        assert_eq!(node.json(&["policy", "show"]).unwrap(), policy, "{deed:?} {file}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let _listener = Listener::new(cluster.pod("red/b").netns.name(), 80).unwrap();
    let open = tcp_exchange(
        cluster.pod("red/a").netns.name(),
        cluster.pod("red/b").address,
        80,
        WAIT,
    )
    .unwrap();
    assert_eq!(open, TcpOutcome::Open, "the policy in force still lets its pairs talk");
}

#[test]
fn files_that_are_no_policy_modules() {
    kernel_test!();
    let cluster = one_node();
    let write = |name: &str, bytes: &[u8]| -> PathBuf {
        let path = cluster.folder().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let component = |name: &str, text: &str| write(name, &wat::parse_str(text).unwrap());
    let modules = [
        (write("empty", b""), None, "no WebAssembly"),
        (write("text", b"apiVersion: v1"), None, "no WebAssembly"),
        (write("torn", b"\0asm\x0d\0\x01\0rest"), None, "not a policy module"),
        (component("core", "(module)"), None, "does not export"),
        (
            component("nothing", "(component)"),
            None,
            "does not export `wasmgate:policy/policy@0.2.0`",
        ),
        (
            component(
                "other",
                r#"(component (instance $i) (export "wasmgate:policy/policy@9.0.0" (instance $i)))"#,
            ),
            None,
            "exports `wasmgate:policy/policy@9.0.0`; this hostd speaks `wasmgate:policy/policy@0.2.0`",
        ),
        (
            component(
                "wasi",
                r#"(component (import "wasi:clocks/monotonic-clock@0.2.0" (instance)))"#,
            ),
            None,
            "imports `wasi:clocks/monotonic-clock@0.2.0`",
        ),
        (
            component(
                "preview1",
                r#"(module (import "wasi_snapshot_preview1" "fd_write" (func)))"#,
            ),
            None,
            "wasi_snapshot_preview1",
        ),
        (
            component(
                "hollow",
                r#"(component (instance $i) (export "wasmgate:policy/policy@0.2.0" (instance $i)))"#,
            ),
            None,
            "starting the module",
        ),
        (
            write("slow", &slow_to_compile()),
            None,
            "takes longer than 1 s to compile",
        ),
        (
            write("large", &vec![0; (16 << 20) + 1]),
            None,
            "`wasm.max_module_bytes` allows 16777216",
        ),
        (PathBuf::from("/nonexistent.wasm"), None, "/nonexistent.wasm"),
    ];
    all_refused(&cluster, &modules);
}

/// A component around a core module whose one function has very many branches: small, and slow to compile.
fn slow_to_compile() -> Vec<u8> {
    let mut body = String::new();
    for n in 0..60_000 {
        let _ = write!(
            body,
            "(if (i32.eq (local.get 0) (i32.const {n})) (then (local.set 0 (i32.mul (local.get 0) (local.get 1)))))"
        );
    }
    let function = format!("(func (param i32 i32) (result i32) {body} (local.get 0))");
    wat::parse_str(format!("(component (core module {}))", function.repeat(4))).unwrap()
}

#[test]
fn modules_that_misbehave() {
    kernel_test!();
    let cluster = one_node();
    let hostile = test_policy("hostile").unwrap();
    let deeds = [
        ("configure loop", "configure: the module used up its fuel"),
        ("configure trap", "configure: the module trapped"),
        ("refuse", "refuses its configuration: the moon is in the wrong phase"),
        ("identify loop", "identify(2 pods): the module used up its fuel"),
        (
            "identify trap",
            "identify(red/a): the module trapped: wasm `unreachable`",
        ),
        ("identify memory", "wants more memory than `wasm.memory_mib` allows"),
        ("identify stack", "identify(red/a): the module trapped"),
        ("learn loop", "learn: the module used up its fuel"),
        ("decide loop", "used up its fuel"),
        ("decide trap", "decide(1 subjects"),
        (
            "refuse pod",
            "identify(red/a): the module can't identify the pod: a is not welcome",
        ),
        ("long tenant", "the tenant has 64 bytes; at most 63 are allowed"),
        ("no tenant", "the tenant is empty"),
        ("huge tenant", "identify("),
        ("many labels", "65 labels; at most 64 are allowed"),
        ("same label", "the same label twice"),
        ("control", "control character"),
        ("index", "index 1 into a table of 1 decisions"),
        ("short row", "cells where"),
        ("many rules", "16385 rules in one decision; at most 16384 are allowed"),
        ("long reason", "a reason of 513 bytes; at most 512 are allowed"),
        (
            "scattered ports",
            "breakpoints of sets of ports, but `maps.breakpoints` allows 16384",
        ),
        ("few classes", "0 classes where"),
        ("no cidr", "network a: \"10.0.0.0/33\", which is no CIDR"),
        (
            "foreign exception",
            "network a: the exception 11.0.0.0/16, which is not in 10.0.0.0/8",
        ),
        ("same network", "the network \"a\" twice"),
        (
            "many blocks",
            "1 networks with 17000 CIDRs and exceptions; at most 16384",
        ),
        ("networks loop", "networks: the module used up its fuel"),
        ("backward ports", "the port range 2 to 1"),
    ];
    let modules: Vec<_> = deeds
        .iter()
        .map(|(deed, expected)| (hostile.clone(), Some(*deed), *expected))
        .collect();
    all_refused(&cluster, &modules);
}

#[test]
fn a_configuration_that_is_wrong_is_refused() {
    kernel_test!();
    let cluster = one_node();
    let node = &cluster.nodes[0];
    let hostile = test_policy("hostile").unwrap().display().to_string();
    let config = |name: &str, text: &str| -> String {
        let path = cluster.folder().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    for (file, expected) in [
        (config("a.json", "{"), "a.json"),
        (config("b.toml", "a = "), "b.toml"),
        ("/nonexistent.toml".to_owned(), "/nonexistent.toml"),
    ] {
        let refusal = node.refusal(&["load-policy", &hostile, "--config", &file]).unwrap();
        assert!(refusal.contains(expected), "{refusal}");
    }
    assert!(Path::new(&hostile).exists());
    assert_eq!(
        node.json(&["policy", "show"]).unwrap()["modules"],
        serde_json::json!([])
    );
}

#[test]
fn a_module_that_fails_later_refuses_the_pod_and_stays_in_force() {
    kernel_test!();
    let mut cluster = one_node();
    let hostile = test_policy("hostile").unwrap().display().to_string();
    // It behaves while the policy is loaded, and then meets a pod that it can't identify.
    let pods_gone = ["a", "b"].map(|name| ["endpoint", "delete", "--namespace", "red", "--name", name]);
    for delete in pods_gone {
        cluster.nodes[0].json(&delete).unwrap();
    }
    cluster.pods.clear();
    let config = cluster.folder().join("deed.json");
    fs::write(&config, "\"refuse pod\"").unwrap();
    let config = config.display().to_string();
    cluster.nodes[0]
        .json(&["load-policy", &hostile, "--config", &config])
        .unwrap();
    let error = cluster.add_pod(0, "red/c", &[]).unwrap_err().to_string();
    assert!(error.contains("c is not welcome"), "{error}");
    assert_eq!(
        cluster.nodes[0].json(&["endpoint", "list"]).unwrap(),
        serde_json::json!([])
    );
    let links = cluster.nodes[0].netns.ip(&["-o", "link", "show"]).unwrap();
    assert!(!links.contains("wg-"), "{links}");
    // Another policy takes the pod.
    cluster.load("allow-all").unwrap();
    cluster.add_pod(0, "red/c", &[]).unwrap();
}

#[test]
fn a_module_with_much_fuel_still_has_little_time() {
    kernel_test!();
    let options = Options {
        nodes: 1,
        tables: "[wasm]\nfuel_per_call = 1000000000000\nevaluate_ms = 200".to_owned(),
        ..Options::default()
    };
    let mut cluster = Cluster::with(&options).unwrap();
    cluster.add_pod(0, "red/a", &[]).unwrap();
    let hostile = test_policy("hostile").unwrap().display().to_string();
    let config = cluster.folder().join("deed.json");
    for call in ["configure", "identify", "learn", "decide"] {
        fs::write(&config, format!("\"{call} loop\"")).unwrap();
        let config = config.display().to_string();
        let began = Instant::now();
        let refusal = cluster.nodes[0]
            .refusal(&["load-policy", &hostile, "--config", &config])
            .unwrap();
        assert!(
            refusal.contains(call) && refusal.contains("took longer than 200 ms"),
            "{refusal}"
        );
        assert!(began.elapsed() < REFUSED_WITHIN, "{call}: {:?}", began.elapsed());
    }
}
