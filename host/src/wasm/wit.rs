//! The WIT, and what of it is the same on both sides of the border.

use crate::plan::{Action, Decision, Ports, Rule};
use abi::policy::{ICMP, ICMPV6, SCTP, TCP, UDP};
use std::collections::BTreeMap;
use wasmtime::component::bindgen;

bindgen!({
    world: "module",
    path: "../policy-sdk/wit",
});
pub use exports::wasmgate::policy::policy::*;

/// The WIT's decision, beside the plan's.
pub type WitDecision = exports::wasmgate::policy::policy::Decision;

/// Rules of one decision at the most.
const MAX_RULES: usize = 16_384;
/// Bytes of a reason at the most.
const MAX_REASON: usize = 512;

/// A decision, checked.
pub fn to_decision(decision: WitDecision) -> Result<Decision, String> {
    if decision.rules.len() > MAX_RULES {
        return Err(format!(
            "{} rules in one decision; at most {MAX_RULES} are allowed",
            decision.rules.len()
        ));
    }
    Ok(Decision {
        rules: decision.rules.into_iter().map(to_rule).collect::<Result<_, _>>()?,
        otherwise: to_action(decision.otherwise),
        reason: to_reason(decision.reason)?,
    })
}

fn to_reason(reason: String) -> Result<String, String> {
    if reason.len() > MAX_REASON {
        return Err(format!(
            "a reason of {} bytes; at most {MAX_REASON} are allowed",
            reason.len()
        ));
    }
    Ok(if reason.chars().any(char::is_control) {
        reason.escape_debug().to_string()
    } else {
        reason
    })
}

fn to_rule(rule: exports::wasmgate::policy::policy::Rule) -> Result<Rule, String> {
    let range = rule.ports;
    if range.first > range.last {
        return Err(format!("the port range {} to {}", range.first, range.last));
    }
    Ok(Rule {
        ports: Ports {
            protocol: protocol_number(range.protocol),
            first: range.first,
            last: range.last,
        },
        action: to_action(rule.action),
        reason: to_reason(rule.reason)?,
    })
}

const fn to_action(action: exports::wasmgate::policy::policy::Action) -> Action {
    use exports::wasmgate::policy::policy::Action as Wit;
    match action {
        Wit::Allow => Action::Allow,
        Wit::Deny => Action::Deny,
        Wit::Pass => Action::Pass,
    }
}

const fn protocol_number(protocol: Protocol) -> Option<u8> {
    match protocol {
        Protocol::Any => None,
        Protocol::Icmp => Some(ICMP),
        Protocol::Tcp => Some(TCP),
        Protocol::Udp => Some(UDP),
        Protocol::Sctp => Some(SCTP),
        Protocol::Icmpv6 => Some(ICMPV6),
    }
}

/// The protocol with this number; none where the WIT has no name for it.
pub const fn protocol(number: u8) -> Option<Protocol> {
    Some(match number {
        ICMP => Protocol::Icmp,
        TCP => Protocol::Tcp,
        UDP => Protocol::Udp,
        SCTP => Protocol::Sctp,
        ICMPV6 => Protocol::Icmpv6,
        _ => return None,
    })
}

pub fn labels(labels: &BTreeMap<String, String>) -> Vec<Label> {
    labels
        .iter()
        .map(|(key, value)| Label {
            key: key.clone(),
            value: value.clone(),
        })
        .collect()
}

/// A reserved identity. Whoever is neither a pod nor of the cluster is the world.
pub fn reserved(identity: abi::Identity) -> Reserved {
    use abi::Identity;

    match identity {
        Identity::HOST => Reserved::Host,
        Identity::HEALTH => Reserved::Health,
        Identity::INIT => Reserved::Init,
        Identity::REMOTE_NODE => Reserved::RemoteNode,
        _ => Reserved::World,
    }
}
