//! Everything changes at once, under traffic: what may talk loses nothing, and what may not never gets through.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use harness::{Cluster, Listener, Namespace, Stop, Traffic, amount, kernel_test, tcp_lost, tcp_open, wait_until};
use std::{
    net::{SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

/// At least so long, and until each kind of change was made often enough, however busy the machine is.
fn at_least() -> Duration {
    Duration::from_secs(amount("WASMGATE_RACES_SECONDS", 4, 120))
}

const LONG: Duration = Duration::from_mins(3);

/// The same policies disagree on much, but under both of them red's frontend reaches red's backend at port 8080, and
/// blue reaches neither.
const POLICIES: [&str; 2] = ["tenant-isolation", "web-app"];

/// Sends datagrams as fast as it may, and counts what is answered: nothing ever should be.
fn knock(from: &str, to: SocketAddr, end: &AtomicBool, sent: &AtomicU64) -> u64 {
    harness::in_netns(from, || {
        let mut answered = 0;
        while !end.load(Ordering::Relaxed) {
            // A port of its own each time: a flow of its own each time.
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
            socket.send_to(b"knock", to).unwrap();
            sent.fetch_add(1, Ordering::Relaxed);
            answered += u64::from(socket.recv(&mut [0; 8]).is_ok());
        }
        answered
    })
    .unwrap()
}

/// The pods, with somebody listening on red's backends.
fn furnish() -> (Cluster, Vec<Listener>) {
    let mut cluster = Cluster::new().unwrap();
    for (node, name, app) in [
        (0, "red/frontend", "frontend"),
        (0, "red/near", "backend"),
        (1, "red/far", "backend"),
        (0, "blue/near", "frontend"),
        (1, "blue/far", "frontend"),
    ] {
        cluster.add_pod(node, name, &[("app", app)]).unwrap();
    }
    cluster.load(POLICIES[0]).unwrap();
    cluster.settle().unwrap();
    let listeners = BACKENDS
        .iter()
        .map(|name| Listener::new(cluster.pod(name).netns.name(), 8080).unwrap())
        .collect();
    (cluster, listeners)
}

const BACKENDS: [&str; 2] = ["red/near", "red/far"];

fn pick<T: Copy>(from: &[T], n: u64) -> T {
    from[usize::try_from(n).unwrap() % from.len()]
}

/// Whatever blue calls itself, it stays blue.
fn relabel(cluster: &Cluster, n: u64) {
    let label = format!("app={}", pick(&["frontend", "backend", "db", "other"], n));
    cluster.nodes[0].label("blue/near", &label).unwrap();
}

/// The same address for a blue pod and a red one in turn.
fn come_and_go(cluster: &Cluster, spare: &[Namespace; 2], n: u64) {
    let node = pick(&[0, 1], n);
    let namespace = pick(&["blue", "red"], n / 2);
    let address = format!("10.{}.0.99", node + 1);
    let (netns, address) = (spare[node].name(), address.as_str());
    let pod = ["--namespace", namespace, "--name", "churn"];
    let add = [&["endpoint", "add", "--netns", netns, "--address", address][..], &pod].concat();
    cluster.nodes[node].json(&add).unwrap();
    cluster.nodes[node]
        .json(&[&["endpoint", "delete"][..], &pod].concat())
        .unwrap();
}

/// Lines back and forth on one connection, each of which has to come back.
fn talk(cluster: &Cluster, to: &str, end: &AtomicBool) {
    let from = cluster.pod("red/frontend").netns.name();
    let mut stream = tcp_open(from, cluster.pod(to).address, 8080, Duration::from_secs(5)).unwrap();
    while !end.load(Ordering::Relaxed) {
        let answered = stream.exchange(Duration::from_secs(5)).unwrap();
        assert!(answered, "a stream that may go on has stopped");
    }
}

/// What each thread has done so far.
#[derive(Default)]
struct Done {
    loads: AtomicU64,
    labels: AtomicU64,
    pods: AtomicU64,
    knocks: AtomicU64,
}

impl Done {
    /// What each has to have done.
    fn least(&self) -> [(&'static str, &AtomicU64, u64); 4] {
        [
            ("loads", &self.loads, 3),
            ("labels", &self.labels, 10),
            ("pods", &self.pods, 4),
            ("knocks", &self.knocks, 1000),
        ]
    }

    fn describe(&self) -> String {
        let done = self
            .least()
            .map(|(what, count, least)| format!("{what}: {} ({least})", did(count)));
        done.join(", ")
    }
}

fn did(count: &AtomicU64) -> u64 {
    count.load(Ordering::Relaxed)
}

#[test]
fn changes_of_every_kind_under_traffic() {
    kernel_test!();
    let (cluster, _listeners) = furnish();
    // Under both policies: a node and its pods by UDP, the frontend and the backends by TCP.
    let echoes = BACKENDS.map(|name| {
        let pod = cluster.pod(name);
        let node = &cluster.nodes[pod.node];
        Traffic::start(node.netns.name(), pod.address, 8080, Duration::from_secs(1))
    });
    let spare = [Namespace::new("churn").unwrap(), Namespace::new("churn").unwrap()];
    let (end, done) = (AtomicBool::new(false), Done::default());
    let until_end = |work: &dyn Fn(u64), count: &AtomicU64| {
        while !end.load(Ordering::Relaxed) {
            work(count.fetch_add(1, Ordering::Relaxed));
        }
    };
    let answered: u64 = thread::scope(|scope| {
        let pairs = ["blue/near", "blue/far"]
            .into_iter()
            .flat_map(|from| BACKENDS.map(|to| (from, to)));
        let knocking: Vec<_> = pairs
            .map(|(from, to)| {
                let (from, to) = (cluster.pod(from).netns.name(), cluster.pod(to).address);
                let (end, knocks) = (&end, &done.knocks);
                scope.spawn(move || knock(from, SocketAddr::new(to, 8080), end, knocks))
            })
            .collect();
        for to in BACKENDS {
            let (cluster, end) = (&cluster, &end);
            scope.spawn(move || talk(cluster, to, end));
        }
        scope.spawn(|| until_end(&|n| drop(cluster.load(pick(&POLICIES, n + 1)).unwrap()), &done.loads));
        scope.spawn(|| until_end(&|n| relabel(&cluster, n), &done.labels));
        scope.spawn(|| until_end(&|n| come_and_go(&cluster, &spare, n), &done.pods));
        let _stop = Stop(&end);
        thread::sleep(at_least());
        let enough = || done.least().iter().all(|(_, count, least)| did(count) >= *least);
        assert!(wait_until(LONG, enough), "{}", done.describe());
        end.store(true, Ordering::Relaxed);
        knocking.into_iter().map(|knocking| knocking.join().unwrap()).sum()
    });
    eprintln!("{}", done.describe());
    assert_eq!(answered, 0, "of {} knocks", did(&done.knocks));
    for echo in echoes {
        let counts = echo.stop().unwrap();
        assert!(counts.answered > 100 && counts.lost == 0, "{counts:?}");
    }
    for pod in ["red/frontend", "red/near", "red/far"] {
        let lost = || tcp_lost(cluster.pod(pod).netns.name()).unwrap();
        assert!(
            wait_until(Duration::from_secs(5), || lost() == 0),
            "{} segments of {pod} were lost",
            lost()
        );
    }
}
