//! Nodes over a real etcd, which is away, cut off, or made anew: pods keep talking, nothing is forgotten, and everything
//! comes right when it is back.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use harness::{
    Cluster, EtcdOptions, Listener, Namespace, Options, TcpOutcome, Traffic, in_netns, kernel_test, tcp_exchange,
    tcp_open, wait_until,
};
use hostd::store::{
    Collection, EtcdConfig, EtcdStore, Expect, Key, Store,
    records::{self, NodeRecord},
};
use std::{
    thread,
    time::{Duration, Instant},
};

const WAIT: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(90);

/// Two nodes over etcd, with a frontend and a backend on either node.
fn cluster(etcd: EtcdOptions, policy: &str) -> Cluster {
    let options = Options {
        etcd: Some(etcd),
        tables: "[lease]\nttl_seconds = 2".to_owned(),
        ..Options::default()
    };
    let mut cluster = Cluster::with(&options).unwrap();
    cluster.load(policy).unwrap();
    for (node, name, app) in [
        (0, "red/front1", "frontend"),
        (1, "red/front2", "frontend"),
        (0, "red/back1", "backend"),
        (1, "red/back2", "backend"),
    ] {
        cluster.add_pod(node, name, &[("app", app)]).unwrap();
    }
    cluster.agree().unwrap();
    cluster
}

/// Echoes between frontends and backends of both nodes, all of which have to come back.
struct Talk {
    _listeners: Vec<Listener>,
    traffic: Vec<Traffic>,
}

fn talk(cluster: &Cluster) -> Talk {
    let listener = |name| Listener::new(cluster.pod(name).netns.name(), 8080).unwrap();
    let listeners = ["red/back1", "red/back2"].map(listener).into();
    let traffic = |(from, to)| {
        let (from, to) = (cluster.pod(from), cluster.pod(to));
        Traffic::paced(from.netns.name(), to.address, 8080, WAIT, Duration::from_millis(2))
    };
    let pairs = [
        ("red/front1", "red/back2"),
        ("red/front2", "red/back1"),
        ("red/front1", "red/back1"),
    ];
    Talk {
        _listeners: listeners,
        traffic: pairs.map(traffic).into(),
    }
}

impl Talk {
    fn nothing_was_lost(self) {
        self.traffic.into_iter().for_each(Traffic::lost_nothing);
    }
}

fn open(cluster: &Cluster, from: &str, to: &str) -> bool {
    let (from, to) = (cluster.pod(from), cluster.pod(to));
    tcp_exchange(from.netns.name(), to.address, 8080, WAIT).unwrap() == TcpOutcome::Open
}

fn problem(cluster: &Cluster, node: usize) -> Option<String> {
    let status = cluster.nodes[node].json(&["status"]).unwrap();
    status["store_problem"].as_str().map(str::to_owned)
}

fn all_alive(cluster: &Cluster) -> bool {
    cluster.nodes.iter().all(|node| {
        let status = node.json(&["status"]).unwrap();
        let nodes = status["nodes"].as_array().unwrap();
        nodes.len() == cluster.nodes.len() && nodes.iter().all(|node| node["state"] == "alive")
    })
}

#[test]
fn two_nodes_share_an_etcd_that_asks_who_they_are() {
    kernel_test!();
    let cluster = cluster(
        EtcdOptions {
            tls: true,
            users: true,
            ..EtcdOptions::default()
        },
        "web-app",
    );
    let _listener = Listener::new(cluster.pod("red/back1").netns.name(), 8080).unwrap();
    assert!(open(&cluster, "red/front2", "red/back1"));
    assert!(!open(&cluster, "red/back2", "red/front1"));
    // What one node says the other one enforces.
    cluster.nodes[1].label("red/front2", "app=other").unwrap();
    assert!(wait_until(LONG, || !open(&cluster, "red/front2", "red/back1")));
    cluster.nodes[1].label("red/front2", "app=frontend").unwrap();
    assert!(wait_until(LONG, || open(&cluster, "red/front2", "red/back1")));
    let status = cluster.nodes[0].json(&["status"]).unwrap();
    assert!(status["store"].as_str().unwrap().starts_with("etcd:https://"));
}

