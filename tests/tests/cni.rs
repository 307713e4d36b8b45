//! The CNI plugin against a real hostd: results and errors as the specification wants them (1.1.0), and nothing left over.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use harness::{Cluster, Cni, Listener, Namespace, Options, TcpOutcome, kernel_test, run, tcp_exchange, wait_until};
use serde_json::{Value, json};
use std::{collections::BTreeSet, net::IpAddr, time::Duration};

const WAIT: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(90);

fn one_node(policy: &str) -> Cluster {
    let options = Options {
        nodes: 1,
        ..Options::dual_stack()
    };
    let cluster = Cluster::with(&options).unwrap();
    cluster.load(policy).unwrap();
    cluster
}

fn path(netns: &Namespace) -> String {
    netns.path().display().to_string()
}

/// Code of the error that an operation ends with, which says `expected`.
fn refused(cni: &Cni, command: &str, expected: &str) -> u64 {
    let error = cni.run(command).unwrap().expect_err("it was not refused");
    let details = error["details"].as_str().unwrap();
    assert!(details.contains(expected), "{command}: {error}");
    assert_eq!(error["cniVersion"], cni.network["cniVersion"]);
    assert!(error["msg"].as_str().is_some_and(|text| !text.is_empty()));
    error["code"].as_u64().unwrap()
}

fn pods(cluster: &Cluster) -> BTreeSet<String> {
    let listed = cluster.nodes[0].json(&["endpoint", "list"]).unwrap();
    let name = |pod: &Value| format!("{}/{}", pod["pod"]["namespace"], pod["pod"]["name"]).replace('"', "");
    listed.as_array().unwrap().iter().map(name).collect()
}

fn links(cluster: &Cluster) -> usize {
    cluster.nodes[0]
        .netns
        .ip(&["-o", "link"])
        .unwrap()
        .matches(" wg-")
        .count()
}

fn address(result: &Value, index: usize) -> IpAddr {
    let text = result["ips"][index]["address"].as_str().unwrap();
    text.split('/').next().unwrap().parse().unwrap()
}

