//! The daemon: one task owns the node's state, and everything that changes it is a message to that task.

mod addresses;
mod attachments;
mod audit;
mod cleanup;
mod collect;
mod compare;
mod coordinate;
mod directory;
mod endpoints;
mod evaluate;
mod explain;
mod join;
mod load;
mod modules;
mod names;
mod node;
mod pods;
mod policy;
mod recover;
mod revision;
mod runtimes;
mod serve;
mod services;
mod start;
mod verify;
mod views;
mod watch;

pub use cleanup::{check_here, cleanup, until_stopped};
pub use start::run;

use crate::{
    api::{CheckAttachment, EndpointAdd, EndpointLabel, Explain, LoadReport, NamespaceLabel, PodName, Response},
    attachment::{Attachment, Queue},
    config::Config,
    datapath::{Datapath, DatapathError},
    endpoint::{AddressError, EndpointFile, LocalEndpoint},
    identity::{Exhausted, Labels, Registry},
    net::{NetError, Veth},
    plan::PlanError,
    stack::StackError,
    store::{
        Change, Store, StoreError,
        records::{NodeRecord, PodRecord, PolicyRecord, SeenRecord, ServiceRecord},
    },
    wasm::{Compiled, Compiler, WasmError},
};
use abi::AddressKey;
use audit::Audit;
use collect::Unused;
use directory::Directory;
use modules::ModuleFolder;
use names::Names;
use policy::Side;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::{Arc, RwLock},
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot};
use watch::Watch;

