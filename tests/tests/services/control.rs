//! What can be a service, and what becomes of one that a node can't have.

use super::{AT_VIPS, LONG, WAIT, backends, cluster};
use harness::{Cluster, Listener, Options, TcpOutcome, in_netns, kernel_test, tcp_exchange, wait_until};
use hostd::store::{
    Collection, Expect, FileStore, Key, Store,
    records::{self, PodRecord},
};

#[test]
fn what_can_be_no_service_is_refused_with_a_reason() {
    kernel_test!();
    let cluster = cluster(&Options::dual_stack());
    let options = format!("{AT_VIPS} --port tcp/80=8080@30080 --selector app=web");
    cluster.add_service("red/web", &options).unwrap();
    let before = cluster.nodes[0].json(&["service", "list"]).unwrap();
    for (name, options, expected) in [
        ("red/Web", "--port tcp/80 --address 172.16.0.9", "lower-case"),
        ("red/a", "--port tcp/80", "an address or a node port"),
        (
            "red/a",
            "--port tcp/80 --address 10.1.0.77",
            "in pod CIDR 10.1.0.0/24 of node node1",
        ),
        (
            "red/a",
            "--port tcp/80 --address 192.0.2.2",
            "the address of node node2",
        ),
        (
            "red/a",
            "--port tcp/80 --address 172.16.0.1",
            "172.16.0.1 tcp/80 is service red/web's",
        ),
        ("red/a", "--port tcp/81@30080", "node port 30080 is service red/web's"),
        ("red/a", "--port tcp/80 --address 127.0.0.1", "can be no service's"),
        (
            "red/a",
            "--port tcp/80 --address 172.16.0.9 --address 172.16.0.8",
            "one address of each family",
        ),
        (
            "red/a",
            "--port tcp/80 --port tcp/80=81 --address 172.16.0.9",
            "given twice",
        ),
        (
            "red/a",
            "--port udp/80@8472 --address 172.16.0.9",
            "not between 30000 and 32767",
        ),
        (
            "red/a",
            "--port tcp/80 --address 172.16.0.9 --backend 172.16.0.1",
            "can be no backend",
        ),
        ("red/a", "--port sctp/80 --address 172.16.0.9", "no port of a service"),
        ("red/a", "--port tcp/80= --address 172.16.0.9", "no port of a service"),
        ("red/a", "--port tcp/0 --address 172.16.0.9", "0 is no port"),
    ] {
        let problem = format!("{:#}", cluster.add_service(name, options).unwrap_err());
        assert!(problem.contains(expected), "{options}: {problem}");
    }
    assert_eq!(cluster.nodes[0].json(&["service", "list"]).unwrap(), before);
    // The same again changes nothing, and other ports are a change.
    cluster.add_service("red/web", &options).unwrap();
    assert_eq!(cluster.nodes[0].json(&["service", "list"]).unwrap(), before);
    let changed = cluster
        .add_service("red/web", &format!("{AT_VIPS} --port tcp/81=http"))
        .unwrap();
    assert_eq!(changed["ports"][0]["port"], "tcp/81");
}

#[test]
fn an_explanation_of_a_service_says_whom_to_ask_about() {
    kernel_test!();
    let cluster = cluster(&Options::default());
    let options = "--address 172.16.0.1 --port tcp/80=8080@30080 --selector app=web";
    cluster.add_service("red/web", options).unwrap();
    let [here, there] = ["red/here", "red/there"].map(|pod| cluster.pod(pod).address);
    let asked = |to: &str, port: &str| {
        let question = [
            "policy",
            "explain",
            "red/client",
            to,
            "--protocol",
            "tcp",
            "--port",
            port,
        ];
        cluster.nodes[0].json(&question).map_err(|refusal| refusal.to_string())
    };
    let nodes = cluster.nodes.iter().map(|node| (node.underlay.to_string(), "30080"));
    for (to, port) in nodes.chain([("172.16.0.1".to_owned(), "80")]) {
        let refusal = asked(&to, port).unwrap_err();
        let expected =
            format!("{to} is where service red/web is asked, of which policy knows nothing: ask about its backends");
        assert!(refusal.contains(&expected), "{refusal}");
        assert!(refusal.contains(&format!("({here}, {there})")), "{refusal}");
    }
    // At another port the node is the node.
    for (node, expected) in cluster.nodes.iter().zip(["host", "remote-node"]) {
        let answer = asked(&node.underlay.to_string(), "30081").unwrap();
        assert_eq!(answer["to"]["identity_name"], expected);
    }
}