#[test]
fn while_etcd_is_away_pods_talk_and_go_and_hostd_may_be_killed() {
    kernel_test!();
    let mut cluster = cluster(EtcdOptions::default(), "tenant-isolation");
    cluster.add_pod(1, "red/leaver", &[("app", "backend")]).unwrap();
    cluster.agree().unwrap();
    let talk = talk(&cluster);
    cluster.etcd.as_mut().unwrap().kill().unwrap();

    for node in 0..2 {
        assert!(wait_until(LONG, || problem(&cluster, node).is_some()));
    }
    // What can't be entered is refused, soon, and nothing of it is left.
    let netns = Namespace::new("pod").unwrap();
    let add = [
        "endpoint",
        "add",
        "--netns",
        netns.name(),
        "--namespace",
        "red",
        "--name",
        "new",
        "--label",
        "app=new",
    ];
    let began = Instant::now();
    let refusal = cluster.nodes[0].refusal(&add).unwrap();
    assert!(refusal.contains("has not answered for"), "{refusal}");
    assert!(began.elapsed() < LONG, "{:?}", began.elapsed());
    let endpoints = cluster.nodes[0].json(&["endpoint", "list"]).unwrap();
    assert_eq!(endpoints.as_array().unwrap().len(), 2);
    assert!(!netns.ip(&["link"]).unwrap().contains("eth0"));
    // A pod can go all the same.
    let leaver = cluster.pod("red/leaver").address;
    cluster.remove_pod("red/leaver").unwrap();

    // One hostd is killed, and waits for the store when it is back.
    cluster.nodes[0].stop(true).unwrap();
    cluster.nodes[0].launch().unwrap();
    let mut said = String::new();
    assert!(
        wait_until(LONG, || {
            said = cluster.nodes[0].refusal(&["status"]).unwrap();
            said.contains("hostd is starting: etcd:http://")
        }),
        "{said}"
    );
    // Longer than any lease.
    thread::sleep(Duration::from_secs(5));
    let known = cluster.nodes[1].others_addresses().unwrap();
    assert_eq!(known.len(), 4, "{known:?}");

    cluster.etcd.as_mut().unwrap().run().unwrap();
    cluster.nodes[0].wait_until_ready().unwrap();
    assert!(wait_until(LONG, || (0..2).all(|node| problem(&cluster, node).is_none())));
    // The other node hears of the one that is gone, and of what comes now.
    cluster.agree().unwrap();
    let again = [
        "--address".to_owned(),
        leaver.to_string(),
        "--label".to_owned(),
        "app=backend".to_owned(),
    ];
    cluster.add_pod_with(1, "red/successor", &again).unwrap();
    cluster.agree().unwrap();
    assert!(wait_until(LONG, || all_alive(&cluster)));
    talk.nothing_was_lost();
    let pods = cluster
        .etcd
        .as_ref()
        .unwrap()
        .ctl(&["get", "--prefix", "--keys-only", "/wasmgate/pods/"]);
    assert_eq!(pods.unwrap().split_whitespace().count(), 5);
}

#[test]
fn a_node_that_is_cut_off_from_etcd_makes_up_for_what_it_missed() {
    kernel_test!();
    let mut cluster = cluster(EtcdOptions::default(), "tenant-isolation");
    cluster.add_pod(0, "red/leaver", &[("app", "backend")]).unwrap();
    cluster.agree().unwrap();
    let talk = talk(&cluster);
    let nft = |rules: &[&str]| {
        let external = cluster.external.as_ref().unwrap();
        let status = external.command("nft").args(rules).status().unwrap();
        assert!(status.success());
    };
    nft(&["add table ip cut; add chain ip cut in { type filter hook input priority 0; }"]);
    let address = cluster.nodes[1].underlay.to_string();
    nft(&["add", "rule", "ip", "cut", "in", "ip", "saddr", &address, "drop"]);
    assert!(wait_until(LONG, || problem(&cluster, 1).is_some()));
    assert!(problem(&cluster, 0).is_none());

    // Meanwhile: a pod goes, one comes, one changes, and etcd forgets how that came about.
    cluster.nodes[0].label("red/back1", "tier=gold").unwrap();
    cluster.remove_pod("red/leaver").unwrap();
    cluster.add_pod(0, "red/new", &[("app", "frontend")]).unwrap();
    cluster.etcd.as_ref().unwrap().compact().unwrap();
    // The others only call it stale.
    let stale = || {
        let status = cluster.nodes[0].json(&["status"]).unwrap();
        status["nodes"][1]["state"] == "stale"
    };
    assert!(wait_until(LONG, stale));
    let external = cluster.external.as_ref().unwrap();
    assert!(
        external
            .command("nft")
            .args(["delete table ip cut"])
            .status()
            .unwrap()
            .success()
    );

    cluster.agree().unwrap();
    assert!(wait_until(LONG, || all_alive(&cluster)));
    assert!(open(&cluster, "red/new", "red/back2"));
    talk.nothing_was_lost();
}