/// Why something was not done. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The request itself is wrong.
    #[error("{0}")]
    Request(String),
    /// The node has as many pods as its maps take.
    #[error("this node has {0} pods already: raise `maps.endpoints`")]
    Full(u32),
    /// There is no such attachment.
    #[error("{0} is not attached")]
    NotAttached(Attachment),
    /// The node takes no pods any more.
    #[error("this node is being drained: it takes no pods any more")]
    Draining,
    /// No address for the pod.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The network.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The kernel's maps and programs.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// The cluster's state.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A policy module that can't be compiled.
    #[error(transparent)]
    Wasm(#[from] WasmError),
    /// A policy module that does not do what it should.
    #[error(transparent)]
    Stack(#[from] StackError),
    /// The plan.
    #[error(transparent)]
    Plan(#[from] PlanError<StackError>),
    /// No identity left.
    #[error(transparent)]
    Identity(#[from] Exhausted),
}

impl DaemonError {
    /// Says that something has failed that is tried again. That the store is away is said where it is noticed.
    fn complain(&self, what: &str) {
        match self {
            Self::Store(error) if error.is_unavailable() => tracing::debug!("{what}: {error}"),
            _ => tracing::warn!("{what}: {self}"),
        }
    }
}

/// A message to the daemon's task.
enum Command {
    Status(oneshot::Sender<Response>),
    EndpointAdd(EndpointAdd, oneshot::Sender<Response>),
    EndpointDelete(PodName, oneshot::Sender<Response>),
    Attach(Box<EndpointAdd>, oneshot::Sender<Response>),
    Detach(Attachment, oneshot::Sender<Response>),
    CheckAttachment(CheckAttachment, oneshot::Sender<Response>),
    CollectAttachments(String, BTreeSet<(String, String)>, oneshot::Sender<Response>),
    Readiness(oneshot::Sender<Response>),
    EndpointList(oneshot::Sender<Response>),
    EndpointLabel(EndpointLabel, oneshot::Sender<Response>),
    IdentityList(oneshot::Sender<Response>),
    IpcacheList(oneshot::Sender<Response>),
    NamespaceLabel(NamespaceLabel, oneshot::Sender<Response>),
    NamespaceList(oneshot::Sender<Response>),
    PolicyShow(oneshot::Sender<Response>),
    PolicyList(oneshot::Sender<Response>),
    PolicyInspect(String, oneshot::Sender<Response>),
    PolicyVerify(String, oneshot::Sender<Response>),
    PolicyAudit(oneshot::Sender<Response>),
    Explain(Explain, oneshot::Sender<Response>),
    NodeDelete(String, oneshot::Sender<Response>),
    ServiceAdd(Box<ServiceRecord>, oneshot::Sender<Response>),
    ServiceDelete(PodName, oneshot::Sender<Response>),
    ServiceList(oneshot::Sender<Response>),
    Drain(oneshot::Sender<Response>),
    /// A flow that was let open, while a module is audited.
    Opened(abi::Event),
    Evaluate(
        Box<evaluate::Candidate>,
        oneshot::Sender<Result<LoadReport, DaemonError>>,
    ),
    /// A monitor has come or gone: how many want drops, and how many flows, more than before.
    Report {
        drops: i32,
        flows: i32,
    },
}

/// A node of the cluster.
struct Node {
    record: NodeRecord,
    /// Since when its lease has been expired; `None` while it is alive.
    stale_since: Option<Instant>,
}

/// A pod of the cluster.
struct Pod {
    record: PodRecord,
    epoch: u32,
}

/// A pod of this node with its veth pair.
struct Local {
    endpoint: LocalEndpoint,
    veth: Veth,
}

/// The node's state.
struct Daemon {
    config: Config,
    store: Arc<dyn Store>,
    datapath: Datapath,
    compiler: Compiler,
    /// Compiled modules by SHA-256, those in force and those that were asked for since.
    compiled: HashMap<String, Compiled>,
    modules: ModuleFolder,
    registry: Registry,
    /// Identities that nobody uses, and up to which mark on one the store's changes were taken in, and others were told so.
    unused: Unused,
    seen: SeenRecord,
    told: Option<SeenRecord>,
    /// When the lease was renewed last; none where it has to be taken.
    renewed: Option<Instant>,
    /// Addresses of pods that are gone, of which the store may not have heard.
    withdrawn: BTreeSet<IpAddr>,
    /// Attachments that were ended while hostd was not there.
    queue: Queue,
    /// Labels of namespaces.
    namespaces: BTreeMap<String, Labels>,
    audit: Audit,
    /// Pods without a place in the policy in force, and when what failed was tried again last.
    unplaced: BTreeSet<AddressKey>,
    made_up: Instant,
    nodes: BTreeMap<String, Node>,
    addresses: addresses::NodeAddresses,
    /// Nodes that have a lease, also those of which there is no record yet.
    alive: BTreeSet<String>,
    pods: Directory,
    services: services::Services,
    locals: BTreeMap<PodName, Local>,
    active: Side,
    /// During a load: the next side until the flip, the last one from there until all nodes have flipped.
    aside: Option<Side>,
    /// The policy of the cluster as last seen, with its revision, and since when it is at that.
    policy: Option<(PolicyRecord, u64)>,
    policy_since: Instant,
    out_of_step: Option<String>,
    /// The policy in force has to be compiled anew, though it is the cluster's.
    recompile: bool,
    file: EndpointFile,
    /// MTU of the pods, in bytes.
    pod_mtu: u32,
    /// The interface with the underlay address.
    underlay: String,
    names: Arc<RwLock<Names>>,
    monitors: (i32, i32),
    watch: Watch,
    /// Changes of the store that could not be taken in, to be tried again.
    missed: Vec<Change>,
    /// When the node was asked to take no more pods and to stop.
    drained: Option<Instant>,
}

/// How often the daemon looks at its lease and at stale nodes.
const TICK: Duration = Duration::from_millis(500);

impl Daemon {
    /// Serves commands and follows the store until the node is drained; the error says why it can't go on before that.
    async fn serve(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        mut changes: mpsc::Receiver<Change>,
    ) -> anyhow::Result<()> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let settling = self.settling();
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.command(command).await,
                    None => anyhow::bail!("nobody asks the daemon's task any more"),
                },
                change = changes.recv() => {
                    let Some(change) = change else {
                        anyhow::bail!("the store's watch has ended; the datapath goes on");
                    };
                    self.follow(change).await;
                }
                _ = tick.tick() => self.tick().await,
                Some(()) = at(settling) => self.settle(),
            }
            // Not before whoever has asked for it has the answer.
            if self.drained.is_some_and(|since| since.elapsed() > TICK) {
                return Ok(());
            }
        }
    }

    async fn command(&mut self, command: Command) {
        match command {
            Command::Status(reply) => answer(reply, self.status().map(|status| Response::Status(Box::new(status)))),
            Command::EndpointAdd(request, reply) => {
                answer(reply, self.endpoint_add(request).await.map(Response::Endpoint));
            }
            Command::EndpointDelete(pod, reply) => {
                answer(reply, self.endpoint_delete(&pod).await.map(Response::Deleted));
            }
            // Of a runtime that has gone since nobody knows what it has done meanwhile.
            Command::Attach(_, reply) | Command::Detach(_, reply) if reply.is_closed() => {}
            Command::Attach(request, reply) => self.attach_for(*request, reply).await,
            Command::Detach(attachment, reply) => {
                answer_runtime(reply, self.detach(&attachment).await.map(Response::Deleted));
            }
            Command::CheckAttachment(asked, reply) => {
                answer_runtime(reply, self.check_attachment(&asked).map(Response::Problems));
            }
            Command::CollectAttachments(network, valid, reply) => {
                let collected = self.collect_attachments(&network, &valid).await;
                answer_runtime(reply, collected.map(Response::Collected));
            }
            Command::Readiness(reply) => answer(reply, Ok(Response::Problems(self.readiness()))),
            Command::EndpointList(reply) => answer(reply, Ok(Response::Endpoints(self.endpoint_list()))),
            Command::EndpointLabel(request, reply) => {
                answer(reply, self.endpoint_label(request).await.map(Response::Endpoint));
            }
            Command::IdentityList(reply) => answer(reply, Ok(Response::Identities(self.identity_list()))),
            Command::IpcacheList(reply) => answer(reply, Ok(Response::Ipcache(self.ipcache_list()))),
            Command::PolicyShow(reply) => {
                answer(
                    reply,
                    self.policy_show().map(|policy| Response::Policy(Box::new(policy))),
                );
            }
            Command::PolicyList(reply) => answer(reply, Ok(Response::Modules(self.policy_list()))),
            Command::PolicyInspect(name, reply) => {
                let inspected = self.policy_inspect(&name);
                answer(reply, inspected.map(|module| Response::Module(Box::new(module))));
            }
            Command::PolicyVerify(text, reply) => answer(reply, self.policy_verify(&text).map(Response::Verified)),
            Command::PolicyAudit(reply) => answer(reply, Ok(Response::Audit(self.audit.views()))),
            Command::Explain(what, reply) => {
                let explained = self.explain(&what);
                answer(
                    reply,
                    explained.map(|explanation| Response::Explained(Box::new(explanation))),
                );
            }
            Command::NamespaceLabel(request, reply) => {
                answer(reply, self.namespace_label(request).await.map(Response::Namespace));
            }
            Command::NamespaceList(reply) => answer(reply, Ok(Response::Namespaces(self.namespace_list()))),
            Command::Opened(event) => self.audit_event(&event),
            Command::ServiceAdd(record, reply) => {
                answer(reply, self.service_add(*record).await.map(Response::Service));
            }
            Command::ServiceDelete(service, reply) => {
                let deleted = self.service_delete(&service.namespace, &service.name).await;
                answer(reply, deleted.map(Response::Deleted));
            }
            Command::ServiceList(reply) => answer(reply, Ok(Response::Services(self.service_list()))),
            Command::Drain(reply) => answer(reply, self.drain().await.map(Response::Drained)),
            Command::NodeDelete(name, reply) => answer(reply, self.node_delete(&name).await.map(Response::Deleted)),
            Command::Evaluate(candidate, reply) => {
                // Nobody waits any more: then the answer is not needed.
                let _ = reply.send(self.evaluate(&candidate).await);
            }
            Command::Report { drops, flows } => {
                self.monitors.0 += drops;
                self.monitors.1 += flows;
                self.set_report();
            }
        }
    }

    /// The programs report what anybody wants to see: a monitor, or the audit of a module.
    fn set_report(&mut self) {
        let flag = |wanted: bool, flag: u32| if wanted { flag } else { 0 };
        let flows = self.monitors.1 > 0 || self.audit.is_on();
        let report = flag(self.monitors.0 > 0, abi::node::REPORT_DROPS) | flag(flows, abi::node::REPORT_FLOWS);
        if let Err(error) = self.datapath.set_report(report) {
            tracing::error!("{error}");
        }
    }
}

/// Waits until then, or not at all.
async fn at(then: Option<Instant>) -> Option<()> {
    tokio::time::sleep_until(then?.into()).await;
    Some(())
}

/// The same, with what kind of failure it was.
fn answer_runtime(reply: oneshot::Sender<Response>, result: Result<Response, DaemonError>) {
    let _ = reply.send(result.unwrap_or_else(|error| error.told()));
}

fn answer(reply: oneshot::Sender<Response>, result: Result<Response, DaemonError>) {
    // A caller that has gone does not want the answer.
    let _ = reply.send(result.unwrap_or_else(|error| Response::Error(error.to_string())));
}
