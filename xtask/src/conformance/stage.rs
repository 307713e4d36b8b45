//! The cluster that cases are played on: nodes, pods and hosts as network namespaces, changed from step to step while it
//! runs.

use super::{
    probe::{Outcome, Probe},
    suite::{Case, Node, Pod, Step, Verdict},
};
use anyhow::{Context, bail, ensure};
use harness::{Cluster, Options, Server};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr},
    thread,
    time::Duration,
};

/// A denied probe is given up after this time.
const WAIT: Duration = Duration::from_millis(250);
/// One that should be answered, and was not, is sent again, and waits so long: on a busy machine silence may be slowness.
const LONG_WAIT: Duration = Duration::from_secs(2);

pub struct Stage {
    cluster: Cluster,
    nodes: Vec<Node>,
    externals: Vec<IpAddr>,
    two_nodes: bool,
    pods: BTreeMap<String, Pod>,
    namespaces: BTreeMap<String, BTreeMap<String, String>>,
    servers: BTreeMap<String, (Vec<u16>, Server)>,
}

/// What became of all probes of a step, in the order of its verdicts.
pub struct Outcomes {
    pub all: Vec<Outcome>,
    pub retried: usize,
}

fn object(map: &BTreeMap<String, String>) -> impl Iterator<Item = String> {
    map.iter().map(|(key, value)| format!("{key}={value}"))
}

/// What turns one set of labels into another.
fn label_changes(from: &BTreeMap<String, String>, to: &BTreeMap<String, String>) -> Vec<String> {
    let gone = from
        .keys()
        .filter(|key| !to.contains_key(*key))
        .map(|key| format!("{key}-"));
    let set = to.iter().filter(|(key, value)| from.get(*key) != Some(value));
    gone.chain(set.map(|(key, value)| format!("{key}={value}"))).collect()
}

impl Stage {
    pub fn new(case: &Case, two_nodes: bool) -> anyhow::Result<Self> {
        let cidrs: Vec<Vec<String>> = case.nodes.iter().map(|node| node.cidrs.clone()).collect();
        let pod_cidrs = if two_nodes { cidrs } else { vec![cidrs.concat()] };
        let cluster = Cluster::with(&Options {
            nodes: u8::try_from(pod_cidrs.len())?,
            pod_cidrs,
            externals: case.externals.clone(),
            ..Options::default()
        })?;
        Ok(Self {
            cluster,
            nodes: case.nodes.clone(),
            externals: case.externals.clone(),
            two_nodes,
            pods: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            servers: BTreeMap::new(),
        })
    }

    /// Whether a case can be played here.
    pub fn fits(&self, case: &Case, two_nodes: bool) -> bool {
        self.nodes == case.nodes && self.externals == case.externals && self.two_nodes == two_nodes
    }

    fn node_of(&self, pod: &Pod) -> usize {
        let index = self.nodes.iter().position(|node| node.name == pod.node).unwrap_or(0);
        if self.two_nodes { index } else { 0 }
    }

