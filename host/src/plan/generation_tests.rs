//! Tests of the compiled matrix: a look-up in it equals asking the policy.

use super::{Change, Decision, Full, Generation, Oracle, PlanError, Row, Shape, with_baseline};
use abi::{
    AddressKey, Direction, Identity, PortRule, PortSet,
    policy::{CELL_ALLOW, CELL_DENY, CELL_PORT_SET, cell_index},
};
use std::{collections::HashMap, convert::Infallible};

const SHAPE: Shape = Shape {
    rows: 8,
    columns: 32,
    port_sets: 4,
};

/// A policy made of numbers, with all kinds of decisions in it.
struct Numbers;

impl Numbers {
    fn say(from: Identity, to: Identity) -> Decision {
        let rule = |port| PortRule {
            first: port,
            last: port,
            protocol: 6,
            zero: 0,
        };
        match (from.0 * 7 + to.0 * 3) % 5 {
            0 => Decision::Allow,
            1 => Decision::Deny,
            2 => Decision::Pass,
            3 => Decision::Ports(vec![rule(80), rule(443)]),
            _ => Decision::Ports(vec![rule(443), rule(80)]),
        }
    }
}

impl Oracle for Numbers {
    type Error = Infallible;

    fn decide(&mut self, from: Identity, to: &[Identity]) -> Result<Row, Infallible> {
        Ok(Row {
            decisions: to.iter().map(|to| Self::say(from, *to)).collect(),
            cells: (0..).take(to.len()).collect(),
        })
    }
}

/// The kernel's side: what was written so far.
#[derive(Default, PartialEq, Debug)]
struct Kernel {
    cells: HashMap<u32, u16>,
    port_sets: HashMap<u32, PortSet>,
}

impl Kernel {
    fn apply(&mut self, change: &Change) {
        self.port_sets.extend(change.port_sets.iter().copied());
        for write in &change.cells {
            if write.cell == CELL_DENY {
                self.cells.remove(&write.index);
            } else {
                self.cells.insert(write.index, write.cell);
            }
        }
    }

    /// What a packet to TCP port 80 meets, and one to port 81.
    fn passes(&self, direction: Direction, row: u32, column: u32) -> (bool, bool) {
        let index = cell_index(direction, row, column, SHAPE.rows, SHAPE.columns);
        match self.cells.get(&index).copied().unwrap_or(CELL_DENY) {
            CELL_DENY => (false, false),
            CELL_ALLOW => (true, true),
            set => {
                let set = self.port_sets[&u32::from(set - CELL_PORT_SET)];
                let rules = &set.rules[..set.len as usize];
                let contains = |port| rules.iter().any(|rule| rule.contains(6, port));
                (contains(80), contains(81))
            }
        }
    }
}

fn address(last: u8) -> AddressKey {
    AddressKey::v4([10, 0, 0, last])
}

fn expected(from: Identity, to: Identity) -> (bool, bool) {
    match with_baseline(from, &Numbers::say(from, to)) {
        Decision::Allow => (true, true),
        Decision::Deny | Decision::Pass => (false, false),
        Decision::Ports(_) => (true, false),
    }
}

/// Every pair, in both directions, says what the policy says.
fn assert_faithful(generation: &Generation, kernel: &Kernel, addresses: &[AddressKey]) {
    let places: Vec<_> = addresses
        .iter()
        .filter_map(|address| generation.place(address))
        .collect();
    for from in &places {
        for to in &places {
            let wanted = expected(from.identity, to.identity);
            if from.row != 0 {
                assert_eq!(
                    kernel.passes(Direction::Egress, from.row, to.column),
                    wanted,
                    "{from:?} {to:?}"
                );
            }
            if to.row != 0 {
                assert_eq!(
                    kernel.passes(Direction::Ingress, to.row, from.column),
                    wanted,
                    "{from:?} {to:?}"
                );
            }
        }
        if from.row != 0 {
            let host = Identity::HOST;
            assert_eq!(
                kernel.passes(Direction::Ingress, from.row, host.0),
                expected(host, from.identity)
            );
        }
    }
}

#[test]
fn one_by_one_and_at_once_are_equally_faithful() {
    let members: Vec<_> = (1..=12_u8)
        .map(|n| (address(n), Identity(0x0001_0000 + u32::from(n % 5)), n % 3 != 0))
        .collect();
    let addresses: Vec<_> = members.iter().map(|(address, ..)| *address).collect();

    let (generation, change) = Generation::compile_all(SHAPE, members.clone(), &mut Numbers).unwrap();
    let mut kernel = Kernel::default();
    kernel.apply(&change);
    assert_faithful(&generation, &kernel, &addresses);
    // Two ways to write the same ports are one set.
    assert_eq!(generation.port_set_count(), 1);

    let mut generation = Generation::new(SHAPE);
    let mut kernel = Kernel::default();
    for (address, identity, local) in members {
        kernel.apply(&generation.assign(address, identity, local, &mut Numbers).unwrap());
        assert_faithful(&generation, &kernel, &addresses);
    }
}

#[test]
fn churn_leaves_nothing_behind_and_stays_faithful() {
    let mut generation = Generation::new(SHAPE);
    let mut kernel = Kernel::default();
    let addresses: Vec<_> = (0..20).map(address).collect();
    let mut random = 12345_u32;
    for _ in 0..2000 {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let one = addresses[(random >> 8) as usize % addresses.len()];
        if random & 0x10_0000 == 0 {
            generation.remove(&one);
        } else {
            let identity = Identity(0x0001_0000 + (random >> 16) % 6);
            let local = random & 0x4000 != 0;
            kernel.apply(&generation.assign(one, identity, local, &mut Numbers).unwrap());
        }
        kernel.apply(&generation.release());
        assert_faithful(&generation, &kernel, &addresses);
    }
    for one in &addresses {
        generation.remove(one);
    }
    kernel.apply(&generation.release());
    assert_eq!(kernel.cells, HashMap::new(), "cells of identities that nobody has");
    assert_eq!(generation.counts(), (0, 0));
}

#[test]
fn what_does_not_fit_changes_nothing_and_names_the_limit() {
    let mut generation = Generation::new(SHAPE);
    for n in 1..=7 {
        generation
            .assign(address(n), Identity(0x0001_0000 + u32::from(n)), true, &mut Numbers)
            .unwrap();
    }
    let before = format!("{generation:?}");
    let error = generation
        .assign(address(8), Identity(0x0001_0008), true, &mut Numbers)
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("8 identities on this node, but `maps.local_identities` allows 7"),
        "{error}"
    );
    assert_eq!(format!("{generation:?}"), before);

    let many = (1..=17_u8).map(|n| (address(n), Identity(0x0001_0000 + u32::from(n)), false));
    let error = Generation::compile_all(SHAPE, many, &mut Numbers).unwrap_err();
    let PlanError::Full(Full {
        needed,
        capacity,
        setting,
        ..
    }) = error;
    assert_eq!((needed, capacity, setting), (17, 16, "maps.identities"));
}

#[test]
fn the_node_reaches_its_pods_unless_the_policy_denies_it() {
    let pod = Identity(0x0001_0001);
    assert_eq!(with_baseline(Identity::HOST, &Decision::Pass), Decision::Allow);
    assert_eq!(with_baseline(Identity::HOST, &Decision::Deny), Decision::Deny);
    assert_eq!(with_baseline(pod, &Decision::Pass), Decision::Deny);
    assert_eq!(with_baseline(Identity::REMOTE_NODE, &Decision::Pass), Decision::Deny);
}
