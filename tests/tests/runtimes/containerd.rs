//! containerd, by `ctr run --cni`.

use super::{LONG, Site, burst, podman::Podman, question, success};
use harness::{kernel_test, wait_until};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// A containerd of its own; ended when dropped.
struct Containerd<'a> {
    site: &'a Site,
    daemon: Child,
}

impl<'a> Containerd<'a> {
    fn new(site: &'a Site) -> Self {
        let config = "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n";
        fs::write(site.path("containerd.toml"), config).unwrap();
        let daemon = site.cluster.nodes[0]
            .netns
            .command("containerd")
            .arg("--config")
            .arg(site.path("containerd.toml"))
            .arg("--root")
            .arg(site.path("containerd"))
            .arg("--state")
            .arg(site.path("containerd-run"))
            .arg("--address")
            .arg(site.path("containerd.sock"))
            .stdout(Stdio::null())
            .stderr(fs::File::create(site.path("containerd.log")).unwrap())
            .spawn()
            .unwrap();
        let containerd = Self { site, daemon };
        let log = || fs::read_to_string(site.path("containerd.log")).unwrap();
        let ready = wait_until(LONG, || {
            containerd.ctr("", &["version"]).output().unwrap().status.success()
        });
        assert!(ready, "{}", log());
        containerd
    }

    /// A command of ctr, which looks for networks and plugins only in `/etc/cni/net.d` and `/opt/cni/bin`: it has its own.
    fn ctr(&self, labels: &str, arguments: &[&str]) -> Command {
        let network = self.site.network("web", &json!({ "app": labels }));
        let script = "mount -t tmpfs none /etc && mkdir -p /etc/cni/net.d && printf %s \"$NETWORK\" > /etc/cni/net.d/10-web.conflist \
             && mount -t tmpfs none /opt && mkdir -p /opt/cni && ln -s \"$BIN\" /opt/cni/bin && exec ctr --address \"$ADDRESS\" \"$@\"";
        let mut command = self.site.cluster.nodes[0].netns.command("unshare");
        command
            .args(["--mount", "sh", "-c", script, "ctr"])
            .args(arguments)
            .env("NETWORK", network)
            .env("BIN", self.site.path("bin"))
            .env("ADDRESS", self.site.path("containerd.sock"));
        command
    }

    fn run(&self, name: &str, app: &str, program: &[&str]) -> Command {
        let start = ["run", "--rm", "--cni", "--snapshotter", "native", IMAGE, name];
        self.ctr(app, &[&start[..], program].concat())
    }
}

/// Name of the image that is imported.
const IMAGE: &str = "localhost/busybox:latest";

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// A container that runs in the foreground of its `ctr`; ended when dropped.
struct Foreground<'a> {
    containerd: &'a Containerd<'a>,
    name: String,
    ctr: Child,
}

impl<'a> Foreground<'a> {
    fn start(containerd: &'a Containerd<'a>, name: &str, app: &str, program: &[&str]) -> Self {
        let mut command = containerd.run(name, app, program);
        let ctr = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let name = name.to_owned();
        Self { containerd, name, ctr }
    }
}

impl Drop for Foreground<'_> {
    fn drop(&mut self) {
        let kill = ["tasks", "kill", "--signal", "KILL", &self.name];
        let _ = self.containerd.ctr("", &kill).output();
        let _ = self.ctr.wait();
    }
}

/// An image as containerd imports it (OCI image layout 1.0.0), of one layer.
fn oci_image(site: &Site) -> PathBuf {
    let podman = Podman(site);
    podman.set_up();
    let archive = site.path("image.tar");
    let path = archive.display().to_string();
    success(&podman.run(
        &["save", "--format", "oci-archive", "-o", &path, "localhost/busybox"],
        "",
    ));
    archive
}

fn import(containerd: &Containerd<'_>, archive: &Path) {
    let archive = archive.display().to_string();
    let arguments = ["images", "import", "--snapshotter", "native", &archive];
    success(&containerd.ctr("", &arguments).output().unwrap());
}

#[test]
fn containerd_attaches_containers_and_policy_is_enforced_between_them() {
    kernel_test!();
    let site = Site::new();
    let archive = oci_image(&site);
    let containerd = Containerd::new(&site);
    import(&containerd, &archive);
    let back = Foreground::start(
        &containerd,
        "back",
        "backend",
        &["httpd", "-f", "-p", "8080", "-h", "/www"],
    );
    let ask = question(&site.address("default-back"));
    let fetch = |name: &str, app: &str| containerd.run(name, app, &["sh", "-c", &ask]).output().unwrap();
    // A moment after its interface the server is there, too.
    assert!(wait_until(LONG, || fetch("front", "frontend").status.success()));
    assert!(success(&fetch("front", "frontend")).ends_with("\r\nserved\n"));
    assert!(!fetch("other", "other").status.success());
    drop(back);
    site.nothing_is_left();

    burst(|number| {
        let output = containerd.run(&format!("burst-{number}"), "burst", &["true"]).output();
        success(&output.unwrap());
    });
    site.nothing_is_left();
}