#[test]
fn a_container_is_attached_and_ended() {
    kernel_test!();
    let cluster = one_node("web-app");
    let node = &cluster.nodes[0];
    let (front, back) = (Namespace::new("front").unwrap(), Namespace::new("back").unwrap());
    let cni = |netns: &Namespace, app: &str| {
        Cni::new(node, &format!("c-{app}"), Some(&path(netns)))
            .with("namespace", json!("red"))
            .with("labels", json!({ "app": app }))
            .with("dns", json!({ "nameservers": ["192.0.2.53"] }))
    };
    let (frontend, backend) = (cni(&front, "frontend").set("CNI_IFNAME", "net1"), cni(&back, "backend"));
    let added = frontend.run("ADD").unwrap().unwrap();
    let interface = added["interfaces"][0]["name"].as_str().unwrap();
    let mac = |which: usize| added["interfaces"][which]["mac"].as_str().unwrap().to_owned();
    let shown = node.netns.ip(&["link", "show", interface]).unwrap();
    assert!(shown.contains(&mac(0)) && shown.contains(" mtu 65535 "), "{shown}");
    let shown = front.ip(&["link", "show", "net1"]).unwrap();
    assert!(shown.contains(&mac(1)) && shown.contains(" mtu 1450 "), "{shown}");
    assert_eq!(
        added,
        json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                { "name": interface, "mac": mac(0), "mtu": 65535 },
                { "name": "net1", "mac": mac(1), "mtu": 1450, "sandbox": path(&front) },
            ],
            "ips": [
                { "address": "10.1.0.0/32", "gateway": "169.254.1.1", "interface": 1 },
                { "address": "fd00:10:1::1/128", "gateway": "fe80::1", "interface": 1 },
            ],
            "routes": [
                { "dst": "0.0.0.0/0", "gw": "169.254.1.1" },
                { "dst": "::/0", "gw": "fe80::1" },
            ],
            "dns": { "nameservers": ["192.0.2.53"] },
        })
    );
    let other = backend.run("ADD").unwrap().unwrap();
    assert_eq!(
        pods(&cluster),
        BTreeSet::from(["red/c-backend".to_owned(), "red/c-frontend".to_owned()])
    );

    // The policy is enforced between them.
    let _listeners = [&front, &back].map(|netns| Listener::new(netns.name(), 8080).unwrap());
    for index in 0..2 {
        let open = |from: &Namespace, to: IpAddr| tcp_exchange(from.name(), to, 8080, WAIT).unwrap();
        assert_eq!(open(&front, address(&other, index)), TcpOutcome::Open);
        assert_eq!(open(&back, address(&added, index)), TcpOutcome::Silence);
    }

    // As it was made, until somebody changes it.
    let check = frontend.clone().with("prevResult", added.clone());
    assert_eq!(check.run("CHECK").unwrap(), Ok(Value::Null));
    assert_eq!(refused(&frontend, "CHECK", "`prevResult`"), 7);
    front.ip(&["link", "del", "net1"]).unwrap();
    assert_eq!(refused(&check, "CHECK", "no interface net1"), 101);

    // Ended, as often as one likes, and without its namespace.
    for _ in 0..2 {
        assert_eq!(frontend.run("DEL").unwrap(), Ok(Value::Null));
    }
    let elsewhere = backend
        .clone()
        .with("prevResult", other)
        .set("CNI_NETNS", "/run/netns/nobody");
    assert_eq!(refused(&elsewhere, "CHECK", "/run/netns/nobody"), 101);
    drop(back);
    let mut gone = backend.clone().with("lables", json!({})).set("CNI_ARGS", "novalue");
    gone.environment.retain(|(name, _)| *name != "CNI_NETNS");
    assert_eq!(gone.run("DEL").unwrap(), Ok(Value::Null));
    assert_eq!(refused(&check, "CHECK", "not attached"), 3);
    assert_eq!((pods(&cluster).len(), links(&cluster)), (0, 0));
}

