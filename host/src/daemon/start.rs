//! Starting: everything is built and filled before anything is attached, so that what an earlier hostd left goes on
//! working until the moment it is replaced.

use super::{
    Daemon, DaemonError, Local, Names, Node, Pod,
    addresses::NodeAddresses,
    audit::Audit,
    collect::Unused,
    coordinate::Coordinator,
    directory::Directory,
    join,
    modules::ModuleFolder,
    policy::Side,
    serve::{self, Front},
    watch::Watch,
};
use crate::{
    api::{self, PodName, Response, Server},
    attachment::Queue,
    codec,
    config::Config,
    datapath::{self, Datapath, Settings},
    endpoint::{EndpointFile, LocalEndpoint},
    identity::{Layout, Registry},
    invariant::Invariants,
    net::{self, Netns, VXLAN_DEVICE},
    source,
    store::{
        self, Change, Collection, Expect, Key, Store,
        records::{self, CLUSTER, IdentityRecord, NamespaceRecord, NodeRecord, Phase, PodRecord, SeenRecord},
    },
    wasm::Compiler,
};
use abi::{AddressKey, Hook, Identity};
use anyhow::Context;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File},
    io,
    net::IpAddr,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    sync::{Arc, RwLock},
    time::{Duration, Instant},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::block_in_place,
};

/// What the daemon follows in the store.
const WATCHED: [Collection; 9] = [
    Collection::Tenants,
    Collection::Identities,
    Collection::Nodes,
    Collection::Addresses,
    Collection::Alive,
    Collection::Namespaces,
    Collection::Pods,
    Collection::Services,
    Collection::Policy,
];

/// Runs hostd until it is told to stop. Its datapath stays.
///
/// # Errors
///
/// Where the node can't be started; what an earlier hostd left is then as it was.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let _lock = lock(&config.state_dir)?;
    let server = Server::bind(&config.socket).with_context(|| format!("control socket {}", config.socket.display()))?;
    check_store(&config)?;
    let store = store::open(&config.store, &config.etcd)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let names = Arc::new(RwLock::new(Names::default()));
    let starting = async {
        until_it_answers(&store).await;
        start(config.clone(), Arc::clone(&store), Arc::clone(&names)).await
    };
    let started = tokio::select! {
        started = starting => started?,
        result = refuse(&server, &store) => return result.context("control socket"),
        _ = terminate.recv() => return Ok(()),
    };
    let Started {
        daemon,
        events,
        changes,
    } = started;

    let (sender, commands) = mpsc::channel(64);
    let channel = serve::event_channel();
    let audit = daemon.audit.switch();
    let pump = tokio::spawn(serve::pump(events, channel.clone(), sender.clone(), audit));
    let front = Arc::new(Front {
        coordinator: Coordinator {
            store,
            node: config.node.clone(),
            phase_time: config.lease.phase(),
            daemon: sender.clone(),
        },
        daemon: sender,
        events: channel,
        names,
        source: Box::new(source::Runtime),
    });
    tracing::info!(
        "node {} is ready; control socket {}",
        config.node,
        config.socket.display()
    );
    let serving = api::serve(&server, move |request, stream| {
        let front = Arc::clone(&front);
        async move { front.handle(request, stream).await }
    });
    tokio::select! {
        ended = daemon.serve(commands, changes) => return ended.inspect(|()| tracing::info!("drained: stopping")),
        result = serving => result.context("control socket")?,
        _ = terminate.recv() => {}
        result = tokio::signal::ctrl_c() => result?,
    }
    pump.abort();
    tracing::info!("stopping; the datapath stays, and enforces the policy as it is (`hostd cleanup` removes it)");
    Ok(())
}

/// A node that was in a cluster makes no store anew by itself: where the folder is only not mounted, numbers of identities would get
/// another meaning.
fn check_store(config: &Config) -> anyhow::Result<()> {
    if let Some(folder) = store::missing(&config.store)
        && EndpointFile::open(&config.state_dir)?.exists()
    {
        let folder = folder.display();
        anyhow::bail!(
            "there is no store in {folder}, but {} is of a node that has had one: is it mounted? To begin a new one there: `touch {folder}/.lock`",
            config.state_dir.display()
        );
    }
    Ok(())
}

