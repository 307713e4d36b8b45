//! One thread that listens on many ports of a namespace.

use crate::in_netns;
use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{
    collections::HashSet,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// Sends back one line over TCP, and every datagram over UDP, on many ports, until it is dropped.
pub struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    arrivals: Arrivals,
}

/// What has arrived: from whom, where, and whether by TCP.
type Arrivals = Arc<Mutex<HashSet<(IpAddr, SocketAddr, bool)>>>;

/// How long a connection may be silent.
const PATIENCE: Duration = Duration::from_secs(2);

impl Server {
    /// Listens on all of `ports` of all of `addresses`, by TCP and UDP, in a namespace. An answer comes from the address
    /// that was asked.
    ///
    /// # Errors
    ///
    /// Where a port is taken.
    pub fn new(namespace: &str, addresses: &[IpAddr], ports: &[u16]) -> anyhow::Result<Self> {
        let sockets = in_netns(namespace, || -> io::Result<Vec<_>> {
            addresses
                .iter()
                .flat_map(|address| ports.iter().map(move |port| (*address, *port)))
                .map(|place| {
                    let tcp = TcpListener::bind(place)?;
                    let udp = UdpSocket::bind(place)?;
                    tcp.set_nonblocking(true)?;
                    udp.set_nonblocking(true)?;
                    Ok((tcp, udp))
                })
                .collect()
        })?
        .with_context(|| format!("listening on {ports:?} in {namespace}"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let arrivals = Arrivals::default();
        let noted = Arc::clone(&arrivals);
        let thread = thread::spawn(move || serve(&sockets, &told, &noted));
        Ok(Self {
            stop,
            thread: Some(thread),
            arrivals,
        })
    }

    /// Whether a connection or a datagram has arrived from this address since the last [`Server::forget`].
    #[must_use]
    pub fn was_reached(&self, from: IpAddr, at: SocketAddr, tcp: bool) -> bool {
        lock(&self.arrivals).contains(&(from, at, tcp))
    }

    /// Forgets what has arrived.
    pub fn forget(&self) {
        lock(&self.arrivals).clear();
    }
}

fn lock(arrivals: &Arrivals) -> MutexGuard<'_, HashSet<(IpAddr, SocketAddr, bool)>> {
    arrivals.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(sockets: &[(TcpListener, UdpSocket)], stop: &AtomicBool, arrivals: &Arrivals) {
    let note = |from: SocketAddr, at: io::Result<SocketAddr>, tcp: bool| {
        if let Ok(at) = at {
            lock(arrivals).insert((from.ip(), at, tcp));
        }
    };
    let pause = Timespec {
        tv_sec: 0,
        tv_nsec: 50_000_000,
    };
    while !stop.load(Ordering::Relaxed) {
        let mut wanted: Vec<PollFd<'_>> = sockets
            .iter()
            .flat_map(|(tcp, udp)| [tcp.as_fd(), udp.as_fd()])
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        // Interrupted or not: the sockets are looked at again.
        let _ = poll(&mut wanted, Some(&pause));
        for (tcp, udp) in sockets {
            while let Ok((stream, from)) = tcp.accept() {
                note(from, tcp.local_addr(), true);
                thread::spawn(move || answer(stream));
            }
            let mut datagram = [0; 2048];
            while let Ok((length, from)) = udp.recv_from(&mut datagram) {
                note(from, udp.local_addr(), false);
                // One that can't be sent is one that does not arrive.
                let _ = udp.send_to(&datagram[..length], from);
            }
        }
    }
}

/// A client that has gone wants no answer.
fn answer(mut stream: TcpStream) {
    let mut line = [0; 64];
    let ready = stream.set_nonblocking(false).is_ok() && stream.set_read_timeout(Some(PATIENCE)).is_ok();
    if ready && let Ok(length) = stream.read(&mut line) {
        let _ = stream.write_all(&line[..length]);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("a listening thread has panicked");
        }
    }
}
