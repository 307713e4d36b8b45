//! What is answered: the node and what is on it.

use super::{
    AttachedView, AuditView, Explanation, Failure, LoadReport, ModuleView, ModulesView, PodName, PolicyView,
    Verification,
};
use crate::{attachment::Attachment, store::records::ModuleRecord};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::IpAddr};

/// What is answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Response {
    /// It could not be done, and nothing was changed.
    Error(String),
    /// The same, to a container runtime.
    Failed(Failure, String),
    /// To [`Request::Attach`](super::Request::Attach).
    Attached(AttachedView),
    /// To [`Request::CheckAttachment`](super::Request::CheckAttachment) and [`Request::Readiness`](super::Request::Readiness): none where all is well.
    Problems(Vec<String>),
    /// To [`Request::CollectAttachments`](super::Request::CollectAttachments): what was ended.
    Collected(Vec<Attachment>),
    /// To [`Request::Status`](super::Request::Status).
    Status(Box<Status>),
    /// To [`Request::EndpointAdd`](super::Request::EndpointAdd) and [`Request::EndpointLabel`](super::Request::EndpointLabel).
    Endpoint(EndpointView),
    /// To [`Request::EndpointList`](super::Request::EndpointList).
    Endpoints(Vec<EndpointView>),
    /// To [`Request::EndpointDelete`](super::Request::EndpointDelete) and [`Request::NodeDelete`](super::Request::NodeDelete): whether there was one.
    Deleted(bool),
    /// The pods that were disconnected.
    Drained(Vec<PodName>),
    /// To [`Request::IdentityList`](super::Request::IdentityList).
    Identities(Vec<IdentityView>),
    /// To [`Request::IpcacheList`](super::Request::IpcacheList).
    Ipcache(Vec<IpcacheView>),
    /// To [`Request::NamespaceLabel`](super::Request::NamespaceLabel).
    Namespace(NamespaceView),
    /// To [`Request::NamespaceList`](super::Request::NamespaceList).
    Namespaces(Vec<NamespaceView>),
    /// To [`Request::ServiceAdd`](super::Request::ServiceAdd).
    Service(ServiceView),
    /// To [`Request::ServiceList`](super::Request::ServiceList).
    Services(Vec<ServiceView>),
    /// To [`Request::PolicyShow`](super::Request::PolicyShow).
    Policy(Box<PolicyView>),
    /// To [`Request::PolicyList`](super::Request::PolicyList).
    Modules(ModulesView),
    /// To [`Request::PolicyInspect`](super::Request::PolicyInspect).
    Module(Box<ModuleView>),
    /// To [`Request::PolicyChange`](super::Request::PolicyChange).
    Loaded(Box<LoadReport>),
    /// To [`Request::PolicyVerify`](super::Request::PolicyVerify).
    Verified(Verification),
    /// To [`Request::PolicyAudit`](super::Request::PolicyAudit).
    Audit(Vec<AuditView>),
    /// To [`Request::Explain`](super::Request::Explain).
    Explained(Box<Explanation>),
    /// To [`Request::Monitor`](super::Request::Monitor): reports begin now.
    Monitoring,
    /// To [`Request::Monitor`](super::Request::Monitor): one packet.
    Packet(PacketView),
    /// To [`Request::Monitor`](super::Request::Monitor): so many packets were not reported, because the reader was too slow.
    Missed(u64),
}

/// How the node is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Name of the node.
    pub node: String,
    /// Version of hostd.
    pub version: String,
    /// `tcx` or `clsact`.
    pub attach: String,
    /// Times that a program was no longer first on its hook, or the table of nftables or a route was gone, and was put
    /// right, since hostd was started.
    pub repairs: u64,
    /// What is wrong on this node that hostd can't put right.
    pub problems: Vec<String>,
    /// MTU of the pods.
    pub pod_mtu: u32,
    /// The generation in force.
    pub generation: u32,
    /// The modules in force, in the order in which they are asked.
    pub modules: Vec<ModuleRecord>,
    /// Tenants' modules that fail, with what they did.
    pub failures: Vec<String>,
    /// The cluster's store.
    pub store: String,
    /// Why it does not answer, where it did not do so last.
    pub store_problem: Option<String>,
    /// Why this node does not enforce the cluster's policy, where it does not.
    pub out_of_step: Option<String>,
    /// What of the cluster's services this node could not take in; it tries again.
    pub service_problems: Vec<String>,
    /// Pods on this node.
    pub endpoints: usize,
    /// How full the maps are.
    pub maps: Vec<Usage>,
    /// The nodes of the cluster.
    pub nodes: Vec<NodeView>,
    /// Packets and bytes forwarded, by path.
    pub forwarded: Vec<CounterView>,
    /// Packets and bytes dropped, by reason; reasons without packets are left out.
    pub drops: Vec<CounterView>,
}