#[test]
fn an_address_that_passes_to_another_namespaces_pod_is_no_backend_any_more() {
    kernel_test!();
    let mut cluster = cluster(&Options::default());
    cluster
        .add_service("red/web", "--address 172.16.0.1 --port tcp/80=8080 --selector app=web")
        .unwrap();
    assert_eq!(backends(&cluster, 0), ["red/here", "red/there"]);
    // As a node hears of it that was busy when the address was given up and taken again.
    let store = FileStore::open(&cluster.folder().join("store")).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let key = Key::new(Collection::Pods, cluster.pod("red/there").address);
    // Its hostd would take it back.
    cluster.nodes[1].stop(true).unwrap();
    let (record, _) = runtime
        .block_on(records::get::<PodRecord>(&store, &key))
        .unwrap()
        .unwrap();
    let next = PodRecord {
        namespace: "blue".to_owned(),
        name: "next".to_owned(),
        incarnation: record.incarnation.wrapping_add(1),
        ..record
    };
    runtime
        .block_on(records::put(&store, &key, &next, Expect::Any))
        .unwrap();
    assert!(
        wait_until(LONG, || backends(&cluster, 0) == ["red/here"]),
        "{:?}",
        backends(&cluster, 0)
    );
}

#[test]
fn a_pod_that_has_a_services_address_against_all_precautions_gives_it_back() {
    kernel_test!();
    let mut cluster = cluster(&Options::default());
    cluster
        .add_service("red/web", "--address 172.16.0.1 --port tcp/80=8080 --selector app=web")
        .unwrap();
    // Its hostd would take back what is not true of its pods.
    cluster.nodes[1].stop(true).unwrap();
    let whose = || -> String {
        let list = cluster.nodes[0].json(&["ipcache", "list"]).unwrap();
        let list = list.as_array().unwrap().iter();
        let mut entries = list.filter(|entry| entry["address"] == "172.16.0.1");
        entries.next().map_or(String::new(), |entry| entry["name"].to_string())
    };
    let problems = || cluster.nodes[0].json(&["status"]).unwrap()["service_problems"].to_string();
    assert_eq!(whose(), "\"service red/web\"");
    // Two nodes have written to the store at the same time.
    let store = FileStore::open(&cluster.folder().join("store")).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let there = cluster.pod("red/there").address;
    let (record, _) = runtime
        .block_on(records::get::<PodRecord>(&store, &Key::new(Collection::Pods, there)))
        .unwrap()
        .unwrap();
    let pod = PodRecord {
        name: "usurper".to_owned(),
        address: "172.16.0.1".parse().unwrap(),
        incarnation: record.incarnation.wrapping_add(1),
        ..record
    };
    let key = Key::new(Collection::Pods, pod.address);
    runtime.block_on(records::put(&store, &key, &pod, Expect::Any)).unwrap();
    assert!(wait_until(LONG, || whose() == "\"red/usurper\""), "{}", whose());
    assert!(wait_until(LONG, || problems().contains("172.16.0.1 is a service's address")));
    runtime.block_on(store.delete(&key, Expect::Any)).unwrap();
    assert!(wait_until(LONG, || whose() == "\"service red/web\""), "{}", whose());
    assert!(wait_until(LONG, || problems() == "[]"), "{}", problems());
}