#[test]
fn what_is_not_as_it_was_made_is_noticed_and_what_the_node_has_lost_is_put_right() {
    kernel_test!();
    let cluster = one_node("allow-all");
    let node = &cluster.nodes[0];
    let front = Namespace::new("front").unwrap();
    let frontend = Cni::new(node, "c1", Some(&path(&front))).set("CNI_IFNAME", "net1");
    let added = frontend.run("ADD").unwrap().unwrap();
    let interface = added["interfaces"][0]["name"].as_str().unwrap();
    let mac = |which: usize| added["interfaces"][which]["mac"].as_str().unwrap().to_owned();
    let _listener = Listener::new(front.name(), 8080).unwrap();
    let check = frontend.clone().with("prevResult", added.clone());
    let mac_back = format!("link set net1 address {}", mac(1));
    let neighbour = format!("neigh add fe80::1 dev net1 lladdr {} nud permanent", mac(0));
    let routes = [
        "route add 169.254.1.1 dev net1",
        "route add default via 169.254.1.1 dev net1",
    ];
    let with_address = ["addr add 10.1.0.0/32 dev net1", routes[0], routes[1]];
    for (tamper, mend, expected) in [
        (
            "addr del 10.1.0.0/32 dev net1",
            &with_address[..],
            "no longer has the address 10.1.0.0",
        ),
        ("route del default", &routes[1..], "route to everything by 169.254.1.1"),
        (
            "link set net1 address 02:00:00:00:00:99",
            &[mac_back.as_str(), neighbour.as_str()],
            "another MAC address",
        ),
        (
            "neigh del fe80::1 dev net1",
            &[neighbour.as_str()],
            "no longer knows fe80::1",
        ),
    ] {
        let change = |what: &str| front.ip(&what.split(' ').collect::<Vec<_>>()).unwrap();
        change(tamper);
        assert_eq!(refused(&check, "CHECK", expected), 101, "{tamper}");
        for step in mend {
            change(step);
        }
        assert_eq!(check.run("CHECK").unwrap(), Ok(Value::Null), "{mend:?}");
    }
    let lies: [(&str, Value, &str); 4] = [
        ("/ips/0/address", json!("10.1.0.77/32"), "10.1.0.77"),
        ("/interfaces/1/mac", json!("02:00:00:00:00:77"), "02:00:00:00:00:77"),
        ("/interfaces/1/name", json!("net2"), "no interface net1"),
        ("/interfaces/1/sandbox", json!(""), "no interface net1"),
    ];
    for (place, lie, expected) in lies {
        let mut other = added.clone();
        *other.pointer_mut(place).unwrap() = lie;
        assert_eq!(
            refused(&frontend.clone().with("prevResult", other), "CHECK", expected),
            101
        );
    }
    // A plugin that comes later may take a route away, and says so.
    let mut fewer = added.clone();
    fewer["routes"].as_array_mut().unwrap().remove(0);
    front.ip(&["route", "del", "default"]).unwrap();
    assert_eq!(refused(&check, "CHECK", "route to everything"), 101);
    assert_eq!(
        frontend.clone().with("prevResult", fewer).run("CHECK").unwrap(),
        Ok(Value::Null)
    );
    front
        .ip(&["route", "add", "default", "via", "169.254.1.1", "dev", "net1"])
        .unwrap();
    // What the node's own end has lost is put right.
    let by_node = || tcp_exchange(node.netns.name(), address(&added, 0), 8080, WAIT).unwrap() == TcpOutcome::Open;
    assert!(by_node());
    for state in ["down", "up"] {
        node.netns.ip(&["link", "set", interface, state]).unwrap();
        let down = state == "down";
        assert!(!by_node(), "{state}");
        if down {
            assert_eq!(refused(&check, "CHECK", "is down"), 101);
        }
    }
    assert_eq!(check.run("CHECK").unwrap(), Ok(Value::Null));
    assert!(by_node());
}

