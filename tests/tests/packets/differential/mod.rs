//! The programs against the model: the same packets and changes of tables, and every verdict, byte, counter and entry of
//! conntrack compared. `PROPTEST_CASES` says how many sequences of up to 400 steps; seeds of those that failed are kept
//! in `regressions`, and are tried first.

mod arena;
mod compare;
mod generator;

use super::{
    bench::GREEN,
    frame::{Frame, NOBODY, OTHER_NODE, POD_A, REMOTE},
    run::{BadPacket, every_one_is_dropped_for_its_own_reason},
    services::frontend,
};
use abi::{DropReason, node::GATEWAY_V4, policy::TCP};
use arena::{Arena, VIP};
use harness::{amount, in_netns, kernel_test};
use proptest::{
    prelude::{Strategy, any},
    test_runner::{Config, FileFailurePersistence, TestRunner},
};
use std::net::IpAddr;

/// What the programs and the model once differed over, and the model was right.
const FOUND: &[BadPacket] = &[
    (
        DropReason::NotLocal,
        "a later fragment to nobody here, whose first one is not known",
        |b| {
            b.from_overlay(
                &Frame::ipv4(REMOTE, NOBODY, 17, &[0; 24]).piece(7, 16, false),
                OTHER_NODE,
                GREEN,
            )
        },
    ),
    (DropReason::UnknownDestination, "the same to the gateway", |b| {
        b.from_pod_a(&Frame::ipv4(POD_A, GATEWAY_V4, 17, &[0; 24]).piece(7, 16, false))
    }),
    (
        DropReason::NoBackends,
        "a later fragment of TCP to a service without backends: it has no header that could be reset",
        |b| {
            b.put_service(frontend(IpAddr::from(VIP), TCP, 80), &[], 0);
            let first = Frame::tcp(POD_A, 4000, VIP, 80, 2);
            b.from_pod_a(&Frame::ipv4(POD_A, VIP, TCP, &[&first.0[34..54], &[0; 4]].concat()).piece(7, 0, true));
            b.from_pod_a(&Frame::ipv4(POD_A, VIP, TCP, &[0; 24]).piece(7, 24, false))
        },
    ),
];

#[test]
fn what_was_found_stays_found() {
    kernel_test!();
    every_one_is_dropped_for_its_own_reason(FOUND);
}

#[test]
fn the_programs_do_what_the_model_does() {
    kernel_test!();
    let mut arena = Arena::new();
    let netns = arena.bench.netns.name().to_owned();
    in_netns(&netns, || {
        let config = Config {
            cases: u32::try_from(amount("PROPTEST_CASES", 300, 10_000)).unwrap(),
            failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
            source_file: Some(file!()),
            ..Config::default()
        };
        let steps = proptest::collection::vec(any::<u64>().no_shrink(), 1..400);
        let arena = std::cell::RefCell::new(&mut arena);
        let result = TestRunner::new(config).run(&steps, |seeds| {
            let mut arena = arena.borrow_mut();
            arena.begin();
            for seed in seeds {
                arena.step(seed)?;
            }
            arena.compare()
        });
        let arena = arena.into_inner();
        println!("{} packets, {} changes of tables", arena.packets, arena.changes);
        let named = |index: usize| DropReason::from_number(u8::try_from(index).unwrap()).map(DropReason::name);
        let reasons = arena.total[0]
            .iter()
            .enumerate()
            .filter_map(|(index, count)| Some((named(index)?, count)));
        let paths = abi::Path::ALL
            .iter()
            .map(|path| (path.name(), &arena.total[1][*path as usize]));
        println!("{:?}", reasons.chain(paths).collect::<Vec<_>>());
        if let Err(failure) = result {
            panic!("{failure}");
        }
    })
    .unwrap();
}
