//! Who reaches whom in a cluster.

use crate::{Cluster, TcpOutcome, in_netns, patience::connect, tcp_exchange, udp_exchange};
use anyhow::{Context, ensure};
use std::{
    collections::BTreeMap,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

/// How one pod reaches another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// A TCP connection opens, and a line comes back.
    pub tcp: bool,
    /// A UDP datagram comes back.
    pub udp: bool,
}

/// Tries every ordered pair of pods at a port, by TCP and UDP, all at once.
///
/// # Errors
///
/// Where an attempt can't be made, or is answered by a reset: a packet that policy denies is dropped.
pub fn reachable(cluster: &Cluster, port: u16, wait: Duration) -> anyhow::Result<BTreeMap<(String, String), Reach>> {
    thread::scope(|scope| {
        let mut attempts = Vec::new();
        for from in &cluster.pods {
            for to in cluster.pods.iter().filter(|to| to.name != from.name) {
                let attempt = scope.spawn(move || -> anyhow::Result<Reach> {
                    let outcome = tcp_exchange(from.netns.name(), to.address, port, wait)?;
                    ensure!(outcome != TcpOutcome::Refused, "{} -> {}: a reset", from.name, to.name);
                    Ok(Reach {
                        tcp: outcome == TcpOutcome::Open,
                        udp: udp_exchange(from.netns.name(), to.address, port, wait)?,
                    })
                });
                attempts.push(((from.name.clone(), to.name.clone()), attempt));
            }
        }
        let mut reach = BTreeMap::new();
        for (pair, attempt) in attempts {
            let found = attempt
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            reach.insert(pair, found);
        }
        Ok(reach)
    })
}

/// A TCP connection on which both ends send all the time.
pub struct Duplex {
    stop: Arc<AtomicBool>,
    received: [Arc<AtomicU64>; 2],
}

impl Duplex {
    /// Opens the connection and begins to send.
    ///
    /// # Errors
    ///
    /// Where it does not open.
    pub fn open(from: &str, to: &str, address: IpAddr, port: u16, wait: Duration) -> anyhow::Result<Self> {
        let listener = in_netns(to, || TcpListener::bind(("0.0.0.0", port)))??;
        let client = in_netns(from, || connect(SocketAddr::new(address, port), wait))?
            .with_context(|| format!("connecting to {address}:{port}"))?;
        let (server, _) = listener.accept()?;
        let stop = Arc::new(AtomicBool::new(false));
        let received = [Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0))];
        for (stream, count) in [(client, &received[0]), (server, &received[1])] {
            let (stop, count) = (Arc::clone(&stop), Arc::clone(count));
            stream.set_nonblocking(true)?;
            thread::spawn(move || exchange(stream, &stop, &count));
        }
        Ok(Self { stop, received })
    }

    /// Bytes that have arrived so far at the end that opened the connection, and at the other one.
    #[must_use]
    pub fn received(&self) -> [u64; 2] {
        [&self.received[0], &self.received[1]].map(|count| count.load(Ordering::Relaxed))
    }
}

impl Drop for Duplex {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Ends with the connection, or shortly after its owner: nobody waits for it.
fn exchange(mut stream: TcpStream, stop: &AtomicBool, count: &AtomicU64) {
    let mut buffer = [0; 4096];
    while !stop.load(Ordering::Relaxed) {
        // What does not fit now is sent later: how much is of no interest here.
        let _ = stream.write(b"some bytes");
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                count.fetch_add(length as u64, Ordering::Relaxed);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
        thread::sleep(Duration::from_millis(1));
    }
}
