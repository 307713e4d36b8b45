//! Connection tracking: one entry a flow, found from either direction by one look-up.

use crate::{Identity, address::Address};

/// Key of a flow, the same for both of its directions: the end with the lower (address, port) comes first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConntrackKey {
    /// The lower end's address.
    pub lower: Address,
    /// The upper end's address.
    pub upper: Address,
    /// The lower end's port, in network byte order. A request of ICMP has its identifier at the end that asks, and its type at the
    /// other: 0 for an echo. Protocols without ports have 0.
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
/// Either end has sent a RST, and nothing has come after it.
pub const RESET: u32 = 1 << 3;
/// The originator has sent something since the first reply: the handshake is done.
pub const CONFIRMED: u32 = 1 << 4;
/// The flow goes to a service's backend: what is sent back gets the frontend's address and port.
pub const TRANSLATED: u32 = 1 << 5;
/// No flow of its own: it says what becomes of what a client sends to a service's frontend.
pub const FRONTEND: u32 = 1 << 6;
/// With [`TRANSLATED`] or [`FRONTEND`]: the client is its own backend, which sees the gateway in its place.
pub const HAIRPIN: u32 = 1 << 7;
/// With [`TRANSLATED`]: the client is outside and has asked at this node's own address, from which the answers leave.
pub const NODE_PORT: u32 = 1 << 8;
/// The client is outside and has asked at another node's address, which the translation holds: answers go back there.
pub const VIA_NODE: u32 = 1 << 9;

/// What the address of one end meant when the flow was judged.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Who had the address; 0 where it was no pod's.
    pub owner: u32,
    /// Epoch of the address; where it was no pod's, its identity.
    pub epoch: u32,
}

/// The other side of a flow that a service translates: the backend in an entry that is a [`FRONTEND`]'s, the frontend in
/// one that is [`TRANSLATED`]. All zero where no service takes part.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Its address.
    pub address: Address,
    /// Its port, in network byte order.
    pub port: u16,
    /// The client's port on the other side, in network byte order: another one only where a flow of the client's with
    /// that port has the same backend by way of another frontend.
    pub client_port: u16,
    /// Number of the backend, as in [`Service`](crate::Service).
    pub backend: u32,
}

impl Translation {
    /// No service takes part.
    pub const NONE: Self = Self {
        address: Address::NONE,
        port: 0,
        client_port: 0,
        backend: 0,
    };
}

/// How one end of a flow is reached, and what says that it still is.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Words in network byte order: [`Macs`](crate::Macs) of a pod here, and zero; or else the other node's address.
    pub place: [u32; 4],
    /// Interface index of the host's end of the pod's veth pair; 0 where the pod lives behind another node.
    pub ifindex: u32,
    /// Security identity.
    pub identity: Identity,
    /// Slot and stamp of the address's entry when this was found out; the slot is 0 where nothing was. They come last, for
    /// the kernel writes an entry from its beginning: who reads them first reads the rest that belongs to them, or what came
    /// later.
    pub slot: u32,
    /// The stamp.
    pub stamp: u32,
}

impl Link {
    /// Nothing is known.
    pub const NONE: Self = Self {
        place: [0; 4],
        ifindex: 0,
        identity: Identity::NONE,
        slot: 0,
        stamp: 0,
    };
}

/// State of a flow between pods that goes on as it does: nothing is to be noted of its packets.
pub const ESTABLISHED: u32 = SEEN_REPLY | CONFIRMED;

/// An allowed flow. Denied flows take no entry. What every packet needs comes first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConntrackEntry {
    /// Hash of the flow's own key. The kernel may hand an LRU element to another flow while a program still reads it:
    /// a reader that finds another cookie, before or after, has read a foreign entry.
    pub cookie: u64,
    /// When the entry ends, in nanoseconds of `CLOCK_MONOTONIC`.
    pub expires: u64,
    /// Until then packets may go by the links alone, in jiffies.
    pub fast_until: u64,
    /// Generation that the verdict was given under.
    pub generation: u32,
    /// [`SEEN_REPLY`], [`FIN_ORIGINAL`], [`FIN_REPLY`], [`RESET`], [`CONFIRMED`], [`TRANSLATED`], [`FRONTEND`], [`HAIRPIN`],
    /// [`NODE_PORT`], [`VIA_NODE`].
    pub state: u32,
    /// Lower and upper end, as they are reached. Both are known, or none.
    pub links: [Link; 2],
    /// Lower and upper end, as they were when the flow was judged; in a [`FRONTEND`]'s entry client and backend, each at
    /// its side.
    pub peers: [Peer; 2],
    /// 0 where the lower end opened the flow, 1 where the upper one did.
    pub originator: u32,
    /// Owner of the address of the pod of this node whose share of the map the entry takes: of the one that opened the
    /// flow, or else of the one it was opened to; [`OUTSIDE`] where neither is.
    pub account: u32,
    /// What a service makes of the flow.
    pub translation: Translation,
}

/// The account of what is no pod's of this node on either end: clients of node ports with backends elsewhere.
pub const OUTSIDE: u32 = 0;

/// Nanoseconds in a second.
pub const SECOND: u64 = 1_000_000_000;
/// How long flows live without a packet, in seconds. As in hostd's configuration.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(serde::Deserialize), serde(deny_unknown_fields, default))]
pub struct Timeouts {
    /// TCP, until the handshake is done.
    pub tcp_syn: u32,
    /// TCP, from then on.
    pub tcp_established: u32,
    /// TCP, once one end has sent a FIN.
    pub tcp_half_closed: u32,
    /// TCP, once both have, or one has sent a RST.
    pub tcp_closed: u32,
    /// Other protocols, without a reply yet.
    pub unreplied: u32,
    /// Other protocols, with replies.
    pub assured: u32,
}

/// TCP's are Cilium's defaults, but for half closed flows, which may go on for long in one direction (an hour is what
/// kube-proxy sets for `CLOSE_WAIT`, `--conntrack-tcp-timeout-close-wait`); the others are the
/// kernel's `nf_conntrack_udp_timeout` and `nf_conntrack_udp_timeout_stream`.
impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp_syn: 60,
            tcp_established: 8000,
            tcp_half_closed: 3600,
            tcp_closed: 10,
            unreplied: 30,
            assured: 120,
        }
    }
}

/// What one pod has of the map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Account {
    /// Entries, about: the programs count those that they enter and forget, hostd counts them all from time to time.
    pub flows: u64,
}

const _: () = assert!(size_of::<Timeouts>() == 24);
const _: () = assert!(size_of::<Account>() == 8);
const _: () = assert!(size_of::<ConntrackKey>() == 40);
const _: () = assert!(size_of::<Link>() == 32);
const _: () = assert!(size_of::<ConntrackEntry>() == 144);
