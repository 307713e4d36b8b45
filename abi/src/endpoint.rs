//! The endpoint map: the pods of this node.

use crate::Identity;

/// What the programs know of a pod on this node.
///
/// `identity`, `row` and `column` are pairs: the element that the parity of the generation word selects is in force,
/// the other belongs to the generation before or the one that is being prepared.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Security identity, by parity.
    pub identity: [Identity; 2],
    /// Row of the pod's identity in the policy matrix, by parity.
    pub row: [u32; 2],
    /// Column of the pod's identity in the policy matrix, by parity.
    pub column: [u32; 2],
    /// Slot of the pod's address: stable while the address belongs to this pod.
    pub slot: u32,
    /// Raised with each change of what the address means; conntrack entries of another epoch are judged again.
    pub epoch: u32,
    /// Interface index of the host's end of the veth pair.
    pub ifindex: u32,
    /// MAC address of the pod's end.
    pub mac: [u8; 6],
    /// MAC address of the host's end, which the pod sees as its gateway's.
    pub gateway_mac: [u8; 6],
}

const _: () = assert!(size_of::<Endpoint>() == 48);
