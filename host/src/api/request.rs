//! What is asked.

use super::{Attach, CheckAttachment};
use crate::{
    attachment::Attachment,
    store::records::ServiceRecord,
    wasm::{Overrides, Tier},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// What is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// How the node is.
    Status,
    /// Connect a pod.
    EndpointAdd(EndpointAdd),
    /// Disconnect a pod. That it is not there is no error.
    EndpointDelete(PodName),
    /// Attach a container, for its runtime.
    Attach(Box<Attach>),
    /// End an attachment. That it is not there is no error.
    Detach(Attachment),
    /// Say what is not as it should be of an attachment.
    CheckAttachment(CheckAttachment),
    /// End all attachments to a network but those of these containers by these interfaces.
    CollectAttachments {
        /// The network.
        network: String,
        /// Containers with interfaces.
        valid: BTreeSet<(String, String)>,
    },
    /// Say why no container can be attached now.
    Readiness,
    /// The node's pods.
    EndpointList,
    /// Change a pod's labels.
    EndpointLabel(EndpointLabel),
    /// The cluster's identities.
    IdentityList,
    /// What the kernel's ipcache holds.
    IpcacheList,
    /// Change a namespace's labels.
    NamespaceLabel(NamespaceLabel),
    /// The namespaces that have labels or pods.
    NamespaceList,
    /// The policy in force.
    PolicyShow,
    /// The modules in force, and earlier sets of them.
    PolicyList,
    /// One module.
    PolicyInspect(String),
    /// Change the set of modules on all nodes.
    PolicyChange(PolicyChange),
    /// Check invariants, given as text, against the policy in force.
    PolicyVerify(String),
    /// What audited modules would have denied.
    PolicyAudit,
    /// Who may reach whom, and why.
    Explain(Explain),
    /// Remove a node that is gone, with its pods.
    NodeDelete(String),
    /// Add a service, or change the one of that name.
    ServiceAdd(Box<ServiceRecord>),
    /// Remove a service. That it is not there is no error.
    ServiceDelete(PodName),
    /// The cluster's services.
    ServiceList,
    /// Disconnect all pods of the node, take no more, and stop.
    Drain,
    /// Report packets until the connection ends.
    Monitor(Monitor),
}

/// A pod's name, or a service's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PodName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl std::fmt::Display for PodName {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}/{}", self.namespace, self.name)
    }
}

/// Connect a pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EndpointAdd {
    /// The pod.
    pub pod: PodName,
    /// Its network namespace: a path, or a name among those of `ip netns`.
    pub netns: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its service account; empty where it has none.
    pub service_account: String,
    /// Names of its ports, with IP protocol number and port.
    pub ports: Vec<(String, u8, u16)>,
    /// Its addresses, one of each family at the most; chosen from the node's pod CIDRs where none is given.
    pub addresses: Vec<IpAddr>,
    /// What a container runtime calls it, where one attaches it.
    pub attachment: Option<Attachment>,
}

/// Change a pod's labels.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EndpointLabel {
    /// The pod.
    pub pod: PodName,
    /// Labels to set.
    pub set: BTreeMap<String, String>,
    /// Labels to take away.
    pub remove: Vec<String>,
}

/// Change a namespace's labels.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NamespaceLabel {
    /// The namespace.
    pub namespace: String,
    /// Labels to set.
    pub set: BTreeMap<String, String>,
    /// Labels to take away.
    pub remove: Vec<String>,
}

/// Change the set of modules.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PolicyChange {
    /// How.
    pub what: Change,
    /// Say what would change, and touch nothing.
    pub dry_run: bool,
    /// Say what would no longer pass of the flows that are tracked on the node that is asked.
    pub against_flows: bool,
    /// Go on without nodes that do not answer.
    pub skip_unreachable: bool,
}

/// A change of the set of modules.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Change {
    /// Add a module, or replace the one of that name.
    Load(Box<LoadModule>),
    /// Take the module of that name away.
    Unload(String),
    /// Go back to the set that an earlier change has put in force, or to the one before the present one.
    Rollback(Option<u64>),
}

/// A module to load. What is not given stays as it was, where the module replaces another.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LoadModule {
    /// Its name.
    pub name: String,
    /// Name of its file, for people.
    pub file: String,
    /// Its tier.
    pub tier: Option<Tier>,
    /// Its place in the tier.
    pub priority: Option<u32>,
    /// Whose it is.
    pub tenant: Option<String>,
    /// Enforce nothing of it; report what it would have denied. One that was audited stays so unless it is told.
    pub audit: Option<bool>,
    /// What it may use; none given keeps what it may, where the file has the same name.
    pub overrides: Option<Overrides>,
    /// The module: a component, or a core module.
    #[serde(with = "serde_bytes")]
    pub module: Vec<u8>,
    /// Configuration as JSON text, empty for none; none given keeps what it has, where the file has the same name.
    pub config: Option<String>,
}

/// Who may reach whom?
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Explain {
    /// Who: a pod, an address, an identity, a reserved name, or a namespace with labels.
    pub from: String,
    /// Whom.
    pub to: String,
    /// IP protocol number.
    pub protocol: Option<u8>,
    /// Destination port, or ICMP type.
    pub port: Option<u16>,
}

/// What to report.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Monitor {
    /// Dropped packets.
    pub drops: bool,
    /// First packets of allowed flows.
    pub flows: bool,
}
