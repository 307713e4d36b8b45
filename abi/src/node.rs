//! What the programs know of the nodes: their underlay addresses, and this node's own settings.

/// Value of the node map: its presence says that an underlay address belongs to a node of the cluster.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeEntry {
    /// 1 where the address is this node's own.
    pub local: u32,
}

/// Report drops through the ring buffer.
pub const REPORT_DROPS: u32 = 1;
/// Report the first packet of each allowed flow through the ring buffer.
pub const REPORT_FLOWS: u32 = 2;

/// This node's settings.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeConfig {
    /// Interface index of the vxlan device.
    pub vxlan_ifindex: u32,
    /// [`REPORT_DROPS`] and [`REPORT_FLOWS`].
    pub report: u32,
    /// UDP port of the tunnel.
    pub tunnel_port: u16,
    /// Zero.
    pub zero: u16,
    /// IPv4 address of the pods' gateway, in network byte order.
    pub gateway: [u8; 4],
}

/// The gateway that every pod sees. Link-local, so that every address of a pod CIDR is free for pods.
pub const GATEWAY_V4: [u8; 4] = [169, 254, 1, 1];

/// UDP port of the tunnel: Linux's and Cilium's, not the registered 4789.
pub const TUNNEL_PORT: u16 = 8472;

const _: () = assert!(size_of::<NodeEntry>() == 4);
const _: () = assert!(size_of::<NodeConfig>() == 16);
