//! Pods, identities and peers.

use crate::{Network, port::PortRange};
use std::{any::Any, cell::OnceCell, collections::BTreeMap, net::IpAddr, rc::Rc};

/// Labels, by key.
///
/// ```
/// let labels = policy_sdk::Labels::from([("app".to_owned(), "web".to_owned())]);
/// assert_eq!(labels["app"], "web");
/// ```
pub type Labels = BTreeMap<String, String>;

/// A port that a pod has a name for.
///
/// ```
/// use policy_sdk::{NamedPort, tcp};
///
/// let http = NamedPort { name: "http".to_owned(), port: tcp(8080) };
/// assert_eq!(http.port.first, 8080);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedPort {
    /// Its name.
    pub name: String,
    /// Its protocol and number.
    pub port: PortRange,
}

/// A pod as the cluster knows it.
///
/// ```
/// use policy_sdk::{Pod, tcp};
///
/// let pod = Pod::new("red", "web").with_label("app", "web").with_port("http", tcp(8080));
/// assert_eq!(pod.label("app"), Some("web"));
/// assert_eq!(pod.port("http", policy_sdk::Protocol::Tcp), Some(8080));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name, unique in the namespace.
    pub name: String,
    /// Its labels.
    pub labels: Labels,
    /// Labels of its namespace.
    pub namespace_labels: Labels,
    /// Its service account; empty where it has none.
    pub service_account: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Ports that it has names for.
    pub ports: Vec<NamedPort>,
    /// Names of those of the policy's own [`Network`]s that hold one of its addresses.
    pub networks: Vec<String>,
}

impl Pod {
    /// A pod without labels.
    #[must_use]
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
            ..Self::default()
        }
    }

    /// The same with a label.
    #[must_use]
    pub fn with_label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.insert(key.into(), value.into());
        self
    }

    /// The same with a named port.
    #[must_use]
    pub fn with_port(mut self, name: impl Into<String>, port: PortRange) -> Self {
        let name = name.into();
        self.ports.push(NamedPort { name, port });
        self
    }

    /// The same with an address.
    #[must_use]
    pub fn with_address(mut self, address: IpAddr) -> Self {
        self.addresses.push(address);
        self
    }

    /// Value of a label.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels.get(key).map(String::as_str)
    }

    /// Value of a label of its namespace.
    #[must_use]
    pub fn namespace_label(&self, key: &str) -> Option<&str> {
        self.namespace_labels.get(key).map(String::as_str)
    }

    /// Number of the port that the pod calls so, for that protocol.
    #[must_use]
    pub fn port(&self, name: &str, protocol: crate::Protocol) -> Option<u16> {
        let named = |port: &&NamedPort| port.name == name && port.port.protocol == protocol;
        self.ports.iter().find(named).map(|port| port.port.first)
    }
}

/// What a policy makes of a pod: a tenant, and the labels that matter to it.
///
/// ```
/// use policy_sdk::{Identity, Pod};
///
/// let pod = Pod::new("red", "web-7f9c").with_label("app", "web").with_label("build", "7f9c");
/// let identity = Identity::new(&pod.namespace).with_label_of(&pod, "app");
/// assert_eq!(identity.label("app"), Some("web"));
/// assert_eq!(identity.label("build"), None);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    /// The tenant. Its number is in the high bits of every identity, so that a receiver can tell it from the VNI.
    /// Empty where a policy leaves it to others; see [`Identity::unclaimed`].
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

    /// An identity whose tenant is another module's to say: the first one in order that names one. Where none does,
    /// the pod's namespace is its tenant.
    #[must_use]
    pub fn unclaimed() -> Self {
        Self::default()
    }

    /// The same with a label.
    #[must_use]
    pub fn with_label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.insert(key.into(), value.into());
        self
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
///
/// ```
/// use policy_sdk::{Peer, Reserved, Who};
///
/// let host = Peer::from(Who::Reserved(Reserved::Host));
/// assert!(host.is(Reserved::Host) && host.pod().is_none());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reserved {
    /// The node that a pod lives on.
    Host,
    /// What is neither in the cluster nor in one of the policy's networks.
    World,
    /// Health checks.
    Health,
    /// A pod before it was identified.
    Init,
    /// Any other node of the cluster.
    RemoteNode,
}

/// Who one end of a connection is.
///
/// ```
/// use policy_sdk::{Peer, Who};
///
/// let office = Peer::from(Who::Networks(vec!["office".to_owned()]));
/// assert!(office.in_network("office") && office.tenant().is_none());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Who {
    /// Pods with this identity. Its tenant is always known.
    Pod(Identity),
    /// No pod.
    Reserved(Reserved),
    /// Addresses that are no pods', in these of the policy's own networks.
    Networks(Vec<String>),
    /// A pod that the policy could not identify, of this tenant, which is not its own.
    Unknown(String),
}

/// One end of a connection.
///
/// ```
/// use policy_sdk::{Identity, Peer, Who};
///
/// let web = Peer::from(Who::Pod(Identity::new("red").with_label("app", "web")));
/// assert_eq!((web.tenant(), web.label("app")), (Some("red"), Some("web")));
/// // Worked out once, however often it is asked for.
/// assert_eq!(*web.derived(|_| 42), 42);
/// ```
#[derive(Clone)]
pub struct Peer {
    who: Who,
    derived: OnceCell<Rc<dyn Any>>,
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.who.fmt(out)
    }
}

