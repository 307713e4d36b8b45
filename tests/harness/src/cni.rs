//! The CNI plugin, as a container runtime starts it.

use crate::{Node, artifacts, in_netns};
use anyhow::Context;
use serde_json::{Value, json};
use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// What a runtime tells the plugin for one container.
#[derive(Clone, Debug)]
pub struct Cni {
    /// The network's configuration.
    pub network: Value,
    /// Variables of the environment.
    pub environment: Vec<(&'static str, String)>,
    /// Somebody else's plugin, with the namespace that it runs in.
    other: Option<(PathBuf, String)>,
}

impl Cni {
    /// For a container on a node's network, with the namespace at a path; none for a container without one.
    #[must_use]
    pub fn new(node: &Node, container: &str, netns: Option<&str>) -> Self {
        let mut environment = vec![
            ("CNI_CONTAINERID", container.to_owned()),
            ("CNI_IFNAME", "eth0".to_owned()),
            ("CNI_PATH", "/opt/cni/bin".to_owned()),
        ];
        environment.extend(netns.map(|path| ("CNI_NETNS", path.to_owned())));
        Self {
            network: json!({
                "cniVersion": "1.1.0",
                "name": "net",
                "type": "wasmgate-cni",
                "socket": node.socket(),
            }),
            environment,
            other: None,
        }
    }

    /// Somebody else's plugin, run in this network namespace.
    #[must_use]
    pub fn of(mut self, plugin: &Path, node: &str) -> Self {
        self.other = Some((plugin.to_owned(), node.to_owned()));
        self
    }

    /// Sets a key of the network's configuration.
    #[must_use]
    pub fn with(mut self, key: &str, value: Value) -> Self {
        self.network[key] = value;
        self
    }

    /// Sets a variable of the environment.
    #[must_use]
    pub fn set(mut self, name: &'static str, value: &str) -> Self {
        self.environment.retain(|(known, _)| *known != name);
        self.environment.push((name, value.to_owned()));
        self
    }

    /// Runs an operation; what it answers, or the error that it prints. Nothing is `null`.
    ///
    /// # Errors
    ///
    /// Where the plugin can't be run, or prints what is no JSON.
    pub fn run(&self, command: &str) -> anyhow::Result<Result<Value, Value>> {
        let output = self.start(command)?.wait_with_output()?;
        let said = match output.stdout.as_slice() {
            [] => Value::Null,
            text => serde_json::from_slice(text).context("the plugin prints no JSON")?,
        };
        Ok(if output.status.success() { Ok(said) } else { Err(said) })
    }

    /// Starts an operation.
    ///
    /// # Errors
    ///
    /// Where the plugin can't be run.
    pub fn start(&self, command: &str) -> anyhow::Result<Child> {
        let mut plugin = Command::new(match &self.other {
            Some((plugin, _)) => plugin.clone(),
            None => artifacts::plugin()?,
        });
        plugin
            .env_clear()
            .env("CNI_COMMAND", command)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        let mut child = match &self.other {
            Some((_, node)) => in_netns(node, || plugin.spawn())??,
            None => plugin.spawn()?,
        };
        let text = self.network.to_string();
        child.stdin.take().context("no stdin")?.write_all(text.as_bytes())?;
        Ok(child)
    }
}
