//! Tests of the compiled matrix: a look-up in it equals asking the policy, however it came to be.

use super::{Change, Full, Generation, Oracle, PlanError, Shape};
use crate::plan::{Decision, Ports, ports::Ruling};
use abi::{
    AddressKey, Direction, Identity, PortSet,
    policy::{CELL_ALLOW, CELL_DENY, CELL_PORT_SET},
};
use proptest::prelude::*;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    convert::Infallible,
};

const SHAPE: Shape = Shape {
    rows: 8,
    columns: 32,
    port_sets: 8,
    breakpoints: 64,
};

fn tcp(ports: &[u16]) -> Ruling {
    let ports = ports.iter().map(|port| Ports {
        protocol: Some(6),
        first: *port,
        last: *port,
    });
    Decision::allow(ports).line().settle(false)
}

/// A policy made of numbers, with all kinds of rulings in it.
struct Numbers(Vec<Ruling>);

impl Numbers {
    fn new() -> Self {
        Self(vec![
            Ruling::all(false),
            Ruling::all(true),
            tcp(&[80, 443]),
            tcp(&[443]),
            tcp(&[81, 8080]),
        ])
    }

    fn say(side: Direction, subject: Identity, peer: Identity) -> u32 {
        (subject.0 * 7 + peer.0 * 3 + side as u32) % 5
    }
}

impl Oracle for Numbers {
    type Error = Infallible;

    fn decide(&mut self, side: Direction, subjects: &[Identity], peers: &[Identity]) -> Result<Vec<u32>, Infallible> {
        let pairs = subjects
            .iter()
            .flat_map(|one| peers.iter().map(move |other| (one, other)));
        Ok(pairs.map(|(subject, peer)| Self::say(side, *subject, *peer)).collect())
    }

    fn ruling(&self, number: u32) -> &Ruling {
        &self.0[number as usize]
    }
}

/// The kernel's side: what was written so far.
#[derive(Default)]
struct Kernel {
    cells: HashMap<u32, u16>,
    sets: HashMap<u32, PortSet>,
    pool: HashMap<u32, u64>,
}

impl Kernel {
    fn apply(&mut self, change: &Change) {
        for write in &change.port_sets {
            self.sets.insert(write.number, write.set);
            self.pool
                .extend((write.set.first..).zip(write.breakpoints.iter().copied()));
        }
        for block in &change.blocks {
            let mut cells = block.cells.iter();
            for row in &block.rows {
                for column in &block.columns {
                    let cell = *cells.next().unwrap();
                    let index = SHAPE.index(block.direction, *row, *column);
                    if cell == CELL_DENY {
                        self.cells.remove(&index);
                    } else {
                        self.cells.insert(index, cell);
                    }
                }
            }
            assert_eq!(cells.next(), None);
        }
    }

    fn cell(&self, index: u32) -> u16 {
        self.cells.get(&index).copied().unwrap_or(CELL_DENY)
    }

    fn ruling(&self, direction: Direction, row: u32, column: u32) -> Ruling {
        match self.cell(SHAPE.index(direction, row, column)) {
            CELL_DENY => Ruling::all(false),
            CELL_ALLOW => Ruling::all(true),
            set => {
                let set = self.sets[&u32::from(set - CELL_PORT_SET)];
                let breakpoints: Vec<u64> = (set.first..set.first + set.len)
                    .map(|index| self.pool[&index])
                    .collect();
                Ruling::from_breakpoints(&breakpoints)
            }
        }
    }
}

fn address(number: u8) -> AddressKey {
    AddressKey::v4([10, 0, 0, number])
}

/// Every cell of every row in use says what the policy does, and there are no others.
fn assert_complete(generation: &Generation, kernel: &Kernel) {
    let oracle = Numbers::new();
    let reserved = Identity::RESERVED.iter().map(|(identity, _)| *identity);
    let known: BTreeSet<Identity> = reserved.chain((100..200).map(Identity)).collect();
    let mut expected = BTreeSet::new();
    for subject in &known {
        let Some(row) = generation.row(*subject) else { continue };
        for peer in &known {
            let Some(column) = generation.column(*peer) else {
                continue;
            };
            for direction in [Direction::Egress, Direction::Ingress] {
                let ruling = oracle.ruling(Numbers::say(direction, *subject, *peer));
                assert_eq!(
                    kernel.ruling(direction, row, column),
                    *ruling,
                    "{subject} {direction:?} {peer}"
                );
                if ruling.constant() != Some(false) {
                    expected.insert(SHAPE.index(direction, row, column));
                }
            }
        }
    }
    let there: BTreeSet<u32> = kernel.cells.keys().copied().collect();
    assert_eq!(there, expected, "cells of nobody");
}

