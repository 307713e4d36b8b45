//! Pods of other nodes that change all the time, and when this cluster's real nodes know.

use crate::simulated::{Simulated, Size, Writer};
use abi::{AddressKey, IpcacheEntry, map};
use anyhow::ensure;
use aya::maps::{HashMap, Map, MapData};
use harness::{Cluster, Node};
use std::{
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, TryRecvError},
    },
    thread,
    time::{Duration, Instant},
};
use wasmgate_tests::report::Samples;

/// A change that no node has by then is lost.
const LATE: Duration = Duration::from_secs(10);
/// How often the kernels' maps are looked at.
const LOOK: Duration = Duration::from_micros(500);

type Ipcache = HashMap<MapData, AddressKey, IpcacheEntry>;

fn ipcache(node: &Node) -> anyhow::Result<Ipcache> {
    let data = MapData::from_pin(node.bpffs().join("maps").join(map::IPCACHE))?;
    Ok(HashMap::try_from(Map::HashMap(data))?)
}

/// What the kernels say of an address.
fn entries(maps: &[Ipcache], address: &AddressKey) -> Vec<Option<[u32; 2]>> {
    let identities = |map: &Ipcache| {
        map.get(address, 0)
            .ok()
            .map(|entry| entry.identity.map(|identity| identity.0))
    };
    maps.iter().map(identities).collect()
}

/// A change on its way: what the kernels said before, and when it was begun.
struct Change {
    address: AddressKey,
    before: Vec<Option<[u32; 2]>>,
    began: Instant,
}

/// Changes so many pods a second until `stop`: every other one is replaced by a new one, the others get other labels.
/// Milliseconds from each change until both nodes' kernels have it.
pub fn run(cluster: &Cluster, size: Size, rate: u32, stop: &AtomicBool) -> anyhow::Result<Samples> {
    let maps = cluster.nodes.iter().map(ipcache).collect::<anyhow::Result<Vec<_>>>()?;
    let (sender, changes) = mpsc::channel();
    thread::scope(|scope| {
        let watcher = scope.spawn(move || watch(cluster, &changes));
        let written = Writer::with(cluster, async |writer| {
            let mut pods = size.all();
            let mut random = 0x2545_f491_4f6c_dd1d_u64;
            let mut next = tokio::time::interval(Duration::from_secs(1) / rate);
            for number in 0_u64.. {
                next.tick().await;
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let index = usize::try_from(random % pods.len() as u64)?;
                let pod: &mut Simulated = &mut pods[index];
                pod.app = (pod.app + 1 + u32::try_from(random >> 40)? % (size.apps - 1)) % size.apps;
                let address = AddressKey::from(pod.address());
                let before = entries(&maps, &address);
                let began = Instant::now();
                if number % 2 == 0 {
                    pod.incarnation += 1;
                    writer.remove(pod).await?;
                }
                writer.change(pod).await?;
                // Where the watcher has given up, so does this.
                if sender.send(Change { address, before, began }).is_err() {
                    break;
                }
            }
            drop(sender);
            Ok(())
        });
        let seen = watcher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        written?;
        seen
    })
}

fn watch(cluster: &Cluster, changes: &Receiver<Change>) -> anyhow::Result<Samples> {
    let maps = cluster.nodes.iter().map(ipcache).collect::<anyhow::Result<Vec<_>>>()?;
    let (mut samples, mut waiting, mut done) = (Samples::default(), Vec::<Change>::new(), false);
    while !done || !waiting.is_empty() {
        loop {
            match changes.try_recv() {
                Ok(change) => waiting.push(change),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    done = true;
                    break;
                }
            }
        }
        let late = waiting.iter().find(|change| change.began.elapsed() > LATE);
        ensure!(late.is_none(), "a node has not heard of a change for {LATE:?}");
        waiting.retain(|change| {
            let now = entries(&maps, &change.address);
            let known = now
                .iter()
                .zip(&change.before)
                .all(|(now, before)| now.is_some() && now != before);
            if known {
                samples.push(change.began.elapsed().as_secs_f64() * 1000.0);
            }
            !known
        });
        thread::sleep(LOOK);
    }
    Ok(samples)
}
