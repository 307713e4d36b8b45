//! Answers about policies, as text.

use super::{
    print::{module, policy_lines},
    table::Table,
};
use crate::api::{AuditView, EndView, Explanation, ModuleView, ModulesView, PolicyView, Verification};
use std::io::Write;

pub fn modules(out: &mut impl Write, all: &ModulesView) -> anyhow::Result<()> {
    let mut table = Table::new(["ASKED", "NAME", "TIER", "TENANT", "PRIORITY", "FILE", "SHA256", ""]);
    for (index, record) in all.modules.iter().enumerate() {
        let placement = &record.placement;
        table.row([
            (index + 1).to_string(),
            placement.name.clone(),
            placement.tier.name().to_owned(),
            placement.tenant.clone().unwrap_or("-".to_owned()),
            placement.priority.to_string(),
            record.file.clone(),
            record.sha256[..12.min(record.sha256.len())].to_owned(),
            if record.audit { "audited only" } else { "" }.to_owned(),
        ]);
    }
    table.print(out)?;
    if !all.earlier.is_empty() {
        writeln!(out, "\nin force since change {}; before that:\n", all.serial)?;
        let mut table = Table::new(["CHANGE", "WHAT", "MODULES"]);
        for one in &all.earlier {
            table.row([one.serial.to_string(), one.what.clone(), one.modules.join(", ")]);
        }
        table.print(out)?;
    }
    Ok(())
}

pub fn inspected(out: &mut impl Write, view: &ModuleView) -> anyhow::Result<()> {
    writeln!(out, "{}", module(&view.module))?;
    writeln!(out, "sha256      {}", view.module.sha256)?;
    let (fuel, milliseconds, memory) = view.limits;
    writeln!(
        out,
        "limits      fuel {fuel} a call, {milliseconds} ms a change, {} MiB of memory",
        memory >> 20
    )?;
    writeln!(out, "asked       {} calls, about {} peers", view.calls, view.peers)?;
    if let Some(failure) = &view.failure {
        writeln!(out, "FAILING     {failure}")?;
    }
    for (name, blocks) in &view.networks {
        writeln!(out, "network     {name}: {}", blocks.join(", "))?;
    }
    if !view.module.config.is_empty() {
        writeln!(out, "config      {}", view.module.config)?;
    }
    Ok(())
}

pub fn verified(out: &mut impl Write, result: &Verification) -> anyhow::Result<()> {
    for one in &result.broken {
        writeln!(out, "broken: {one}")?;
    }
    for one in &result.about_nobody {
        writeln!(out, "about nobody: `{one}`")?;
    }
    Ok(writeln!(
        out,
        "{} invariants over {} identities of pods, {} counterexamples",
        result.invariants,
        result.identities,
        result.broken.len()
    )?)
}

pub fn audit(out: &mut impl Write, findings: &[AuditView]) -> anyhow::Result<()> {
    let mut table = Table::new(["MODULE", "WOULD HAVE DENIED", "TO", "PORT", "FLOWS"]);
    for one in findings {
        table.row([
            one.module.clone(),
            one.from.clone(),
            one.to.clone(),
            format!("{}/{}", one.protocol, one.port),
            one.flows.to_string(),
        ]);
    }
    Ok(table.print(out)?)
}

const fn allowed(verdict: bool) -> &'static str {
    if verdict { "allowed" } else { "denied" }
}

pub fn explained(out: &mut impl Write, view: &Explanation) -> anyhow::Result<()> {
    let end = |end: &EndView| format!("{} = identity {} {}", end.name, end.identity, end.identity_name);
    writeln!(out, "from        {}", end(&view.from))?;
    writeln!(out, "to          {}", end(&view.to))?;
    if let (Some(protocol), Some(verdict)) = (&view.protocol, view.verdict) {
        let port = view.port.map_or(String::new(), |port| format!("/{port}"));
        writeln!(out, "{protocol}{port}: {}", allowed(verdict))?;
    }
    writeln!(out, "all ports   {}", view.allowed)?;
    for side in &view.sides {
        let verdict = side
            .verdict
            .map_or(side.ruling.clone(), |verdict| allowed(verdict).to_owned());
        writeln!(out, "\n{} of {}: {verdict}", side.side, side.subject)?;
        let mut table = Table::new(["", "MODULE", "TIER", "SEES", "AND", "SAYS", "BECAUSE"]);
        for step in &side.steps {
            let mark = match (step.decides, step.audit) {
                (true, _) => "->",
                (false, true) => "audit",
                (false, false) => "",
            };
            let tier = match &step.tenant {
                Some(tenant) => format!("{} of {tenant}", step.tier),
                None => step.tier.clone(),
            };
            table.row([
                mark.to_owned(),
                step.module.clone(),
                tier,
                step.subject.clone(),
                step.peer.clone(),
                step.action.clone(),
                step.reason.clone(),
            ]);
        }
        if !side.steps.is_empty() {
            table.print(out)?;
        }
        if side.last_word && side.verdict.is_some() {
            writeln!(
                out,
                "no module decides; the last word: a node reaches its own pods, all else is denied"
            )?;
        }
        match (&side.kernel, &side.node) {
            (Some(kernel), _) => {
                let ruling = if kernel.cell.starts_with("port set") {
                    format!(": {}", kernel.ruling)
                } else {
                    String::new()
                };
                writeln!(
                    out,
                    "kernel      {} [{}, {}] = cell {}: {}{ruling}",
                    kernel.map, kernel.row, kernel.column, kernel.index, kernel.cell
                )?;
            }
            (None, _) if side.here => writeln!(out, "kernel      no cell: nobody has the other end's identity")?,
            (None, Some(node)) => writeln!(out, "kernel      enforced on node {node}: ask there")?,
            (None, None) => writeln!(out, "kernel      no pod of this node has the identity")?,
        }
    }
    if view.protocol.is_none() {
        writeln!(
            out,
            "\nWith --protocol and --port this shows what each module says, and why."
        )?;
    }
    if !view.agrees {
        writeln!(out, "\nTHE KERNEL DOES NOT HAVE WHAT THE MODULES SAY: a defect")?;
    }
    Ok(())
}

pub fn policy(out: &mut impl Write, policy: &PolicyView) -> anyhow::Result<()> {
    policy_lines(out, &policy.modules)?;
    writeln!(out, "generation  {}", policy.generation)?;
    writeln!(
        out,
        "compiled    {} identities, {} of them here; {} cells, {} port sets",
        policy.identities, policy.local_identities, policy.cells, policy.port_sets
    )?;
    writeln!(out)?;
    let mut table = Table::new(["FROM", "TO", "VERDICT"]);
    for pair in &policy.pairs {
        table.row([pair.from.clone(), pair.to.clone(), pair.verdict.clone()]);
    }
    table.print(out)?;
    Ok(writeln!(out, "Everything else is denied.")?)
}