/// Waits until the store answers, whatever it says. The datapath goes on as an earlier hostd has left it.
async fn until_it_answers(store: &Arc<dyn Store>) {
    let key = Key::new(Collection::Cluster, CLUSTER);
    while store.get(&key).await.is_err_and(|error| error.is_unavailable()) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Tells whoever asks that hostd is not ready yet, and why, where the store is the reason.
async fn refuse(server: &Server, store: &Arc<dyn Store>) -> io::Result<()> {
    let store = Arc::clone(store);
    api::serve(server, move |_, mut stream| {
        let problem = store.problem().map_or(String::new(), |problem| format!(": {problem}"));
        let refusal = Response::Error(format!("hostd is starting{problem}"));
        async move { codec::write(&mut stream, &refusal).await.map_err(io::Error::other) }
    })
    .await
}

/// One hostd for one state folder.
pub(super) fn lock(state_dir: &Path) -> anyhow::Result<File> {
    fs::create_dir_all(state_dir).with_context(|| format!("create {}", state_dir.display()))?;
    let path = state_dir.join("lock");
    // Whoever may open it could hold the lock, which is nobody but its owner.
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path);
    let file = file.with_context(|| format!("open {}", path.display()))?;
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    file.try_lock()
        .with_context(|| format!("{} is locked: another hostd uses this `state_dir`", path.display()))?;
    Ok(file)
}

struct Started {
    daemon: Daemon,
    events: datapath::EventStream,
    changes: mpsc::Receiver<Change>,
}

async fn start(config: Config, store: Arc<dyn Store>, names: Arc<RwLock<Names>>) -> anyhow::Result<Started> {
    let underlay = net::underlay(config.underlay)?;
    let pod_mtu = net::pod_mtu(config.underlay, underlay.mtu, config.has_ipv6())?;
    let record = NodeRecord {
        name: config.node.clone(),
        underlay: config.underlay,
        pod_cidrs: config.pod_cidrs.clone(),
    };
    let layout = Layout {
        tenant_bits: config.vni.tenant_bits,
    };
    let cluster = join::agree(&*store, layout, None).await?;
    join::check_against_others(&*store, &record).await?;
    if let Some(path) = &config.invariants {
        let context = || format!("invariants {}", path.display());
        let text = fs::read_to_string(path).with_context(context)?;
        Invariants::parse(&text).with_context(context)?;
    }
    let file = EndpointFile::open(&config.state_dir)?;
    for folder in [&config.state_dir, &config.state_dir.join("modules")] {
        if folder.is_dir() {
            store::remove_asides(folder)?;
        }
    }
    let place = match store::folder(&config.store) {
        Some(_) => config.store.clone(),
        None => format!("{} under {}", config.store, config.etcd.prefix),
    };
    let modules = ModuleFolder::open(&config.state_dir, place, cluster)?;
    // This very program, also after another was installed in its place.
    let cache = config.state_dir.join("compiled");
    let compiler = Compiler::new("/proc/self/exe".into(), config.wasm.into(), Some(&cache))?;
    let settings = Settings {
        bpffs: config.bpffs.clone(),
        maps: config.maps,
        attach: config.attach,
        timeouts: config.conntrack,
    };
    let (datapath, events) = Datapath::load(&settings)?;

    let queue = Queue::beside(&config.socket);
    let mut daemon = Daemon {
        active: Side::empty(datapath.shape()),
        aside: None,
        config,
        store,
        datapath,
        compiler,
        compiled: HashMap::new(),
        modules,
        registry: Registry::new(layout),
        unused: Unused::default(),
        seen: SeenRecord::default(),
        told: None,
        renewed: None,
        withdrawn: BTreeSet::new(),
        queue,
        namespaces: BTreeMap::new(),
        audit: Audit::default(),
        unplaced: BTreeSet::new(),
        made_up: Instant::now(),
        nodes: BTreeMap::new(),
        addresses: NodeAddresses::default(),
        alive: BTreeSet::new(),
        pods: Directory::default(),
        services: super::services::Services::default(),
        locals: BTreeMap::new(),
        policy: None,
        policy_since: Instant::now(),
        out_of_step: None,
        recompile: false,
        file,
        pod_mtu,
        underlay: underlay.name,
        names,
        monitors: (0, 0),
        watch: Watch::new(),
        missed: Vec::new(),
        drained: None,
    };
    let changes = daemon.begin(&record, underlay.ifindex).await?;
    Ok(Started {
        daemon,
        events,
        changes,
    })
}

