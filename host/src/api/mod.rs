//! The control socket: what can be asked of a running hostd, and what it answers.
//!
//! One connection carries one request and its answer, each a frame of [`codec`](crate::codec). A monitor's answer is
//! many frames, until either side ends the connection.

mod client;
mod server;

pub use client::{ClientError, call, monitor};
pub use server::{Server, serve};

use crate::{
    plan::Verdict,
    store::records::{ModuleRecord, Prepared},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::IpAddr};

/// What is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// How the node is.
    Status,
    /// Connect a pod.
    EndpointAdd(EndpointAdd),
    /// Disconnect a pod. That it is not there is no error.
    EndpointDelete(PodName),
    /// The node's pods.
    EndpointList,
    /// Change a pod's labels.
    EndpointLabel(EndpointLabel),
    /// The cluster's identities.
    IdentityList,
    /// What the kernel's ipcache holds.
    IpcacheList,
    /// The policy in force.
    PolicyShow,
    /// Load a policy on all nodes.
    LoadPolicy(LoadPolicy),
    /// Remove a node that is gone, with its pods.
    NodeDelete(String),
    /// Report packets until the connection ends.
    Monitor(Monitor),
}

/// A pod's name.
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
    /// Its address; chosen from the node's pod CIDRs where there is none.
    pub address: Option<IpAddr>,
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

/// Load a policy.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LoadPolicy {
    /// Name, for people.
    pub name: String,
    /// The module: a component, or a core module.
    pub module: Vec<u8>,
    /// Configuration as JSON text, empty for none.
    pub config: String,
    /// Say what would change, and touch nothing.
    pub dry_run: bool,
    /// Go on without nodes that do not answer.
    pub skip_unreachable: bool,
}

/// What to report.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Monitor {
    /// Dropped packets.
    pub drops: bool,
    /// First packets of allowed flows.
    pub flows: bool,
}

/// What is answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Response {
    /// It could not be done, and nothing was changed.
    Error(String),
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::EndpointAdd`] and [`Request::EndpointLabel`].
    Endpoint(EndpointView),
    /// To [`Request::EndpointList`].
    Endpoints(Vec<EndpointView>),
    /// To [`Request::EndpointDelete`] and [`Request::NodeDelete`]: whether there was one.
    Deleted(bool),
    /// To [`Request::IdentityList`].
    Identities(Vec<IdentityView>),
    /// To [`Request::IpcacheList`].
    Ipcache(Vec<IpcacheView>),
    /// To [`Request::PolicyShow`].
    Policy(Box<PolicyView>),
    /// To [`Request::LoadPolicy`].
    Loaded(Box<LoadReport>),
    /// To [`Request::Monitor`]: reports begin now.
    Monitoring,
    /// To [`Request::Monitor`]: one packet.
    Packet(PacketView),
    /// To [`Request::Monitor`]: so many packets were not reported, because the reader was too slow.
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
    /// MTU of the pods.
    pub pod_mtu: u32,
    /// The generation in force.
    pub generation: u32,
    /// The policy in force, as `name (sha256)`.
    pub policy: Option<ModuleRecord>,
    /// Why this node does not enforce the cluster's policy, where it does not.
    pub out_of_step: Option<String>,
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
    /// Its address.
    pub address: IpAddr,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
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

/// The policy in force.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PolicyView {
    /// The module; none where nothing was loaded.
    pub module: Option<ModuleRecord>,
    /// The generation.
    pub generation: u32,
    /// Identities in it.
    pub identities: usize,
    /// Those of this node's pods.
    pub local_identities: usize,
    /// Cells decided.
    pub cells: u64,
    /// Different port sets.
    pub port_sets: usize,
    /// What passes, by pair; pairs for which nothing does are left out.
    pub pairs: Vec<PairView>,
}

/// A pair of identities.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PairView {
    /// The sender.
    pub from: String,
    /// The receiver.
    pub to: String,
    /// What passes.
    pub verdict: Verdict,
}

/// What a policy load did, or would do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LoadReport {
    /// The module.
    pub module: ModuleRecord,
    /// Whether nothing was touched.
    pub dry_run: bool,
    /// Pods in the cluster.
    pub pods: usize,
    /// Identities that the module makes of them.
    pub identities: usize,
    /// Ordered pairs of identities, the node itself included.
    pub pairs: usize,
    /// Cells of this node's policy matrix.
    pub cells: u64,
    /// Pairs whose verdict changes; none where there are too many identities to ask for every pair.
    pub changed: Option<Vec<ChangedPair>>,
    /// What each step took, in microseconds.
    pub steps: Vec<(String, u64)>,
    /// What each node did.
    pub nodes: Vec<NodeReport>,
}

/// A pair whose verdict changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangedPair {
    /// The sender, as the new policy identifies it.
    pub from: String,
    /// The receiver.
    pub to: String,
    /// What passed before.
    pub before: Verdict,
    /// What passes after.
    pub after: Verdict,
}

/// What a node did for a policy load.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeReport {
    /// Its name.
    pub node: String,
    /// What it prepared, or that it was skipped.
    pub result: Result<Prepared, String>,
    /// Time from the commit to its answer that it has switched, in microseconds; as the coordinator saw it.
    pub commit_micros: Option<u64>,
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
