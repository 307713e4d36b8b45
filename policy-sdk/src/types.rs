//! Pods, identities and decisions.

use std::collections::BTreeMap;

/// Labels, by key.
pub type Labels = BTreeMap<String, String>;

/// A pod as the cluster knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name, unique in the namespace.
    pub name: String,
    /// Its labels.
    pub labels: Labels,
}

impl Pod {
    /// Value of a label.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels.get(key).map(String::as_str)
    }
}

/// What a policy makes of a pod: a tenant, and the labels that matter to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    /// The tenant. Its number is in the high bits of every identity, so that a receiver can tell it from the VNI.
    pub tenant: String,
    /// The labels that matter.
    pub labels: Labels,
}

impl Identity {
    /// An identity without labels.
    #[must_use]
    pub fn new(tenant: impl Into<String>) -> Self {
        Self {
            tenant: tenant.into(),
            labels: Labels::new(),
        }
    }

    /// Takes over one of the pod's labels, if it has it.
    #[must_use]
    pub fn with_label_of(mut self, pod: &Pod, key: &str) -> Self {
        if let Some(value) = pod.label(key) {
            self.labels.insert(key.to_owned(), value.to_owned());
        }
        self
    }

    /// Value of a label.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels.get(key).map(String::as_str)
    }
}

/// Peers that are no pods, and pods that were not identified yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reserved {
    /// The node that a pod lives on.
    Host,
    /// Everything outside the cluster.
    World,
    /// Health checks.
    Health,
    /// A pod before it was identified.
    Init,
    /// Any other node of the cluster.
    RemoteNode,
}

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Peer {
    /// Pods with this identity.
    Pod(Identity),
    /// No pod.
    Reserved(Reserved),
}

impl Peer {
    /// The identity, where the peer is a pod.
    #[must_use]
    pub fn pod(&self) -> Option<&Identity> {
        match self {
            Self::Pod(identity) => Some(identity),
            Self::Reserved(_) => None,
        }
    }
}

/// Protocol of a [`PortRange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// All of them.
    Any,
    /// ICMP; it has no ports.
    Icmp,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// Destination ports of one protocol, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    /// The protocol.
    pub protocol: Protocol,
    /// First port.
    pub first: u16,
    /// Last port.
    pub last: u16,
}

impl PortRange {
    /// The same protocol up to this port.
    #[must_use]
    pub const fn to(mut self, last: u16) -> Self {
        self.last = last;
        self
    }

    /// Whether a packet to `other`, a single port, is in the range.
    #[must_use]
    pub fn contains(&self, other: Self) -> bool {
        (self.protocol == Protocol::Any || self.protocol == other.protocol)
            && self.first <= other.first
            && other.last <= self.last
    }
}

/// A TCP port; `tcp(8000).to(8080)` is a range.
#[must_use]
pub const fn tcp(port: u16) -> PortRange {
    PortRange {
        protocol: Protocol::Tcp,
        first: port,
        last: port,
    }
}

/// A UDP port.
#[must_use]
pub const fn udp(port: u16) -> PortRange {
    PortRange {
        protocol: Protocol::Udp,
        first: port,
        last: port,
    }
}

/// ICMP, such as ping.
#[must_use]
pub const fn icmp() -> PortRange {
    PortRange {
        protocol: Protocol::Icmp,
        first: 0,
        last: 0,
    }
}

/// Whether one identity may open a connection to another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Decision {
    /// All traffic.
    Allow,
    /// No traffic.
    Deny,
    /// Left to who decides next. hostd lets a node reach its own pods; the last word is deny.
    Pass,
    /// These ports; what is not among them is left to who decides next.
    Ports(Vec<PortRange>),
}

impl Decision {
    /// Allows these ports.
    #[must_use]
    pub fn ports(ranges: impl IntoIterator<Item = PortRange>) -> Self {
        Self::Ports(ranges.into_iter().collect())
    }
}