impl Daemon {
    /// Fills the maps before anything is attached, and tells the cluster of this node.
    async fn begin(&mut self, record: &NodeRecord, underlay: u32) -> anyhow::Result<mpsc::Receiver<Change>> {
        let vxlan = block_in_place(|| net::ensure_vxlan(abi::node::TUNNEL_PORT, self.pod_mtu))?;
        self.datapath.set_vxlan(vxlan, self.pod_mtu, self.config.underlay)?;
        self.datapath.set_underlay(underlay)?;
        self.restore().await?;
        // First the lease: a node without one is stale, also one that has died just here.
        self.renew().await?;
        let key = Key::new(Collection::Nodes, &record.name);
        records::put(&*self.store, &key, record, Expect::Any).await?;
        self.look_at_own_addresses()?;
        let mut changes = self.store.watch(&WATCHED).await?;
        self.take_stock(&mut changes).await?;
        self.place_nodes()?;
        self.follow_own_addresses().await?;
        let recalled = self.recall_policy();
        self.enforce_from_start().await.context("the policy in force")?;
        self.services_from_start();
        self.attach_all()?;
        self.route()?;
        self.announce().await?;
        self.keep_modules().await;
        if recalled && let Err(error) = self.enter_policy().await {
            error.complain("entering the policy, tried again");
            self.missed.push(Change::Anew);
        }
        self.end_queued().await;
        if let Some((record, revision)) = self.policy.clone()
            && record.phase == Phase::Prepare
        {
            // A load that waits for this node's answer.
            self.policy_seen(record, revision).await?;
        }
        Ok(changes)
    }

    /// Finds the pods that an earlier hostd connected. Those whose namespace or interface is gone are forgotten.
    async fn restore(&mut self) -> anyhow::Result<()> {
        let endpoints = self.known_endpoints().await?;
        for endpoint in endpoints {
            let pod = PodName {
                namespace: endpoint.pod.namespace.clone(),
                name: endpoint.pod.name.clone(),
            };
            match find_link(&endpoint) {
                Ok(Some(veth)) => {
                    self.locals.insert(pod, Local { endpoint, veth });
                }
                Ok(None) => tracing::warn!("pod {pod} is gone: its interface is no longer there"),
                Err(error) => tracing::warn!("pod {pod} is gone: {error}"),
            }
        }
        // What an addition that was cut short has left, and the interfaces of pods that are gone: without a pod's record
        // nothing would guard them.
        for name in block_in_place(net::pod_links)? {
            if !self.locals.values().any(|local| local.endpoint.interface == name) {
                tracing::warn!("removing {name}: no pod is known to have it");
                block_in_place(|| net::delete_link(&name))?;
            }
        }
        for local in self.locals.values() {
            let record = local.endpoint.pod.clone();
            let pod = Pod { epoch: 1, record };
            let address = AddressKey::from(pod.record.address);
            self.name(&pod.record);
            self.pods.insert(address, pod);
        }
        Ok(())
    }

    /// Reads what the store holds, without asking any policy yet.
    async fn take_stock(&mut self, changes: &mut mpsc::Receiver<Change>) -> Result<(), DaemonError> {
        while let Some(change) = changes.recv().await {
            match change {
                Change::Synced => break,
                Change::Put(key, value) if key.collection == Collection::Pods => {
                    self.stock_pod(&key, records::decode(&key, &value.value)?).await?;
                }
                Change::Put(key, value) if key.collection == Collection::Namespaces => {
                    let namespace: NamespaceRecord = records::decode(&key, &value.value)?;
                    self.namespaces.insert(key.name, namespace.labels);
                }
                Change::Put(key, value) if key.collection == Collection::Services => {
                    self.note_service(records::decode(&key, &value.value)?);
                }
                Change::Put(key, value) if key.collection == Collection::Identities => {
                    if let Ok(number) = key.name.parse() {
                        let record: IdentityRecord = records::decode(&key, &value.value)?;
                        self.note_mark(&key, record.retiring, value.revision);
                        self.note_identity(Identity(number), record);
                    }
                }
                Change::Put(key, value) if key.collection == Collection::Policy => {
                    self.policy = Some((records::decode(&key, &value.value)?, value.revision));
                }
                Change::Put(key, value) if key.collection == Collection::Addresses => {
                    let record = records::decode(&key, &value.value)?;
                    self.note_addresses(&key.name, Some(record));
                }
                Change::Put(key, _) if key.collection == Collection::Alive => {
                    self.alive.insert(key.name);
                }
                Change::Put(key, value) if key.collection == Collection::Nodes => {
                    let record: NodeRecord = records::decode(&key, &value.value)?;
                    let node = Node {
                        record,
                        stale_since: Some(Instant::now()),
                    };
                    self.nodes.insert(key.name, node);
                }
                other => self.follow(other).await,
            }
        }
        for (name, node) in &mut self.nodes {
            if self.alive.contains(name) {
                node.stale_since = None;
            }
        }
        Ok(())
    }

