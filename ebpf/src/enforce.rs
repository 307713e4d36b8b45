//! Enforcement: conntrack first, then policy, for the direction in which the flow was opened.

use crate::{
    conntrack::{self, Tracked},
    lookup::Party,
    maps,
    packet::{Flow, Fragment, Service, TCP},
};
use abi::{
    Direction, DropReason,
    conntrack::OUTSIDE,
    policy::{
        CELL_ALLOW, CELL_DENY, CELL_PORT_SET, CELLS_PER_ELEMENT, ICMP, ICMPV6, NOT_ENFORCED, SEARCH_STEPS,
        breakpoint_allows, breakpoint_key, cell_index, port_key,
    },
};

/// Type of an ICMP echo request (RFC 792), and of ICMPv6's (RFC 4443): where policy looks for a port.
const ICMP_ECHO: u16 = 8;
const ICMPV6_ECHO: u16 = 128;

/// Lets a packet pass or says why not.
///
/// 1. A flow that is tracked, with a verdict that still holds, passes in both directions.
/// 2. A tracked flow whose verdict is of another generation, or one of whose addresses means something else by now, is
///    judged again as it was opened. If it may not go on, it is forgotten, and both directions stop.
/// 3. A SYN against the direction of a flow, or on one that is closed, asks for a new one, and is judged as such.
/// 4. An ICMP error or reply passes only with its flow. A request is never a reply, though both look the same where the
///    identifier is the type's own number.
/// 5. A later fragment whose first one has not been here passes where the two may talk at all.
/// 6. Anything else opens a flow, if policy lets it. TCP that is no SYN must be allowed both ways, since nobody knows
///    which end opened it; a pod of this node that sent it is told where it goes no farther.
#[inline(never)]
pub fn admit(flow: &mut Flow, from: &Party, to: &Party) -> Result<(), DropReason> {
    if flow.fragment == Fragment::Ahead {
        // Whether it belongs to a flow of those that alone may go on this way nobody knows.
        if flow.must_answer {
            return Err(DropReason::UnknownSource);
        }
        return match (flow.in_transit, is_answer_to_itself(flow)) {
            (true, _) => Err(DropReason::NotLocal),
            (_, true) => Err(DropReason::UnknownDestination),
            _ => ahead(flow, from, to),
        };
    }
    let mut place = conntrack::place(flow, &flow.ends).ok_or(DropReason::Internal)?;
    let peers = conntrack::peers(&place, from, to);
    let now = conntrack::now();

    let tracked = conntrack::find(&place, now).filter(|tracked| tracked.is_flow_between(&peers));
    if let Some(tracked) = tracked {
        if flow.must_answer && (!tracked.reply || opens_anew(flow, &tracked)) {
            return Err(DropReason::UnknownSource);
        }
        let crossed = is_crossed(flow, &tracked);
        if crossed && flow.protocol == TCP && !tracked.is_closed() {
            flow.is_lost = true;
            return Err(DropReason::ServicePorts);
        }
        if flow.answer && !tracked.reply {
            return Err(DropReason::IcmpUnrelated);
        }
        if !crossed && !opens_anew(flow, &tracked) {
            tracked.goes_via_node(flow);
            if tracked.is_answer() {
                tracked.answer(flow);
            }
            if flow.in_transit && !flow.leaves {
                return Err(DropReason::NotLocal);
            }
            if is_answer_to_itself(flow) {
                return Err(DropReason::UnknownDestination);
            }
            if tracked.is_current(flow, peers) {
                conntrack::touch(&place, &tracked, flow, now);
                return Ok(());
            }
            let verdict = if tracked.reply {
                judge(flow, to, from, flow.ends.source_port)
            } else {
                judge(flow, from, to, flow.ends.destination_port)
            };
            if flow.related {
                // About the flow, not of it: that is for the flow's own packets to settle.
            } else if verdict.is_err() {
                conntrack::forget(&place, &tracked);
            } else {
                conntrack::renew(&mut place, &tracked, flow, peers, now);
            }
            return verdict;
        }
    } else if flow.must_answer {
        return Err(DropReason::UnknownSource);
    } else if flow.related || flow.answer {
        return Err(DropReason::IcmpUnrelated);
    }
    if flow.in_transit {
        return Err(DropReason::NotLocal);
    }
    if is_answer_to_itself(flow) {
        return Err(DropReason::UnknownDestination);
    }

    flow.is_lost = flow.protocol == TCP && !flow.is_syn();
    judge(flow, from, to, flow.ends.destination_port)?;
    if flow.is_lost {
        judge(flow, to, from, flow.ends.source_port).map_err(|_| DropReason::MidStream)?;
    }
    conntrack::open(&mut place, flow, peers, account(from, to), now)?;
    flow.opened = true;
    Ok(())
}

/// Whose flow it is: the pod's of this node that opens it, or else the one's that it is opened to.
#[inline(always)]
fn account(from: &Party, to: &Party) -> u32 {
    if from.row != NOT_ENFORCED {
        from.peer.owner
    } else if to.row != NOT_ENFORCED {
        to.peer.owner
    } else {
        OUTSIDE
    }
}

