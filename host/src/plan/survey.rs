//! What a policy says of every pair, in words: for reports and dry runs.

use super::{Decision, Oracle, generation::with_baseline};
use abi::{Identity, PortRule};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// What passes from one identity to another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Verdict {
    /// Everything.
    Allow,
    /// Nothing.
    Deny,
    /// These, as `tcp/8080` or `udp/5000-5010`.
    Ports(Vec<String>),
}

impl fmt::Display for Verdict {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allow => out.write_str("allow"),
            Self::Deny => out.write_str("deny"),
            Self::Ports(ports) => write!(out, "allow {}", ports.join(", ")),
        }
    }
}

impl Verdict {
    fn new(decision: &Decision) -> Self {
        match decision {
            Decision::Allow => Self::Allow,
            Decision::Deny | Decision::Pass => Self::Deny,
            Decision::Ports(rules) => Self::Ports(rules.iter().copied().map(port_text).collect()),
        }
    }
}

/// Name of an IP protocol.
#[must_use]
pub fn protocol_name(protocol: u8) -> String {
    match protocol {
        0 => "any".to_owned(),
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        132 => "sctp".to_owned(),
        other => format!("protocol {other}"),
    }
}

fn port_text(rule: PortRule) -> String {
    let protocol = protocol_name(rule.protocol);
    match (rule.first, rule.last) {
        (0, 0) => protocol,
        (first, last) if first == last => format!("{protocol}/{first}"),
        (first, last) => format!("{protocol}/{first}-{last}"),
    }
}

/// Asks for every ordered pair of `identities`.
///
/// # Errors
///
/// Where the policy can't be asked.
pub fn survey<O: Oracle>(
    identities: &[Identity],
    oracle: &mut O,
) -> Result<BTreeMap<(Identity, Identity), Verdict>, O::Error> {
    let mut verdicts = BTreeMap::new();
    for from in identities {
        let row = oracle.decide(*from, identities)?;
        let table: Vec<Verdict> = row
            .decisions
            .iter()
            .map(|decision| Verdict::new(&with_baseline(*from, decision)))
            .collect();
        for (to, cell) in identities.iter().zip(row.cells) {
            verdicts.insert((*from, *to), table[usize::from(cell)].clone());
        }
    }
    Ok(verdicts)
}