#[test]
fn what_can_not_be_attached_is_refused_with_its_code_and_leaves_nothing() {
    kernel_test!();
    let cluster = one_node("allow-all");
    let node = &cluster.nodes[0];
    let netns = Namespace::new("pod").unwrap();
    let cni = Cni::new(node, "c1", Some(&path(&netns)));
    assert_eq!(
        refused(&cni.clone().with("cniVersion", json!("9.9.9")), "ADD", "1.1.0"),
        1
    );
    assert_eq!(
        refused(&cni.clone().with("ipam", json!({"type": "dhcp"})), "ADD", "ipam"),
        2
    );
    assert_eq!(
        refused(
            &cni.clone().set("CNI_NETNS", "/run/netns/nobody"),
            "ADD",
            "/run/netns/nobody"
        ),
        3
    );
    assert_eq!(refused(&cni.clone().set("CNI_IFNAME", "a/b"), "ADD", "CNI_IFNAME"), 4);
    assert_eq!(
        refused(
            &cni.clone().set("CNI_NETNS", "/proc/self/ns/net"),
            "ADD",
            "the node's own"
        ),
        4
    );
    assert_eq!(refused(&cni, "", "CNI_COMMAND"), 4);
    assert_eq!(refused(&cni, "MOVE", "CNI_COMMAND=MOVE"), 4);
    assert_eq!(refused(&cni.clone().with("labels", json!("x")), "ADD", "labels"), 6);
    let foreign = cni.clone().with("runtimeConfig", json!({ "ips": ["10.9.9.9/24"] }));
    assert_eq!(refused(&foreign, "ADD", "10.9.9.9"), 7);
    let occupied = cni.clone().set("CNI_IFNAME", "lo2");
    netns
        .ip(&["link", "add", "lo2", "type", "veth", "peer", "name", "lo3"])
        .unwrap();
    assert_eq!(refused(&occupied, "ADD", "`lo2`"), 7);
    assert_eq!((pods(&cluster).len(), links(&cluster)), (0, 0));

    let asked = cni.clone().with("runtimeConfig", json!({ "ips": ["10.1.0.9/24"] }));
    assert_eq!(address(&asked.run("ADD").unwrap().unwrap(), 0).to_string(), "10.1.0.9");
    assert_eq!(refused(&cni, "ADD", "attached already"), 7);
    assert_eq!(
        refused(
            &cni.clone()
                .set("CNI_CONTAINERID", "c2")
                .with("runtimeConfig", json!({ "ips": ["10.1.0.9"] })),
            "ADD",
            "belongs to"
        ),
        7
    );
    // Another container of that name, when the first one's namespace is gone: a sandbox that has died.
    let again = Namespace::new("again").unwrap();
    let sandbox = cni
        .set("CNI_ARGS", "K8S_POD_NAMESPACE=default;K8S_POD_NAME=c1")
        .set("CNI_CONTAINERID", "c3");
    let sandbox = sandbox.set("CNI_NETNS", &path(&again));
    assert_eq!(refused(&sandbox, "ADD", "exists already"), 7);
    drop(netns);
    assert!(sandbox.run("ADD").unwrap().is_ok());
    assert_eq!(pods(&cluster), BTreeSet::from(["default/c1".to_owned()]));
    // And the same one, whose runtime has not ended it.
    drop(again);
    let third = Namespace::new("third").unwrap();
    let same = sandbox.clone().set("CNI_NETNS", &path(&third));
    assert!(same.run("ADD").unwrap().is_ok());
    assert_eq!(refused(&same, "ADD", "attached already"), 7);
    assert!(sandbox.run("DEL").unwrap().is_ok());
    assert_eq!((pods(&cluster).len(), links(&cluster)), (0, 0));
}

#[test]
fn older_runtimes_are_answered_in_their_version() {
    kernel_test!();
    let cluster = one_node("allow-all");
    let netns = Namespace::new("pod").unwrap();
    let none = Cni::new(&cluster.nodes[0], "c1", None).with("cniVersion", Value::Null);
    assert_eq!(none.run("VERSION").unwrap().unwrap()["cniVersion"], "1.1.0");
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let cni = Cni::new(&cluster.nodes[0], "c1", Some(&path(&netns))).with("cniVersion", json!(version));
        let versions = cni.run("VERSION").unwrap().unwrap();
        assert_eq!(versions["cniVersion"], version);
        assert!(
            versions["supportedVersions"]
                .as_array()
                .unwrap()
                .contains(&json!(version))
        );
        let added = cni.run("ADD").unwrap().unwrap();
        assert_eq!(added["cniVersion"], version);
        if version != "1.1.0" {
            let collect = cni.clone().with("cni.dev/valid-attachments", json!([]));
            assert_eq!(refused(&collect, "GC", "since 1.1.0"), 1);
            assert_eq!(pods(&cluster).len(), 1);
        }
        assert_eq!(added["ips"][0]["version"] == "4", version.starts_with('0'), "{added}");
        assert!(cni.run("DEL").unwrap().is_ok());
    }
}

