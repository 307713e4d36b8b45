//! A node of a cluster: a namespace with a hostd in it.

use crate::{Namespace, Options, artifacts, probe::wait_until, run};
use anyhow::{Context, bail, ensure};
use serde_json::Value;
use std::{
    fmt::Write as _,
    fs::{self, File},
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::Duration,
};

/// hostd has to be ready within this time, also on a busy machine.
pub(crate) const START: Duration = Duration::from_secs(90);

/// A node: a namespace with a hostd in it.
#[derive(Debug)]
pub struct Node {
    /// Its namespace.
    pub netns: Namespace,
    /// Its name.
    pub name: String,
    /// Its underlay address.
    pub underlay: IpAddr,
    pub(crate) folder: PathBuf,
    pub(crate) hostd: Option<Child>,
}

impl Node {
    pub(crate) fn configure(&self, options: &Options, number: u8, store: &str, table: &str) -> anyhow::Result<()> {
        let mut text = String::new();
        writeln!(text, "node = {:?}", self.name)?;
        writeln!(text, "underlay = \"{}\"", self.underlay)?;
        writeln!(text, "pod_cidrs = {:?}", options.cidrs_of(number))?;
        text += store;
        writeln!(text, "state_dir = \"{}\"", self.folder.join("state").display())?;
        writeln!(text, "socket = \"{}\"", self.socket().display())?;
        writeln!(text, "bpffs = \"{}\"", self.bpffs().display())?;
        // On a busy machine, or a busy disk, a load may take long; whoever waits for its end says so.
        let tables = match options.tables.split_once("[lease]") {
            _ if options.tables.contains("load_seconds") => options.tables.clone(),
            Some((before, lease)) => format!("{before}[lease]\nload_seconds = 60{lease}"),
            None => format!("{}\n[lease]\nload_seconds = 60", options.tables),
        };
        writeln!(text, "{}\n{table}\n{tables}", options.keys)?;
        Ok(fs::write(self.config(), text)?)
    }

