//! Kernel tests: everything for real, in network namespaces. They need root; see `tests/`. Here is what the tables of packets
//! and the benchmarks run the programs with.
#![expect(
    clippy::unwrap_used,
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    clippy::must_use_candidate,
    clippy::new_without_default,
    clippy::return_self_not_must_use,
    missing_docs,
    reason = "helpers of tests and benchmarks, which fail as a whole"
)]

pub mod bench;
pub mod crowd;
pub mod frame;
pub mod report;
pub mod run;
pub mod stage;
