//! What the programs have noted: flows and counters.

use super::{Datapath, DatapathError, conntrack};
use abi::{
    AddressKey, DropReason, Path as ForwardPath,
    conntrack::{FRONTEND, HAIRPIN},
    event::Counter,
    map,
    policy::{ICMP, ICMPV6},
};
use aya::maps::{MapData, PerCpuArray};

/// Type of an ICMP echo request, which stands for the port of its flow (RFC 792), and of ICMPv6's (RFC 4443).
const ICMP_ECHO: u16 = 8;
const ICMPV6_ECHO: u16 = 128;

/// A flow that is tracked, in the direction in which it was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Who opened it.
    pub from: AddressKey,
    /// To whom.
    pub to: AddressKey,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port, in host byte order.
    pub port: u16,
}

/// What was counted.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Dropped, by reason.
    pub drops: Vec<(DropReason, Counter)>,
    /// Forwarded, by path.
    pub forwarded: Vec<(ForwardPath, Counter)>,
}

impl Datapath {
    /// The flows that are tracked now.
    ///
    /// # Errors
    ///
    /// Where the map can't be read.
    pub fn flows(&self) -> Result<Vec<Flow>, DatapathError> {
        let tracked = conntrack::open(&self.bpffs)?;
        let now = conntrack::now();
        let mut flows = Vec::new();
        // One that is replaced while it is read is left out.
        for (key, entry) in tracked.iter().flatten() {
            // What a client sends to a frontend is judged as the flow to the backend that it becomes, and what a pod sends
            // itself is not judged at all.
            if entry.expires <= now || entry.state & (FRONTEND | HAIRPIN) != 0 {
                continue;
            }
            let end = |address| AddressKey {
                scope: key.scope,
                family: key.family,
                zero: 0,
                address,
            };
            let (lower, upper) = (end(key.lower), end(key.upper));
            let opened_below = entry.originator == 0;
            let (from, to, port) = if opened_below {
                (lower, upper, key.upper_port)
            } else {
                (upper, lower, key.lower_port)
            };
            let port = match key.protocol {
                ICMP => ICMP_ECHO,
                ICMPV6 => ICMPV6_ECHO,
                _ => u16::from_be(port),
            };
            flows.push(Flow {
                from,
                to,
                protocol: key.protocol,
                port,
            });
        }
        Ok(flows)
    }

    /// Packets dropped, by reason, and forwarded, by path, on all CPUs.
    ///
    /// # Errors
    ///
    /// Where a map can't be read.
    pub fn counters(&self) -> Result<Counters, DatapathError> {
        let sum = |map: &PerCpuArray<MapData, Counter>, index: u32, name: &str| {
            let values = map.get(&index, 0).map_err(DatapathError::map(name))?;
            Ok::<_, DatapathError>(values.iter().fold(Counter::default(), |sum, one| Counter {
                packets: sum.packets + one.packets,
                bytes: sum.bytes + one.bytes,
            }))
        };
        let mut counters = Counters::default();
        for reason in DropReason::ALL {
            counters
                .drops
                .push((*reason, sum(&self.drops, *reason as u32, map::DROPS)?));
        }
        for path in ForwardPath::ALL {
            counters
                .forwarded
                .push((path, sum(&self.forwarded, path as u32, map::FORWARDED)?));
        }
        Ok(counters)
    }
}
