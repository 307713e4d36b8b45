//! Connection tracking: one entry a flow, found from either direction by one look-up.

use crate::address::Address;

/// Key of a flow, the same for both of its directions: the end with the lower (address, port) comes first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConntrackKey {
    /// The lower end's address.
    pub lower: Address,
    /// The upper end's address.
    pub upper: Address,
    /// The lower end's port, in network byte order. An ICMP echo has its identifier at the end that asks, 0 at the other.
    pub lower_port: u16,
    /// The upper end's port, in network byte order.
    pub upper_port: u16,
    /// Scope of both addresses.
    pub scope: u16,
    /// [`Family`](crate::Family) of both addresses.
    pub family: u8,
    /// IP protocol number.
    pub protocol: u8,
}

/// A reply has been seen.
pub const SEEN_REPLY: u32 = 1;
/// The originator has sent a FIN.
pub const FIN_ORIGINAL: u32 = 1 << 1;
/// The other end has sent a FIN.
pub const FIN_REPLY: u32 = 1 << 2;
/// Either end has sent a RST.
pub const RESET: u32 = 1 << 3;

/// What the address of one end meant when the flow was judged.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Who had the address; 0 where it was no pod's.
    pub owner: u32,
    /// Epoch of the address; where it was no pod's, its identity.
    pub epoch: u32,
}

/// An allowed flow. Denied flows take no entry.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConntrackEntry {
    /// Hash of the flow's own key. The kernel may hand an LRU element to another flow while a program still reads it:
    /// a reader that finds another cookie, before or after, has read a foreign entry.
    pub cookie: u64,
    /// When the entry ends, in nanoseconds of `CLOCK_MONOTONIC`.
    pub expires: u64,
    /// Generation that the verdict was given under.
    pub generation: u32,
    /// [`SEEN_REPLY`], [`FIN_ORIGINAL`], [`FIN_REPLY`], [`RESET`].
    pub state: u32,
    /// Lower and upper end, as they were when the flow was judged.
    pub peers: [Peer; 2],
    /// 0 where the lower end opened the flow, 1 where the upper one did.
    pub originator: u32,
    /// Zero.
    pub zero: u32,
}

/// Nanoseconds in a second.
pub const SECOND: u64 = 1_000_000_000;
/// A TCP flow that both ends have spoken in lives this long without a packet. Cilium's default.
pub const TCP_ESTABLISHED_NS: u64 = 8000 * SECOND;
/// A TCP flow with no reply yet. Cilium's default.
pub const TCP_SYN_NS: u64 = 60 * SECOND;
/// A TCP flow that was closed or reset. Cilium's default.
pub const TCP_CLOSING_NS: u64 = 10 * SECOND;
/// A flow of another protocol that both ends have spoken in. The kernel's `nf_conntrack_udp_timeout_stream`.
pub const OTHER_ASSURED_NS: u64 = 120 * SECOND;
/// A flow of another protocol with no reply yet. The kernel's `nf_conntrack_udp_timeout`.
pub const OTHER_UNREPLIED_NS: u64 = 30 * SECOND;

const _: () = assert!(size_of::<ConntrackKey>() == 40);
const _: () = assert!(size_of::<ConntrackEntry>() == 48);