#[test]
fn what_does_not_fit_is_refused_with_its_setting_and_changes_nothing() {
    let mut generation = Generation::new(SHAPE);
    let mut kernel = Kernel::default();
    let mut oracle = Numbers::new();
    for number in 0..7_u8 {
        let identity = Identity(100 + u32::from(number));
        kernel.apply(&generation.assign(address(number), identity, true, &mut oracle).unwrap());
    }
    let error = generation
        .assign(address(7), Identity(150), true, &mut oracle)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the policy does not fit: 8 identities on this node, but `maps.local_identities` allows 7; raise it and \
         restart hostd, or have the policy make fewer"
    );
    assert_eq!(generation.place(&address(7)), None);
    assert_eq!(generation.column(Identity(150)), None);
    assert_complete(&generation, &kernel);

    let all = (0..20_u8).map(|number| (address(number), Identity(100 + u32::from(number)), false));
    let error = Generation::compile_all(SHAPE, all, [], &mut oracle).unwrap_err();
    let PlanError::Full(Full {
        setting,
        needed,
        capacity,
        ..
    }) = error;
    assert_eq!((setting, needed, capacity), ("maps.identities", 20, 16));
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let compile = || {
        let all = (0..12_u8).map(|number| (address(number), Identity(100 + u32::from(number)), number % 2 == 0));
        let (_, change) = Generation::compile_all(SHAPE, all, [Identity(180)], &mut Numbers::new()).unwrap();
        change
    };
    assert_eq!(compile(), compile());
}

#[test]
fn sets_that_no_cell_names_are_swept_and_the_others_keep_their_meaning() {
    let mut oracle = Numbers::new();
    let mut generation = Generation::new(Shape { port_sets: 3, ..SHAPE });
    let mut kernel = Kernel::default();
    kernel.apply(&generation.assign(address(1), Identity(100), true, &mut oracle).unwrap());
    assert_eq!(generation.port_set_counts().0, 3);
    assert_eq!(generation.sweep(|index| kernel.cell(index)), 0, "all are in use");
    generation.remove(&address(1));
    kernel.apply(&generation.release());
    assert_eq!(generation.sweep(|index| kernel.cell(index)), 3);
    kernel.apply(&generation.assign(address(2), Identity(101), true, &mut oracle).unwrap());
    assert_complete(&generation, &kernel);
}

/// What can happen to the pods of a cluster.
#[derive(Clone, Debug)]
enum Step {
    /// A pod comes, or is relabelled, or moves.
    Assign(u8, u32, bool),
    Remove(u8),
    Sweep,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (0..10_u8, 0..12_u32, any::<bool>()).prop_map(|(pod, identity, local)| Step::Assign(pod, 100 + identity, local)),
        2 => (0..10_u8).prop_map(Step::Remove),
        1 => Just(Step::Sweep),
    ]
}

proptest! {
    #[test]
    fn churn_comes_to_the_same_as_a_plan_from_scratch(steps in prop::collection::vec(any_step(), 1..40)) {
        let mut oracle = Numbers::new();
        let mut generation = Generation::new(SHAPE);
        let mut kernel = Kernel::default();
        let mut members = BTreeMap::new();
        for step in steps {
            match step {
                Step::Assign(pod, identity, local) => {
                    match generation.assign(address(pod), Identity(identity), local, &mut oracle) {
                        Ok(change) => {
                            kernel.apply(&change);
                            members.insert(address(pod), (Identity(identity), local));
                        }
                        Err(PlanError::Full(_)) => {}
                    }
                }
                Step::Remove(pod) => {
                    generation.remove(&address(pod));
                    members.remove(&address(pod));
                }
                Step::Sweep => {
                    generation.sweep(|index| kernel.cell(index));
                }
            }
            kernel.apply(&generation.release());
            assert_complete(&generation, &kernel);
        }
        let all = members.iter().map(|(address, (identity, local))| (*address, *identity, *local));
        let (scratch, change) = Generation::compile_all(SHAPE, all, [], &mut oracle).unwrap();
        let mut fresh = Kernel::default();
        fresh.apply(&change);
        assert_complete(&scratch, &fresh);
        prop_assert_eq!(scratch.counts(), generation.counts());
        for address in members.keys() {
            let (one, other) = (scratch.place(address).unwrap(), generation.place(address).unwrap());
            prop_assert_eq!(one.identity, other.identity);
            prop_assert_eq!(one.row == 0, other.row == 0);
        }
    }
}
