//! The control socket: what can be asked of a running hostd, and what it answers.
//!
//! One connection carries one request and its answer, each a frame of [`codec`](crate::codec). A monitor's answer is
//! many frames, until either side ends the connection.

mod attachment;
mod client;
mod policy;
mod request;
mod server;
mod view;

pub use attachment::{Attach, AttachedView, CheckAttachment, Failure};
pub use client::{ClientError, call, monitor};
pub use policy::{
    AuditView, ChangedPair, EndView, Explanation, FlowView, KernelView, LoadReport, ModuleView, ModulesView,
    NodeReport, PairView, PolicyView, RevisionView, SideView, StepView, Verification,
};
pub use request::{
    Change, EndpointAdd, EndpointLabel, Explain, LoadModule, Monitor, NamespaceLabel, PodName, PolicyChange, Request,
};
pub use server::{Server, remove_socket, serve};
pub use view::{
    BackendView, CounterView, EndpointView, IdentityView, IpcacheView, NamespaceView, NodeView, PacketView, Response,
    ServicePortView, ServiceView, Status, Usage,
};