#[test]
fn while_hostd_is_not_there_containers_can_go() {
    kernel_test!();
    let mut cluster = one_node("allow-all");
    let (one, other) = (Namespace::new("one").unwrap(), Namespace::new("other").unwrap());
    let [first, second] =
        [("c1", &one), ("c2", &other)].map(|(name, netns)| Cni::new(&cluster.nodes[0], name, Some(&path(netns))));
    first.run("ADD").unwrap().unwrap();
    let kept = second.run("ADD").unwrap().unwrap();
    assert_eq!(first.run("STATUS").unwrap(), Ok(Value::Null));
    cluster.nodes[0].stop(true).unwrap();
    assert_eq!(refused(&first, "STATUS", "cannot reach hostd"), 50);
    let third = Cni::new(&cluster.nodes[0], "c3", Some(&path(&one)));
    assert_eq!(refused(&third, "ADD", "cannot reach hostd"), 11);
    for _ in 0..2 {
        assert_eq!(first.run("DEL").unwrap(), Ok(Value::Null));
    }
    cluster.nodes[0].start().unwrap();
    assert!(wait_until(LONG, || pods(&cluster) == BTreeSet::from(["default/c2".to_owned()])));
    assert_eq!(links(&cluster), 1);
    // What was there is as it was, and known by its name.
    assert_eq!(
        second.clone().with("prevResult", kept).run("CHECK").unwrap(),
        Ok(Value::Null)
    );
    // The address is free again, and given to one container only.
    let again = third.run("ADD").unwrap().unwrap();
    assert_eq!(address(&again, 0).to_string(), "10.1.0.0");

    // What the runtime has forgotten.
    let collect = |valid: Value| Cni::new(&cluster.nodes[0], "", None).with("cni.dev/valid-attachments", valid);
    let valid = json!([{ "containerID": "c2", "ifname": "eth0" }, { "containerID": "c9", "ifname": "eth0" }]);
    assert_eq!(refused(&third, "GC", "cni.dev/valid-attachments"), 7);
    assert_eq!(
        collect(json!([])).with("name", json!("another")).run("GC").unwrap(),
        Ok(Value::Null)
    );
    assert_eq!(pods(&cluster).len(), 2);
    assert_eq!(collect(valid).run("GC").unwrap(), Ok(Value::Null));
    assert_eq!(pods(&cluster), BTreeSet::from(["default/c2".to_owned()]));
    assert_eq!(collect(Value::Null).run("GC").unwrap(), Ok(Value::Null));
    assert_eq!((pods(&cluster).len(), links(&cluster)), (0, 0));
}

#[test]
fn what_a_runtime_that_is_gone_has_asked_for_is_not_done() {
    kernel_test!();
    let cluster = one_node("allow-all");
    let node = &cluster.nodes[0];
    let netns = Namespace::new("pod").unwrap();
    let cni = Cni::new(node, "c1", Some(&path(&netns)));
    let pid = node.pid().unwrap().to_string();
    let freeze = || run("kill", &["-STOP", &pid]).unwrap();
    let thaw = || run("kill", &["-CONT", &pid]).unwrap();
    // Killed while hostd does not answer.
    let give_up = |command: &str| {
        freeze();
        let mut plugin = cni.start(command).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        plugin.kill().unwrap();
        plugin.wait().unwrap();
        thaw();
    };
    give_up("ADD");
    // Whether that one was begun and undone, or never begun.
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!((pods(&cluster).len(), links(&cluster)), (0, 0));
    let added = cni.run("ADD").unwrap().unwrap();
    give_up("DEL");
    std::thread::sleep(Duration::from_secs(1));
    let check = cni.clone().with("prevResult", added);
    assert_eq!(check.run("CHECK").unwrap(), Ok(Value::Null));
    assert_eq!(cni.run("DEL").unwrap(), Ok(Value::Null));
    assert_eq!((pods(&cluster).len(), links(&cluster)), (0, 0));
}

#[test]
fn a_namespace_that_is_another_one_by_now_is_not_taken_for_the_pods() {
    kernel_test!();
    let mut cluster = one_node("allow-all");
    let (one, other) = (Namespace::new("one").unwrap(), Namespace::new("other").unwrap());
    // As `/proc/PID/ns/net` is, when another process gets the number.
    let alias = cluster.folder().join("netns");
    std::os::unix::fs::symlink(one.path(), &alias).unwrap();
    let alias = alias.display().to_string();
    Cni::new(&cluster.nodes[0], "c1", Some(&alias))
        .run("ADD")
        .unwrap()
        .unwrap();
    Cni::new(&cluster.nodes[0], "c2", Some(&path(&other)))
        .run("ADD")
        .unwrap()
        .unwrap();
    cluster.nodes[0].stop(true).unwrap();
    std::fs::remove_file(&alias).unwrap();
    std::os::unix::fs::symlink(other.path(), &alias).unwrap();
    cluster.nodes[0].start().unwrap();
    assert_eq!(pods(&cluster), BTreeSet::from(["default/c2".to_owned()]));
    assert_eq!(links(&cluster), 1);
}

