//! What goes to a module, and what comes back: checked before it is believed.

use super::{
    runtime::{Class, Matrix, Pod, Who},
    wit,
};
use crate::{
    identity::{MAX_KEY, MAX_TEXT, check_labels, check_text},
    plan::Network,
};
use ipnet::IpNet;
use std::collections::{BTreeMap, HashSet};

/// Rules in one answer at the most.
const MAX_RULES_AT_ONCE: usize = 1 << 17;
/// Networks of one module, and CIDRs and exceptions of them, at the most.
const MAX_NETWORKS: usize = 16_384;

pub fn check_matrix(matrix: wit::Matrix, expected: usize) -> Result<Matrix, String> {
    if matrix.cells.len() != expected {
        return Err(format!("{} cells where {expected} were asked for", matrix.cells.len()));
    }
    let rules: usize = matrix.decisions.iter().map(|decision| decision.rules.len()).sum();
    if rules > MAX_RULES_AT_ONCE {
        return Err(format!(
            "{rules} rules at once; at most {MAX_RULES_AT_ONCE} are allowed"
        ));
    }
    let count = matrix.decisions.len();
    if let Some(cell) = matrix.cells.iter().find(|cell| usize::from(**cell) >= count) {
        return Err(format!("index {cell} into a table of {count} decisions"));
    }
    Ok(Matrix {
        decisions: matrix
            .decisions
            .into_iter()
            .map(wit::to_decision)
            .collect::<Result<_, _>>()?,
        cells: matrix.cells,
    })
}

pub fn check_class(class: wit::Class) -> Result<Class, String> {
    let count = class.labels.len();
    let labels: BTreeMap<String, String> = class.labels.into_iter().map(|label| (label.key, label.value)).collect();
    if labels.len() != count {
        return Err("the same label twice".to_owned());
    }
    if let Some(tenant) = &class.tenant {
        if tenant.is_empty() {
            return Err("the tenant is empty".to_owned());
        }
        check_text("the tenant", tenant, MAX_TEXT)?;
    }
    check_labels(&labels)?;
    Ok(Class {
        tenant: class.tenant,
        labels,
    })
}

pub fn check_networks(module: &str, networks: Vec<wit::Network>) -> Result<Vec<Network>, String> {
    let prefixes = |network: &wit::Network| network.blocks.iter().map(|block| 1 + block.except.len()).sum::<usize>();
    let blocks: usize = networks.iter().map(prefixes).sum();
    if networks.len().max(blocks) > MAX_NETWORKS {
        return Err(format!(
            "{} networks with {blocks} CIDRs and exceptions; at most {MAX_NETWORKS} are allowed",
            networks.len()
        ));
    }
    let mut names = HashSet::new();
    let mut checked = Vec::with_capacity(networks.len());
    for network in networks {
        check_text("a network's name", &network.name, MAX_KEY)?;
        if network.name.is_empty() || !names.insert(network.name.clone()) {
            return Err(format!("the network {:?} twice, or without a name", network.name));
        }
        let parse = |text: &str| -> Result<IpNet, String> {
            text.parse()
                .map_err(|_| format!("network {}: {text:?}, which is no CIDR", network.name))
        };
        let mut blocks = Vec::with_capacity(network.blocks.len());
        for block in &network.blocks {
            let cidr = parse(&block.cidr)?.trunc();
            let except = block
                .except
                .iter()
                .map(|text| Ok(parse(text)?.trunc()))
                .collect::<Result<Vec<_>, String>>()?;
            if let Some(outside) = except.iter().find(|except| !cidr.contains(*except)) {
                return Err(format!(
                    "network {}: the exception {outside}, which is not in {cidr}",
                    network.name
                ));
            }
            blocks.push((cidr, except));
        }
        checked.push(Network {
            module: module.to_owned(),
            name: network.name,
            blocks,
        });
    }
    Ok(checked)
}

pub fn to_pod(pod: &Pod, networks: &[String]) -> wit::Pod {
    wit::Pod {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        labels: wit::labels(&pod.labels),
        namespace_labels: wit::labels(&pod.namespace_labels),
        service_account: pod.service_account.clone(),
        addresses: pod.addresses.iter().map(ToString::to_string).collect(),
        ports: pod
            .ports
            .iter()
            .filter_map(|(name, protocol, port)| {
                Some(wit::NamedPort {
                    name: name.clone(),
                    protocol: wit::protocol(*protocol)?,
                    port: *port,
                })
            })
            .collect(),
        networks: networks.to_vec(),
    }
}

pub fn to_peer(who: &Who) -> wit::Peer {
    match who {
        Who::Pod(tenant, labels) => wit::Peer::Pod(wit::Identity {
            tenant: tenant.clone(),
            labels: wit::labels(labels),
        }),
        Who::Reserved(identity) => wit::Peer::Reserved(wit::reserved(*identity)),
        Who::Networks(names) => wit::Peer::Networks(names.clone()),
        Who::Unknown(tenant) => wit::Peer::Unknown(tenant.clone()),
    }
}
