//! A native test harness: the policy runs in the test itself, with no wasm and no root.
//!
//! ```
//! # use policy_sdk::{Decision, Identity, Peer, Pod, Policy};
//! # struct Tenants;
//! # impl Policy for Tenants {
//! #     type Config = ();
//! #     fn new((): ()) -> Result<Self, String> { Ok(Self) }
//! #     fn identify(&self, pod: &Pod) -> Result<Identity, String> { Ok(Identity::new(&pod.namespace)) }
//! #     fn decide(&self, from: &Peer, to: &Peer) -> Decision {
//! #         if from.same_tenant(to) { Decision::allow() } else { Decision::pass() }
//! #     }
//! # }
//! use policy_sdk::{tcp, testing::Cluster};
//!
//! let cluster = Cluster::of(Tenants).pod("red/a", &[]).pod("red/b", &[]).pod("blue/c", &[("app", "web")]);
//! cluster.assert_allowed("red/a", "red/b", tcp(80));
//! cluster.assert_matrix(
//!     tcp(80),
//!     "
//!              red/a  red/b  blue/c
//!     red/a    X      X      .
//!     red/b    X      X      .
//!     blue/c   .      .      X
//!     host     X      X      X
//!     ",
//! );
//! ```

use crate::{
    Action, Decision, Identity, Labels, Network, Peer, Placement, Pod, Policy, PortRange, Reserved, Side, Tier, Who,
    config::read_config, types::networks_of,
};
use std::{collections::BTreeMap, fmt::Write, net::IpAddr};

/// A policy with the pods of a cluster. Peers that are no pods are there from the start, as `host`, `world`, `health`,
/// `init` and `remote-node`.
pub struct Cluster<P> {
    policy: P,
    networks: Vec<Network>,
    namespaces: BTreeMap<String, Labels>,
    peers: BTreeMap<String, Peer>,
    /// In the order in which they were added.
    order: Vec<String>,
}

impl<P: Policy> Cluster<P> {
    /// A cluster without pods under this policy.
    #[must_use]
    pub fn of(policy: P) -> Self {
        let reserved = [
            ("host", Reserved::Host),
            ("world", Reserved::World),
            ("health", Reserved::Health),
            ("init", Reserved::Init),
            ("remote-node", Reserved::RemoteNode),
        ];
        let peers = reserved.map(|(name, reserved)| (name.to_owned(), Who::Reserved(reserved).into()));
        Self {
            networks: policy.networks(),
            policy,
            namespaces: BTreeMap::new(),
            peers: BTreeMap::from(peers),
            order: Vec::new(),
        }
    }

    /// The same, with the policy made of a configuration as an admin writes it: JSON, TOML or YAML.
    ///
    /// # Errors
    ///
    /// What [`Policy::new`] or the configuration's type says.
    pub fn configured(config: &str) -> Result<Self, String> {
        let placement = Placement {
            name: "test".to_owned(),
            tier: Tier::Tenant,
            tenant: None,
        };
        Self::placed(config, &placement)
    }

    /// The same in another place than the tenant tier.
    ///
    /// # Errors
    ///
    /// As [`Cluster::configured`].
    pub fn placed(config: &str, placement: &Placement) -> Result<Self, String> {
        let config = to_json(config)?;
        Ok(Self::of(P::placed(read_config(&config)?, placement)?))
    }

    /// The policy.
    #[must_use]
    pub const fn policy(&self) -> &P {
        &self.policy
    }

    /// Gives a namespace its labels, for the pods that are added after this.
    #[must_use]
    pub fn namespace(mut self, name: &str, labels: &[(&str, &str)]) -> Self {
        self.namespaces.insert(name.to_owned(), to_labels(labels));
        self
    }

    /// Adds a pod, given as `NAMESPACE/NAME`.
    ///
    /// # Panics
    ///
    /// Where the name has no slash, or the policy can't identify the pod.
    #[must_use]
    pub fn pod(self, name: &str, labels: &[(&str, &str)]) -> Self {
        let mut pod = named(name);
        pod.labels = to_labels(labels);
        self.with_pod(pod)
    }

