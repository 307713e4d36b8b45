//! Networks: which named sets of addresses each address is in, as prefixes for the kernel's LPM trie.
//!
//! All prefixes that any network mentions, as a CIDR or as an exception, cut the address space into nested pieces. The
//! longest of them that holds an address lies in the same networks as the address: so one trie answers for all.

use ipnet::IpNet;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// A named set of addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// The module that named it.
    pub module: String,
    /// Its name there.
    pub name: String,
    /// CIDRs, each with its exceptions.
    pub blocks: Vec<(IpNet, Vec<IpNet>)>,
}

impl Network {
    /// CIDRs and exceptions that it names.
    #[must_use]
    pub fn prefixes(&self) -> usize {
        self.blocks.iter().map(|(_, except)| 1 + except.len()).sum()
    }
}

/// Names of networks, each with its module: what an address is in.
pub type Membership = BTreeSet<(String, String)>;

/// The address space, cut into pieces.
#[derive(Clone, Debug)]
pub struct Partition {
    /// Different memberships; the first one is the empty one.
    memberships: Vec<Membership>,
    /// Index of each prefix's membership.
    prefixes: BTreeMap<IpNet, usize>,
}

/// Names in all memberships at the most: they may be as many as networks times prefixes.
const MAX_NAMES: usize = 1 << 18;

impl Default for Partition {
    fn default() -> Self {
        Self {
            memberships: vec![Membership::new()],
            prefixes: BTreeMap::new(),
        }
    }
}

impl Partition {
    /// Cuts the address space.
    ///
    /// # Errors
    ///
    /// Where the networks overlap so much that there are too many different sets of them.
    pub fn new(networks: &[Network]) -> Result<Self, String> {
        // Which blocks begin at a prefix, and which end there for good.
        let mut marks: BTreeMap<IpNet, (Vec<usize>, Vec<usize>)> = BTreeMap::new();
        let mut owners = Vec::new();
        for (index, network) in networks.iter().enumerate() {
            for (cidr, except) in &network.blocks {
                let block = owners.len();
                owners.push(index);
                marks.entry(cidr.trunc()).or_default().0.push(block);
                for prefix in except {
                    marks.entry(prefix.trunc()).or_default().1.push(block);
                }
            }
        }
        let mut partition = Self::default();
        let mut names = 0;
        let mut numbers: BTreeMap<Membership, usize> = BTreeMap::from([(Membership::new(), 0)]);
        // Prefixes are sorted so that each comes right after those that hold it.
        let mut around: Vec<(IpNet, BTreeSet<usize>)> = Vec::new();
        for (prefix, (begin, end)) in marks {
            while around.last().is_some_and(|(outer, _)| !outer.contains(&prefix)) {
                around.pop();
            }
            let mut blocks = around.last().map(|(_, blocks)| blocks.clone()).unwrap_or_default();
            blocks.extend(begin);
            for block in end {
                blocks.remove(&block);
            }
            let membership: Membership = blocks
                .iter()
                .map(|block| {
                    let network = &networks[owners[*block]];
                    (network.module.clone(), network.name.clone())
                })
                .collect();
            names += membership.len();
            if names > MAX_NAMES {
                return Err(format!(
                    "networks that overlap too much: more than {MAX_NAMES} names in the sets of networks that hold a prefix"
                ));
            }
            let next = partition.memberships.len();
            let number = *numbers.entry(membership.clone()).or_insert(next);
            if number == next {
                partition.memberships.push(membership);
            }
            partition.prefixes.insert(prefix, number);
            around.push((prefix, blocks));
        }
        Ok(partition)
    }

    /// The different memberships. The first one is the empty one: the world.
    #[must_use]
    pub fn memberships(&self) -> &[Membership] {
        &self.memberships
    }

    /// All prefixes that matter.
    pub fn prefixes(&self) -> impl Iterator<Item = IpNet> {
        self.prefixes.keys().copied()
    }

    /// Index of the membership of all addresses of a prefix that are in no longer one of these.
    #[must_use]
    pub fn find(&self, prefix: IpNet) -> usize {
        let mut prefix = Some(prefix.trunc());
        while let Some(candidate) = prefix {
            if let Some(number) = self.prefixes.get(&candidate) {
                return *number;
            }
            prefix = candidate.supernet();
        }
        0
    }

