//! Following the cluster: nodes come and go, pods of other nodes come and go, leases expire.

use super::{Daemon, DaemonError, Node, cleanup::forget, join};
use crate::{
    net,
    store::{
        Change, Collection, Expect, Key, StoreError,
        records::{
            self, AliveRecord, IdentityRecord, NamespaceRecord, NodeRecord, PodRecord, PolicyRecord, SeenRecord,
            ServiceRecord, TenantRecord,
        },
    },
};
use abi::{AddressKey, Identity};
use ipnet::IpNet;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant},
};
use tokio::task::block_in_place;

impl Daemon {
    /// Takes in a change of the store. What can't be taken in is reported, and tried again.
    pub(super) async fn follow(&mut self, change: Change) {
        let key = match &change {
            Change::Put(key, _) | Change::Delete(key) | Change::Missing(key) => key.clone(),
            Change::Synced => return,
            Change::Anew => return self.start_over().await,
        };
        // What comes later about the same key says more.
        let is_older = |missed: &Change| match missed {
            Change::Put(known, _) | Change::Delete(known) | Change::Missing(known) => *known == key,
            Change::Synced | Change::Anew => false,
        };
        self.missed.retain(|missed| !is_older(missed));
        if let Err(error) = self.try_follow(change.clone()).await {
            error.complain(&format!("{key}, tried again"));
            self.missed.push(change);
        }
    }

    /// A record was taken in. Where it is marked, all nodes have to see that before it may go; each collection has its own
    /// order.
    pub(super) fn note_mark(&mut self, key: &Key, retiring: bool, revision: u64) {
        let seen = match key.collection {
            Collection::Identities => &mut self.seen.identities,
            Collection::Tenants => &mut self.seen.tenants,
            _ => return,
        };
        if retiring {
            *seen = revision.max(*seen);
        }
    }

    async fn try_follow(&mut self, change: Change) -> Result<(), DaemonError> {
        let change = match change {
            Change::Missing(key) if self.enter_for_another(&key).await? => return Ok(()),
            Change::Missing(key) => Change::Delete(key),
            other => other,
        };
        match change {
            Change::Put(key, value) => match key.collection {
                Collection::Nodes => self.node_seen(records::decode(&key, &value.value)?)?,
                Collection::Addresses => {
                    let record = records::decode(&key, &value.value)?;
                    self.addresses_seen(&key.name, Some(record))?;
                }
                Collection::Alive => {
                    if let Some(node) = self.nodes.get_mut(&key.name) {
                        node.stale_since = None;
                    }
                    self.alive.insert(key.name);
                }
                Collection::Pods => self.pod_seen(records::decode(&key, &value.value)?).await?,
                Collection::Tenants => {
                    if let Ok(number) = key.name.parse() {
                        let tenant: TenantRecord = records::decode(&key, &value.value)?;
                        let retiring = tenant.retiring;
                        self.tenant_seen(number, tenant).await?;
                        self.note_mark(&key, retiring, value.revision);
                    }
                }
                Collection::Identities => {
                    if let Ok(number) = key.name.parse() {
                        let identity: IdentityRecord = records::decode(&key, &value.value)?;
                        let retiring = identity.retiring;
                        self.identity_seen(Identity(number), identity).await?;
                        self.note_mark(&key, retiring, value.revision);
                    }
                }
                Collection::Namespaces => {
                    let namespace: NamespaceRecord = records::decode(&key, &value.value)?;
                    self.namespace_seen(&key.name, namespace.labels).await?;
                }
                Collection::Services => self.service_seen(records::decode(&key, &value.value)?),
                Collection::Policy => {
                    let record: PolicyRecord = records::decode(&key, &value.value)?;
                    self.policy_seen(record, value.revision).await?;
                }
                Collection::Cluster | Collection::Seen | Collection::Modules | Collection::Answers => {}
            },
            Change::Delete(key) => match key.collection {
                Collection::Nodes if key.name == self.config.node => self.register().await?,
                Collection::Nodes => self.node_gone(&key.name)?,
                Collection::Addresses => self.addresses_seen(&key.name, None)?,
                Collection::Alive => self.lease_expired(&key.name).await?,
                Collection::Pods => self.pod_gone(&key).await?,
                Collection::Namespaces => self.namespace_seen(&key.name, BTreeMap::new()).await?,
                Collection::Services => self.service_gone(&key.name.replacen('_', "/", 1)),
                Collection::Tenants => {
                    if let Ok(number) = key.name.parse() {
                        self.tenant_gone(number).await?;
                    }
                }
                Collection::Identities => {
                    if let Ok(number) = key.name.parse() {
                        self.identity_gone(Identity(number)).await?;
                        self.audit.forget_rulings();
                    }
                }
                _ => {}
            },
            Change::Missing(_) | Change::Synced | Change::Anew => {}
        }
        Ok(())
    }

