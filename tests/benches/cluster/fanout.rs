//! What it takes etcd to tell many nodes of a change.

use crate::{processor_seconds, simulated::Writer};
use anyhow::{Context, ensure};
use harness::Cluster;
use std::time::Duration;

/// Nodes that watch, and changes.
const WATCHERS: u32 = 200;
const CHANGES: u32 = 2000;
/// All of them have heard everything by then.
const LATE: Duration = Duration::from_mins(2);

/// What was measured.
pub struct Fanout {
    /// Bytes of a pod's record with its key.
    pub record: usize,
    /// Microseconds of etcd's processor time for a change that one node hears of.
    pub change: f64,
    /// And for each further node.
    pub event: f64,
}

/// The same changes, with one node that watches and with many.
pub fn measure(cluster: &Cluster) -> anyhow::Result<Fanout> {
    let [one, many] = [1, WATCHERS].map(|watchers| change(cluster, watchers));
    let ((record, one), (_, many)) = (one?, many?);
    let micros = |seconds: f64| seconds * 1e6 / f64::from(CHANGES);
    Ok(Fanout {
        record,
        change: micros(one),
        event: micros(many - one) / f64::from(WATCHERS - 1),
    })
}

/// Bytes of a record, and etcd's seconds.
fn change(cluster: &Cluster, watchers: u32) -> anyhow::Result<(usize, f64)> {
    let etcd = cluster.etcd.as_ref().and_then(harness::Etcd::pid).context("no etcd")?;
    Writer::with(cluster, async |writer| {
        let watching: Vec<_> = (0..watchers).map(|_| Writer::watch(cluster, CHANGES)).collect();
        let watching = watching.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
        let mut ends = Vec::new();
        for mut watch in watching {
            watch.synced().await?;
            ends.push(tokio::spawn(async move { watch.all().await }));
        }
        let before = processor_seconds(etcd)?;
        let mut record = 0;
        for number in 0..CHANGES {
            record = writer.say(number).await?;
        }
        for end in ends {
            let heard = tokio::time::timeout(LATE, end).await???;
            ensure!(heard == CHANGES, "{heard} of {CHANGES} changes were heard");
        }
        Ok((record, processor_seconds(etcd)? - before))
    })
}
