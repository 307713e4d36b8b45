//! Pods of this node: connected, disconnected, relabelled.

use super::{Daemon, DaemonError, Local, policy::NAMESPACE_NAME};
use crate::{
    api::{EndpointAdd, EndpointLabel, EndpointView, NamespaceLabel, NamespaceView, PodName},
    attachment::Attachment,
    endpoint::{self, LocalEndpoint},
    net::{self, Netns, PairNames},
    random,
    store::{
        Collection, Expect, Key, StoreError,
        records::{self, NamespaceRecord, PodRecord},
    },
};
use abi::{AddressKey, Hook};
use std::{net::IpAddr, sync::Arc, time::Instant};
use tokio::task::block_in_place;

fn pod_key(address: IpAddr) -> Key {
    Key::new(Collection::Pods, address)
}

/// A number that no other pod has had, as good as.
fn incarnation() -> Result<u32, DaemonError> {
    let failed = |error| DaemonError::Request(format!("the kernel gives no random number: {error}"));
    // 0 is the node itself.
    Ok(u32::from_ne_bytes(random::bytes().map_err(failed)?).max(1))
}

impl Daemon {
    /// Connects a pod; traffic can flow when this returns. On an error nothing is left.
    pub(super) async fn endpoint_add(&mut self, request: EndpointAdd) -> Result<EndpointView, DaemonError> {
        let EndpointAdd {
            pod,
            netns,
            labels,
            service_account,
            ports,
            addresses,
            attachment,
        } = request;
        if self.drained.is_some() {
            return Err(DaemonError::Draining);
        }
        let wrong = DaemonError::Request;
        if let Some(attachment) = &attachment {
            endpoint::check_interface(&attachment.interface).map_err(wrong)?;
        }
        endpoint::check_name(&pod.namespace).map_err(|problem| wrong(format!("namespace {problem}")))?;
        endpoint::check_name(&pod.name).map_err(|problem| wrong(format!("pod {problem}")))?;
        endpoint::check_labels(&labels).map_err(wrong)?;
        endpoint::check_ports(&ports).map_err(wrong)?;
        if !service_account.is_empty() {
            endpoint::check_name(&service_account).map_err(|problem| wrong(format!("service account {problem}")))?;
        }
        let most = self.config.maps.endpoints;
        if self.locals.len() >= most as usize {
            return Err(DaemonError::Full(most));
        }
        self.check_unknown(&pod).await?;
        let netns = Netns::open(&netns)?;
        let (address, second) = endpoint::choose_addresses(&self.config.pod_cidrs, &addresses, |address| {
            if self.addresses.is_own(address) {
                return Some("this node".to_owned());
            }
            let owner = self.pods.find(&address.into());
            owner.map(|(_, pod)| pod.record.full_name())
        })?;
        let endpoint = LocalEndpoint {
            interface: endpoint::interface_name(&pod.namespace, &pod.name),
            netns: netns.path().to_owned(),
            attachment,
            pod: PodRecord {
                namespace: pod.namespace.clone(),
                name: pod.name.clone(),
                labels: Arc::new(labels),
                service_account: service_account.into(),
                ports,
                address,
                second,
                node: self.config.node.as_str().into(),
                incarnation: incarnation()?,
            },
        };
        let connected = self.connect(&pod, endpoint, &netns).await;
        if connected.is_err()
            && let Err(error) = self.disconnect(&pod).await
        {
            tracing::error!("undoing what was done for {pod}: {error}");
        }
        connected?;
        let and = second.map_or(String::new(), |second| format!(" and {second}"));
        tracing::info!("connected {pod} at {address}{and}");
        self.endpoint_view(&pod)
    }

    /// There must be no such pod in the cluster. What this node has not yet heard of another one, the store knows.
    async fn check_unknown(&mut self, pod: &PodName) -> Result<(), DaemonError> {
        let Some((address, known)) = self.pods.named(&pod.namespace, &pod.name) else {
            return Ok(());
        };
        let node = known.record.node.clone();
        if *node != *self.config.node && self.store.get(&pod_key(address.ip())).await?.is_none() {
            return self.remove_pod(&address);
        }
        Err(DaemonError::Request(format!(
            "pod {pod} exists already, on node {node}"
        )))
    }

