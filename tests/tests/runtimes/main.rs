//! Real container runtimes on a node: podman with its CNI backend, and containerd by `ctr run --cni`.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

mod containerd;
mod leftovers;
mod podman;

use harness::{Cluster, amount, plugin, run, wait_until};
use leftovers::Leftovers;
use serde_json::{Value, json};
use std::{
    fs,
    path::PathBuf,
    process::Output,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

/// Runtimes share folders of the machine: one test after the other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const LONG: Duration = Duration::from_secs(90);
/// How many containers of a burst there are at a time.
const AT_ONCE: usize = 8;

/// Containers that come and go in a burst.
fn containers() -> usize {
    usize::try_from(amount("WASMGATE_CONTAINERS", 24, 100)).unwrap()
}

/// A node with a policy that lets frontends reach backends, and what runtimes need: the plugin, and an image.
struct Site {
    cluster: Cluster,
    // Dropped after what runs on the node.
    _leftovers: Leftovers,
    _turn: MutexGuard<'static, ()>,
}

impl Site {
    fn new() -> Self {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let leftovers = Leftovers::watch();
        let cluster = Cluster::one_node().unwrap();
        cluster.load("web-app").unwrap();
        let site = Self {
            cluster,
            _leftovers: leftovers,
            _turn: turn,
        };
        for folder in ["bin", "net.d", "root/bin", "root/www"] {
            fs::create_dir_all(site.path(folder)).unwrap();
        }
        fs::copy(plugin().unwrap(), site.path("bin/wasmgate-cni")).unwrap();
        fs::copy("/bin/busybox", site.path("root/bin/busybox")).unwrap();
        for name in ["sh", "sleep", "nc", "httpd", "true"] {
            std::os::unix::fs::symlink("busybox", site.path("root/bin").join(name)).unwrap();
        }
        fs::write(site.path("root/www/index.html"), "served\n").unwrap();
        let (root, image) = (site.text("root"), site.text("root.tar"));
        run("tar", &["-C", &root, "-cf", &image, "."]).unwrap();
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.cluster.folder().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// The configuration of a network.
    fn network(&self, name: &str, labels: &Value) -> String {
        let socket = self.cluster.nodes[0].socket();
        let plugin = json!({ "type": "wasmgate-cni", "socket": socket, "namespace": "red", "labels": labels });
        json!({ "cniVersion": "0.4.0", "name": name, "plugins": [plugin] }).to_string()
    }

    fn pods(&self) -> Vec<Value> {
        let listed = self.cluster.nodes[0].json(&["endpoint", "list"]).unwrap();
        listed.as_array().unwrap().clone()
    }

    /// Address of the pod of this name, when it has one.
    fn address(&self, name: &str) -> String {
        let mut found = None;
        let there = wait_until(LONG, || {
            let pods = self.pods();
            found = pods
                .iter()
                .find(|pod| pod["pod"]["name"] == name)
                .map(|pod| pod["addresses"][0].clone());
            found.is_some()
        });
        assert!(there, "no pod {name}: {:?}", self.pods());
        found.unwrap().as_str().unwrap().to_owned()
    }

    /// Nothing of any container is left: pods, interfaces, records.
    fn nothing_is_left(&self) {
        assert!(wait_until(LONG, || self.pods().is_empty()), "{:?}", self.pods());
        let links = self.cluster.nodes[0].netns.ip(&["-o", "link"]).unwrap();
        assert!(!links.contains(" wg-"), "{links}");
        assert_eq!(fs::read_dir(self.path("store/pods")).unwrap().count(), 0);
    }
}

/// Does something many times, some of them at a time.
fn burst(work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= containers() {
                        return;
                    }
                    work(number);
                }
            });
        }
    });
}

fn success(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    said
}

/// Asks a server for its page. A static busybox can't look up names, not even its own wget's.
fn question(address: &str) -> String {
    format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 2 {address} 8080")
}
