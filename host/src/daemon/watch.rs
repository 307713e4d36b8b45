//! Watching what hostd has made: somebody may remove or replace the programs, or put another in front, or take away what
//! the node's stack has for the pods.

use super::{Daemon, DaemonError};
use crate::{
    datapath,
    net::{self, VXLAN_DEVICE},
};
use abi::Hook;
use ipnet::IpNet;
use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};
use tokio::task::block_in_place;

/// How often all hooks are looked at; where that takes longer than [`LOOK`], a round goes on with the next tick.
const WATCH: Duration = Duration::from_secs(1);
/// How long hostd looks at hooks before it does something else: a pod that comes waits for that.
const LOOK: Duration = Duration::from_millis(10);
/// How often the table of nftables and the routes into the tunnel are looked at.
const WATCH_STACK: Duration = Duration::from_secs(5);
/// How long no pod may have come or gone before a link takes over from a filter: one that comes would wait for the kernel.
const CALM: Duration = Duration::from_millis(100);
/// How long a filter waits for that at most; then it is its turn. Also how long nothing is tried after a link could not be made.
const SETTLED: Duration = Duration::from_secs(2);
/// Between two links that take over pods have their turn with the kernel.
const BETWEEN: Duration = Duration::from_millis(50);

/// What is known of the attachment.
pub struct Watch {
    /// When the round began.
    looked: Instant,
    /// Hooks that are still to be looked at in this round.
    round: VecDeque<(Hook, String)>,
    looked_at_stack: Instant,
    looked_at_addresses: Instant,
    /// When a pod came or went last.
    pub moved: Instant,
    /// When the next link may take over from a filter.
    next: Instant,
    /// Routes into the tunnel as they were set.
    pub routes: BTreeMap<IpNet, net::Tunnel>,
    /// The table of nftables as it was shown when it was set.
    table: Option<String>,
    /// Times that something was put right.
    pub repairs: u64,
    /// What can't be put right, as found in this round.
    problems: Vec<String>,
    /// The same of the round before: it is said once.
    said: Vec<String>,
}

impl Watch {
    pub fn new() -> Self {
        Self {
            looked: Instant::now(),
            round: VecDeque::new(),
            looked_at_stack: Instant::now(),
            looked_at_addresses: Instant::now(),
            moved: Instant::now(),
            next: Instant::now(),
            routes: BTreeMap::new(),
            table: None,
            repairs: 0,
            problems: Vec::new(),
            said: Vec::new(),
        }
    }

    /// A pod goes: its hooks are nobody's business any more.
    pub fn forget(&mut self, interface: &str) {
        self.moved = Instant::now();
        self.round.retain(|(_, name)| name != interface);
    }

    /// What can't be put right: of this round, and of the one before, for this one may not have come to all of it yet.
    pub fn problems(&self) -> Vec<String> {
        let earlier = self.said.iter().filter(|problem| !self.problems.contains(problem));
        self.problems.iter().chain(earlier).cloned().collect()
    }

    pub(super) fn complain(&mut self, problem: String) {
        if self.problems.contains(&problem) {
            return;
        }
        if !self.said.contains(&problem) {
            tracing::error!("{problem}");
        }
        self.problems.push(problem);
    }
}

impl Daemon {
    /// Looks at hooks, if that is due, and puts right what is wrong. A round over all of them may take several calls.
    pub(super) fn watch_attachment(&mut self) {
        if self.watch.round.is_empty() {
            if self.watch.looked.elapsed() < WATCH {
                return;
            }
            self.watch.looked = Instant::now();
            self.watch.round = self.hooks();
            self.watch.said = std::mem::take(&mut self.watch.problems);
            self.watch_stack();
            self.watch_guard();
        }
        let began = Instant::now();
        while began.elapsed() < LOOK
            && let Some((hook, interface)) = self.watch.round.pop_front()
        {
            if hook == Hook::FromNetdev && !self.datapath.has_node_ports() {
                continue; // the last one has gone since this round began
            }
            match block_in_place(|| self.datapath.keep_attached(hook, &interface)) {
                Ok(None) => {}
                Ok(Some(wrong)) => {
                    self.watch.repairs += 1;
                    tracing::warn!("{} on {interface}: {wrong}; it is first again", hook.name());
                }
                Err(error) => self.watch.complain(error.to_string()),
            }
        }
    }

    /// All hooks that should have a program.
    fn hooks(&self) -> VecDeque<(Hook, String)> {
        let pods = self.locals.values().map(|local| local.endpoint.interface.clone());
        let mut hooks: VecDeque<(Hook, String)> = pods
            .flat_map(|name| [(Hook::FromPod, name.clone()), (Hook::ToPod, name)])
            .collect();
        hooks.push_back((Hook::FromOverlay, VXLAN_DEVICE.to_owned()));
        if self.datapath.has_node_ports() {
            hooks.push_back((Hook::FromNetdev, self.underlay.clone()));
        }
        hooks
    }

    /// Keeps the node's own processes from sending for the tunnel.
    pub(super) fn guard_tunnel(&mut self) {
        let cgroup = self.config.cgroup.clone().map_or_else(datapath::cgroup_root, Ok);
        let guarded = match cgroup {
            Ok(cgroup) => self.datapath.guard_tunnel(&cgroup).map_err(|error| error.to_string()),
            Err(error) => Err(format!(
                "the node's own processes are not kept from the tunnel port: {error} (`cgroup` in the configuration)"
            )),
        };
        if let Err(problem) = guarded {
            self.watch.complain(problem);
        }
    }

    fn watch_guard(&mut self) {
        if !self.datapath.is_guarded() {
            self.guard_tunnel();
            if self.datapath.is_guarded() {
                self.watch.repairs += 1;
                tracing::warn!("the guard of the tunnel was gone; put right");
            }
        }
    }

    /// Looks at the node's addresses, if that is due.
    pub(super) async fn watch_addresses(&mut self) -> Result<(), DaemonError> {
        if self.watch.looked_at_addresses.elapsed() < WATCH {
            return Ok(());
        }
        self.watch.looked_at_addresses = Instant::now();
        self.follow_own_addresses().await
    }

    fn watch_stack(&mut self) {
        if self.watch.looked_at_stack.elapsed() < WATCH_STACK {
            return;
        }
        self.watch.looked_at_stack = Instant::now();
        match self.keep_stack() {
            Ok(wrong) => {
                for what in wrong {
                    self.watch.repairs += 1;
                    tracing::warn!("{what}; put right");
                }
            }
            Err(error) => self.watch.complain(error.to_string()),
        }
    }

    /// When a link is to take over from the next filter, where there is one.
    pub(super) fn settling(&self) -> Option<Instant> {
        let since = self.datapath.unsettled_since()?;
        let due = (self.watch.moved + CALM).min(since + SETTLED);
        Some(due.max(self.watch.next))
    }

    /// Lets a link take over from a filter.
    pub(super) fn settle(&mut self) {
        let pause = match block_in_place(|| self.datapath.settle()) {
            Ok(()) => BETWEEN,
            Err(error) => {
                self.watch.complain(error.to_string());
                SETTLED
            }
        };
        self.watch.next = Instant::now() + pause;
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
        if !block_in_place(|| net::has_tunnel_routes(&routes))? {
            self.route_to_nodes()?;
            wrong.push("a route to another node's pods was gone");
        }
        Ok(wrong)
    }
}