#[test]
fn node_ports_that_the_kernel_may_give_away_are_a_problem_that_is_said() {
    kernel_test!();
    let cluster = cluster(&Options::default());
    let set = |name: &str, value: &str| {
        let path = format!("/proc/sys/net/ipv4/{name}");
        in_netns(cluster.nodes[0].netns.name(), || std::fs::write(path, value))
            .unwrap()
            .unwrap();
    };
    let problems = || cluster.nodes[0].json(&["status"]).unwrap()["service_problems"].to_string();
    set("ip_local_port_range", "1024 65535");
    cluster
        .add_service("red/web", "--address 172.16.0.1 --port tcp/80")
        .unwrap();
    assert_eq!(problems(), "[]");
    cluster.add_service("red/web", "--port tcp/80@30080").unwrap();
    let said = problems();
    let expected = "add 30000-32767 to the sysctl net.ipv4.ip_local_reserved_ports";
    assert!(said.contains(expected), "{said}");
    set("ip_local_reserved_ports", "30000-32767");
    assert!(wait_until(LONG, || problems() == "[]"));
}

#[test]
fn a_node_that_could_have_a_services_address_does_not_start() {
    kernel_test!();
    let mut cluster = Cluster::without_hostd(&Options::default()).unwrap();
    cluster.nodes[0].start().unwrap();
    let service = [
        "service",
        "add",
        "--namespace",
        "red",
        "--name",
        "web",
        "--port",
        "tcp/80",
    ];
    for (address, expected) in [
        (
            "10.2.0.7",
            "pod CIDR 10.2.0.0/24 contains 10.2.0.7, the address of service red/web",
        ),
        (
            "192.0.2.2",
            "the underlay address 192.0.2.2 is the address of service red/web",
        ),
    ] {
        let at = ["--address", address];
        cluster.nodes[0].json(&[&service[..], &at].concat()).unwrap();
        let error = cluster.nodes[1].start().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn what_one_node_has_no_room_for_keeps_nothing_else_from_being_done() {
    kernel_test!();
    let mut cluster = cluster(&Options::default());
    let config = cluster.nodes[1].config();
    let small = std::fs::read_to_string(&config).unwrap() + "\n[maps]\nservices = 16\n";
    std::fs::write(&config, small).unwrap();
    let restart = |cluster: &mut Cluster| {
        cluster.nodes[1].stop(false).unwrap();
        cluster.nodes[1].start().unwrap();
    };
    restart(&mut cluster);
    let many: Vec<String> = (1..=20).map(|port| format!("--port tcp/{port}=8080")).collect();
    let options = format!("--address 172.16.0.5 --selector app=web {}", many.join(" "));
    cluster.add_service("red/many", &options).unwrap();
    let problems = |node: usize| -> usize {
        let status = cluster.nodes[node].json(&["status"]).unwrap();
        status["service_problems"].as_array().unwrap().len()
    };
    assert_eq!(problems(0), 0);
    assert!(wait_until(LONG, || problems(1) > 0));
    // Pods come and go there all the same, and hostd starts.
    cluster.add_pod(1, "red/more", &[("app", "web")]).unwrap();
    cluster.remove_pod("red/more").unwrap();
    restart(&mut cluster);
    let _listener = Listener::new(cluster.pod("red/there").netns.name(), 8080).unwrap();
    let here = cluster.pod("red/client").netns.name();
    assert_eq!(
        tcp_exchange(here, cluster.pod("red/there").address, 8080, WAIT).unwrap(),
        TcpOutcome::Open
    );
    // What there is room for again is there, without anybody's doing.
    cluster.delete_service("red/many").unwrap();
    let status = |node: usize| cluster.nodes[node].json(&["status"]).unwrap();
    assert!(wait_until(LONG, || status(1)["service_problems"]
        .as_array()
        .unwrap()
        .is_empty()));
}
