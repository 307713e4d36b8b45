//! The control socket: what can be asked of a running hostd, and what it answers.
//!
//! One connection carries one request and its answer, each a frame of [`codec`](crate::codec). A monitor's answer is
//! many frames, until either side ends the connection.

mod client;
mod server;

pub use client::{ClientError, call, monitor};
pub use server::{Server, serve};

use crate::{
    store::records::{ModuleRecord, Prepared},
    wasm::{Overrides, Tier},
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
    /// Its service account; empty where it has none.
    pub service_account: String,
    /// Names of its ports, with IP protocol number and port.
    pub ports: Vec<(String, u8, u16)>,
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
    /// What it may use.
    pub overrides: Overrides,
    /// The module: a component, or a core module.
    pub module: Vec<u8>,
    /// Configuration as JSON text, empty for none.
    pub config: String,
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
    /// To [`Request::NamespaceLabel`].
    Namespace(NamespaceView),
    /// To [`Request::NamespaceList`].
    Namespaces(Vec<NamespaceView>),
    /// To [`Request::PolicyShow`].
    Policy(Box<PolicyView>),
    /// To [`Request::PolicyList`].
    Modules(ModulesView),
    /// To [`Request::PolicyInspect`].
    Module(Box<ModuleView>),
    /// To [`Request::PolicyChange`].
    Loaded(Box<LoadReport>),
    /// To [`Request::PolicyVerify`].
    Verified(Verification),
    /// To [`Request::PolicyAudit`].
    Audit(Vec<AuditView>),
    /// To [`Request::Explain`].
    Explained(Box<Explanation>),
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
    /// The modules in force, in the order in which they are asked.
    pub modules: Vec<ModuleRecord>,
    /// Tenants' modules that fail, with what they did.
    pub failures: Vec<String>,
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

/// The policy in force.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PolicyView {
    /// The modules, in the order in which they are asked.
    pub modules: Vec<ModuleRecord>,
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

/// The modules in force, and earlier sets of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModulesView {
    /// In the order in which they are asked.
    pub modules: Vec<ModuleRecord>,
    /// Number of the change that has put them in force.
    pub serial: u64,
    /// Earlier sets, the newest first.
    pub earlier: Vec<RevisionView>,
}

/// An earlier set of modules.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RevisionView {
    /// The change that has put it in force.
    pub serial: u64,
    /// That change.
    pub what: String,
    /// When, in milliseconds since 1970.
    pub time_ms: u64,
    /// Names of the modules.
    pub modules: Vec<String>,
}

/// One module.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModuleView {
    /// Its record.
    pub module: ModuleRecord,
    /// Its networks, with their CIDRs.
    pub networks: Vec<(String, Vec<String>)>,
    /// Peers that it has been told of: classes, reserved ones, networks.
    pub peers: usize,
    /// Calls on this node since it was started.
    pub calls: u64,
    /// Limits in force: fuel for a call, milliseconds for a load or a change, bytes of memory.
    pub limits: (u64, u64, u64),
    /// What it did, where its tenant's pods do without it.
    pub failure: Option<String>,
}

/// A pair of identities.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PairView {
    /// The sender.
    pub from: String,
    /// The receiver.
    pub to: String,
    /// What passes, as `allow` or `allow tcp/80`.
    pub verdict: String,
}

/// Invariants, checked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Verification {
    /// How many invariants.
    pub invariants: usize,
    /// Over how many identities of pods.
    pub identities: usize,
    /// Counterexamples; none where all of them hold.
    pub broken: Vec<String>,
    /// Invariants that are about nobody.
    pub about_nobody: Vec<String>,
}

/// What an audited module would have denied.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AuditView {
    /// The module.
    pub module: String,
    /// The sender.
    pub from: String,
    /// The receiver.
    pub to: String,
    /// Protocol.
    pub protocol: String,
    /// Destination port.
    pub port: u16,
    /// Flows that it would have denied.
    pub flows: u64,
}

/// Who may reach whom, and why.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Explanation {
    /// Who.
    pub from: EndView,
    /// Whom.
    pub to: EndView,
    /// Protocol that was asked for.
    pub protocol: Option<String>,
    /// Port that was asked for.
    pub port: Option<u16>,
    /// The generation in force.
    pub generation: u32,
    /// Whether a connection may open, where a protocol was asked for.
    pub verdict: Option<bool>,
    /// What may pass.
    pub allowed: String,
    /// Each end where policy is enforced.
    pub sides: Vec<SideView>,
    /// The kernel has what the modules say, at every end that this node enforces.
    pub agrees: bool,
}

/// One end of an explanation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EndView {
    /// As it was asked for, with the address where it is a pod.
    pub name: String,
    /// Number of its identity.
    pub identity: u32,
    /// Its identity.
    pub identity_name: String,
    /// Its node, where it is a pod.
    pub node: Option<String>,
}

/// What one end lets pass.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SideView {
    /// `egress` or `ingress`.
    pub side: String,
    /// The pod at whose end that is.
    pub subject: String,
    /// The node that enforces it, where the pod is known.
    pub node: Option<String>,
    /// What each module says of the port, in order; none where no port was asked for.
    pub steps: Vec<StepView>,
    /// No module has decided: the built-in baseline has.
    pub last_word: bool,
    /// What the modules let pass.
    pub ruling: String,
    /// Whether they let the port pass.
    pub verdict: Option<bool>,
    /// What the kernel has, where this node enforces it.
    pub kernel: Option<KernelView>,
}

/// What one module says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StepView {
    /// The module.
    pub module: String,
    /// Its tier.
    pub tier: String,
    /// Whose it is.
    pub tenant: Option<String>,
    /// It is only audited.
    pub audit: bool,
    /// What it makes of the pod at this end.
    pub subject: String,
    /// What it makes of the other end.
    pub peer: String,
    /// `allow`, `deny` or `pass`.
    pub action: String,
    /// Why, in the author's words.
    pub reason: String,
    /// This is the word that counts.
    pub decides: bool,
}

/// A cell of the kernel's policy map.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KernelView {
    /// The map.
    pub map: String,
    /// Row: the identity at this end.
    pub row: u32,
    /// Column: the identity at the other end.
    pub column: u32,
    /// Offset of the cell.
    pub index: u32,
    /// `deny`, `allow`, or the number of a port set.
    pub cell: String,
    /// What that lets pass, read from the kernel.
    pub ruling: String,
}

/// A flow that a new policy would end.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FlowView {
    /// Who opened it.
    pub from: String,
    /// To whom.
    pub to: String,
    /// Protocol.
    pub protocol: String,
    /// Destination port.
    pub port: u16,
    /// How many of them.
    pub flows: u64,
}

/// What a policy change did, or would do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LoadReport {
    /// The change.
    pub what: String,
    /// The modules after it, in the order in which they are asked.
    pub modules: Vec<ModuleRecord>,
    /// Whether nothing was touched.
    pub dry_run: bool,
    /// Pods in the cluster.
    pub pods: usize,
    /// Identities that the modules make of them.
    pub identities: usize,
    /// Ordered pairs of them.
    pub pairs: usize,
    /// Cells of this node's policy matrix.
    pub cells: u64,
    /// Calls of modules that it took here.
    pub calls: u64,
    /// Pairs whose verdict changes; none where there are too many identities to ask for every pair.
    pub changed: Option<Vec<ChangedPair>>,
    /// Flows tracked on this node that it would end; none unless asked for.
    pub flows: Option<Vec<FlowView>>,
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
    /// What passed before, as `deny`, `allow` or `allow tcp/80`.
    pub before: String,
    /// What passes after.
    pub after: String,
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
