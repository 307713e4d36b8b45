//! Answers, as text for people and as JSON for programs.

use super::{print_policy, table::Table};
use crate::{
    api::{
        BackendView, CounterView, EndpointView, IdentityView, IpcacheView, LoadReport, NamespaceView, PacketView,
        Response, ServiceView, Status,
    },
    store::records::ModuleRecord,
};
use serde::Serialize;
use std::{collections::BTreeMap, io::Write, net::IpAddr};

/// Changed pairs that are printed, at the most; JSON has all.
const MAX_PAIRS: usize = 40;

/// The content of an answer as JSON, indented.
pub fn json(out: &mut impl Write, response: &Response) -> anyhow::Result<()> {
    serde_json::to_writer_pretty(&mut *out, &content(response)?)?;
    Ok(writeln!(out)?)
}

/// The same on one line.
pub fn json_line(out: &mut impl Write, response: &Response) -> anyhow::Result<()> {
    if matches!(response, Response::Monitoring) {
        return Ok(());
    }
    serde_json::to_writer(&mut *out, &content(response)?)?;
    Ok(writeln!(out)?)
}

/// Without the enum's tag: a reader knows what it has asked for.
fn content(response: &Response) -> serde_json::Result<serde_json::Value> {
    #[derive(Serialize)]
    struct Deleted {
        deleted: bool,
    }
    #[derive(Serialize)]
    struct Missed {
        missed: u64,
    }
    match response {
        Response::Error(problem) | Response::Failed(_, problem) => serde_json::to_value(problem),
        Response::Attached(attached) => serde_json::to_value(attached),
        Response::Problems(problems) => serde_json::to_value(problems),
        Response::Collected(ended) => serde_json::to_value(ended),
        Response::Status(status) => serde_json::to_value(status),
        Response::Endpoint(endpoint) => serde_json::to_value(endpoint),
        Response::Endpoints(endpoints) => serde_json::to_value(endpoints),
        Response::Drained(pods) => serde_json::to_value(pods),
        Response::Deleted(deleted) => serde_json::to_value(Deleted { deleted: *deleted }),
        Response::Identities(identities) => serde_json::to_value(identities),
        Response::Ipcache(ipcache) => serde_json::to_value(ipcache),
        Response::Namespace(namespace) => serde_json::to_value(namespace),
        Response::Namespaces(namespaces) => serde_json::to_value(namespaces),
        Response::Service(service) => serde_json::to_value(service),
        Response::Services(services) => serde_json::to_value(services),
        Response::Policy(policy) => serde_json::to_value(policy),
        Response::Modules(modules) => serde_json::to_value(modules),
        Response::Module(module) => serde_json::to_value(module),
        Response::Verified(verified) => serde_json::to_value(verified),
        Response::Audit(findings) => serde_json::to_value(findings),
        Response::Explained(explanation) => serde_json::to_value(explanation),
        Response::Loaded(report) => serde_json::to_value(report),
        Response::Monitoring => Ok(serde_json::Value::Null),
        Response::Packet(packet) => serde_json::to_value(packet),
        Response::Missed(missed) => serde_json::to_value(Missed { missed: *missed }),
    }
}

/// An answer as text.
pub fn text(out: &mut impl Write, response: &Response) -> anyhow::Result<()> {
    match response {
        Response::Error(problem) | Response::Failed(_, problem) => Ok(writeln!(out, "{problem}")?),
        // Asked for by the CNI plugin alone, which has its own words for them.
        Response::Attached(_) | Response::Problems(_) | Response::Collected(_) => json(out, response),
        Response::Status(report) => status(out, report),
        Response::Endpoint(one) => endpoints(out, std::slice::from_ref(one)),
        Response::Endpoints(all) => endpoints(out, all),
        Response::Drained(pods) => Ok(writeln!(out, "{} pods disconnected", pods.len())?),
        Response::Deleted(true) => Ok(writeln!(out, "deleted")?),
        Response::Deleted(false) => Ok(writeln!(out, "nothing to delete")?),
        Response::Identities(all) => identities(out, all),
        Response::Ipcache(all) => ipcache(out, all),
        Response::Namespace(one) => namespaces(out, std::slice::from_ref(one)),
        Response::Namespaces(all) => namespaces(out, all),
        Response::Service(one) => services(out, std::slice::from_ref(one)),
        Response::Services(all) => services(out, all),
        Response::Policy(shown) => print_policy::policy(out, shown),
        Response::Modules(all) => print_policy::modules(out, all),
        Response::Module(one) => print_policy::inspected(out, one),
        Response::Verified(result) => print_policy::verified(out, result),
        Response::Audit(findings) => print_policy::audit(out, findings),
        Response::Explained(explanation) => print_policy::explained(out, explanation),
        Response::Loaded(report) => load(out, report),
        Response::Monitoring => Ok(()),
        Response::Packet(one) => Ok(writeln!(out, "{}", packet(one))?),
        Response::Missed(missed) => Ok(writeln!(out, "({missed} packets were not reported: too many at once)")?),
    }
}

