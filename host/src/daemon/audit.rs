//! Modules that are only audited: what they would have denied of the flows that were let open.

use super::Daemon;
use crate::{
    api::AuditView,
    plan::{Ruling, protocol_name},
    stack::Include,
};
use abi::{Direction, Event, Hook, Identity, policy::port_key};
use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::task::block_in_place;

/// Findings that are kept at the most.
const MAX_FINDINGS: usize = 4096;
/// Rulings that are kept at the most.
const MAX_RULINGS: usize = 65_536;

/// What was found: module, sender, receiver, protocol, port.
type Finding = (String, Identity, Identity, u8, u16);

/// The audit.
#[derive(Default)]
pub struct Audit {
    modules: Vec<String>,
    /// Whether there is anything to audit, for those who hand over the programs' reports.
    on: Arc<AtomicBool>,
    rulings: HashMap<(usize, u32, Identity, Identity), Ruling>,
    findings: BTreeMap<Finding, (AuditView, u64)>,
    overflow: bool,
}

impl Audit {
    /// Whether flows are to be reported.
    pub fn is_on(&self) -> bool {
        !self.modules.is_empty()
    }

    /// The same, for others to look at.
    pub fn switch(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.on)
    }

    /// What was found so far.
    pub fn views(&self) -> Vec<AuditView> {
        let view = |(view, count): &(AuditView, u64)| AuditView {
            flows: *count,
            ..view.clone()
        };
        self.findings.values().map(view).collect()
    }

    /// Identities have changed their meaning.
    pub fn forget_rulings(&mut self) {
        self.rulings.clear();
    }
}

impl Daemon {
    /// Another set of modules is in force. What was found of a module that is still audited stays.
    pub(super) fn audit_anew(&mut self) {
        let modules = self.active.stack.audited();
        self.audit.findings.retain(|(module, ..), _| modules.contains(module));
        self.audit.modules = modules;
        self.audit.rulings.clear();
        self.audit.overflow = false;
        self.audit.on.store(self.audit.is_on(), Ordering::Relaxed);
        self.set_report();
    }

    /// A flow was let open.
    pub(super) fn audit_event(&mut self, event: &Event) {
        let key = port_key(event.protocol, audited_port(event));
        self.active.stack.begin();
        // Each end is audited where it is enforced.
        let ends = [
            (
                Direction::Egress,
                event.from,
                event.to,
                event.hook == Hook::FromPod as u8,
            ),
            (Direction::Ingress, event.to, event.from, true),
        ];
        for index in 0..self.audit.modules.len() {
            let module = self.audit.modules[index].clone();
            let denied = ends.iter().any(|(direction, subject, peer, here)| {
                *here
                    && self.active.generation.row(*subject).is_some()
                    && self
                        .audit_ruling(index, *direction, *subject, *peer)
                        .is_some_and(|ruling| !ruling.at(key))
            });
            if denied {
                self.note_finding(module, event);
            }
        }
    }

    fn audit_ruling(&mut self, index: usize, side: Direction, subject: Identity, peer: Identity) -> Option<Ruling> {
        let place = (index, side as u32, subject, peer);
        if let Some(ruling) = self.audit.rulings.get(&place) {
            return Some(ruling.clone());
        }
        let module = &self.audit.modules[index];
        let stack = &mut self.active.stack;
        match block_in_place(|| stack.ruling_of(Include::Audited(module), side, subject, peer)) {
            Ok(ruling) => {
                if self.audit.rulings.len() >= MAX_RULINGS {
                    self.audit.rulings.clear();
                }
                self.audit.rulings.insert(place, ruling.clone());
                Some(ruling)
            }
            Err(error) => {
                tracing::warn!("auditing {module}: {error}");
                None
            }
        }
    }

    fn note_finding(&mut self, module: String, event: &Event) {
        let port = audited_port(event);
        let finding = (module.clone(), event.from, event.to, event.protocol, port);
        if let Some((_, count)) = self.audit.findings.get_mut(&finding) {
            *count += 1;
            return;
        }
        if self.audit.findings.len() >= MAX_FINDINGS {
            if !self.audit.overflow {
                self.audit.overflow = true;
                tracing::warn!("audit: {MAX_FINDINGS} different findings; more are left out");
            }
            return;
        }
        let view = AuditView {
            module,
            from: self.registry.name(event.from),
            to: self.registry.name(event.to),
            protocol: protocol_name(event.protocol),
            port,
            flows: 0,
        };
        tracing::info!(
            "audit: {} would have denied {} -> {} {}/{}",
            view.module,
            view.from,
            view.to,
            view.protocol,
            view.port
        );
        self.audit.findings.insert(finding, (view, 1));
    }
}

/// An echo has its type in place of a port.
const fn audited_port(event: &Event) -> u16 {
    match event.protocol {
        abi::policy::ICMP => 8,
        abi::policy::ICMPV6 => 128,
        _ => event.destination_port,
    }
}