#[test]
fn an_etcd_that_was_made_anew_is_told_everything_again() {
    kernel_test!();
    let mut cluster = cluster(EtcdOptions::default(), "tenant-isolation");
    cluster
        .add_service(
            "red/web",
            "--address 172.16.0.1 --port tcp/80=8080 --selector app=backend",
        )
        .unwrap();
    cluster.nodes[0].json(&["namespace", "label", "red", "zone=a"]).unwrap();
    let talk = talk(&cluster);
    let etcd = cluster.etcd.as_mut().unwrap();
    etcd.wipe().unwrap();
    etcd.run().unwrap();
    let etcd = cluster.etcd.as_ref().unwrap();
    let keys = |folder: &str| {
        let keys = etcd
            .ctl(&["get", "--prefix", "--keys-only", &format!("/wasmgate/{folder}/")])
            .unwrap();
        keys.split_whitespace().count()
    };
    let entered = || {
        (
            keys("nodes"),
            keys("alive"),
            keys("pods"),
            keys("policy"),
            keys("modules"),
        )
    };
    assert!(wait_until(LONG, || entered() == (2, 2, 4, 1, 1)), "{:?}", entered());
    // And what is no node's own.
    let shared = || ["tenants", "identities", "namespaces", "services"].map(keys);
    assert!(wait_until(LONG, || shared() == [1, 1, 1, 1]), "{:?}", shared());
    // The policy stays in force, also on a node that starts now, and there is no moment without one when the next comes.
    cluster.nodes[1].stop(true).unwrap();
    cluster.nodes[1].start().unwrap();
    assert!(open(&cluster, "red/front1", "red/back2"));
    cluster.load("tenant-isolation").unwrap();
    assert!(cluster.delete_service("red/web").unwrap());
    cluster.agree().unwrap();
    talk.nothing_was_lost();
    cluster.load("web-app").unwrap();
    let _listener = Listener::new(cluster.pod("red/front2").netns.name(), 8080).unwrap();
    assert!(!open(&cluster, "red/back1", "red/front2"), "the policy before it");
}

fn keys(cluster: &Cluster, folder: &str) -> usize {
    let etcd = cluster.etcd.as_ref().unwrap();
    let keys = etcd.ctl(&["get", "--prefix", "--keys-only", &format!("/wasmgate/{folder}/")]);
    keys.unwrap().split_whitespace().count()
}

#[test]
fn a_node_that_is_away_is_not_forgotten_with_what_etcd_has_lost() {
    kernel_test!();
    let etcd = EtcdOptions {
        hold_seconds: Some(20),
        ..EtcdOptions::default()
    };
    let mut cluster = cluster(etcd, "tenant-isolation");
    let talk = talk(&cluster);
    cluster.nodes[1].stop(true).unwrap();
    let etcd = cluster.etcd.as_mut().unwrap();
    etcd.wipe().unwrap();
    etcd.run().unwrap();
    // First the others are given the time to speak for themselves.
    let entered = || ["nodes", "addresses", "alive", "pods"].map(|folder| keys(&cluster, folder));
    assert!(wait_until(LONG, || entered() == [1, 1, 1, 2]), "{:?}", entered());
    assert!(wait_until(2 * LONG, || entered() == [2, 2, 1, 4]), "{:?}", entered());
    let status = cluster.nodes[0].json(&["status"]).unwrap();
    assert_eq!(status["nodes"][1]["state"], "stale", "{status}");
    cluster.nodes[1].start().unwrap();
    cluster.agree().unwrap();
    assert!(wait_until(LONG, || all_alive(&cluster)));
    talk.nothing_was_lost();
}