impl PartialEq for Peer {
    fn eq(&self, other: &Self) -> bool {
        self.who == other.who
    }
}

impl From<Who> for Peer {
    fn from(who: Who) -> Self {
        Self {
            who,
            derived: OnceCell::new(),
        }
    }
}

impl Peer {
    /// Who it is.
    #[must_use]
    pub const fn who(&self) -> &Who {
        &self.who
    }

    /// The identity, where the peer is a pod.
    #[must_use]
    pub const fn pod(&self) -> Option<&Identity> {
        match &self.who {
            Who::Pod(identity) => Some(identity),
            _ => None,
        }
    }

    /// The tenant, where the peer is a pod.
    #[must_use]
    pub fn tenant(&self) -> Option<&str> {
        match &self.who {
            Who::Pod(identity) => Some(&identity.tenant),
            Who::Unknown(tenant) => Some(tenant),
            Who::Reserved(_) | Who::Networks(_) => None,
        }
    }

    /// Whether both are pods of one tenant.
    ///
    /// ```
    /// use policy_sdk::{Identity, Peer, Reserved, Who};
    ///
    /// let red = Peer::from(Who::Pod(Identity::new("red")));
    /// assert!(red.same_tenant(&red));
    /// assert!(!red.same_tenant(&Peer::from(Who::Reserved(Reserved::World))));
    /// ```
    #[must_use]
    pub fn same_tenant(&self, other: &Self) -> bool {
        self.tenant().is_some() && self.tenant() == other.tenant()
    }

    /// Value of a label of the identity, where the peer is a pod.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&str> {
        self.pod().and_then(|identity| identity.label(key))
    }

    /// Whether it is this one of the peers that are no pods.
    #[must_use]
    pub fn is(&self, reserved: Reserved) -> bool {
        self.who == Who::Reserved(reserved)
    }

    /// Whether it is an address in this network of the policy's. What the policy made of a pod in the network it has
    /// said in [`Policy::identify`](crate::Policy::identify).
    #[must_use]
    pub fn in_network(&self, name: &str) -> bool {
        matches!(&self.who, Who::Networks(names) if names.iter().any(|known| known == name))
    }

    /// What `make` makes of this peer, kept with it: for policies that would work out the same of a peer in every
    /// decision about it. A policy must always ask for the same type.
    ///
    /// # Panics
    ///
    /// Where it was asked for another type before.
    pub fn derived<T: 'static>(&self, make: impl FnOnce(&Who) -> T) -> &T {
        let kept = self.derived.get_or_init(|| Rc::new(make(&self.who)));
        kept.downcast_ref().expect("a policy derives one type of its peers")
    }
}

/// Which end of a connection a decision is for.
///
/// ```
/// use policy_sdk::{Action, Decision, Identity, Peer, Pod, Policy, Side, tcp, testing::Cluster};
///
/// /// Nobody is let in, whoever is let out.
/// struct Closed;
///
/// impl Policy for Closed {
///     type Config = ();
///     fn new((): ()) -> Result<Self, String> { Ok(Self) }
///     fn identify(&self, pod: &Pod) -> Result<Identity, String> { Ok(Identity::new(&pod.namespace)) }
///     fn decide_side(&self, side: Side, _subject: &Peer, _peer: &Peer) -> Decision {
///         match side {
///             Side::Egress => Decision::allow(),
///             Side::Ingress => Decision::deny().because("closed"),
///         }
///     }
/// }
/// let cluster = Cluster::of(Closed).pod("a/a", &[]).pod("b/b", &[]);
/// assert_eq!(cluster.decision(Side::Egress, "a/a", "b/b").action(tcp(80)), Action::Allow);
/// cluster.assert_denied("a/a", "b/b", tcp(80));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// May the subject open a connection to the peer?
    Egress,
    /// May the peer open a connection to the subject?
    Ingress,
}

/// When a module is asked: admin before tenant before baseline.
///
/// ```
/// use policy_sdk::Tier;
///
/// assert!(Tier::Admin < Tier::Tenant && Tier::Tenant < Tier::Baseline);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// First.
    Admin,
    /// Second.
    Tenant,
    /// Last.
    Baseline,
}

/// Where a module stands among those that are loaded.
///
/// ```
/// use policy_sdk::{Placement, Tier};
///
/// let placement = Placement { name: "guard".to_owned(), tier: Tier::Admin, tenant: None };
/// assert_eq!(placement.tier, Tier::Admin);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Its name.
    pub name: String,
    /// Its tier.
    pub tier: Tier,
    /// Whose it is: then it is asked only about this tenant's pods as subjects.
    pub tenant: Option<String>,
}

/// Names of the networks that hold an address, sorted.
pub(crate) fn networks_of(networks: &[Network], address: IpAddr) -> Vec<String> {
    let mut names: Vec<String> = networks
        .iter()
        .filter(|network| network.contains(address))
        .map(|network| network.name.clone())
        .collect();
    names.sort();
    names.dedup();
    names
}