    async fn connect(&mut self, pod: &PodName, endpoint: LocalEndpoint, netns: &Netns) -> Result<(), DaemonError> {
        let (name, pod_interface) = (endpoint.interface.clone(), endpoint.pod_interface().to_owned());
        let alias = Attachment::alias(&endpoint.pod.full_name(), endpoint.attachment.as_ref());
        let record = endpoint.pod.clone();
        let addresses: Vec<IpAddr> = record.addresses().collect();
        let mtu = self.pod_mtu;
        let names = PairNames {
            node: &name,
            alias: &alias,
            pod: &pod_interface,
        };
        self.watch.moved = Instant::now();
        let veth = block_in_place(|| net::make_pod_link(names, netns, &addresses, mtu))?;
        self.locals.insert(pod.clone(), Local { endpoint, veth });
        self.datapath.set_pods(self.locals.len())?;
        self.services.withheld.insert(record.full_name());
        self.upsert_pod(record.clone()).await?;
        self.datapath.attach_pod(Hook::FromPod, &name)?;
        self.datapath.attach_pod(Hook::ToPod, &name)?;
        let underlay = self.config.underlay;
        block_in_place(|| net::prepare_node(&name, &veth, &addresses, underlay, mtu))?;
        self.services.withheld.remove(&record.full_name());
        self.services_follow(&record);
        self.publish(&record).await?;
        self.save()
    }

    /// Tells the cluster of a pod. A record that this node has left behind at the address is replaced.
    async fn publish(&mut self, record: &PodRecord) -> Result<(), DaemonError> {
        let key = pod_key(record.address);
        match records::put(&*self.store, &key, record, Expect::Absent).await {
            Err(StoreError::Conflict {
                key,
                found: Some(found),
            }) => {
                let left: PodRecord = records::decode(&key, &found.value)?;
                if !left.is_on(&self.config.node) {
                    return Err(StoreError::Conflict {
                        key,
                        found: Some(found),
                    }
                    .into());
                }
                records::put(&*self.store, &key, record, Expect::Revision(found.revision)).await?;
            }
            published => {
                published?;
            }
        }
        self.withdrawn.remove(&record.address);
        Ok(())
    }

    fn save(&self) -> Result<(), DaemonError> {
        Ok(block_in_place(|| {
            self.file.save(self.locals.values().map(|local| &local.endpoint))
        })?)
    }

    /// Takes away everything of a pod of this node, as far as it is there: attachment, endpoint, ipcache, policy. The store is
    /// told when it answers.
    pub(super) async fn disconnect(&mut self, pod: &PodName) -> Result<(), DaemonError> {
        let interface = endpoint::interface_name(&pod.namespace, &pod.name);
        let mut problems: Vec<DaemonError> = Vec::new();
        let mut note = |result: Result<(), DaemonError>| problems.extend(result.err());
        // A pod whose namespace was occupied has no link of ours.
        if let Some(local) = self.locals.get(pod) {
            let record = local.endpoint.pod.clone();
            self.services.withheld.insert(pod.to_string());
            self.services_follow(&record);
            self.watch.forget(&interface);
            if let Err(error) = block_in_place(|| net::delete_link(&interface)) {
                // What can still send must stay guarded, and known, so that it can be tried again.
                self.services.withheld.remove(&pod.to_string());
                self.services_follow(&record);
                return Err(error.into());
            }
            self.withdrawn.insert(record.address);
            note(self.datapath.detach(&interface).map_err(DaemonError::from));
            note(self.remove_pod(&AddressKey::from(record.address)));
            self.locals.remove(pod);
            self.services.withheld.remove(&pod.to_string());
            note(self.datapath.set_pods(self.locals.len()).map_err(DaemonError::from));
        }
        if let Err(error) = self.withdraw().await {
            error.complain(&format!("taking back the record of {pod}, tried again"));
        }
        note(self.save());
        match problems.into_iter().next() {
            Some(problem) => Err(problem),
            None => Ok(()),
        }
    }

    /// Takes back what the cluster was told of pods that are gone.
    pub(super) async fn withdraw(&mut self) -> Result<(), DaemonError> {
        while let Some(&address) = self.withdrawn.first() {
            let found = records::get::<PodRecord>(&*self.store, &pod_key(address)).await?;
            if let Some((record, revision)) = found
                && record.is_on(&self.config.node)
                && !self.has_incarnation(record.incarnation)
            {
                match self.store.delete(&pod_key(address), Expect::Revision(revision)).await {
                    // Changed meanwhile: it is looked at again.
                    Err(StoreError::Conflict { .. }) => continue,
                    deleted => deleted?,
                }
            }
            self.withdrawn.remove(&address);
        }
        Ok(())
    }

    /// The store speaks of a pod of this node. One that is not here was entered by a request whose answer never came, or
    /// could not be taken back.
    pub(super) async fn own_words(&mut self, record: &PodRecord) -> Result<(), DaemonError> {
        let its = |local: &&Local| local.endpoint.pod.incarnation == record.incarnation;
        if let Some(local) = self.locals.values().find(its) {
            let known = local.endpoint.pod.clone();
            // Its labels were changed by a request whose answer never came, and which was undone here.
            return if known == *record {
                Ok(())
            } else {
                self.publish(&known).await
            };
        }
        self.withdrawn.insert(record.address);
        self.withdraw().await
    }

