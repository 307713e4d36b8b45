//! The endpoint map: the pods of this node.

use crate::{Identity, address::Address};

/// What the programs know of a pod on this node.
///
/// `identity`, `row` and `column` are pairs: the element that the parity of the generation word selects is in force,
/// the other belongs to the generation before or the one that is being prepared.
///
/// The kernel may hand the memory of an entry that was replaced to another key while a program still reads it
/// (`bpf_mem_cache_free` in `kernel/bpf/memalloc.c`, Linux 6.1 and later). So every entry that hostd writes has a stamp
/// of its own at both ends, and its own key in between: a reader that finds the same stamp at both ends, before and
/// after, and the key that it looked for, has read one entry whole.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Number of the write, as in `last_stamp`.
    pub first_stamp: u32,
    /// The address that this is the entry of.
    pub address: Address,
    /// Security identity, by parity.
    pub identity: [Identity; 2],
    /// Row of the pod's identity in the policy matrix, by parity.
    pub row: [u32; 2],
    /// Column of the pod's identity in the policy matrix, by parity.
    pub column: [u32; 2],
    /// Who has the address: another number for every pod that ever has it. Flows of another owner are none of this
    /// one's.
    pub owner: u32,
    /// Raised with each change of what the address means; flows of another epoch are judged again.
    pub epoch: u32,
    /// Interface index of the host's end of the veth pair.
    pub ifindex: u32,
    /// MAC addresses of both ends.
    pub macs: Macs,
    /// Element of [`map::STAMPS`](crate::map::STAMPS) that has the stamp of the last write of this address, in either map:
    /// hostd writes it there first. What was concluded from an entry holds for as long as the stamp is there.
    pub slot: u32,
    /// Number of the write, as in `first_stamp`.
    pub last_stamp: u32,
}

/// Both ends of a pod's veth pair: the beginning of a frame that goes into the pod.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Macs {
    /// MAC address of the pod's end.
    pub pod: [u8; 6],
    /// MAC address of the host's end, which the pod sees as its gateway's.
    pub gateway: [u8; 6],
}

const _: () = assert!(size_of::<Macs>() == 12);
const _: () = assert!(size_of::<Endpoint>() == 76);