/// What a value is in etcd, or what it becomes.
fn raw(cluster: &Cluster, key: &Key, value: Option<Vec<u8>>) -> Option<Vec<u8>> {
    let store = format!("etcd:{}", cluster.etcd.as_ref().unwrap().url());
    let patient = EtcdConfig {
        answer_seconds: 30,
        ..EtcdConfig::default()
    };
    let store = EtcdStore::open(&store, &patient).unwrap();
    let external = cluster.external.as_ref().unwrap();
    let asked = in_netns(external.name(), || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            if let Some(value) = value {
                store.put(key, value, Expect::Any).await.unwrap();
            }
            store.get(key).await.unwrap().map(|found| found.value)
        })
    });
    asked.unwrap()
}

/// Ends what is between the nodes and etcd, or begins it again.
fn cut(cluster: &Cluster, rules: &str) {
    let external = cluster.external.as_ref().unwrap();
    assert!(external.command("nft").arg(rules).status().unwrap().success());
}

const CUT: &str = "add table ip cut; add chain ip cut in { type filter hook input priority 0; iif != lo drop; }";
const MEND: &str = "delete table ip cut";

/// Makes etcd anew, and cuts it off until it has what a test says that it has.
fn wipe_behind_the_nodes_backs(cluster: &mut Cluster) {
    cut(cluster, CUT);
    for node in 0..2 {
        assert!(wait_until(LONG, || problem(cluster, node).is_some()));
    }
    let etcd = cluster.etcd.as_mut().unwrap();
    etcd.wipe().unwrap();
    etcd.run().unwrap();
}

#[test]
fn a_backup_does_not_bring_back_what_a_later_policy_has_revoked() {
    kernel_test!();
    let mut cluster = cluster(EtcdOptions::default(), "tenant-isolation");
    let policy = Key::new(Collection::Policy, records::POLICY);
    let before = raw(&cluster, &policy, None).unwrap();
    cluster.load("web-app").unwrap();
    let in_force = raw(&cluster, &policy, None).unwrap();
    let _listeners = ["red/front2", "red/back1", "red/back2"].map(|name| {
        let pod = cluster.pod(name);
        Listener::new(pod.netns.name(), 8080).unwrap()
    });
    let stream = |(from, to)| {
        let (from, to) = (cluster.pod(from), cluster.pod(to));
        tcp_open(from.netns.name(), to.address, 8080, WAIT).unwrap()
    };
    let mut streams = [("red/front1", "red/back2"), ("red/front2", "red/back1")].map(stream);
    let revoked = |cluster: &Cluster| !open(cluster, "red/back1", "red/front2");
    assert!(revoked(&cluster));
    let generations = |cluster: &Cluster| {
        [0, 1].map(|node: usize| cluster.nodes[node].json(&["status"]).unwrap()["generation"].clone())
    };
    let generation = generations(&cluster);
    wipe_behind_the_nodes_backs(&mut cluster);
    raw(&cluster, &policy, Some(before.clone()));
    cut(&cluster, MEND);
    let entered = || raw(&cluster, &policy, None).unwrap() == in_force;
    assert!(wait_until(LONG, || {
        assert!(revoked(&cluster));
        assert!(streams.iter_mut().all(|stream| stream.exchange(WAIT).unwrap()));
        entered()
    }));
    assert!(
        wait_until(LONG, || keys(&cluster, "modules") == 2),
        "those that can be gone back to"
    );
    assert!(wait_until(LONG, || all_alive(&cluster)));
    assert!(streams.iter_mut().all(|stream| stream.exchange(WAIT).unwrap()));
    assert_eq!(generations(&cluster), generation, "not for a moment");

    // Nor does it where nobody was there when it was restored.
    for node in &mut cluster.nodes {
        node.stop(true).unwrap();
    }
    raw(&cluster, &policy, Some(before));
    for node in &mut cluster.nodes {
        node.start().unwrap();
    }
    assert!(revoked(&cluster));
    let entered = || raw(&cluster, &policy, None).unwrap() == in_force;
    assert!(wait_until(LONG, || entered() && all_alive(&cluster)));
    assert!(revoked(&cluster));
    cluster.load("tenant-isolation").unwrap();
    assert!(open(&cluster, "red/back1", "red/front2"), "what comes later counts");
}

