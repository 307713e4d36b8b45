//! Watching what hostd has made: somebody may remove or replace the programs, or put another in front, or take away what
//! the node's stack has for the pods.

use super::{Daemon, DaemonError};
use crate::net::{self, VXLAN_DEVICE};
use abi::Hook;
use ipnet::IpNet;
use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant},
};
use tokio::task::block_in_place;

/// How often the hooks are looked at.
const WATCH: Duration = Duration::from_secs(1);
/// How often the table of nftables and the routes into the tunnel are.
const WATCH_STACK: Duration = Duration::from_secs(5);

/// What is known of the attachment.
pub struct Watch {
    looked: Instant,
    looked_at_stack: Instant,
    /// Routes into the tunnel as they were set.
    pub routes: BTreeMap<IpNet, IpAddr>,
    /// The table of nftables as it was shown when it was set.
    table: Option<String>,
    /// Times that something was put right.
    pub repairs: u64,
    /// What was said last of what can't be put right, so that it is said once.
    said: Vec<String>,
}

impl Watch {
    pub fn new() -> Self {
        Self {
            looked: Instant::now(),
            looked_at_stack: Instant::now(),
            routes: BTreeMap::new(),
            table: None,
            repairs: 0,
            said: Vec::new(),
        }
    }
}

impl Daemon {
    /// Looks at all hooks, if that is due, and puts right what is wrong.
    pub(super) fn watch_attachment(&mut self) {
        if self.watch.looked.elapsed() < WATCH {
            return;
        }
        self.watch.looked = Instant::now();
        let pods = self.locals.values().map(|local| local.endpoint.interface.clone());
        let mut hooks: Vec<(Hook, String)> = pods
            .flat_map(|name| [(Hook::FromPod, name.clone()), (Hook::ToPod, name)])
            .collect();
        hooks.push((Hook::FromOverlay, VXLAN_DEVICE.to_owned()));
        if self.datapath.has_node_ports() {
            hooks.push((Hook::FromNetdev, self.underlay.clone()));
        }
        let mut problems = Vec::new();
        for (hook, interface) in hooks {
            match block_in_place(|| self.datapath.keep_attached(hook, &interface)) {
                Ok(None) => {}
                Ok(Some(wrong)) => {
                    self.watch.repairs += 1;
                    tracing::warn!("{} on {interface}: {wrong}; it is first again", hook.name());
                }
                Err(error) => problems.push(error.to_string()),
            }
        }
        if self.watch.looked_at_stack.elapsed() >= WATCH_STACK {
            self.watch.looked_at_stack = Instant::now();
            match self.keep_stack() {
                Ok(wrong) => {
                    for what in wrong {
                        self.watch.repairs += 1;
                        tracing::warn!("{what}; put right");
                    }
                }
                Err(error) => problems.push(error.to_string()),
            }
        }
        for problem in problems.iter().filter(|problem| !self.watch.said.contains(problem)) {
            tracing::error!("{problem}");
        }
        self.watch.said = problems;
    }

    /// Gives the node's stack its table of nftables.
    pub(super) fn set_table(&mut self) -> Result<(), DaemonError> {
        let config = &self.config;
        let masqueraded = if config.masquerade { &config.pod_cidrs[..] } else { &[] };
        self.watch.table = block_in_place(|| {
            net::set_table(net::Routed {
                masqueraded,
                except: &config.masquerade_except,
                node_ports: config.node_port_range,
                underlay: config.underlay,
            })?;
            net::table()
        })?;
        Ok(())
    }

    /// Puts right what the node's stack has for the pods; what was wrong.
    fn keep_stack(&mut self) -> Result<Vec<&'static str>, DaemonError> {
        let mut wrong = Vec::new();
        if block_in_place(net::table)? != self.watch.table {
            self.set_table()?;
            wrong.push("the table `wasmgate` of nftables was gone or changed");
        }
        let routes = self.tunnel_routes();
        if !block_in_place(|| net::has_tunnel_routes(&routes, self.config.underlay))? {
            self.route_to_nodes()?;
            wrong.push("a route to another node's pods was gone");
        }
        Ok(wrong)
    }
}
