//! Files of cases.

use anyhow::{Context, ensure};
use flate2::read::GzDecoder;
use serde::Deserialize;
use serde_json::Value;
use std::{collections::BTreeMap, fs, io::Read, net::IpAddr, path::Path};

/// A case: a cluster, and what should reach what in it, step by step.
#[derive(Clone, Debug, Deserialize)]
pub struct Case {
    pub name: String,
    pub nodes: Vec<Node>,
    #[serde(default)]
    pub externals: Vec<IpAddr>,
    pub steps: Vec<Step>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Node {
    pub name: String,
    pub cidrs: Vec<String>,
}

/// A full snapshot of the cluster.
#[derive(Clone, Debug, Deserialize)]
pub struct Step {
    #[serde(default)]
    pub note: String,
    pub policies: Vec<Value>,
    pub namespaces: BTreeMap<String, BTreeMap<String, String>>,
    pub pods: Vec<Pod>,
    pub expect: Vec<Verdict>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub ip: IpAddr,
    pub node: String,
    #[serde(default)]
    pub ports: Vec<Port>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Port {
    #[serde(default)]
    pub name: String,
    #[serde(rename = "port")]
    pub number: u16,
    #[serde(default = "tcp")]
    pub protocol: String,
}

fn tcp() -> String {
    "TCP".to_owned()
}

/// Source, destination, protocol, port, and whether the connection should open.
#[derive(Clone, Debug, Deserialize)]
pub struct Verdict(pub String, pub String, pub String, pub u16, pub bool);

impl Pod {
    /// `NAMESPACE/NAME`.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// Reads a file: JSON, or JSON compressed by gzip.
pub fn read(path: &Path) -> anyhow::Result<Vec<Case>> {
    let context = || format!("suite {}", path.display());
    let mut bytes = fs::read(path).with_context(context)?;
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut plain = Vec::new();
        GzDecoder::new(&bytes[..])
            .read_to_end(&mut plain)
            .with_context(context)?;
        bytes = plain;
    }
    let cases: Vec<Case> = serde_json::from_slice(&bytes).with_context(context)?;
    for case in &cases {
        for (index, step) in case.steps.iter().enumerate() {
            check(case, step).with_context(|| format!("{}: case {:?}, step {}", context(), case.name, index + 1))?;
        }
    }
    Ok(cases)
}

fn check(case: &Case, step: &Step) -> anyhow::Result<()> {
    for pod in &step.pods {
        let known = case.nodes.iter().any(|node| node.name == pod.node);
        ensure!(
            known,
            "pod {} is on node {:?}, which the case does not have",
            pod.full_name(),
            pod.node
        );
    }
    for Verdict(from, to, protocol, ..) in &step.expect {
        ensure!(
            protocol == "TCP" || protocol == "UDP",
            "the protocol {protocol:?} can't be probed"
        );
        for end in [from, to] {
            let known = step.pods.iter().any(|pod| pod.full_name() == *end)
                || case.externals.iter().any(|address| address.to_string() == *end);
            ensure!(known, "{end:?} is neither a pod of the step nor one of `externals`");
        }
    }
    Ok(())
}