    /// What an address is in.
    #[must_use]
    pub fn holding(&self, address: IpAddr) -> &Membership {
        &self.memberships[self.find(IpNet::from(address))]
    }
}

#[cfg(test)]
mod tests {
    use super::{Network, Partition};
    use ipnet::IpNet;
    use proptest::prelude::*;
    use std::net::{IpAddr, Ipv4Addr};

    fn network(name: &str, blocks: &[(&str, &[&str])]) -> Network {
        let parse = |text: &str| text.parse().unwrap();
        Network {
            module: "m".to_owned(),
            name: name.to_owned(),
            blocks: blocks
                .iter()
                .map(|(cidr, except)| (parse(cidr), except.iter().map(|one| parse(one)).collect()))
                .collect(),
        }
    }

    fn names(partition: &Partition, address: &str) -> Vec<String> {
        let holding = partition.holding(address.parse().unwrap());
        holding.iter().map(|(_, name)| name.clone()).collect()
    }

    #[test]
    fn exceptions_and_overlaps_are_told_apart() {
        let partition = Partition::new(&[
            network("ten", &[("10.0.0.0/8", &["10.1.0.0/16"])]),
            network(
                "inside",
                &[("10.1.2.0/24", &[]), ("2001:db8::/32", &["2001:db8:1::/48"])],
            ),
            network("again", &[("10.1.0.0/16", &[]), ("10.1.2.3/32", &[])]),
        ])
        .unwrap();
        for (address, expected) in [
            ("10.0.0.1", &["ten"][..]),
            ("10.1.0.1", &["again"]),
            ("10.1.2.1", &["again", "inside"]),
            ("10.1.2.3", &["again", "inside"]),
            ("11.0.0.1", &[]),
            ("2001:db8::1", &["inside"]),
            ("2001:db8:1::1", &[]),
            ("::a00:1", &[]),
        ] {
            assert_eq!(names(&partition, address), expected, "{address}");
        }
        assert_eq!(partition.memberships().len(), 5);
    }

    #[test]
    fn networks_that_overlap_too_much_are_refused() {
        let mut networks: Vec<Network> = (0..1000)
            .map(|n| network(&n.to_string(), &[("0.0.0.0/0", &[])]))
            .collect();
        let inner = (0..250).map(|n| format!("10.0.{n}.0/24"));
        networks.extend(inner.map(|cidr| network(&cidr, &[(&cidr, &[])])));
        assert!(Partition::new(&networks).is_ok());
        let more = (0..50).map(|n| format!("10.1.{n}.0/24"));
        networks.extend(more.map(|cidr| network(&cidr, &[(&cidr, &[])])));
        assert!(Partition::new(&networks).unwrap_err().contains("overlap too much"));
    }

    proptest! {
        #[test]
        fn the_partition_says_what_the_networks_say(
            blocks in prop::collection::vec((0_u32..64, 26_u8..=32, prop::collection::vec((0_u32..64, 27_u8..=32), 0..3)), 1..12),
        ) {
            let net = |low: u32, length: u8| IpNet::new(Ipv4Addr::from(0x0a00_0000 + low).into(), length).unwrap().trunc();
            let networks: Vec<Network> = blocks
                .iter()
                .enumerate()
                .map(|(index, (low, length, except))| Network {
                    module: "m".to_owned(),
                    name: (index / 2).to_string(),
                    blocks: vec![(
                        net(*low, *length),
                        except.iter().map(|(low, length)| net(*low, *length)).filter(|one| net(blocks[index].0, *length).contains(one)).collect(),
                    )],
                })
                .collect();
            let partition = Partition::new(&networks).unwrap();
            for low in 0..64 {
                let address = IpAddr::from(Ipv4Addr::from(0x0a00_0000 + low));
                let expected = networks
                    .iter()
                    .filter(|network| network.blocks.iter().any(|(cidr, except)| {
                        cidr.contains(&address) && !except.iter().any(|one| one.contains(&address))
                    }))
                    .map(|network| (network.module.clone(), network.name.clone()))
                    .collect();
                prop_assert_eq!(partition.holding(address), &expected);
            }
        }
    }
}