    /// Changes the live cluster into a step's.
    pub fn become_step(&mut self, step: &Step) -> anyhow::Result<()> {
        let wanted: BTreeMap<String, Pod> = step.pods.iter().map(|pod| (pod.full_name(), pod.clone())).collect();
        let replaced = |name: &str, pod: &Pod| {
            wanted
                .get(name)
                .is_none_or(|other| (&other.ip, &other.node, &other.ports) != (&pod.ip, &pod.node, &pod.ports))
        };
        let gone: Vec<String> = self
            .pods
            .iter()
            .filter(|(name, pod)| replaced(name, pod))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            self.servers.remove(&name);
            self.cluster.remove_pod(&name)?;
            self.pods.remove(&name);
        }
        self.label_namespaces(step)?;
        for (name, pod) in &wanted {
            match self.pods.get(name) {
                None => self.add(name, pod)?,
                Some(known) => {
                    let changes = label_changes(&known.labels, &pod.labels);
                    if !changes.is_empty() {
                        let mut arguments =
                            vec!["endpoint", "label", "--namespace", &pod.namespace, "--name", &pod.name];
                        arguments.extend(changes.iter().map(String::as_str));
                        self.cluster.nodes[self.node_of(pod)].json(&arguments)?;
                    }
                }
            }
        }
        self.pods = wanted;
        self.listen(step)?;
        let file = self.cluster.folder().join("policies.json");
        fs::write(&file, serde_json::to_vec(&step.policies)?)?;
        let module = harness::policy("network-policy")?;
        self.cluster.nodes[0].json(&[
            "load-policy",
            &module.display().to_string(),
            "--config",
            &file.display().to_string(),
        ])?;
        self.cluster.agree()
    }

    fn label_namespaces(&mut self, step: &Step) -> anyhow::Result<()> {
        let mut names: BTreeSet<&String> = self.namespaces.keys().collect();
        names.extend(step.namespaces.keys());
        let none = BTreeMap::new();
        for name in names {
            let before = self.namespaces.get(name).unwrap_or(&none);
            let after = step.namespaces.get(name).unwrap_or(&none);
            let changes = label_changes(before, after);
            if !changes.is_empty() {
                let mut arguments = vec!["namespace", "label", name];
                arguments.extend(changes.iter().map(String::as_str));
                self.cluster.nodes[0].json(&arguments)?;
            }
        }
        self.namespaces.clone_from(&step.namespaces);
        Ok(())
    }

    fn add(&mut self, name: &str, pod: &Pod) -> anyhow::Result<()> {
        let mut arguments = vec!["--address".to_owned(), pod.ip.to_string()];
        for label in object(&pod.labels) {
            arguments.extend(["--label".to_owned(), label]);
        }
        for port in pod.ports.iter().filter(|port| !port.name.is_empty()) {
            let protocol = port.protocol.to_lowercase();
            arguments.extend(["--port".to_owned(), format!("{}={protocol}/{}", port.name, port.number)]);
        }
        let node = self.node_of(pod);
        self.cluster.add_pod_with(node, name, &arguments)?;
        Ok(())
    }

    /// Every end listens on every port that is probed.
    fn listen(&mut self, step: &Step) -> anyhow::Result<()> {
        let ports: BTreeSet<u16> = step.expect.iter().map(|verdict| verdict.3).collect();
        let ports: Vec<u16> = ports.into_iter().collect();
        let external = self.cluster.external.as_ref();
        let external = external.map(|netns| ("external", netns, self.externals.clone()));
        let pods = self.cluster.pods.iter();
        let ends = pods.map(|pod| {
            (
                pod.name.as_str(),
                &pod.netns,
                vec![pod.address, Ipv4Addr::LOCALHOST.into()],
            )
        });
        for (name, netns, addresses) in ends.chain(external) {
            if self.servers.get(name).is_some_and(|(known, _)| *known == ports) {
                continue;
            }
            self.servers.remove(name);
            let server = Server::new(netns.name(), &addresses, &ports)?;
            self.servers.insert(name.to_owned(), (ports.clone(), server));
        }
        Ok(())
    }

    fn end(&self, name: &str) -> anyhow::Result<(String, IpAddr)> {
        if let Some(pod) = self.cluster.pods.iter().find(|pod| pod.name == name) {
            return Ok((pod.netns.name().to_owned(), pod.address));
        }
        let external = self.cluster.external.as_ref().context("no external host")?;
        Ok((external.name().to_owned(), name.parse()?))
    }

    /// Sends a probe for every verdict, all at once.
    pub fn probe(&self, step: &Step) -> anyhow::Result<Outcomes> {
        let probes = step
            .expect
            .iter()
            .map(|Verdict(from, to, protocol, port, _)| {
                let (netns, from) = self.end(from)?;
                let (_, to) = self.end(to)?;
                Ok(Probe {
                    netns,
                    from,
                    to,
                    tcp: protocol == "TCP",
                    port: *port,
                })
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        for (_, server) in self.servers.values() {
            server.forget();
        }
        let mut all = send_all(&probes.iter().collect::<Vec<_>>(), WAIT)?;
        let slow: Vec<usize> = (0..all.len())
            .filter(|index| step.expect[*index].4 && all[*index] == Outcome::Silence)
            .collect();
        let again = send_all(&slow.iter().map(|index| &probes[*index]).collect::<Vec<_>>(), LONG_WAIT)?;
        for (index, outcome) in slow.iter().zip(again) {
            all[*index] = outcome;
        }
        // Denied is what does not arrive, not only what is not answered.
        for ((outcome, verdict), probe) in all.iter_mut().zip(&step.expect).zip(&probes) {
            let end = if self.pods.contains_key(&verdict.1) {
                verdict.1.as_str()
            } else {
                "external"
            };
            let server = self.servers.get(end).map(|(_, server)| server);
            let reached =
                server.is_some_and(|server| server.was_reached(probe.from, (probe.to, probe.port).into(), probe.tcp));
            if *outcome == Outcome::Silence && reached && !verdict.4 {
                *outcome = Outcome::Error("nothing came back, but it has arrived".to_owned());
            }
        }
        Ok(Outcomes {
            all,
            retried: slow.len(),
        })
    }

    /// What `hostd policy explain` says of every verdict, read from the kernel of the node that enforces each end;
    /// nothing of a pod to itself, which no policy is asked about, and of two hosts.
    pub fn explain(&self, step: &Step) -> anyhow::Result<Vec<Option<Result<bool, String>>>> {
        let mut pairs: BTreeMap<(String, String), Vec<Value>> = BTreeMap::new();
        for Verdict(from, to, ..) in &step.expect {
            let key = (from.clone(), to.clone());
            let is_pod = |name: &String| self.pods.contains_key(name);
            if from == to || (!is_pod(from) && !is_pod(to)) || pairs.contains_key(&key) {
                continue;
            }
            let mut nodes = BTreeSet::new();
            for end in [from, to] {
                nodes.extend(self.pods.get(end).map(|pod| self.node_of(pod)));
            }
            let mut sides = Vec::new();
            for node in nodes {
                let explained = self.cluster.nodes[node].json(&["policy", "explain", from, to])?;
                ensure!(
                    explained["agrees"] == true,
                    "explain {from} {to}: the kernel differs: {explained}"
                );
                let all = explained["sides"].as_array().context("no sides")?;
                sides.extend(all.iter().filter(|side| !side["kernel"].is_null()).cloned());
            }
            pairs.insert(key, sides);
        }
        step.expect
            .iter()
            .map(|Verdict(from, to, protocol, port, _)| {
                let Some(sides) = pairs.get(&(from.clone(), to.clone())) else {
                    return Ok(None);
                };
                let pods = usize::from(self.pods.contains_key(from)) + usize::from(self.pods.contains_key(to));
                let mut named: Vec<&str> = sides.iter().filter_map(|side| side["side"].as_str()).collect();
                named.sort_unstable();
                named.dedup();
                if named.len() != pods {
                    return Ok(Some(Err(format!("explain shows {} of {pods} ends", named.len()))));
                }
                let mut allowed = true;
                for side in sides {
                    let ruling = side["kernel"]["ruling"].as_str().context("no ruling")?;
                    allowed &= lets_pass(ruling, &protocol.to_lowercase(), *port)?;
                }
                Ok(Some(Ok(allowed)))
            })
            .collect()
    }
}

fn send_all(probes: &[&Probe], wait: Duration) -> anyhow::Result<Vec<Outcome>> {
    thread::scope(|scope| {
        let sent: Vec<_> = probes
            .iter()
            .map(|probe| scope.spawn(move || probe.send(wait)))
            .collect();
        sent.into_iter()
            .map(|probe| probe.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// Whether a ruling as hostd prints it, such as `allow tcp/80, udp/5000-5010`, holds a port.
fn lets_pass(ruling: &str, protocol: &str, port: u16) -> anyhow::Result<bool> {
    let Some(ranges) = ruling.strip_prefix("allow ") else {
        return match ruling {
            "allow" => Ok(true),
            "deny" => Ok(false),
            other => bail!("hostd prints the ruling {other:?}"),
        };
    };
    for one in ranges.split(", ") {
        let (name, range) = one.split_once('/').unwrap_or((one, "0-65535"));
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        if name == protocol && (first.parse()?..=last.parse()?).contains(&port) {
            return Ok(true);
        }
    }
    Ok(false)
}