    /// Adds a pod with all that it has. Labels of its namespace that were given before are added to its own.
    ///
    /// # Panics
    ///
    /// Where the policy can't identify the pod.
    #[must_use]
    pub fn with_pod(mut self, pod: Pod) -> Self {
        let name = format!("{}/{}", pod.namespace, pod.name);
        let identity = self.identify(pod).unwrap_or_else(|error| panic!("{name}: {error}"));
        self.peers.insert(name.clone(), Who::Pod(identity).into());
        self.order.push(name);
        self
    }

    /// Adds an address that is no pod's, under the address as its name.
    #[must_use]
    pub fn outside(mut self, address: IpAddr) -> Self {
        let networks = networks_of(&self.networks, address);
        let who = if networks.is_empty() {
            Who::Reserved(Reserved::World)
        } else {
            Who::Networks(networks)
        };
        self.peers.insert(address.to_string(), who.into());
        self.order.push(address.to_string());
        self
    }

    /// What the policy makes of a pod, given as `NAMESPACE/NAME`.
    ///
    /// # Errors
    ///
    /// What [`Policy::identify`] says.
    ///
    /// # Panics
    ///
    /// Where the name has no slash.
    pub fn identity(&self, name: &str, labels: &[(&str, &str)]) -> Result<Identity, String> {
        let mut pod = named(name);
        pod.labels = to_labels(labels);
        self.identify(pod)
    }

    fn identify(&self, mut pod: Pod) -> Result<Identity, String> {
        if let Some(labels) = self.namespaces.get(&pod.namespace) {
            pod.namespace_labels.extend(labels.clone());
        }
        let mut networks: Vec<String> = pod
            .addresses
            .iter()
            .flat_map(|address| networks_of(&self.networks, *address))
            .collect();
        networks.sort();
        networks.dedup();
        pod.networks = networks;
        let mut identity = self.policy.identify(&pod)?;
        if identity.tenant.is_empty() {
            identity.tenant = pod.namespace;
        }
        Ok(identity)
    }

    fn peer(&self, name: &str) -> &Peer {
        self.peers
            .get(name)
            .unwrap_or_else(|| panic!("no peer {name} in this test; there are {:?}", self.peers.keys()))
    }

    /// What the policy says of a pair, for one end.
    ///
    /// # Panics
    ///
    /// Where there is no such peer.
    #[must_use]
    pub fn decision(&self, side: Side, from: &str, to: &str) -> Decision {
        let (from, to) = (self.peer(from), self.peer(to));
        match side {
            Side::Egress => self.policy.decide_side(side, from, to),
            Side::Ingress => self.policy.decide_side(side, to, from),
        }
    }

    /// Whether `from` may open a connection to that port of `to`, where this policy is the only one.
    ///
    /// # Panics
    ///
    /// Where there is no such peer.
    #[must_use]
    pub fn allows(&self, from: &str, to: &str, port: PortRange) -> bool {
        let is_pod = |name: &str| self.peer(name).pod().is_some();
        let lets = |side: Side| match self.decision(side, from, to).action(port) {
            Action::Allow => true,
            Action::Deny => false,
            // hostd's own baseline: what all modules pass, a node may reach.
            Action::Pass => side == Side::Ingress && self.peer(from).is(Reserved::Host),
        };
        (!is_pod(from) || lets(Side::Egress)) && (!is_pod(to) || lets(Side::Ingress))
    }

    /// Fails the test unless the connection may be opened.
    ///
    /// # Panics
    ///
    /// That is what it is for; with the whole matrix.
    pub fn assert_allowed(&self, from: &str, to: &str, port: PortRange) {
        assert!(
            self.allows(from, to, port),
            "{from} may not reach {to}:\n{}",
            self.matrix(port)
        );
    }

