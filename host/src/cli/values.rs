//! Values of arguments: how they are written, and what they mean.

use crate::{
    invariant::parse_ports,
    plan::CARRIED,
    store::records::{ServicePort, TargetPort},
    wasm::{Overrides, Tier},
};
use abi::policy::{TCP, UDP};
use clap::ValueEnum;
use std::collections::BTreeMap;

#[derive(Clone, Copy, ValueEnum)]
pub enum TierArgument {
    /// First: the admin's, for all.
    Admin,
    /// Second: tenants' own, and what stands for them.
    Tenant,
    /// Last: what holds where nobody else has decided.
    Baseline,
}

impl From<TierArgument> for Tier {
    fn from(tier: TierArgument) -> Self {
        match tier {
            TierArgument::Admin => Self::Admin,
            TierArgument::Tenant => Self::Tenant,
            TierArgument::Baseline => Self::Baseline,
        }
    }
}

/// A change of a label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LabelChange {
    Set(String, String),
    Remove(String),
}

pub fn parse_protocol(text: &str) -> Result<u8, String> {
    let known = CARRIED.iter().find(|(_, name)| *name == text);
    let number = known.map(|(number, _)| *number).or_else(|| text.parse().ok());
    number.ok_or_else(|| "one of tcp, udp, sctp, icmp, icmpv6, or the number of an IP protocol, 0 to 255".to_owned())
}

pub fn parse_named_port(text: &str) -> Result<(String, u8, u16), String> {
    let wrong = || "a named port is NAME=PROTOCOL/PORT, as http=tcp/8080".to_owned();
    let (name, port) = text.split_once('=').ok_or_else(wrong)?;
    let ports = parse_ports(port)?;
    match ports.protocol {
        Some(protocol) if ports.first == ports.last => Ok((name.to_owned(), protocol, ports.first)),
        _ => Err(wrong()),
    }
}

pub fn parse_service_port(text: &str) -> Result<ServicePort, String> {
    let wrong = || {
        format!(
            "{text:?} is no port of a service, which are of tcp or udp: write tcp/80, udp/53=5353, tcp/80=http or tcp/80=8080@30080"
        )
    };
    let (rest, node_port) = match text.split_once('@') {
        Some((rest, number)) => (rest, Some(number.parse().map_err(|_| wrong())?)),
        None => (text, None),
    };
    let (port, target) = match rest.split_once('=') {
        Some((port, target)) => (port, Some(target)),
        None => (rest, None),
    };
    let ports = parse_ports(port).map_err(|_| wrong())?;
    let protocol = ports.protocol.filter(|protocol| matches!(*protocol, TCP | UDP));
    let (Some(protocol), true) = (protocol, ports.first == ports.last) else {
        return Err(wrong());
    };
    let target = match target {
        None => TargetPort::Number(ports.first),
        Some("") => return Err(wrong()),
        Some(target) if target.starts_with(|c: char| c.is_ascii_digit()) => {
            TargetPort::Number(target.parse().map_err(|_| wrong())?)
        }
        Some(target) => TargetPort::Name(target.to_owned()),
    };
    Ok(ServicePort {
        protocol,
        port: ports.first,
        target,
        node_port,
    })
}

pub fn parse_limit(text: &str) -> Result<(String, u64), String> {
    const LIMITS: [&str; 3] = ["fuel_per_call", "evaluate_ms", "memory_mib"];
    let (name, value) = text.split_once('=').ok_or("a limit is NAME=NUMBER")?;
    let value: u64 = value.parse().map_err(|_| format!("{value:?} is no number"))?;
    if !LIMITS.contains(&name) {
        return Err(format!("a limit is one of {}", LIMITS.join(", ")));
    }
    if value == 0 || (name == "memory_mib" && value > 4096) {
        return Err(format!("{name}: {value} is too little or too much"));
    }
    Ok((name.to_owned(), value))
}

/// Limits as a module's record holds them.
pub fn overrides(limits: &[(String, u64)]) -> Overrides {
    let find = |name: &str| {
        limits
            .iter()
            .rev()
            .find(|(limit, _)| limit == name)
            .map(|(_, value)| *value)
    };
    Overrides {
        evaluate_ms: find("evaluate_ms"),
        memory_mib: find("memory_mib").and_then(|mib| u32::try_from(mib).ok()),
        fuel_per_call: find("fuel_per_call"),
    }
}

pub fn parse_label(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .ok_or_else(|| "a label is KEY=VALUE".to_owned())
}

pub fn parse_label_change(text: &str) -> Result<LabelChange, String> {
    if let Ok((key, value)) = parse_label(text) {
        return Ok(LabelChange::Set(key, value));
    }
    text.strip_suffix('-')
        .map(|key| LabelChange::Remove(key.to_owned()))
        .ok_or_else(|| "KEY=VALUE sets a label, KEY- takes one away".to_owned())
}

/// What to set, and what to take away.
pub fn split_label_changes(changes: Vec<LabelChange>) -> (BTreeMap<String, String>, Vec<String>) {
    let mut set = BTreeMap::new();
    let mut remove = Vec::new();
    for change in changes {
        match change {
            LabelChange::Set(key, value) => {
                set.insert(key, value);
            }
            LabelChange::Remove(key) => remove.push(key),
        }
    }
    (set, remove)
}

#[cfg(test)]
mod tests {
    use super::{LabelChange, parse_label_change};

    #[test]
    fn label_changes_are_told_apart() {
        let set = |key: &str, value: &str| LabelChange::Set(key.to_owned(), value.to_owned());
        assert_eq!(parse_label_change("app=web").unwrap(), set("app", "web"));
        assert_eq!(parse_label_change("app=").unwrap(), set("app", ""));
        assert_eq!(parse_label_change("a=b-").unwrap(), set("a", "b-"));
        assert_eq!(
            parse_label_change("app-").unwrap(),
            LabelChange::Remove("app".to_owned())
        );
        assert!(parse_label_change("app").is_err());
    }
}