    /// Enters again what a store that was made anew has to know of a node that is not there to say so itself: it is away,
    /// and has the same time to come back as at any other time. False where its node is alive and does not know of it.
    async fn enter_for_another(&mut self, key: &Key) -> Result<bool, DaemonError> {
        let pod = match key.collection {
            Collection::Nodes | Collection::Addresses => None,
            Collection::Pods => {
                let address = key.name.parse::<IpAddr>().ok().map(AddressKey::from);
                let pod = address.and_then(|address| self.pods.get(&address));
                match pod {
                    Some(pod) => Some(pod.record.clone()),
                    None => return Ok(false),
                }
            }
            _ => return Ok(false),
        };
        let name = pod.as_ref().map_or(key.name.as_str(), |pod| &*pod.node);
        let Some(node) = self.nodes.get(name).map(|node| node.record.clone()) else {
            return Ok(false);
        };
        let alive = Key::new(Collection::Alive, name);
        if name == self.config.node || self.store.get(&alive).await?.is_some() {
            return Ok(false);
        }
        self.lease_expired(&node.name).await?;
        match (&pod, key.collection) {
            (Some(pod), _) => self.enter(key, pod).await?,
            (None, Collection::Addresses) => match self.addresses_of(name) {
                Some(addresses) => self.enter(key, &addresses).await?,
                None => return Ok(false),
            },
            (None, _) => self.enter(key, &node).await?,
        }
        Ok(true)
    }

