//! What a CNI plugin asks, and what it is answered.

use super::EndpointAdd;
use crate::attachment::Attachment;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

/// Attach a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attach {
    /// The pod that it is.
    pub endpoint: EndpointAdd,
    /// What its runtime says besides (`CNI_ARGS`).
    pub arguments: BTreeMap<String, String>,
}

/// Is an attachment as it was made?
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CheckAttachment {
    /// The attachment.
    pub attachment: Attachment,
    /// The container's network namespace.
    pub netns: PathBuf,
    /// The addresses that the runtime was told.
    pub addresses: Vec<IpAddr>,
    /// MAC address of the container's interface as it was told, where it was.
    pub mac: Option<String>,
    /// Gateways of the routes to everything that it was told. A plugin after this one may have taken some away.
    pub routes: Vec<IpAddr>,
}

/// An attachment that was made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AttachedView {
    /// The node's end of the veth pair.
    pub interface: String,
    /// Its MAC address, as `02:00:00:00:00:01`.
    pub mac: String,
    /// MAC address of the container's end.
    pub pod_mac: String,
    /// MTU of the node's end, in bytes.
    pub mtu: u32,
    /// MTU of the container's end, in bytes.
    pub pod_mtu: u32,
    /// The container's addresses, each with its gateway.
    pub addresses: Vec<(IpAddr, IpAddr)>,
}

/// Why something that a CNI plugin has asked for was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Failure {
    /// It may work in a moment.
    Transient,
    /// There is no such container, or no namespace of it.
    NoContainer,
    /// What was asked for makes no sense.
    Invalid,
    /// The kernel or hostd itself.
    Internal,
}
