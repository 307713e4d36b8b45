//! Nodes and pods that exist in the cluster's etcd only.

use anyhow::Context;
use futures::{StreamExt, TryStreamExt, stream};
use harness::{Cluster, in_netns};
use hostd::store::{
    Change, Collection, EtcdConfig, EtcdStore, Expect, Key, Store,
    records::{self, AliveRecord, NodeRecord, PodRecord},
};
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};
use tokio::sync::mpsc;

/// How many there are of what.
#[derive(Clone, Copy)]
pub struct Size {
    pub nodes: u32,
    /// Pods of each node.
    pub pods: u32,
    pub namespaces: u32,
    /// Values of the label `app` in each namespace, each of which is an identity.
    pub apps: u32,
}

/// Leases outlive the benchmark: nobody renews them.
const LEASE: Duration = Duration::from_hours(3);
/// Requests to etcd at once.
const AT_ONCE: usize = 64;
/// What no policy of the benchmark names.
const PLAIN: &str = "plain";

/// One pod of a node that does not exist.
#[derive(Clone, Copy)]
pub struct Simulated {
    node: u32,
    pod: u32,
    namespace: u32,
    pub app: u32,
    /// Raised when another pod takes its place.
    pub incarnation: u32,
}

impl Size {
    /// All pods. Each identity has about as many as any other.
    pub fn all(self) -> Vec<Simulated> {
        let numbers = 0..self.nodes * self.pods;
        numbers
            .map(|number| Simulated {
                node: number / self.pods,
                pod: number % self.pods,
                namespace: number % self.namespaces,
                app: number / self.namespaces % self.apps,
                incarnation: 1,
            })
            .collect()
    }
}

impl Simulated {
    /// 10.64.0.0/14 has a /24 for each node.
    pub fn address(&self) -> IpAddr {
        Ipv4Addr::from(0x0a40_0000 + (self.node << 8) + self.pod).into()
    }

    fn record(&self) -> PodRecord {
        PodRecord {
            namespace: format!("ns-{}", self.namespace),
            name: format!("pod-{}-{}-{}", self.node, self.pod, self.incarnation),
            labels: Arc::new(BTreeMap::from([
                ("app".to_owned(), format!("{PLAIN}-{}", self.app)),
                ("pod-template-hash".to_owned(), format!("{:08x}", self.app)),
            ])),
            address: self.address(),
            second: None,
            node: name(self.node).into(),
            service_account: "default".into(),
            ports: Vec::new(),
            incarnation: self.incarnation * 1_000_000 + self.node * 256 + self.pod,
        }
    }
}

fn name(node: u32) -> String {
    format!("simulated-{node}")
}

fn put<T: serde::Serialize>(key: &Key, value: &T) -> anyhow::Result<Vec<u8>> {
    records::encode(key, value).with_context(|| key.to_string())
}

/// What all keys begin with.
const PREFIX: &str = "/wasmgate/";

/// One who listens.
pub struct Watch {
    store: EtcdStore,
    changes: Option<mpsc::Receiver<Change>>,
    left: u32,
}

impl Watch {
    /// Waits until everything that is there has been heard.
    pub async fn synced(&mut self) -> anyhow::Result<()> {
        let mut changes = self.store.watch(&[Collection::Answers]).await?;
        while changes.recv().await.context("the watch has ended")? != Change::Synced {}
        self.changes = Some(changes);
        Ok(())
    }

    /// Hears all changes; how many.
    pub async fn all(mut self) -> anyhow::Result<u32> {
        let changes = self.changes.as_mut().context("not begun")?;
        for heard in 0..self.left {
            if !matches!(changes.recv().await, Some(Change::Put(..))) {
                return Ok(heard);
            }
        }
        Ok(self.left)
    }
}

/// The cluster's etcd, from the host that it runs on.
pub struct Writer(EtcdStore);

impl Writer {
    /// Runs what needs the store, in a namespace where etcd can be reached.
    pub fn with<T: Send>(
        cluster: &Cluster,
        work: impl AsyncFnOnce(Self) -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        let external = cluster.external.as_ref().context("no host for etcd")?;
        let url = cluster.etcd.as_ref().context("no etcd")?.url();
        in_netns(external.name(), || {
            // All sockets are made by this thread, in its namespace.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let store = EtcdStore::open(&format!("etcd:{url}"), &EtcdConfig::default())?;
                work(Self(store)).await
            })
        })?
    }

    /// Enters all nodes and pods.
    pub async fn enter(&self, size: Size) -> anyhow::Result<()> {
        let nodes = stream::iter(0..size.nodes).map(|number| async move {
            let record = NodeRecord {
                name: name(number),
                underlay: Ipv4Addr::from(0xc612_0000 + number + 1).into(),
                pod_cidrs: vec![format!("{}/24", Ipv4Addr::from(0x0a40_0000 + (number << 8))).parse()?],
            };
            let key = Key::new(Collection::Nodes, &record.name);
            records::put(&self.0, &key, &record, Expect::Any).await?;
            let key = Key::new(Collection::Alive, &record.name);
            self.0.put_leased(&key, put(&key, &AliveRecord)?, LEASE).await?;
            anyhow::Ok(())
        });
        nodes.buffer_unordered(AT_ONCE).try_collect::<()>().await?;
        let pods = stream::iter(size.all()).map(|pod| async move { self.change(&pod).await });
        pods.buffer_unordered(AT_ONCE).try_collect().await
    }

    /// Says what a pod is now.
    pub async fn change(&self, pod: &Simulated) -> anyhow::Result<()> {
        let key = Key::new(Collection::Pods, pod.address());
        records::put(&self.0, &key, &pod.record(), Expect::Any).await?;
        Ok(())
    }

    /// Says something of a pod where no node listens; how many bytes that is with its key.
    pub async fn say(&self, number: u32) -> anyhow::Result<usize> {
        let pod = Simulated {
            node: 0,
            pod: 0,
            namespace: 0,
            app: number,
            incarnation: number,
        };
        let key = Key::new(Collection::Answers, pod.address());
        let value = put(&key, &pod.record())?;
        let length = value.len() + PREFIX.len() + key.to_string().len();
        self.0.put(&key, value, Expect::Any).await?;
        Ok(length)
    }

    /// Listens there, by a connection of its own.
    pub fn watch(cluster: &Cluster, changes: u32) -> anyhow::Result<Watch> {
        let url = cluster.etcd.as_ref().context("no etcd")?.url();
        let store = EtcdStore::open(&format!("etcd:{url}"), &EtcdConfig::default())?;
        Ok(Watch {
            store,
            changes: None,
            left: changes,
        })
    }

    /// Says that a pod is gone.
    pub async fn remove(&self, pod: &Simulated) -> anyhow::Result<()> {
        let key = Key::new(Collection::Pods, pod.address());
        Ok(self.0.delete(&key, Expect::Any).await?)
    }
}