    fn has_incarnation(&self, incarnation: u32) -> bool {
        self.locals
            .values()
            .any(|local| local.endpoint.pod.incarnation == incarnation)
    }

    /// The store has forgotten a pod of this node that is here.
    pub(super) async fn publish_again(&mut self, address: IpAddr) -> Result<(), DaemonError> {
        let its = |local: &&Local| local.endpoint.pod.address == address;
        let Some(record) = self.locals.values().find(its).map(|local| local.endpoint.pod.clone()) else {
            return Ok(());
        };
        self.publish(&record).await
    }

    /// Disconnects a pod; false where there is none.
    pub(super) async fn endpoint_delete(&mut self, pod: &PodName) -> Result<bool, DaemonError> {
        if !self.locals.contains_key(pod) {
            return match self.pods.named(&pod.namespace, &pod.name) {
                Some((_, known)) => Err(DaemonError::Request(format!(
                    "pod {pod} is on node {}: delete it there",
                    known.record.node
                ))),
                None => Ok(false),
            };
        }
        self.disconnect(pod).await?;
        tracing::info!("disconnected {pod}");
        Ok(true)
    }

    /// Disconnects all pods, and takes no more; their names.
    pub(super) async fn drain(&mut self) -> Result<Vec<PodName>, DaemonError> {
        self.drained = Some(Instant::now());
        let pods: Vec<PodName> = self.locals.keys().cloned().collect();
        let mut problem = None;
        for pod in &pods {
            // The others all the same.
            problem = self.disconnect(pod).await.err().or(problem);
        }
        problem.map_or(Ok(pods), Err)
    }

    /// Changes a pod's labels, and with them its identity.
    pub(super) async fn endpoint_label(&mut self, request: EndpointLabel) -> Result<EndpointView, DaemonError> {
        let EndpointLabel { pod, set, remove } = request;
        let local = self
            .locals
            .get(&pod)
            .ok_or_else(|| DaemonError::Request(format!("there is no pod {pod} on this node")))?;
        let before = local.endpoint.pod.clone();
        let mut record = before.clone();
        let labels = Arc::make_mut(&mut record.labels);
        for key in remove {
            if labels.remove(&key).is_none() {
                return Err(DaemonError::Request(format!("pod {pod} has no label {key}")));
            }
        }
        labels.extend(set);
        endpoint::check_labels(&record.labels).map_err(DaemonError::Request)?;
        if record.labels != before.labels {
            self.upsert_pod(record.clone()).await?;
            let stored = records::put(&*self.store, &pod_key(record.address), &record, Expect::Any).await;
            if let Err(error) = stored {
                // Other nodes know the old labels: so does this one again.
                self.upsert_pod(before).await?;
                return Err(error.into());
            }
            if let Some(local) = self.locals.get_mut(&pod) {
                local.endpoint.pod = record;
            }
            self.save()?;
        }
        self.endpoint_view(&pod)
    }

    /// Changes a namespace's labels, and with them the identities of its pods.
    pub(super) async fn namespace_label(&mut self, request: NamespaceLabel) -> Result<NamespaceView, DaemonError> {
        let NamespaceLabel { namespace, set, remove } = request;
        endpoint::check_name(&namespace).map_err(|problem| DaemonError::Request(format!("namespace {problem}")))?;
        let key = Key::new(Collection::Namespaces, &namespace);
        let found = records::get::<NamespaceRecord>(&*self.store, &key).await?;
        let (mut record, expect) = match found {
            Some((record, revision)) => (record, Expect::Revision(revision)),
            None => (NamespaceRecord::default(), Expect::Absent),
        };
        for label in remove {
            if record.labels.remove(&label).is_none() {
                return Err(DaemonError::Request(format!(
                    "namespace {namespace} has no label {label}"
                )));
            }
        }
        record.labels.extend(set);
        endpoint::check_labels(&record.labels).map_err(DaemonError::Request)?;
        let other = record.labels.get(NAMESPACE_NAME).filter(|name| **name != namespace);
        if let Some(other) = other {
            return Err(DaemonError::Request(format!(
                "namespace {namespace} can't be labelled {NAMESPACE_NAME}={other}: that label is its own name"
            )));
        }
        // First here: what the policy refuses, the cluster does not hear of.
        let before = self.namespaces.get(&namespace).cloned().unwrap_or_default();
        let result = match self.try_namespace(&namespace, record.labels.clone()).await {
            Ok(()) => records::put(&*self.store, &key, &record, expect)
                .await
                .map(|_| ())
                .map_err(DaemonError::from),
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            self.namespace_seen(&namespace, before).await?;
            return Err(error);
        }
        self.namespace_list()
            .into_iter()
            .find(|view| view.namespace == namespace)
            .ok_or_else(|| DaemonError::Request(format!("namespace {namespace} is gone again")))
    }
}