    /// The store has forgotten, perhaps: it is told anew of this node and its pods, and what was seen of its revisions
    /// counts no longer.
    async fn start_over(&mut self) {
        self.seen = SeenRecord::default();
        self.told = None;
        self.renewed = None;
        let known = Some(self.modules.cluster);
        let rejoined = match join::agree(&*self.store, self.registry.layout(), known).await {
            Ok(cluster) => {
                self.modules.cluster = cluster;
                self.enter_all().await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = rejoined {
            error.complain("joining the cluster anew, tried again");
            self.missed.push(Change::Anew);
        }
    }

    /// First what numbers mean, then this node, then what is nobody's, which all nodes know.
    async fn enter_all(&mut self) -> Result<(), DaemonError> {
        for number in self.registry.tenant_numbers().collect::<Vec<_>>() {
            let name = self.registry.tenant(number).unwrap_or_default().to_owned();
            let tenant = TenantRecord { name, retiring: false };
            let is_it = |found: &TenantRecord| found.name == tenant.name || !self.registry.has_identities(number);
            self.enter_meaning(&Key::new(Collection::Tenants, number), &tenant, is_it)
                .await?;
        }
        for (identity, key) in self.registry.iter() {
            let record = IdentityRecord {
                key: key.clone(),
                retiring: false,
            };
            let is_it = |found: &IdentityRecord| found.key == record.key || !self.uses(identity);
            self.enter_meaning(&Key::new(Collection::Identities, identity.0), &record, is_it)
                .await?;
        }
        self.register().await?;
        for (name, labels) in &self.namespaces {
            let labels = labels.clone();
            let key = Key::new(Collection::Namespaces, name);
            self.enter(&key, &NamespaceRecord { labels }).await?;
        }
        for service in self.services.records() {
            self.enter(&ServiceRecord::key(&service.namespace, &service.name), service)
                .await?;
        }
        self.enter_policy().await
    }

    /// Enters what a number means. Where a backup says otherwise of one that packets carry now, it is wrong.
    async fn enter_meaning<T: Serialize + DeserializeOwned>(
        &self,
        key: &Key,
        record: &T,
        is_right: impl Fn(&T) -> bool,
    ) -> Result<(), DaemonError> {
        let found = match records::put(&*self.store, key, record, Expect::Absent).await {
            Err(StoreError::Conflict { found: Some(found), .. }) => found,
            Ok(_) | Err(StoreError::Conflict { .. }) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if is_right(&records::decode(key, &found.value)?) {
            return Ok(());
        }
        tracing::warn!("{key} means something else in the store than for this node's packets: setting it right");
        match records::put(&*self.store, key, record, Expect::Revision(found.revision)).await {
            Ok(_) | Err(StoreError::Conflict { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Enters a value, unless another node was faster.
    async fn enter<T: Serialize>(&self, key: &Key, value: &T) -> Result<(), DaemonError> {
        match records::put(&*self.store, key, value, Expect::Absent).await {
            Ok(_) | Err(StoreError::Conflict { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn node_seen(&mut self, record: NodeRecord) -> Result<(), DaemonError> {
        let (name, underlay) = (record.name.clone(), record.underlay);
        let known = self.nodes.get(&name).map(|node| node.stale_since);
        let stale_since = known.unwrap_or_else(|| (!self.alive.contains(&name)).then(Instant::now));
        self.nodes.insert(name.clone(), Node { record, stale_since });
        self.place_nodes()?;
        let its: Vec<AddressKey> = self.pods_of(&name);
        for address in its {
            self.place(&address)?;
        }
        // First closed to what is no pod's, then routed.
        self.place_networks()?;
        if self.is_a_services(underlay) {
            self.place_services();
        }
        self.route_to_nodes()
    }

    /// The node's own way to the pods of other nodes.
    pub(super) fn route_to_nodes(&mut self) -> Result<(), DaemonError> {
        let wanted = self.tunnel_routes();
        let known = std::mem::take(&mut self.watch.routes);
        let set = block_in_place(|| net::set_tunnel_routes(&wanted, &known, self.config.underlay));
        self.watch.routes = if set.is_ok() { wanted } else { known };
        Ok(set?)
    }

    /// CIDRs of the other nodes' pods, each with the way there; of a family of which this node has an address.
    pub(super) fn tunnel_routes(&self) -> BTreeMap<IpNet, net::Tunnel> {
        let (underlay, second) = (self.config.underlay, self.second_source());
        let others = self.nodes.values().filter(|node| node.record.name != self.config.node);
        let cidrs = others.flat_map(|node| node.record.pod_cidrs.iter().map(|cidr| (*cidr, node.record.underlay)));
        cidrs
            .filter(|(_, node)| node.is_ipv4() == underlay.is_ipv4())
            .filter_map(|(cidr, node)| {
                let is_underlays = cidr.addr().is_ipv4() == underlay.is_ipv4();
                let source = if is_underlays { underlay } else { second? };
                Some((cidr.trunc(), net::Tunnel { node, source }))
            })
            .collect()
    }

    fn pods_of(&self, node: &str) -> Vec<AddressKey> {
        let its = self.pods.iter().filter(|(_, pod)| pod.record.is_on(node));
        its.map(|(address, _)| *address).collect()
    }

    fn node_gone(&mut self, name: &str) -> Result<(), DaemonError> {
        if let Some(node) = self.nodes.remove(name) {
            self.place_nodes()?;
            if self.is_a_services(node.record.underlay) {
                self.place_services();
            }
        }
        // Pods that the store still knows: they are nowhere now.
        for address in self.pods_of(name) {
            self.place(&address)?;
        }
        self.route_to_nodes()?;
        self.place_networks()
    }

    async fn lease_expired(&mut self, name: &str) -> Result<(), DaemonError> {
        self.alive.remove(name);
        if name == self.config.node {
            // Somebody's clock ran ahead, or this node slept. It is alive.
            self.renewed = None;
            return self.renew().await;
        }
        if let Some(node) = self.nodes.get_mut(name).filter(|node| node.stale_since.is_none()) {
            tracing::warn!("node {name} is stale: its lease has expired. Its pods stay reachable");
            node.stale_since = Some(Instant::now());
        }
        Ok(())
    }

    pub(super) async fn pod_seen(&mut self, record: PodRecord) -> Result<(), DaemonError> {
        if record.is_on(&self.config.node) {
            return self.own_words(&record).await;
        }
        for address in record.addresses() {
            if let Some((_, known)) = self.pods.find(&address.into())
                && known.record.is_on(&self.config.node)
            {
                return Err(DaemonError::Request(format!(
                    "node {} says that {address} is {}'s, but it is {}'s here",
                    record.node,
                    record.full_name(),
                    known.record.full_name()
                )));
            }
        }
        let addresses = record.addresses();
        let taken = self.upsert_pod(record).await;
        if taken.is_err() {
            // What it was is no longer true, and what it is can't be told: nothing passes until it can.
            for address in addresses {
                self.datapath.remove(&address.into())?;
            }
        }
        taken
    }

    /// Tells the cluster of this node and its pods: at a start, and when somebody has removed it while it was away.
    pub(super) async fn register(&mut self) -> Result<(), DaemonError> {
        let record = NodeRecord {
            name: self.config.node.clone(),
            underlay: self.config.underlay,
            pod_cidrs: self.config.pod_cidrs.clone(),
        };
        // First the lease: a node without one is stale, also one that has died just here.
        self.renew().await?;
        let key = Key::new(Collection::Nodes, &record.name);
        records::put(&*self.store, &key, &record, Expect::Any).await?;
        self.tell_addresses_again();
        self.follow_own_addresses().await?;
        self.announce().await
    }

    async fn pod_gone(&mut self, key: &Key) -> Result<(), DaemonError> {
        let Ok(address) = key.name.parse::<IpAddr>() else {
            return Ok(());
        };
        let address = AddressKey::from(address);
        let remote = self
            .pods
            .get(&address)
            .is_some_and(|pod| !pod.record.is_on(&self.config.node));
        if remote {
            self.remove_pod(&address)
        } else {
            self.publish_again(address.ip()).await
        }
    }

    /// Renews this node's lease, and says what this node has seen.
    pub(super) async fn renew(&mut self) -> Result<(), DaemonError> {
        // What could not be taken in was not seen, and nothing after it counts.
        let seen = if self.missed.is_empty() {
            self.seen
        } else {
            self.told.unwrap_or_default()
        };
        if self.told != Some(seen) {
            let key = Key::new(Collection::Seen, &self.config.node);
            records::put(&*self.store, &key, &seen, Expect::Any).await?;
            self.told = Some(seen);
        }
        let ttl = self.config.lease.ttl();
        if self.renewed.is_some_and(|renewed| renewed.elapsed() < ttl / 3) {
            return Ok(());
        }
        let key = Key::new(Collection::Alive, &self.config.node);
        if self.renewed.is_none() || !self.store.keep(&key).await? {
            let value = records::encode(&key, &AliveRecord)?;
            self.store.put_leased(&key, value, ttl).await?;
        }
        self.renewed = Some(Instant::now());
        Ok(())
    }

    /// What is due from time to time.
    pub(super) async fn tick(&mut self) {
        if let Err(error) = self.renew().await {
            error.complain("renewing the lease");
        }
        if let Err(error) = self.withdraw().await {
            error.complain("taking back records of pods that are gone");
        }
        self.end_queued().await;
        if self.store.problem().is_some() {
            // Nobody could renew anything: all have their time to do so when it is back.
            let stale = self.nodes.values_mut().filter_map(|node| node.stale_since.as_mut());
            stale.for_each(|since| *since = Instant::now());
        }
        let grace = Duration::from_secs(self.config.lease.grace_seconds);
        let gone: Vec<String> = self
            .nodes
            .iter()
            .filter(|(_, node)| {
                node.stale_since
                    .is_some_and(|since| !grace.is_zero() && since.elapsed() > grace)
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            match self.forget_node(&name).await {
                Ok(true) => {
                    let grace = grace.as_secs();
                    tracing::warn!("node {name} was stale for {grace} s: it is removed, with its pods");
                }
                Ok(false) => {}
                Err(error) => error.complain(&format!("removing node {name}")),
            }
        }
        self.watch_attachment();
        if let Err(error) = self.watch_addresses().await {
            error.complain("following this node's addresses");
        }
        if let Err(error) = block_in_place(|| self.datapath.collect_flows()) {
            tracing::warn!("collecting flows: {error}");
        }
        self.finish_abandoned_load().await;
        if let Err(error) = self.collect().await {
            error.complain("collecting identities");
        }
        self.make_up().await;
        for change in std::mem::take(&mut self.missed) {
            self.follow(change).await;
        }
    }

    /// Removes a node that is gone, with its pods; false where there is none.
    pub(super) async fn node_delete(&mut self, name: &str) -> Result<bool, DaemonError> {
        let Some(node) = self.nodes.get(name) else {
            return Ok(false);
        };
        let is_alive = || {
            DaemonError::Request(format!(
                "node {name} is alive: stop its hostd first, and wait until its lease has expired"
            ))
        };
        if node.stale_since.is_none() || !self.forget_node(name).await? {
            return Err(is_alive());
        }
        Ok(true)
    }

    /// The store tells the other nodes, and this one. False where it is alive, of which this one may not have heard yet.
    async fn forget_node(&mut self, name: &str) -> Result<bool, DaemonError> {
        if self.store.has(&Key::new(Collection::Alive, name)).await? {
            if let Some(node) = self.nodes.get_mut(name) {
                node.stale_since = None;
            }
            return Ok(false);
        }
        forget(&*self.store, name).await?;
        Ok(true)
    }
}
