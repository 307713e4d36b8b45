//! What a container runtime waits for: the plugin's ADD, beside that of the reference plugin `ptp`.

use anyhow::{Context, anyhow};
use harness::{Cluster, Cni, Namespace};
use serde_json::json;
use std::{path::Path, time::Instant};
use wasmgate_tests::report::Samples;

/// The reference plugin: a veth pair and routes, with addresses from files, and no policy
/// (<https://www.cni.dev/plugins/current/main/ptp/>).
const PTP: &str = "/usr/lib/cni/ptp";

/// What both plugins do with containers of their own.
pub struct Adds {
    /// Index of the node.
    at: usize,
    ours: Vec<(Cni, Namespace)>,
    theirs: Vec<(Cni, Namespace)>,
    node: Namespace,
}

/// Milliseconds of our plugin's operations, and of the other's.
#[derive(Default)]
pub struct Times {
    pub ours: [Samples; 2],
    pub theirs: [Samples; 2],
}

fn timed(cni: &Cni, command: &str) -> anyhow::Result<f64> {
    let began = Instant::now();
    let answer = cni.run(command)?;
    let took = began.elapsed().as_secs_f64() * 1000.0;
    answer.map_err(|error| anyhow!("{command}: {error}"))?;
    Ok(took)
}

impl Adds {
    /// Attaches so many containers to a node, and to one of the other plugin's.
    pub fn new(cluster: &Cluster, at: usize, pods: usize) -> anyhow::Result<Self> {
        let mut adds = Self {
            at,
            ours: Vec::new(),
            theirs: Vec::new(),
            node: Namespace::new("ptp")?,
        };
        for number in 0..pods {
            let (ours, theirs) = adds.containers(cluster, &format!("filler-{at}-{number}"))?;
            for container in [&ours, &theirs] {
                timed(&container.0, "ADD")?;
            }
            adds.ours.push(ours);
            adds.theirs.push(theirs);
        }
        Ok(adds)
    }

    fn containers(&self, cluster: &Cluster, name: &str) -> anyhow::Result<((Cni, Namespace), (Cni, Namespace))> {
        let container = |cni: &dyn Fn(&str) -> Cni| -> anyhow::Result<(Cni, Namespace)> {
            let netns = Namespace::new("container")?;
            Ok((cni(netns.path().to_str().context("a path that is no text")?), netns))
        };
        let ours = |netns: &str| {
            Cni::new(&cluster.nodes[self.at], name, Some(netns))
                .with("namespace", json!("ns-1"))
                .with("labels", json!({ "app": "plain-1" }))
        };
        let data = cluster.folder().join(format!("ptp{}", self.at));
        let theirs = |netns: &str| {
            let ipam = json!({
                "type": "host-local", "dataDir": data, "ranges": [[{ "subnet": "10.9.0.0/16" }]],
            });
            Cni::new(&cluster.nodes[self.at], name, Some(netns))
                .of(Path::new(PTP), self.node.name())
                .set("CNI_PATH", "/usr/lib/cni")
                .with("cniVersion", json!("1.0.0"))
                .with("type", json!("ptp"))
                .with("ipam", ipam)
        };
        Ok((container(&ours)?, container(&theirs)?))
    }

    /// One container after the other comes and goes.
    pub fn measure(&self, cluster: &Cluster, times: usize) -> anyhow::Result<Times> {
        let mut all = Times::default();
        for number in 0..times {
            let (ours, theirs) = self.containers(cluster, &format!("one-{}-{number}", self.at))?;
            for (index, command) in ["ADD", "DEL"].into_iter().enumerate() {
                all.ours[index].push(timed(&ours.0, command)?);
                all.theirs[index].push(timed(&theirs.0, command)?);
            }
        }
        Ok(all)
    }
}

impl Drop for Adds {
    fn drop(&mut self) {
        for (cni, _) in self.ours.iter().chain(&self.theirs) {
            if let Err(error) = timed(cni, "DEL") {
                eprintln!("{error:#}");
            }
        }
    }
}
