//! Networks: addresses that are no pod's, by prefix.

use crate::Identity;

/// No packet is routed to or from these addresses: pod CIDRs, where only pods count, and what is no unicast address.
pub const UNROUTED: u32 = 1;

/// Bits of a key before the address: scope and family. An address's prefix length counts from there.
pub const NETWORK_KEY_BITS: u32 = 32;

/// What the programs know of a prefix. Pairs are selected by parity, as in [`Endpoint`](crate::Endpoint). There are no
/// stamps: the kernel gives a replaced element's memory to another only after a grace period (`bpf_mem_cache_free_rcu`
/// in `kernel/bpf/lpm_trie.c` since Linux 6.13, `kfree_rcu` before).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetworkEntry {
    /// Identity of the networks that hold the prefix, [`Identity::WORLD`] where none does, by parity.
    pub identity: [Identity; 2],
    /// Column of the identity in the policy matrix, by parity.
    pub column: [u32; 2],
    /// [`UNROUTED`] or zero.
    pub flags: u32,
    /// Zero.
    pub zero: u32,
}

const _: () = assert!(size_of::<NetworkEntry>() == 24);
