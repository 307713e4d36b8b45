//! Types shared by the tc programs and hostd: the key and value of every BPF map, once.
//!
//! Integers are in host byte order and addresses in network byte order, unless a field says otherwise. Every type that
//! crosses the border is `repr(C)` without padding, and its size is asserted here, so that neither side can drift.
//! Maps that outlive the programs have a number for their [`layout`], which is written beside their pins.
#![cfg_attr(not(feature = "user"), no_std)]
#![expect(
    clippy::inline_always,
    reason = "the verifier follows what a program knows of a value only within one function"
)]

pub mod address;
pub mod conntrack;
pub mod drop;
pub mod endpoint;
pub mod event;
pub mod fragment;
pub mod identity;
pub mod ipcache;
pub mod network;
pub mod node;
pub mod policy;
pub mod service;

pub use address::{Address, AddressKey, Family};
pub use conntrack::{ConntrackEntry, ConntrackKey};
pub use drop::DropReason;
pub use endpoint::{Endpoint, Macs};
pub use event::{Event, Hook, Path};
pub use fragment::{FragmentEntry, FragmentKey};
pub use identity::Identity;
pub use ipcache::IpcacheEntry;
pub use network::NetworkEntry;
pub use node::NodeConfig;
pub use policy::{Direction, PortSet};
pub use service::{AffinityEntry, AffinityKey, Service, ServiceKey};

/// Number of a map's layout, for the maps that hostd uses again when it comes back, perhaps as another build. Raise it with
/// every change of the map's key or value that an older or newer program would misread.
#[must_use]
pub const fn layout(kept: Kept) -> u32 {
    match kept {
        Kept::Conntrack => 5,
        Kept::Affinity | Kept::Services | Kept::Generation => 1,
    }
}

/// What is kept: maps of one layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Flows.
    Conntrack,
    /// Backends of clients.
    Affinity,
    /// Numbers of backends.
    Services,
    /// The generation that flows were judged by.
    Generation,
}

/// Names of the maps in the eBPF object: what hostd asks aya for, and the file names of the pins.
pub mod map {
    /// Hash: [`AddressKey`](crate::AddressKey) to [`Endpoint`](crate::Endpoint), the pods of this node.
    pub const ENDPOINTS: &str = "ENDPOINTS";
    /// Hash: [`AddressKey`](crate::AddressKey) to [`IpcacheEntry`](crate::IpcacheEntry), every address of the cluster.
    pub const IPCACHE: &str = "IPCACHE";
    /// Array of `u64`: the stamp of the last write of an address's entries, by the slot that they name. Slot 0 is nobody's.
    pub const STAMPS: &str = "STAMPS";
    /// Hash: [`AddressKey`](crate::AddressKey) to [`IpcacheEntry`](crate::IpcacheEntry), the addresses of every node: what the
    /// ipcache does not know. An underlay address lives behind itself.
    pub const NODES: &str = "NODES";
    /// LRU hash: [`ConntrackKey`](crate::ConntrackKey) to [`ConntrackEntry`](crate::ConntrackEntry).
    pub const CONNTRACK: &str = "CONNTRACK";
    /// Hash: owner of a pod of this node to [`Account`](crate::conntrack::Account).
    pub const ACCOUNTS: &str = "ACCOUNTS";
    /// Array of one `u64`: entries of the conntrack map, counted as in [`Account`](crate::conntrack::Account).
    pub const TRACKED: &str = "TRACKED";
    /// LRU hash: [`FragmentKey`](crate::FragmentKey) to [`FragmentEntry`](crate::FragmentEntry).
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// Hash of maps: [`ServiceKey`](crate::ServiceKey) to an array of one [`Service`](crate::Service).
    pub const SERVICES: &str = "SERVICES";
    /// LRU hashes: [`AffinityKey`](crate::AffinityKey) to [`AffinityEntry`](crate::AffinityEntry), of pods, and of clients
    /// outside, who may be as many as they like.
    pub const AFFINITY: [&str; 2] = ["AFFINITY", "AFFINITY_OUTSIDE"];
    /// Array of one `u64`: the generation word (see [`policy`](crate::policy)).
    pub const GENERATION: &str = "GENERATION";
    /// Array of one [`NodeConfig`](crate::NodeConfig).
    pub const CONFIG: &str = "CONFIG";
    /// Arrays of `u64`, four policy cells each, by parity of the generation.
    pub const POLICY: [&str; 2] = ["POLICY_EVEN", "POLICY_ODD"];
    /// Arrays of [`PortSet`](crate::PortSet), by parity of the generation.
    pub const PORT_SETS: [&str; 2] = ["PORT_SETS_EVEN", "PORT_SETS_ODD"];
    /// Arrays of `u64`: the pools of breakpoints that port sets refer to, by parity of the generation.
    pub const PORT_POOL: [&str; 2] = ["PORT_POOL_EVEN", "PORT_POOL_ODD"];
    /// LPM trie: a prefix of an [`AddressKey`](crate::AddressKey) to [`NetworkEntry`](crate::NetworkEntry), for addresses
    /// that the ipcache does not hold.
    pub const NETWORKS: &str = "NETWORKS";
    /// Per-CPU array of [`Counter`](crate::event::Counter), by [`DropReason`](crate::DropReason).
    pub const DROPS: &str = "DROPS";
    /// Per-CPU array of [`Counter`](crate::event::Counter), by [`Path`](crate::Path).
    pub const FORWARDED: &str = "FORWARDED";
    /// Ring buffer of [`Event`](crate::Event).
    pub const EVENTS: &str = "EVENTS";
    /// Array of one map: replacing its element makes the kernel wait for a grace period.
    pub const GRACE: &str = "GRACE";
}

#[cfg(feature = "user")]
mod pod {
    //! What lets aya copy these types in and out of maps.

    macro_rules! pod {
        ($($type:ty),* $(,)?) => {
            // SAFETY: each is `repr(C)` or `repr(transparent)`, made of integers alone and without padding (their
            // sizes are asserted beside them), so that any bytes are a value and every byte is initialised.
            $(unsafe impl aya::Pod for $type {})*
        };
    }
    pod!(
        crate::AddressKey,
        crate::AffinityEntry,
        crate::AffinityKey,
        crate::ConntrackEntry,
        crate::ConntrackKey,
        crate::Endpoint,
        crate::Event,
        crate::FragmentEntry,
        crate::FragmentKey,
        crate::IpcacheEntry,
        crate::NetworkEntry,
        crate::NodeConfig,
        crate::PortSet,
        crate::Service,
        crate::ServiceKey,
        crate::conntrack::Account,
        crate::event::Counter,
    );
}