    async fn stock_pod(&mut self, key: &Key, record: PodRecord) -> Result<(), DaemonError> {
        let address = AddressKey::from(record.address);
        if record.is_on(&self.config.node) {
            if self.pods.get(&address).is_none() {
                // A pod of this node that is not here any more.
                self.store.delete(key, Expect::Any).await?;
            }
            return Ok(());
        }
        self.name(&record);
        self.pods.insert(address, Pod { record, epoch: 1 });
        Ok(())
    }

    /// From here on packets meet this hostd's programs and maps.
    fn attach_all(&mut self) -> Result<(), DaemonError> {
        // Pins first: a start that is cut short after this finds a generation that is no lower than any program's.
        self.datapath.adopt_pins()?;
        self.datapath.set_pods(self.locals.len())?;
        self.datapath.count_flows()?;
        self.guard_tunnel();
        self.datapath.attach(Hook::FromOverlay, VXLAN_DEVICE)?;
        // Only now: without the program everybody's packets would reach the node's own stack.
        block_in_place(|| net::bring_up(VXLAN_DEVICE))?;
        let names: Vec<String> = self
            .locals
            .values()
            .map(|local| local.endpoint.interface.clone())
            .collect();
        for name in &names {
            self.datapath.attach_pod(Hook::FromPod, name)?;
            self.datapath.attach_pod(Hook::ToPod, name)?;
        }
        for local in self.locals.values() {
            let addresses: Vec<IpAddr> = local.endpoint.pod.addresses().collect();
            let (underlay, mtu) = (self.config.underlay, self.pod_mtu);
            block_in_place(|| net::prepare_node(&local.endpoint.interface, &local.veth, &addresses, underlay, mtu))?;
        }
        self.place_services();
        let mut known: Vec<&str> = names.iter().map(String::as_str).collect();
        known.push(VXLAN_DEVICE);
        known.push(&self.underlay);
        Ok(self.datapath.forget_links_except(&known)?)
    }

    /// What is for an address of this node's pod CIDRs that no pod has ends here, and does not go back to where it came
    /// from; what pods send to the outside, and what is answered, is let through.
    fn route(&mut self) -> Result<(), DaemonError> {
        for cidr in &self.config.pod_cidrs {
            block_in_place(|| net::make_unreachable(*cidr))?;
        }
        self.set_table()?;
        self.route_to_nodes()?;
        if self.config.forwarding {
            block_in_place(|| net::enable_forwarding(self.config.has_ipv6()))?;
        }
        Ok(())
    }

    /// Tells the cluster of this node's pods, where it has forgotten them.
    pub(super) async fn announce(&self) -> Result<(), DaemonError> {
        for local in self.locals.values() {
            let record = &local.endpoint.pod;
            records::put(
                &*self.store,
                &Key::new(Collection::Pods, record.address),
                record,
                Expect::Any,
            )
            .await?;
        }
        Ok(block_in_place(|| {
            self.file.save(self.locals.values().map(|local| &local.endpoint))
        })?)
    }
}

/// A pod's veth pair, where its namespace and both ends are still there.
pub(super) fn find_link(endpoint: &LocalEndpoint) -> Result<Option<net::Veth>, net::NetError> {
    block_in_place(|| {
        let netns = Netns::open_path(&endpoint.netns)?;
        net::find_pod_link(&endpoint.interface, &netns, endpoint.pod_interface())
    })
}
