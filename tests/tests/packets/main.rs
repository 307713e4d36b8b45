//! Tables of packets, run through the loaded programs by `BPF_PROG_TEST_RUN`: verdict, path, target, tunnel key, bytes
//! and counters, for every way that a packet can go and every reason for which it can be dropped.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

mod services;

mod backends;
mod differential;
mod drops;
mod fast;
mod flows;
mod forwarding;
mod fragments;
mod ipv6;
mod model;
mod node_ports;
mod protocols;
mod strangers;
mod stress;
mod told;

use wasmgate_tests::{bench, frame, run, stage};
