//! A native test harness: the policy runs in the test itself, with no wasm and no root.
//!
//! ```
//! # use policy_sdk::{Decision, Identity, Peer, Pod, Policy};
//! # struct Open;
//! # impl Policy for Open {
//! #     type Config = ();
//! #     fn new((): ()) -> Result<Self, String> { Ok(Self) }
//! #     fn identify(&self, pod: &Pod) -> Result<Identity, String> { Ok(Identity::new(&pod.namespace)) }
//! #     fn decide(&self, _: &Peer, _: &Peer) -> Decision { Decision::Allow }
//! # }
//! use policy_sdk::{tcp, testing::Cluster};
//!
//! let cluster = Cluster::of(Open).pod("red/a", &[]).pod("blue/b", &[("app", "web")]);
//! cluster.assert_allowed("red/a", "blue/b", tcp(80));
//! ```

use crate::{Decision, Identity, Peer, Pod, Policy, PortRange, Reserved, guest::read_config};
use std::{collections::BTreeMap, fmt::Write};

/// A policy with the pods of a cluster.
pub struct Cluster<P> {
    policy: P,
    peers: BTreeMap<String, Peer>,
}

impl<P: Policy> Cluster<P> {
    /// A cluster without pods under this policy. The node is there from the start, as `host`.
    #[must_use]
    pub fn of(policy: P) -> Self {
        let host = ("host".to_owned(), Peer::Reserved(Reserved::Host));
        Self {
            policy,
            peers: BTreeMap::from([host]),
        }
    }

    /// The same, with the policy made of JSON text, as hostd makes it of the admin's file.
    ///
    /// # Errors
    ///
    /// What [`Policy::new`] or the configuration's type says.
    pub fn configured(config: &str) -> Result<Self, String> {
        Ok(Self::of(P::new(read_config(config)?)?))
    }

    /// Adds a pod, given as `NAMESPACE/NAME`.
    ///
    /// # Panics
    ///
    /// Where the name has no slash, or the policy can't identify the pod.
    #[must_use]
    pub fn pod(mut self, name: &str, labels: &[(&str, &str)]) -> Self {
        let identity = self
            .identity(name, labels)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        self.peers.insert(name.to_owned(), Peer::Pod(identity));
        self
    }

    /// What the policy makes of a pod.
    ///
    /// # Errors
    ///
    /// What [`Policy::identify`] says.
    ///
    /// # Panics
    ///
    /// Where the name has no slash.
    pub fn identity(&self, name: &str, labels: &[(&str, &str)]) -> Result<Identity, String> {
        let (namespace, pod) = name
            .split_once('/')
            .unwrap_or_else(|| panic!("{name} is not NAMESPACE/NAME"));
        self.policy.identify(&Pod {
            namespace: namespace.to_owned(),
            name: pod.to_owned(),
            labels: labels
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
        })
    }

    fn peer(&self, name: &str) -> &Peer {
        self.peers
            .get(name)
            .unwrap_or_else(|| panic!("no pod {name} in this test; there are {:?}", self.peers.keys()))
    }

    /// What the policy says of a pair.
    ///
    /// # Panics
    ///
    /// Where there is no such pod.
    #[must_use]
    pub fn decision(&self, from: &str, to: &str) -> Decision {
        self.policy.decide(self.peer(from), self.peer(to))
    }

    /// Whether `from` may open a connection to that port of `to`.
    ///
    /// # Panics
    ///
    /// Where there is no such pod.
    #[must_use]
    pub fn allows(&self, from: &str, to: &str, port: PortRange) -> bool {
        // hostd's own baseline: what the policy passes, a node may reach.
        let baseline = self.peer(from) == &Peer::Reserved(Reserved::Host);
        match self.decision(from, to) {
            Decision::Allow => true,
            Decision::Deny => false,
            Decision::Pass => baseline,
            Decision::Ports(ranges) => baseline || ranges.iter().any(|range| range.contains(port)),
        }
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

    /// Who reaches whom at that port: a row for each sender, `X` for allowed and `.` for denied.
    #[must_use]
    pub fn matrix(&self, port: PortRange) -> String {
        let width = self.peers.keys().map(String::len).max().unwrap_or(0);
        let mut text = format!("{:?} {} to {}\n", port.protocol, port.first, port.last);
        for from in self.peers.keys() {
            let _ = write!(text, "{from:width$} ");
            for to in self.peers.keys() {
                text.push(' ');
                text.push(if self.allows(from, to, port) { 'X' } else { '.' });
            }
            text.push('\n');
        }
        text
    }
}
