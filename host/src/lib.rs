//! hostd, the daemon on each node, in the order in which policy flows through it.
//!
//! Pods come in by [`endpoint`]; [`wasm`] runs the modules, and [`stack`] puts together what they say: of a pod, which
//! becomes its identity key, and of a pair, which becomes a ruling; [`identity`] gives
//! the keys their numbers; [`plan`] makes of it what the kernel should hold, without doing I/O; [`datapath`] is the
//! only writer of BPF maps. [`store`] shares state between nodes, [`net`] speaks netlink, [`api`] is the control
//! socket, [`cli`] the command, and [`daemon`] ties them together.

pub mod api;
pub mod attachment;
pub mod cli;
pub mod cni;
pub mod codec;
pub mod config;
pub mod daemon;
pub mod datapath;
pub mod endpoint;
pub mod identity;
pub mod invariant;
pub mod net;
pub mod plan;
pub(crate) mod random;
pub mod source;
pub mod stack;
pub mod store;
pub mod survey;
pub mod wasm;