/// How full a map is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Usage {
    /// The key in the configuration.
    pub setting: String,
    /// In use.
    pub used: u64,
    /// At the most.
    pub capacity: u64,
}

/// A node of the cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeView {
    /// Its name.
    pub name: String,
    /// Its underlay address.
    pub underlay: IpAddr,
    /// Its pod CIDRs.
    pub pod_cidrs: Vec<String>,
    /// Its pods.
    pub pods: usize,
    /// `alive`, or `stale`, where its lease has expired.
    pub state: String,
    /// Seconds for which it has been stale.
    pub stale_seconds: u64,
}

/// What was counted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CounterView {
    /// Path or drop reason.
    pub name: String,
    /// What it means.
    pub text: String,
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A pod of this node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EndpointView {
    /// The pod.
    pub pod: PodName,
    /// Its address, or one of each family.
    pub addresses: Vec<IpAddr>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its service account; empty where it has none.
    pub service_account: String,
    /// Names of its ports, as `http=tcp/80`.
    pub ports: Vec<String>,
    /// Its identity's number.
    pub identity: u32,
    /// Its identity.
    pub identity_name: String,
    /// Its network namespace.
    pub netns: String,
    /// The host's end of its veth pair.
    pub interface: String,
    /// Index of that.
    pub ifindex: u32,
    /// MAC address of the pod's end.
    pub mac: String,
}

/// An identity.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct IdentityView {
    /// Its number, which is the VNI.
    pub identity: u32,
    /// The tenant's number.
    pub tenant: u32,
    /// As `tenant{labels}`, or a reserved name.
    pub name: String,
    /// Addresses that have it, in the cluster.
    pub addresses: usize,
}

/// An entry of the ipcache.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct IpcacheView {
    /// The address.
    pub address: IpAddr,
    /// Its identity's number, in the generation in force.
    pub identity: u32,
    /// Its identity.
    pub identity_name: String,
    /// The number in the other generation, where it differs.
    pub other_identity: Option<u32>,
    /// Underlay address of the node that it lives behind; none where that is this one.
    pub tunnel_endpoint: Option<IpAddr>,
    /// The pod, or `host`.
    pub name: String,
}

/// A namespace.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NamespaceView {
    /// Its name.
    pub namespace: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its pods, in the cluster.
    pub pods: usize,
}

/// A service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceView {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Labels of its backends.
    pub selector: BTreeMap<String, String>,
    /// Seconds for which a client keeps its backend; zero for none.
    pub affinity_seconds: u32,
    /// Its ports.
    pub ports: Vec<ServicePortView>,
}

/// A port of a service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServicePortView {
    /// The port, as `tcp/80`.
    pub port: String,
    /// The backends' port: its number, or the name that pods give it.
    pub target: String,
    /// The port at which every node's address stands for this one.
    pub node_port: Option<u16>,
    /// Its backends.
    pub backends: Vec<BackendView>,
    /// Backends that there was no room for.
    pub left_out: usize,
}

/// A backend of a service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BackendView {
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// The pod, or `host`; empty where it is neither.
    pub name: String,
}

/// A packet, as the programs report it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PacketView {
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// `allow` or `drop`.
    pub verdict: String,
    /// Path or drop reason.
    pub reason: String,
    /// The program.
    pub hook: String,
    /// Protocol, where the packet was read so far.
    pub protocol: String,
    /// Source address.
    pub source: Option<IpAddr>,
    /// Source port.
    pub source_port: u16,
    /// The source's pod, or `host`.
    pub source_name: String,
    /// Destination address.
    pub destination: Option<IpAddr>,
    /// Destination port.
    pub destination_port: u16,
    /// The destination's pod, or `host`.
    pub destination_name: String,
    /// Identity of the source.
    pub from: String,
    /// Identity of the destination.
    pub to: String,
    /// Length of the frame in bytes.
    pub length: u32,
    /// The generation in force.
    pub generation: u32,
}