/// Whether the flow was opened through a service, or else directly, and the packet goes the other way. Who gets both can't
/// tell them apart: datagrams are answered where they were sent last.
#[inline(always)]
fn is_crossed(flow: &Flow, tracked: &Tracked) -> bool {
    !flow.related && !tracked.reply && tracked.is_translated() != (flow.service == Service::Asked)
}

/// What goes to the gateway answers a flow of the pod's to itself, or nobody wants it.
#[inline(always)]
fn is_answer_to_itself(flow: &Flow) -> bool {
    flow.hairpin && flow.service == Service::None
}

#[inline(always)]
fn opens_anew(flow: &Flow, tracked: &Tracked) -> bool {
    let asks_back = flow.request && tracked.reply;
    !flow.related && (asks_back || flow.is_syn() && (tracked.reply || tracked.is_closed()))
}

/// What policy says of a flow from `from` to `to`, at those ends that this node enforces: egress where the sender is
/// its pod, ingress where the receiver is. What a pod sends itself nobody forbids.
#[inline(always)]
fn judge(flow: &Flow, from: &Party, to: &Party, port: u16) -> Result<(), DropReason> {
    if flow.hairpin {
        return Ok(());
    }
    if !permits(flow, Direction::Egress, from.row, to.column, port) {
        return Err(DropReason::EgressDenied);
    }
    if !permits(flow, Direction::Ingress, to.row, from.column, port) {
        return Err(DropReason::IngressDenied);
    }
    Ok(())
}

/// The ports of the packet that this is a piece of are not known, nor which end has opened the flow.
#[inline(always)]
fn ahead(flow: &Flow, from: &Party, to: &Party) -> Result<(), DropReason> {
    let something = |direction, row, column| row == NOT_ENFORCED || cell(flow, direction, row, column) != CELL_DENY;
    let either = |one: &Party, other: &Party| {
        something(Direction::Egress, one.row, other.column) && something(Direction::Ingress, other.row, one.column)
    };
    if either(from, to) || either(to, from) {
        Ok(())
    } else {
        Err(DropReason::FragmentUnknown)
    }
}

#[inline(never)]
fn permits(flow: &Flow, direction: Direction, row: u32, column: u32, port: u16) -> bool {
    row == NOT_ENFORCED
        || match cell(flow, direction, row, column) {
            CELL_DENY => false,
            CELL_ALLOW => true,
            set => port_set_permits(flow, u32::from(set - CELL_PORT_SET), u16::from_be(port)),
        }
}

#[inline(always)]
fn cell(flow: &Flow, direction: Direction, row: u32, column: u32) -> u16 {
    let (rows, columns) = maps::policy_shape();
    if row >= rows || column >= columns {
        return CELL_DENY;
    }
    let index = cell_index(direction, row, column, rows, columns);
    let element = index / CELLS_PER_ELEMENT;
    let pointer = if flow.parity() == 0 {
        maps::POLICY_EVEN.get_ptr(element)
    } else {
        maps::POLICY_ODD.get_ptr(element)
    };
    pointer.map_or(CELL_DENY, |word| {
        // SAFETY: an element of an array map is there as long as the program. hostd writes cells while programs run;
        // a volatile read of an aligned word sees each cell as it was before or after.
        let word = unsafe { core::ptr::read_volatile(word) };
        (word >> ((index % CELLS_PER_ELEMENT) * 16)) as u16
    })
}

/// Searches the set for the last breakpoint that is not above the packet's place on the line.
#[inline(always)]
fn port_set_permits(flow: &Flow, index: u32, port: u16) -> bool {
    let set = if flow.parity() == 0 {
        maps::PORT_SETS_EVEN.get(index)
    } else {
        maps::PORT_SETS_ODD.get(index)
    };
    let Some(set) = set else { return false };
    if set.len == 0 {
        return false;
    }
    let port = match (flow.protocol, port) {
        (ICMP, 0) => ICMP_ECHO,
        (ICMPV6, 0) => ICMPV6_ECHO,
        _ => port,
    };
    let key = port_key(flow.protocol, port);
    let (mut low, mut left) = (set.first, set.len);
    for _ in 0..SEARCH_STEPS {
        if left <= 1 {
            break;
        }
        let half = left / 2;
        if breakpoint_key(breakpoint(flow, low + half)) <= key {
            low += half;
            left -= half;
        } else {
            left = half;
        }
    }
    breakpoint_allows(breakpoint(flow, low))
}

/// A breakpoint of the pool; one that is not there denies.
#[inline(always)]
fn breakpoint(flow: &Flow, index: u32) -> u64 {
    let pointer = if flow.parity() == 0 {
        maps::PORT_POOL_EVEN.get_ptr(index)
    } else {
        maps::PORT_POOL_ODD.get_ptr(index)
    };
    // SAFETY: as in `cell`.
    pointer.map_or(0, |word| unsafe { core::ptr::read_volatile(word) })
}
