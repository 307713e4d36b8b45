//! Watching the attachment: somebody may remove or replace the programs, or put another in front.

use super::Daemon;
use crate::net::VXLAN_DEVICE;
use abi::Hook;
use std::time::{Duration, Instant};
use tokio::task::block_in_place;

/// How often the hooks are looked at.
const WATCH: Duration = Duration::from_secs(1);

/// What is known of the attachment.
pub struct Watch {
    looked: Instant,
    /// Times that something was put right.
    pub repairs: u64,
    /// What was said last of what can't be put right, so that it is said once.
    said: Vec<String>,
}

impl Watch {
    pub fn new() -> Self {
        Self {
            looked: Instant::now(),
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
        for problem in problems.iter().filter(|problem| !self.watch.said.contains(problem)) {
            tracing::error!("{problem}");
        }
        self.watch.said = problems;
    }
}