#[test]
fn a_network_is_installed_and_taken_away() {
    kernel_test!();
    let cluster = one_node("allow-all");
    let node = &cluster.nodes[0];
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name).display().to_string();
    let (bin, conf, config) = (place("bin"), place("net.d"), node.config().display().to_string());
    let places = ["--bin-dir", &bin, "--conf-dir", &conf];
    let install = [&["install", "--config", &config, "--namespace", "red"][..], &places].concat();
    let uninstall = [&["uninstall"][..], &places].concat();
    for _ in 0..2 {
        assert!(node.hostd(&install).unwrap().status.success());
    }
    let list = folder.path().join("net.d/10-wasmgate.conflist");
    let written: Value = serde_json::from_slice(&std::fs::read(&list).unwrap()).unwrap();
    // What it has written works.
    let netns = Namespace::new("pod").unwrap();
    let mut cni = Cni::new(node, "c1", Some(&path(&netns)));
    cni.network = written["plugins"][0].clone();
    let cni = cni
        .with("cniVersion", json!("1.0.0"))
        .with("name", written["name"].clone());
    cni.run("ADD").unwrap().unwrap();
    assert_eq!(pods(&cluster), BTreeSet::from(["red/c1".to_owned()]));
    assert!(
        std::process::Command::new(folder.path().join("bin/wasmgate-cni"))
            .env("CNI_COMMAND", "X")
            .output()
            .is_ok()
    );
    for _ in 0..2 {
        assert!(node.hostd(&uninstall).unwrap().status.success());
    }
    for folder in ["bin", "net.d"].map(|name| folder.path().join(name)) {
        assert_eq!(std::fs::read_dir(folder).unwrap().count(), 0);
    }
    // Somebody else's network of that name stays.
    std::fs::write(&list, r#"{"name": "wasmgate", "plugins": [{"type": "bridge"}]}"#).unwrap();
    for arguments in [&install, &uninstall] {
        let refusal = node.refusal(arguments).unwrap();
        assert!(
            refusal.contains("is not ours: its plugins are [\"bridge\"]"),
            "{refusal}"
        );
    }
    assert_eq!(std::fs::read_dir(folder.path().join("bin")).unwrap().count(), 0);
    // One that others are chained to is ours, and theirs stay in it.
    let chained = r#"{"name": "wasmgate", "plugins": [{"type": "wasmgate-cni"}, {"type": "bandwidth"}]}"#;
    std::fs::write(&list, chained).unwrap();
    let said = node.hostd(&install).unwrap();
    assert!(said.status.success());
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("set `attach = \"tcx\"`"), "{said}");
    let written: Value = serde_json::from_slice(&std::fs::read(&list).unwrap()).unwrap();
    let plugins = written["plugins"].as_array().unwrap();
    assert_eq!((plugins.len(), &plugins[1]["type"]), (2, &json!("bandwidth")));
    assert_eq!(plugins[0]["namespace"], "red");
    // The plugin stays for as long as a network has it.
    let binary = folder.path().join("bin/wasmgate-cni");
    let second = [&install[..], &["--network", "second"]].concat();
    assert!(node.hostd(&second).unwrap().status.success());
    let said = node.hostd(&uninstall).unwrap();
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("10-second.conflist uses it"), "{said}");
    assert!(!list.exists() && binary.exists());
    let second = [&uninstall[..], &["--network", "second"]].concat();
    assert!(node.hostd(&second).unwrap().status.success());
    assert!(!binary.exists());
}
