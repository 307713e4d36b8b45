//! What is answered about policies.

use crate::store::records::{ModuleRecord, Prepared};
use serde::{Deserialize, Serialize};

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
    /// Whether a connection may open, where a protocol was asked for: what the kernel holds, at every end that this node
    /// enforces.
    pub verdict: Option<bool>,
    /// What may pass, likewise.
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
    /// A pod of this node has the identity, so that this node enforces it.
    pub here: bool,
    /// What each module says of the port, in order; none where no port was asked for.
    pub steps: Vec<StepView>,
    /// No module has decided: the built-in baseline has.
    pub last_word: bool,
    /// What the modules let pass.
    pub ruling: String,
    /// Whether the port passes: what the kernel holds, or, where this node does not enforce it, what the modules say.
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
