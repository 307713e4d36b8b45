//! The ipcache: every address of the cluster, with its identity and the node that it lives behind.

use crate::{Identity, address::Address};

/// The address is one of this node's own.
pub const IPCACHE_HOST: u8 = 1;
/// The address is a service's: nobody has it.
pub const IPCACHE_SERVICE: u8 = 2;

/// The address is a node's, but perhaps this one's own: an entry of the map of nodes.
pub const IPCACHE_NODE: u8 = 4;

/// What the programs know of an address. Pairs are selected by parity, and stamps have the same use, as in
/// [`Endpoint`](crate::Endpoint).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpcacheEntry {
    /// Number of the write, as in `last_stamp`.
    pub first_stamp: u32,
    /// The address that this is the entry of.
    pub address: Address,
    /// Security identity, by parity.
    pub identity: [Identity; 2],
    /// Column of the identity in the policy matrix, by parity.
    pub column: [u32; 2],
    /// Who has the address.
    pub owner: u32,
    /// Raised with each change of what the address means.
    pub epoch: u32,
    /// Underlay address of the node that the address lives behind; all zero where that is this node, or, of a node's address,
    /// where several nodes have it.
    pub tunnel_endpoint: Address,
    /// [`Family`](crate::Family) of `tunnel_endpoint`, or zero where there is none.
    pub tunnel_family: u8,
    /// [`IPCACHE_HOST`], [`IPCACHE_SERVICE`], [`IPCACHE_NODE`] or zero.
    pub flags: u8,
    /// Zero.
    pub zero: [u8; 2],
    /// Where the address has its last stamp outside the maps, too; as in [`Endpoint`](crate::Endpoint). 0 in the map of nodes.
    pub slot: u32,
    /// Number of the write, as in `first_stamp`.
    pub last_stamp: u32,
}

const _: () = assert!(size_of::<IpcacheEntry>() == 72);
