//! Joining the cluster: what all nodes must agree on, and what no two may have.

use super::DaemonError;
use crate::{
    identity::Layout,
    store::{
        Collection, Expect, Key, Store, StoreError,
        records::{self, CLUSTER, ClusterRecord, NodeRecord, ServiceRecord},
    },
};

/// The first node of a cluster fixes what all must agree on; one that knows which cluster it is says so to a store that has forgotten.
/// The answer is which it is.
pub async fn agree(store: &dyn Store, layout: Layout, known: Option<u64>) -> Result<u64, DaemonError> {
    let key = Key::new(Collection::Cluster, CLUSTER);
    let no_number = |error| DaemonError::Request(format!("the kernel gives no random number: {error}"));
    let mut record = ClusterRecord::new(layout).map_err(no_number)?;
    record.cluster = known.unwrap_or(record.cluster);
    let found: ClusterRecord = match records::put(store, &key, &record, Expect::Absent).await {
        Ok(_) => return Ok(record.cluster),
        Err(StoreError::Conflict { found: Some(found), .. }) => records::decode(&key, &found.value)?,
        Err(error) => return Err(error.into()),
    };
    if found.layout == layout {
        return Ok(found.cluster);
    }
    Err(DaemonError::Request(format!(
        "`vni.tenant_bits` is {} here but {} in this cluster: make them the same",
        layout.tenant_bits, found.layout.tenant_bits
    )))
}

/// No two nodes may have a name, an underlay address or pod addresses in common, nor a pod CIDR contain what is others'.
pub async fn check_against_others(store: &dyn Store, record: &NodeRecord) -> anyhow::Result<()> {
    for (key, value) in store.list(Collection::Services).await? {
        let service: ServiceRecord = records::decode(&key, &value.value)?;
        anyhow::ensure!(
            !service.addresses.contains(&record.underlay),
            "the underlay address {} is the address of service {}",
            record.underlay,
            service.full_name()
        );
        for ours in &record.pod_cidrs {
            if let Some(address) = service.addresses.iter().find(|address| ours.contains(*address)) {
                anyhow::bail!(
                    "pod CIDR {ours} contains {address}, the address of service {}",
                    service.full_name()
                );
            }
        }
    }
    for (key, value) in store.list(Collection::Nodes).await? {
        let other: NodeRecord = records::decode(&key, &value.value)?;
        if other.name == record.name {
            anyhow::ensure!(
                other.underlay == record.underlay
                    || store.get(&Key::new(Collection::Alive, &other.name)).await?.is_none(),
                "another node named {} is alive at {}: names are unique",
                other.name,
                other.underlay
            );
            continue;
        }
        anyhow::ensure!(
            other.underlay.is_ipv4() == record.underlay.is_ipv4(),
            "node {} has the underlay address {}: all nodes of a cluster have theirs in one family",
            other.name,
            other.underlay
        );
        anyhow::ensure!(
            other.underlay != record.underlay,
            "node {} has the underlay address {} already",
            other.name,
            other.underlay
        );
        for ours in &record.pod_cidrs {
            anyhow::ensure!(
                !ours.contains(&other.underlay),
                "pod CIDR {ours} contains the underlay address {} of node {}",
                other.underlay,
                other.name
            );
            for theirs in &other.pod_cidrs {
                anyhow::ensure!(
                    !ours.contains(&theirs.network()) && !theirs.contains(&ours.network()),
                    "pod CIDR {ours} overlaps {theirs} of node {}",
                    other.name
                );
            }
        }
    }
    Ok(())
}
