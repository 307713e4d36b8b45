//! Tables of packets, run through the loaded programs by `BPF_PROG_TEST_RUN`: verdict, path, target, tunnel key, bytes
//! and counters, for every way that a packet can go and every reason for which it can be dropped.

mod bench;
mod frame;

mod drops;
mod flows;
mod forwarding;