#[test]
fn a_node_that_starts_when_etcd_has_lost_everything_goes_on_with_its_policy() {
    kernel_test!();
    let mut cluster = cluster(EtcdOptions::default(), "tenant-isolation");
    // What is on other nodes is not known until they have said so.
    let _listener = Listener::new(cluster.pod("red/back1").netns.name(), 8080).unwrap();
    let (from, to) = (cluster.pod("red/front1"), cluster.pod("red/back1"));
    let traffic = Traffic::paced(from.netns.name(), to.address, 8080, WAIT, Duration::from_millis(2));
    for node in &mut cluster.nodes {
        node.stop(true).unwrap();
    }
    let etcd = cluster.etcd.as_mut().unwrap();
    etcd.wipe().unwrap();
    etcd.run().unwrap();
    for node in &mut cluster.nodes {
        node.start().unwrap();
    }
    cluster.agree().unwrap();
    assert!(wait_until(LONG, || keys(&cluster, "policy") == 1 && keys(&cluster, "modules") == 1));
    let _other = Listener::new(cluster.pod("red/back2").netns.name(), 8080).unwrap();
    assert!(open(&cluster, "red/front1", "red/back2"));
    assert!(wait_until(LONG, || all_alive(&cluster)));
    traffic.lost_nothing();
}

#[test]
fn a_node_that_has_never_had_a_lease_is_stale_and_can_be_deleted() {
    kernel_test!();
    let cluster = cluster(EtcdOptions::default(), "tenant-isolation");
    let record = NodeRecord {
        name: "ghost".to_owned(),
        underlay: "192.0.2.77".parse().unwrap(),
        pod_cidrs: vec!["10.77.0.0/24".parse().unwrap()],
    };
    let key = Key::new(Collection::Nodes, "ghost");
    raw(&cluster, &key, Some(records::encode(&key, &record).unwrap()));
    let node = &cluster.nodes[0];
    let state = || {
        let status = node.json(&["status"]).unwrap();
        let nodes = status["nodes"].as_array().unwrap().clone();
        nodes
            .into_iter()
            .find(|one| one["node"] == "ghost" || one["name"] == "ghost")
    };
    assert!(
        wait_until(LONG, || state().is_some_and(|its| its["state"] == "stale")),
        "{:?}",
        state()
    );
    node.json(&["node", "delete", "ghost"]).unwrap();
    assert!(wait_until(LONG, || state().is_none()));
    assert!(node.refusal(&["node", "delete", "node2"]).unwrap().contains("is alive"));
}

#[test]
fn what_numbers_mean_to_packets_wins_over_a_backup() {
    kernel_test!();
    let mut cluster = cluster(EtcdOptions::default(), "tenant-isolation");
    cluster.add_pod(0, "blue/a", &[("app", "other")]).unwrap();
    cluster.agree().unwrap();
    let talk = talk(&cluster);
    let number = |pod: &str| {
        let endpoints = cluster.nodes[0].json(&["endpoint", "list"]).unwrap();
        let mut all = endpoints.as_array().unwrap().iter();
        let address = cluster.pod(pod).address.to_string();
        let its = all.find(|endpoint| endpoint["addresses"][0] == address);
        Key::new(Collection::Identities, its.unwrap()["identity"].as_u64().unwrap())
    };
    let [red, blue] = ["red/back1", "blue/a"].map(number);
    assert_ne!(red, blue);
    let [means_red, means_blue] = [&red, &blue].map(|key| raw(&cluster, key, None).unwrap());
    wipe_behind_the_nodes_backs(&mut cluster);
    // As if the one number had meant the other at the time of the backup.
    raw(&cluster, &red, Some(means_blue.clone()));
    cut(&cluster, MEND);
    let entered = || [&red, &blue].map(|key| raw(&cluster, key, None));
    let right = [Some(means_red), Some(means_blue)];
    assert!(wait_until(LONG, || entered() == right), "{:?}", entered());
    cluster.agree().unwrap();
    assert!(open(&cluster, "red/back1", "red/back2"));
    assert!(!open(&cluster, "blue/a", "red/back2"));
    talk.nothing_was_lost();
}
