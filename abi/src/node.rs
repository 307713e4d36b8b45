//! This node's own settings.

use crate::{address::Address, conntrack::Timeouts};

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
    /// This node's underlay address: tunnel packets leave from it, and only those for it are believed.
    pub underlay: Address,
    /// UDP port of the tunnel.
    pub tunnel_port: u16,
    /// Family of the underlay, a [`Family`](crate::Family).
    pub underlay_family: u8,
    /// Zero.
    pub zero: u8,
    /// Bytes of the largest packet, without its ethernet header, that fits into the tunnel.
    pub tunnel_mtu: u32,
    /// Time-outs of flows.
    pub timeouts: Timeouts,
    /// Entries of the conntrack map from which on a pod gets no more than its share.
    pub conntrack_limit: u32,
    /// Entries that every pod may have then.
    pub conntrack_share: u32,
    /// Interface with the node's underlay address.
    pub underlay_ifindex: u32,
    /// 1 while there are node ports.
    pub node_ports: u32,
    /// Interface where a link takes over from a filter of the same program: what passes the one must not meet the other. 0 for
    /// none.
    pub settling_ifindex: u32,
}

/// The gateway that every pod sees. Link-local, so that every address of a pod CIDR is free for pods.
pub const GATEWAY_V4: [u8; 4] = [169, 254, 1, 1];
/// The same for IPv6: `fe80::1`.
pub const GATEWAY_V6: Address = Address([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);

/// Mark (`skb->mark`) of what the programs let up the node's stack. The table of nftables drops whatever comes from pods or the tunnel
/// without it, where a program is missing, and takes it away from the rest, so that it means nothing to anybody else.
pub const SEEN_MARK: u32 = 0x5747_0001;

/// UDP port of the tunnel: Linux's and Cilium's, not the registered 4789.
pub const TUNNEL_PORT: u16 = 8472;

const _: () = assert!(size_of::<NodeConfig>() == 76);
