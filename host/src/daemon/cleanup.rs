//! Taking away all that hostd has made on a node.

use super::start::lock;
use crate::{
    api::remove_socket,
    attachment::Queue,
    config::Config,
    datapath,
    net::{self, VXLAN_DEVICE},
    store::{
        self, Collection, Expect, Key, Store, StoreError,
        records::{self, PodRecord},
    },
};
use anyhow::{Context, bail, ensure};
use std::{
    fmt::Display,
    fs, io,
    path::Path,
    time::{Duration, Instant},
};

/// What a node keeps across restarts, in its state folder. Others may keep theirs there, too.
const STATE: [&str; 6] = [
    "endpoints",
    "endpoints.damaged",
    "policy",
    "modules",
    "compiled",
    "lock",
];

/// hostd stops within this time, once it has said so.
const STOPPING: Duration = Duration::from_secs(30);

/// Waits until no hostd uses a state folder any more.
///
/// # Errors
///
/// Where one goes on.
pub async fn until_stopped(state_dir: &Path) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        match lock(state_dir) {
            Ok(_) => return Ok(()),
            Err(error) if began.elapsed() > STOPPING => return Err(error.context("hostd does not stop")),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// In another network namespace nothing of hostd's would be found, but pods would lose their guard.
///
/// # Errors
///
/// Where this is not the node's, by all that can be seen.
pub fn check_here(config: &Config) -> anyhow::Result<()> {
    if let Err(error) = net::underlay(config.underlay)
        && net::ifindex(VXLAN_DEVICE).is_err()
    {
        bail!(
            "{error}, and there is no interface {VXLAN_DEVICE}: is this the node's network namespace? If it is, and the node's address \
             has changed, set `underlay` to the one it has. Nothing is changed"
        );
    }
    Ok(())
}

/// Takes away all that hostd has made on this node: pods' interfaces, the vxlan device, rules, routes, pins, records, files.
///
/// # Errors
///
/// Where something can't be removed; everything else is.
pub async fn cleanup(config: &Config) -> anyhow::Result<()> {
    check_here(config)?;
    let lock = lock(&config.state_dir).context("stop hostd first")?;
    let mut problems = Vec::new();
    // By their names, and not by a file that may be lost.
    match net::pod_links() {
        Ok(links) => {
            for link in links {
                note(&mut problems, net::delete_link(&link));
            }
        }
        failed => note(&mut problems, failed.map(|_| ())),
    }
    note(&mut problems, net::remove_table());
    note(&mut problems, net::delete_link(VXLAN_DEVICE));
    for cidr in &config.pod_cidrs {
        note(&mut problems, net::make_reachable(*cidr));
    }
    if let Ok(underlay) = net::underlay(config.underlay) {
        note(&mut problems, datapath::detach_node_ports(&underlay.name));
    }
    note(&mut problems, datapath::cleanup(&config.bpffs));
    if let Some(folder) = store::missing(&config.store) {
        problems.push(format!("there is no store in {}: is it mounted?", folder.display()));
    } else {
        let forgotten = match store::open(&config.store, &config.etcd) {
            Ok(store) => forget(&*store, &config.node).await,
            Err(error) => Err(error),
        };
        note(&mut problems, forgotten);
    }
    note(&mut problems, Queue::beside(&config.socket).clear());
    let removed = remove_socket(&config.socket).map_err(|error| format!("{}: {error}", config.socket.display()));
    note(&mut problems, removed);
    if let Some(folder) = config.socket.parent() {
        // Unless something else is in it.
        let _ = fs::remove_dir(folder);
    }
    for name in STATE {
        let path = config.state_dir.join(name);
        let removed = remove(&path);
        note(
            &mut problems,
            removed.map_err(|error| format!("{}: {error}", path.display())),
        );
    }
    drop(lock);
    // Unless something else is in it.
    let _ = fs::remove_dir(&config.state_dir);
    ensure!(
        problems.is_empty(),
        "not everything could be removed: {}; what is left is removed when this is run again",
        problems.join("; ")
    );
    Ok(())
}

fn note<E: Display>(problems: &mut Vec<String>, result: Result<(), E>) {
    problems.extend(result.err().map(|error| error.to_string()));
}

/// Makes the cluster forget a node with its pods.
pub(super) async fn forget(store: &dyn Store, node: &str) -> Result<(), StoreError> {
    for (key, value) in store.list(Collection::Pods).await? {
        let pod: PodRecord = records::decode(&key, &value.value)?;
        if pod.is_on(node) {
            match store.delete(&key, Expect::Revision(value.revision)).await {
                // Changed meanwhile: somebody else has the address now.
                Ok(()) | Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }
    for collection in [
        Collection::Alive,
        Collection::Seen,
        Collection::Addresses,
        Collection::Nodes,
    ] {
        store.delete(&Key::new(collection, node), Expect::Any).await?;
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    let removed = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