fn labels(labels: &BTreeMap<String, String>) -> String {
    let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    labels.join(",")
}

/// A module in a few words.
pub fn module(record: &ModuleRecord) -> String {
    let sha256 = &record.sha256[..12.min(record.sha256.len())];
    let placement = &record.placement;
    let tenant = placement
        .tenant
        .as_ref()
        .map_or(String::new(), |tenant| format!(" of {tenant}"));
    let audit = if record.audit { ", audited only" } else { "" };
    let config = if record.config.is_empty() { "" } else { ", configured" };
    format!(
        "{}: {} (tier {}{tenant}, priority {}, sha256 {sha256}{config}{audit})",
        placement.name,
        record.file,
        placement.tier.name(),
        placement.priority
    )
}

/// The modules, in the order in which they are asked.
pub fn policy_lines(out: &mut impl Write, modules: &[ModuleRecord]) -> anyhow::Result<()> {
    if modules.is_empty() {
        writeln!(out, "policy      none: nothing passes between pods")?;
    }
    for (index, record) in modules.iter().enumerate() {
        let head = if index == 0 { "policy" } else { "" };
        writeln!(out, "{head:<11} {}", module(record))?;
    }
    Ok(())
}

fn status(out: &mut impl Write, status: &Status) -> anyhow::Result<()> {
    writeln!(out, "node        {} (hostd {})", status.node, status.version)?;
    policy_lines(out, &status.modules)?;
    for failure in &status.failures {
        writeln!(out, "FAILING     {failure}")?;
    }
    if let Some(problem) = &status.out_of_step {
        writeln!(out, "OUT OF STEP {problem}")?;
    }
    for problem in &status.service_problems {
        writeln!(out, "SERVICES    {problem}")?;
    }
    writeln!(out, "store       {}", status.store)?;
    if let Some(problem) = &status.store_problem {
        writeln!(out, "STORE       {problem}; pods keep talking, and changes wait")?;
    }
    writeln!(out, "generation  {}", status.generation)?;
    let repaired = match status.repairs {
        0 => String::new(),
        times => format!(", put right {times} times"),
    };
    writeln!(out, "attachment  {}{repaired}", status.attach)?;
    for problem in &status.problems {
        writeln!(out, "PROBLEM     {problem}")?;
    }
    writeln!(out, "pod MTU     {}", status.pod_mtu)?;
    writeln!(out, "endpoints   {}", status.endpoints)?;

    writeln!(out)?;
    let mut table = Table::new(["NODE", "UNDERLAY", "POD CIDRS", "PODS", "STATE"]);
    for node in &status.nodes {
        let state = if node.state == "alive" {
            node.state.clone()
        } else {
            format!("{} for {} s", node.state, node.stale_seconds)
        };
        let cidrs = node.pod_cidrs.join(",");
        table.row([
            node.name.clone(),
            node.underlay.to_string(),
            cidrs,
            node.pods.to_string(),
            state,
        ]);
    }
    table.print(out)?;

    writeln!(out)?;
    let mut table = Table::new(["MAP", "USED", "OF", "PRESSURE"]);
    for map in &status.maps {
        let share = map.used * 100 / map.capacity.max(1);
        let warning = if share >= 80 { " !" } else { "" };
        let sizes = (map.used.to_string(), map.capacity.to_string());
        table.row([map.setting.clone(), sizes.0, sizes.1, format!("{share} %{warning}")]);
    }
    table.print(out)?;

    writeln!(out)?;
    counters(out, "FORWARDED", &status.forwarded)?;
    if !status.drops.is_empty() {
        writeln!(out)?;
        counters(out, "DROPPED", &status.drops)?;
    }
    Ok(())
}

fn counters(out: &mut impl Write, head: &str, counters: &[CounterView]) -> anyhow::Result<()> {
    let mut table = Table::new([head, "PACKETS", "BYTES", ""]);
    for counter in counters {
        let count = (counter.packets.to_string(), counter.bytes.to_string());
        table.row([counter.name.clone(), count.0, count.1, counter.text.clone()]);
    }
    Ok(table.print(out)?)
}

fn endpoints(out: &mut impl Write, endpoints: &[EndpointView]) -> anyhow::Result<()> {
    let mut table = Table::new(["POD", "ADDRESSES", "IDENTITY", "AS", "LABELS", "INTERFACE"]);
    for one in endpoints {
        table.row([
            one.pod.to_string(),
            joined(&one.addresses),
            one.identity.to_string(),
            one.identity_name.clone(),
            labels(&one.labels),
            one.interface.clone(),
        ]);
    }
    Ok(table.print(out)?)
}

