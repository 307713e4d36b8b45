//! What the programs count and report.

use crate::{Identity, address::Address};

/// Where a program is attached.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// tc ingress of a pod's host veth: what the pod sends.
    FromPod = 1,
    /// tc ingress of the vxlan device: what other nodes send.
    FromOverlay = 2,
    /// tc egress of a pod's host veth: what the node's own stack sends or routes to the pod.
    ToPod = 3,
    /// tc ingress of the interface with the node's underlay address, while there are node ports: what comes from outside.
    FromNetdev = 4,
}

/// Where a packet went that was not dropped.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Path {
    /// From a pod into another pod of the same node.
    Local = 0,
    /// From a pod into the tunnel.
    Encap = 1,
    /// From the tunnel into a pod.
    Overlay = 2,
    /// From a pod to the node itself.
    ToHost = 3,
    /// From the node into a pod.
    FromHost = 4,
    /// An ARP request for the gateway, answered.
    ArpReply = 5,
    /// From a pod to an address that is no pod's, routed by the node.
    ToOutside = 6,
    /// From such an address into a pod, routed by the node.
    FromOutside = 7,
    /// A neighbour solicitation for the gateway, answered.
    NeighbourReply = 8,
    /// From outside by way of a node port into a pod.
    NodePort = 9,
    /// From a pod to outside, which had asked at a node port.
    NodePortReply = 10,
    /// An echo request for the gateway, answered.
    EchoReply = 11,
}

/// Elements of the counter map.
pub const PATHS: u32 = 12;

impl Path {
    /// All paths, by number.
    pub const ALL: [Self; PATHS as usize] = [
        Self::Local,
        Self::Encap,
        Self::Overlay,
        Self::ToHost,
        Self::FromHost,
        Self::ArpReply,
        Self::ToOutside,
        Self::FromOutside,
        Self::NeighbourReply,
        Self::NodePort,
        Self::NodePortReply,
        Self::EchoReply,
    ];

    /// Name, as in metrics and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Encap => "encap",
            Self::Overlay => "overlay",
            Self::ToHost => "to_host",
            Self::FromHost => "from_host",
            Self::ArpReply => "arp_reply",
            Self::ToOutside => "to_outside",
            Self::FromOutside => "from_outside",
            Self::NeighbourReply => "neighbour_reply",
            Self::NodePort => "node_port",
            Self::NodePortReply => "node_port_reply",
            Self::EchoReply => "echo_reply",
        }
    }
}

impl Hook {
    /// All hooks.
    pub const ALL: [Self; 4] = [Self::FromPod, Self::FromOverlay, Self::ToPod, Self::FromNetdev];

    /// Name of the hook, which is its program's name too.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FromPod => "from_pod",
            Self::FromOverlay => "from_overlay",
            Self::ToPod => "to_pod",
            Self::FromNetdev => "from_netdev",
        }
    }
}

/// Packets and bytes (of the frame, as the hook sees it), on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// In [`Event::reason`]: the packet was allowed, and opened a flow.
pub const ALLOWED: u8 = 0;

/// One packet, as the ring buffer reports it. What the program did not learn before the verdict is zero.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub time: u64,
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Identity of the source.
    pub from: Identity,
    /// Identity of the destination.
    pub to: Identity,
    /// Interface that the program ran on.
    pub ifindex: u32,
    /// Length of the frame in bytes.
    pub length: u32,
    /// Generation that was in force.
    pub generation: u32,
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// [`Family`](crate::Family) of both addresses, or zero.
    pub family: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// A [`Hook`].
    pub hook: u8,
    /// A [`DropReason`](crate::DropReason), or [`ALLOWED`].
    pub reason: u8,
    /// A [`Path`], where the packet was allowed.
    pub path: u8,
    /// Zero.
    pub zero: [u8; 3],
}

const _: () = assert!(size_of::<Counter>() == 16);
const _: () = assert!(size_of::<Event>() == 72);
