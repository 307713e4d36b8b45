//! The set of modules that a change of policy asks for.

use super::DaemonError;
use crate::{
    api::{self, LoadModule},
    stack::order,
    store::records::{ModuleRecord, PolicyRecord, Revision},
    wasm::{Placement, Tier},
};
use std::{collections::BTreeMap, sync::Arc};

/// Priority of a module that was given none.
const DEFAULT_PRIORITY: u32 = 500;

/// The set of modules that a change asks for. Those that it brings along are `given` by their SHA-256.
pub fn wanted(
    last: Option<&PolicyRecord>,
    change: api::Change,
    given: &mut BTreeMap<String, Arc<Vec<u8>>>,
) -> Result<Revision, DaemonError> {
    let wrong = |problem: String| Err(DaemonError::Request(problem));
    let in_force = last.map_or_else(Revision::none, |record| record.in_force().clone());
    let mut modules = in_force.modules.clone();
    let mut origin = None;
    let what = match change {
        api::Change::Load(load) => {
            let what = format!("load {}", load.name);
            let before = modules.iter().position(|module| module.name() == load.name);
            let record = loaded(*load, before.map(|index| &modules[index]), given).map_err(DaemonError::Request)?;
            match before {
                Some(index) => modules[index] = record,
                None => modules.push(record),
            }
            what
        }
        api::Change::Unload(name) => {
            let Some(index) = modules.iter().position(|module| module.name() == name) else {
                return wrong(format!(
                    "no module is named {name:?}: `hostd policy list` shows those that are loaded"
                ));
            };
            modules.remove(index);
            format!("unload {name}")
        }
        api::Change::Rollback(serial) => {
            // The last that was in force, whatever has happened to a change that came to nothing.
            let earlier = last
                .into_iter()
                .flat_map(|record| [&record.previous].into_iter().chain(&record.history))
                .filter(|revision| revision.serial != in_force.serial && revision.serial != 0);
            let found = match serial {
                // A rollback stands for what it went back to: the next one goes back further.
                None => earlier
                    .filter(|revision| revision.origin < in_force.origin)
                    .max_by_key(|revision| (revision.origin, revision.serial)),
                Some(serial) => earlier.into_iter().find(|revision| revision.serial == serial),
            };
            let Some(revision) = found else {
                return wrong(match serial {
                    None => "there is no earlier policy to go back to".to_owned(),
                    Some(serial) => format!("there is no policy of change {serial}: `hostd policy list` shows them"),
                });
            };
            modules.clone_from(&revision.modules);
            origin = Some(revision.origin);
            format!("rollback to change {}", revision.serial)
        }
    };
    modules.sort_by(|one, other| order(one).cmp(&order(other)));
    Ok(Revision {
        serial: 0,
        origin: origin.unwrap_or(0),
        what,
        time_ms: 0,
        modules,
    })
}

/// The record of a module that is to be loaded, perhaps over one of the same name: what is not given stays as it was.
fn loaded(
    load: LoadModule,
    before: Option<&ModuleRecord>,
    given: &mut BTreeMap<String, Arc<Vec<u8>>>,
) -> Result<ModuleRecord, String> {
    crate::endpoint::check_name(&load.name).map_err(|problem| format!("--name {problem}"))?;
    let known = before.map(|record| &record.placement);
    if let Some(known) = known {
        let other_tier = load.tier.is_some_and(|tier| tier != known.tier);
        let other_tenant = load.tenant.is_some() && load.tenant != known.tenant;
        if other_tier || other_tenant {
            let of = known
                .tenant
                .as_ref()
                .map_or(String::new(), |tenant| format!(" of tenant {tenant}"));
            return Err(format!(
                "the name {} is taken by a module in tier {}{of}: choose another --name, or unload that one first",
                load.name,
                known.tier.name()
            ));
        }
    }
    let placement = Placement {
        tier: load.tier.or(known.map(|known| known.tier)).unwrap_or_default(),
        priority: load
            .priority
            .or(known.map(|known| known.priority))
            .unwrap_or(DEFAULT_PRIORITY),
        tenant: load.tenant.or_else(|| known.and_then(|known| known.tenant.clone())),
        name: load.name,
    };
    if placement.tenant.is_some() && placement.tier != Tier::Tenant {
        return Err(format!(
            "--tenant goes with the tier `tenant`: in tier `{}` a module decides about everybody",
            placement.tier.name()
        ));
    }
    // Another version of the same module; another module has no use for the configuration of the one that it replaces.
    let same = before.filter(|known| known.file == load.file);
    let sha256 = crate::wasm::sha256(&load.module);
    given.insert(sha256.clone(), Arc::new(load.module));
    Ok(ModuleRecord {
        placement,
        file: load.file,
        audit: load.audit.or(before.map(|known| known.audit)).unwrap_or(false),
        overrides: load.overrides.or(same.map(|known| known.overrides)).unwrap_or_default(),
        sha256,
        config: load
            .config
            .or(same.map(|known| known.config.clone()))
            .unwrap_or_default(),
    })
}