fn joined(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn identities(out: &mut impl Write, identities: &[IdentityView]) -> anyhow::Result<()> {
    let mut table = Table::new(["IDENTITY", "TENANT", "NAME", "ADDRESSES"]);
    for one in identities {
        table.row([
            one.identity.to_string(),
            one.tenant.to_string(),
            one.name.clone(),
            one.addresses.to_string(),
        ]);
    }
    Ok(table.print(out)?)
}

fn ipcache(out: &mut impl Write, entries: &[IpcacheView]) -> anyhow::Result<()> {
    let mut table = Table::new(["ADDRESS", "IDENTITY", "AS", "TUNNEL ENDPOINT", "NAME"]);
    for one in entries {
        let other = one
            .other_identity
            .map_or(String::new(), |other| format!(" (or {other})"));
        table.row([
            one.address.to_string(),
            format!("{}{other}", one.identity),
            one.identity_name.clone(),
            one.tunnel_endpoint
                .map_or("-".to_owned(), |address| address.to_string()),
            one.name.clone(),
        ]);
    }
    Ok(table.print(out)?)
}

fn namespaces(out: &mut impl Write, namespaces: &[NamespaceView]) -> anyhow::Result<()> {
    let mut table = Table::new(["NAMESPACE", "PODS", "LABELS"]);
    for one in namespaces {
        table.row([one.namespace.clone(), one.pods.to_string(), labels(&one.labels)]);
    }
    Ok(table.print(out)?)
}

fn services(out: &mut impl Write, services: &[ServiceView]) -> anyhow::Result<()> {
    let mut table = Table::new([
        "SERVICE",
        "ADDRESSES",
        "PORT",
        "NODE PORT",
        "TARGET",
        "AFFINITY",
        "BACKENDS",
    ]);
    for service in services {
        for port in &service.ports {
            let backend = |backend: &BackendView| match backend.name.as_str() {
                "" => backend.address.to_string(),
                name => format!("{} ({name})", backend.address),
            };
            let mut backends: Vec<String> = port.backends.iter().map(backend).collect();
            if port.left_out > 0 {
                backends.push(format!("no room for {}", port.left_out));
            }
            table.row([
                format!("{}/{}", service.namespace, service.name),
                joined(&service.addresses),
                port.port.clone(),
                port.node_port.map_or("-".to_owned(), |port| port.to_string()),
                port.target.clone(),
                match service.affinity_seconds {
                    0 => "-".to_owned(),
                    seconds => format!("{seconds} s"),
                },
                if backends.is_empty() {
                    "none".to_owned()
                } else {
                    backends.join(", ")
                },
            ]);
        }
    }
    Ok(table.print(out)?)
}

fn milliseconds(micros: u64) -> String {
    format!("{}.{:03} ms", micros / 1000, micros % 1000)
}

fn load(out: &mut impl Write, report: &LoadReport) -> anyhow::Result<()> {
    let what = if report.dry_run { "would do: " } else { "done: " };
    writeln!(out, "{what}{}", report.what)?;
    policy_lines(out, &report.modules)?;
    writeln!(
        out,
        "{} pods, {} identities, {} pairs, {} cells on this node, {} calls",
        report.pods, report.identities, report.pairs, report.cells, report.calls
    )?;
    match &report.changed {
        Some(changed) => {
            let verb = if report.dry_run { "would change" } else { "changed" };
            writeln!(out, "{} verdicts {verb}", changed.len())?;
            if report.dry_run && !changed.is_empty() {
                writeln!(out)?;
                let mut table = Table::new(["FROM", "TO", "BEFORE", "AFTER"]);
                for pair in changed.iter().take(MAX_PAIRS) {
                    let verdicts = (pair.before.clone(), pair.after.clone());
                    table.row([pair.from.clone(), pair.to.clone(), verdicts.0, verdicts.1]);
                }
                table.print(out)?;
                if changed.len() > MAX_PAIRS {
                    writeln!(out, "… and {} more; `--json` has all", changed.len() - MAX_PAIRS)?;
                }
            }
        }
        None => writeln!(out, "too many identities to compare every pair")?,
    }
    if let Some(flows) = &report.flows {
        writeln!(
            out,
            "{} of the tracked flows would end",
            flows.iter().map(|flow| flow.flows).sum::<u64>()
        )?;
        let mut table = Table::new(["FROM", "TO", "PORT", "FLOWS"]);
        for flow in flows {
            let port = format!("{}/{}", flow.protocol, flow.port);
            table.row([flow.from.clone(), flow.to.clone(), port, flow.flows.to_string()]);
        }
        table.print(out)?;
    }
    writeln!(out)?;
    let mut table = Table::new(["STEP", "TIME"]);
    for (step, micros) in &report.steps {
        table.row([step.clone(), milliseconds(*micros)]);
    }
    table.print(out)?;
    if report.nodes.is_empty() {
        return Ok(());
    }
    writeln!(out)?;
    let mut table = Table::new(["NODE", "IDENTITIES", "CELLS", "PREPARED IN", "SWITCHED AFTER"]);
    for node in &report.nodes {
        let switched = node.commit_micros.map_or("-".to_owned(), milliseconds);
        match &node.result {
            Ok(prepared) => table.row([
                node.node.clone(),
                format!("{} ({} here)", prepared.identities, prepared.local_identities),
                prepared.cells.to_string(),
                milliseconds(prepared.micros),
                switched,
            ]),
            Err(problem) => table.row([node.node.clone(), problem.clone(), "-".into(), "-".into(), switched]),
        }
    }
    Ok(table.print(out)?)
}

fn end(name: &str, address: Option<IpAddr>, port: u16) -> String {
    let address = match (address, port) {
        (None, _) => "?".to_owned(),
        (Some(address), 0) => address.to_string(),
        (Some(address), port) => format!("{address}:{port}"),
    };
    if name.is_empty() {
        address
    } else {
        format!("{name} ({address})")
    }
}

fn packet(packet: &PacketView) -> String {
    let (seconds, millis) = (packet.time_ms / 1000 % 86400, packet.time_ms % 1000);
    let time = format!(
        "{:02}:{:02}:{:02}.{millis:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    );
    let mut line = format!("{time} {:5} {} at {}", packet.verdict, packet.reason, packet.hook);
    if packet.source.is_some() {
        let source = end(&packet.source_name, packet.source, packet.source_port);
        let destination = end(&packet.destination_name, packet.destination, packet.destination_port);
        line = format!("{line} {} {source} -> {destination}", packet.protocol);
    }
    if !packet.from.is_empty() {
        let to = if packet.to.is_empty() { "?" } else { &packet.to };
        line = format!("{line} [{} -> {to}]", packet.from);
    }
    format!("{line} {} bytes", packet.length)
}

/// The node's counters and map pressure (Prometheus text format 0.0.4).
pub fn metrics(out: &mut impl Write, status: &Status) -> anyhow::Result<()> {
    let escape = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
    writeln!(out, "# TYPE wasmgate_map_entries gauge")?;
    for map in &status.maps {
        writeln!(out, "wasmgate_map_entries{{map=\"{}\"}} {}", map.setting, map.used)?;
    }
    writeln!(out, "# TYPE wasmgate_map_capacity gauge")?;
    for map in &status.maps {
        writeln!(out, "wasmgate_map_capacity{{map=\"{}\"}} {}", map.setting, map.capacity)?;
    }
    for (metric, label, counters) in [
        ("forwarded", "path", &status.forwarded),
        ("dropped", "reason", &status.drops),
    ] {
        for (unit, value) in [
            ("packets", (|one| one.packets) as fn(&CounterView) -> u64),
            ("bytes", |one| one.bytes),
        ] {
            writeln!(out, "# TYPE wasmgate_{metric}_{unit}_total counter")?;
            for one in counters {
                writeln!(
                    out,
                    "wasmgate_{metric}_{unit}_total{{{label}=\"{}\"}} {}",
                    one.name,
                    value(one)
                )?;
            }
        }
    }
    writeln!(out, "# TYPE wasmgate_attachment_repairs_total counter")?;
    writeln!(out, "wasmgate_attachment_repairs_total {}", status.repairs)?;
    writeln!(out, "# TYPE wasmgate_generation gauge")?;
    writeln!(out, "wasmgate_generation {}", status.generation)?;
    writeln!(out, "# TYPE wasmgate_endpoints gauge")?;
    writeln!(out, "wasmgate_endpoints {}", status.endpoints)?;
    writeln!(out, "# TYPE wasmgate_in_step gauge")?;
    writeln!(out, "wasmgate_in_step {}", u8::from(status.out_of_step.is_none()))?;
    writeln!(out, "# TYPE wasmgate_store_answers gauge")?;
    writeln!(
        out,
        "wasmgate_store_answers {}",
        u8::from(status.store_problem.is_none())
    )?;
    writeln!(out, "# TYPE wasmgate_policy_module gauge")?;
    for record in &status.modules {
        writeln!(
            out,
            "wasmgate_policy_module{{name=\"{}\",tier=\"{}\",sha256=\"{}\"}} 1",
            escape(record.name()),
            record.placement.tier.name(),
            record.sha256
        )?;
    }
    Ok(())
}