    /// Fails the test if the connection may be opened.
    ///
    /// # Panics
    ///
    /// That is what it is for; with the whole matrix.
    pub fn assert_denied(&self, from: &str, to: &str, port: PortRange) {
        assert!(
            !self.allows(from, to, port),
            "{from} may reach {to}:\n{}",
            self.matrix(port)
        );
    }

    /// Who reaches whom at that port: a row for each sender, `X` for allowed and `.` for denied. The pods and addresses
    /// of this test, and the node.
    #[must_use]
    pub fn matrix(&self, port: PortRange) -> String {
        let columns: Vec<&str> = self.order.iter().map(String::as_str).collect();
        let rows: Vec<&str> = columns.iter().copied().chain(["host"]).collect();
        self.draw(&rows, &columns, port)
    }

    fn draw(&self, rows: &[&str], columns: &[&str], port: PortRange) -> String {
        let width = rows.iter().map(|name| name.len()).max().unwrap_or(0);
        let mut text = format!("{:width$}", "");
        for to in columns {
            let _ = write!(text, "  {to}");
        }
        text.push('\n');
        for from in rows {
            let _ = write!(text, "{from:width$}");
            for to in columns {
                let mark = if self.allows(from, to, port) { 'X' } else { '.' };
                let _ = write!(text, "  {mark:<width$}", width = to.len());
            }
            text.truncate(text.trim_end().len());
            text.push('\n');
        }
        text
    }

    /// Fails the test unless exactly the pairs marked `X` may open a connection to that port. The first line names
    /// receivers, every other one begins with a sender; white space is as you like.
    ///
    /// # Panics
    ///
    /// That is what it is for; with the rows that differ. And where `expected` is no matrix.
    pub fn assert_matrix(&self, port: PortRange, expected: &str) {
        let mut lines = expected.lines().filter(|line| !line.trim().is_empty());
        let columns: Vec<&str> = lines.next().expect("a line of receivers").split_whitespace().collect();
        let mut rows = Vec::new();
        let mut wrong = String::new();
        for line in lines {
            let mut words = line.split_whitespace();
            let from = words.next().expect("a sender");
            rows.push(from);
            let marks: Vec<&str> = words.collect();
            assert_eq!(marks.len(), columns.len(), "{from}: a mark for each of {columns:?}");
            for (to, mark) in columns.iter().zip(marks) {
                let allowed = match mark {
                    "X" => true,
                    "." => false,
                    other => panic!("{from} to {to}: the mark {other:?} is neither X nor ."),
                };
                if self.allows(from, to, port) != allowed {
                    let may = if allowed { "may not" } else { "may" };
                    let _ = writeln!(wrong, "{from} {may} reach {to}");
                }
            }
        }
        assert!(
            wrong.is_empty(),
            "{:?} {} to {}:\n{wrong}\nwhat the policy says:\n{}",
            port.protocol,
            port.first,
            port.last,
            self.draw(&rows, &columns, port)
        );
    }
}

fn named(name: &str) -> Pod {
    let (namespace, pod) = name
        .split_once('/')
        .unwrap_or_else(|| panic!("{name} is not NAMESPACE/NAME"));
    Pod::new(namespace, pod)
}

fn to_labels(labels: &[(&str, &str)]) -> Labels {
    labels
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

/// A configuration as hostd hands it to a module. What is neither JSON nor TOML is YAML; many documents are a list.
fn to_json(text: &str) -> Result<String, String> {
    if text.trim().is_empty() {
        return Ok(String::new());
    }
    if serde_json::from_str::<serde_json::Value>(text).is_ok() {
        return Ok(text.to_owned());
    }
    if let Ok(value) = toml::from_str::<serde_json::Value>(text) {
        return Ok(value.to_string());
    }
    let documents: Vec<serde_json::Value> =
        serde_saphyr::from_multiple_with_options(text, serde_saphyr::options! { strict_booleans: true })
            .map_err(|error| format!("neither JSON, TOML nor YAML: {error}"))?;
    Ok(match <[_; 1]>::try_from(documents) {
        Ok([one]) => one.to_string(),
        Err(many) => serde_json::Value::Array(many).to_string(),
    })
}
