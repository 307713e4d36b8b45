//! What a CNI plugin asks, and what it is answered.

use crate::attachment::Attachment;
use serde::{Deserialize, Serialize};
use std::{net::IpAddr, path::PathBuf};

/// Is an attachment as it was made?
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CheckAttachment {
    /// The attachment.
    pub attachment: Attachment,
    /// The container's network namespace.
    pub netns: PathBuf,
    /// The addresses that the runtime was told.
    pub addresses: Vec<IpAddr>,
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
    /// MTU of the container's end, in bytes.
    pub mtu: u32,
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
