//! podman with its CNI backend.

use super::{Site, burst, question, success};
use harness::kernel_test;
use serde_json::{Value, json};
use std::{collections::BTreeSet, fs, path::PathBuf, process::Output};

/// The network namespaces that podman has made.
fn network_namespaces() -> BTreeSet<PathBuf> {
    let listed = fs::read_dir("/run/netns").unwrap();
    let podmans = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("netns-");
    listed.map(|file| file.unwrap().path()).filter(podmans).collect()
}

/// podman with storage of its own; its containers are removed when it is dropped.
pub struct Podman<'a>(pub &'a Site);

impl Podman<'_> {
    pub fn set_up(&self) {
        let site = self.0;
        let folder = |name: &str| site.text(name);
        let conf = format!(
            "[network]\nnetwork_backend = \"cni\"\ncni_plugin_dirs = [{:?}]\nnetwork_config_dir = {:?}\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\nlock_type = \"file\"\n\
             runtime = \"runc\"\ntmp_dir = {:?}\n\
             [containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=4096:4096\"]\n",
            folder("bin"),
            folder("net.d"),
            folder("podman-tmp"),
        );
        fs::write(site.path("containers.conf"), conf).unwrap();
        fs::write(site.path("net.d/10-web.conflist"), site.network("web", &json!({}))).unwrap();
        success(&self.run(&["import", &folder("root.tar"), "busybox"], ""));
    }

    pub fn run(&self, arguments: &[&str], labels: &str) -> Output {
        let site = self.0;
        let mut command = site.cluster.nodes[0].netns.command("podman");
        command
            .env("CONTAINERS_CONF", site.path("containers.conf"))
            .env("CNI_ARGS", labels)
            .arg("--root")
            .arg(site.path("podman"))
            .arg("--runroot")
            .arg(site.path("podman-run"))
            .args(["--storage-driver", "vfs"])
            .args(arguments);
        command.output().unwrap()
    }

    fn start(&self, name: &str, app: &str, program: &[&str]) {
        let arguments = [
            &["run", "-d", "--name", name, "--network", "web", "busybox"][..],
            program,
        ]
        .concat();
        success(&self.run(&arguments, &format!("WASMGATE_LABELS=app:{app}")));
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        let _ = self.run(&["rm", "--all", "--force", "--time", "0"], "");
        // Its storage has mounts of its own.
        let _ = self.run(&["unmount", "--all", "--force"], "");
    }
}

#[test]
fn podman_attaches_containers_and_policy_is_enforced_between_them() {
    kernel_test!();
    let namespaces = network_namespaces();
    let site = Site::new();
    let podman = Podman(&site);
    podman.set_up();
    let serve = ["httpd", "-f", "-p", "8080", "-h", "/www"];
    podman.start("back", "backend", &serve);
    podman.start("front", "frontend", &["sleep", "1000"]);
    podman.start("other", "other", &["sleep", "1000"]);
    let ask = question(&site.address("back"));
    let fetch = |from: &str| podman.run(&["exec", from, "sh", "-c", &ask], "");
    assert!(success(&fetch("front")).ends_with("\r\nserved\n"));
    assert!(!fetch("other").status.success());
    // While they run.
    site.cluster.nodes[0].label("red/other", "app=frontend").unwrap();
    assert!(success(&fetch("other")).ends_with("\r\nserved\n"));
    // Its own word for it.
    let inspected = success(&podman.run(&["inspect", "back"], ""));
    let inspected: Value = serde_json::from_str(&inspected).unwrap();
    assert_eq!(
        inspected[0]["NetworkSettings"]["Networks"]["web"]["IPAddress"],
        site.address("back")
    );
    success(&podman.run(&["rm", "-f", "-t", "0", "back", "front", "other"], ""));
    site.nothing_is_left();

    burst(|number| {
        let name = format!("burst-{number}");
        let arguments = ["run", "--rm", "--name", &name, "--network", "web", "busybox", "true"];
        success(&podman.run(&arguments, "WASMGATE_LABELS=app:burst"));
    });
    site.nothing_is_left();
    assert_eq!(network_namespaces(), namespaces);
}
