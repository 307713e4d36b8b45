//! The ipcache: every address of the cluster, with its identity and the node that it lives behind.

use crate::{Identity, address::Address};

/// The address is one of this node's own.
pub const IPCACHE_HOST: u8 = 1;

/// What the programs know of an address. Pairs are selected by parity, as in [`Endpoint`](crate::Endpoint).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpcacheEntry {
    /// Security identity, by parity.
    pub identity: [Identity; 2],
    /// Column of the identity in the policy matrix, by parity.
    pub column: [u32; 2],
    /// Slot of the address.
    pub slot: u32,
    /// Raised with each change of what the address means.
    pub epoch: u32,
    /// Underlay address of the node that the address lives behind; all zero where that is this node.
    pub tunnel_endpoint: Address,
    /// [`Family`](crate::Family) of `tunnel_endpoint`, or zero where there is none.
    pub tunnel_family: u8,
    /// [`IPCACHE_HOST`] or zero.
    pub flags: u8,
    /// Zero.
    pub zero: [u8; 6],
}

const _: () = assert!(size_of::<IpcacheEntry>() == 48);