    /// Its configuration file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.folder.join("node.toml")
    }

    /// Its control socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.join("hostd.sock")
    }

    /// Its folder of pins.
    #[must_use]
    pub fn bpffs(&self) -> PathBuf {
        self.folder.join("bpf")
    }

    fn log_file(&self) -> PathBuf {
        self.folder.join("hostd.log")
    }

    /// What hostd has logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    /// Process number of its hostd.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.hostd.as_ref().map(Child::id)
    }

    /// Starts hostd, and waits until it is ready.
    ///
    /// # Errors
    ///
    /// Where it ends, or is not ready in time; with its log.
    pub fn start(&mut self) -> anyhow::Result<()> {
        self.launch()?;
        self.wait_until_ready()
    }

    /// Starts hostd.
    ///
    /// # Errors
    ///
    /// Where it can't be started.
    pub fn launch(&mut self) -> anyhow::Result<()> {
        let log = File::options().create(true).append(true).open(self.log_file())?;
        let child = self
            .netns
            .command(artifacts::hostd()?)
            .args(["run", "--config"])
            .arg(self.config())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        self.hostd = Some(child);
        Ok(())
    }

    /// Waits until hostd is ready.
    ///
    /// # Errors
    ///
    /// Where it ends, or is not ready in time; with its log.
    pub fn wait_until_ready(&mut self) -> anyhow::Result<()> {
        let child = self.hostd.as_mut().context("hostd does not run")?;
        let mut ended = None;
        let socket = self.folder.join("hostd.sock");
        let ready = wait_until(START, || {
            ended = child.try_wait().ok().flatten();
            ended.is_some() || query(&socket, &["status"]).is_ok_and(|output| output.status.success())
        });
        if let Some(status) = ended {
            self.hostd = None;
            bail!("hostd on {} ended with {status}:\n{}", self.name, self.log());
        }
        ensure!(ready, "hostd on {} is not ready:\n{}", self.name, self.log());
        Ok(())
    }

    /// Ends hostd: by SIGTERM, or by SIGKILL. Its datapath stays.
    ///
    /// # Errors
    ///
    /// Where it does not run.
    pub fn stop(&mut self, kill: bool) -> anyhow::Result<()> {
        let mut child = self.hostd.take().context("hostd does not run")?;
        if kill {
            child.kill()?;
        } else {
            let pid = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        }
        child.wait()?;
        Ok(())
    }

    /// How hostd has ended by itself.
    ///
    /// # Errors
    ///
    /// Where it does not run, or goes on.
    pub fn ended(&mut self) -> anyhow::Result<ExitStatus> {
        let child = self.hostd.as_mut().context("hostd does not run")?;
        let mut status = None;
        wait_until(START, || {
            status = child.try_wait().ok().flatten();
            status.is_some()
        });
        let status = status.context("hostd goes on")?;
        self.hostd = None;
        Ok(status)
    }

    /// Runs a command of hostd against this node.
    ///
    /// # Errors
    ///
    /// Where it can't be run.
    pub fn hostd(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        query(&self.socket(), arguments)
    }

    /// The same; the answer is the JSON that it prints.
    ///
    /// # Errors
    ///
    /// Where hostd refuses; with what it said.
    pub fn json(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let output = self.hostd(&[&["--json"], arguments].concat())?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Changes a label, `k=v` or `k-`, of one of its pods, given as `NAMESPACE/NAME`; the answer is the pod.
    ///
    /// # Errors
    ///
    /// Where hostd refuses.
    pub fn label(&self, pod: &str, change: &str) -> anyhow::Result<Value> {
        let (namespace, name) = pod.split_once('/').context("a pod is NAMESPACE/NAME")?;
        self.json(&["endpoint", "label", "--namespace", namespace, "--name", name, change])
    }

    /// What hostd says when it refuses a command.
    ///
    /// # Errors
    ///
    /// Where it does not refuse.
    pub fn refusal(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.hostd(arguments)?;
        ensure!(
            !output.status.success(),
            "hostd {} was not refused",
            arguments.join(" ")
        );
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Addresses that the node knows, but for its own: entries of its ipcache.
    ///
    /// # Errors
    ///
    /// Where hostd does not answer.
    pub fn others_addresses(&self) -> anyhow::Result<Vec<Value>> {
        let listed = self.json(&["ipcache", "list"])?;
        let entries = listed.as_array().cloned().unwrap_or_default();
        Ok(entries.into_iter().filter(|entry| entry["name"] != "host").collect())
    }

    /// Packets dropped for this reason so far.
    ///
    /// # Errors
    ///
    /// Where hostd does not answer.
    pub fn drops(&self, reason: &str) -> anyhow::Result<u64> {
        Ok(counter(&self.json(&["status"])?["drops"], reason))
    }

    /// Packets forwarded on this path so far.
    ///
    /// # Errors
    ///
    /// Where hostd does not answer.
    pub fn forwarded(&self, path: &str) -> anyhow::Result<u64> {
        Ok(counter(&self.json(&["status"])?["forwarded"], path))
    }
}

fn counter(counters: &Value, name: &str) -> u64 {
    let find = |counter: &&Value| counter["name"] == name;
    let found = counters.as_array().and_then(|counters| counters.iter().find(find));
    found.and_then(|counter| counter["packets"].as_u64()).unwrap_or(0)
}

fn query(socket: &Path, arguments: &[&str]) -> anyhow::Result<Output> {
    Ok(Command::new(artifacts::hostd()?)
        .arg("--socket")
        .arg(socket)
        .args(arguments)
        .output()?)
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.hostd.take() {
            // It may have ended already; then there is nothing to end.
            let _ = child.kill();
            if let Err(error) = child.wait() {
                eprintln!("ending hostd on {}: {error}", self.name);
            }
        }
        if self.bpffs().exists()
            && let Err(error) = run("umount", &[&self.bpffs().display().to_string()])
        {
            eprintln!("{error:#}");
        }
        if std::thread::panicking() {
            eprintln!("--- log of {}:\n{}", self.name, self.log());
        }
    }
}
