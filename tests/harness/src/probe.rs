//! Real connections between namespaces.

use crate::{
    in_netns,
    patience::{connect, patiently},
};
use anyhow::{Context, ensure};
use std::{
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// What came of an attempt to open a TCP connection and exchange a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpOutcome {
    /// The line came back.
    Open,
    /// No answer: what a policy that denies looks like.
    Silence,
    /// A reset: nobody listens.
    Refused,
    /// A router says that there is no way.
    Unreachable,
}

/// Opens a TCP connection from a namespace, sends a line and waits for it to come back.
///
/// # Errors
///
/// Where the attempt could not be made, or ended in any other way.
pub fn tcp_exchange(namespace: &str, to: IpAddr, port: u16, wait: Duration) -> anyhow::Result<TcpOutcome> {
    in_netns(namespace, || -> anyhow::Result<TcpOutcome> {
        let mut stream = match connect(SocketAddr::new(to, port), wait) {
            Ok(stream) => stream,
            Err(error) => return outcome(&error).with_context(|| format!("connecting to {to}:{port}: {error}")),
        };
        stream.write_all(b"hello\n")?;
        match read_line(&mut stream, wait) {
            Ok(()) => Ok(TcpOutcome::Open),
            Err(error) => outcome(&error).with_context(|| format!("reading from {to}:{port}: {error}")),
        }
    })?
}

/// A line of six bytes, which comes at once or not at all.
fn read_line(stream: &mut TcpStream, wait: Duration) -> io::Result<()> {
    patiently(wait, |wait| {
        stream.set_read_timeout(Some(wait))?;
        stream.read_exact(&mut [0; 6])
    })
}

pub(crate) fn outcome(error: &io::Error) -> Option<TcpOutcome> {
    match error.kind() {
        ErrorKind::TimedOut | ErrorKind::WouldBlock => Some(TcpOutcome::Silence),
        ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset => Some(TcpOutcome::Refused),
        ErrorKind::NetworkUnreachable | ErrorKind::HostUnreachable => Some(TcpOutcome::Unreachable),
        _ => None,
    }
}

/// Opens a TCP connection from a namespace, and keeps it.
///
/// # Errors
///
/// Where it does not open.
pub fn tcp_open(namespace: &str, to: IpAddr, port: u16, wait: Duration) -> anyhow::Result<Stream> {
    let stream = in_netns(namespace, || connect(SocketAddr::new(to, port), wait))?
        .with_context(|| format!("connecting to {to}:{port}"))?;
    Ok(Stream(stream))
}

/// An open TCP connection to a [`Listener`].
pub struct Stream(TcpStream);

impl Stream {
    /// Sends a line and waits for it to come back; false where it does not in time, or the connection was reset.
    ///
    /// # Errors
    ///
    /// Where the connection ends otherwise.
    pub fn exchange(&mut self, wait: Duration) -> anyhow::Result<bool> {
        let answered = self.0.write_all(b"again\n").and_then(|()| read_line(&mut self.0, wait));
        match answered {
            Ok(()) => Ok(true),
            Err(error) if outcome(&error) == Some(TcpOutcome::Silence) => Ok(false),
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// Sends a UDP datagram from a namespace and waits for it to come back; false where it does not in time.
///
/// # Errors
///
/// Where it can't be sent.
pub fn udp_exchange(namespace: &str, to: IpAddr, port: u16, wait: Duration) -> anyhow::Result<bool> {
    udp_exchange_of(namespace, to, port, 5, wait)
}

/// The same with a datagram of so many bytes, which must come back as it was.
///
/// # Errors
///
/// Where it can't be sent, or comes back as another one.
pub fn udp_exchange_of(namespace: &str, to: IpAddr, port: u16, size: usize, wait: Duration) -> anyhow::Result<bool> {
    in_netns(namespace, || -> anyhow::Result<bool> {
        let any: IpAddr = match to {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(SocketAddr::new(to, port))?;
        let datagram: Vec<u8> = (0..=u8::MAX).cycle().take(size).collect();
        socket.send(&datagram)?;
        let mut answer = vec![0; 65536];
        let received = patiently(wait, |wait| {
            socket.set_read_timeout(Some(wait))?;
            socket.recv(&mut answer)
        });
        match received {
            Ok(length) => {
                ensure!(answer[..length] == datagram, "{to}:{port} sends something else back");
                Ok(true)
            }
            Err(error) if outcome(&error).is_some() => Ok(false),
            Err(error) => Err(error.into()),
        }
    })?
}

/// Sends back what it gets, over TCP and UDP, until it is dropped.
pub struct Listener {
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<()>>,
}

/// How often a listener looks whether it should stop.
const PAUSE: Duration = Duration::from_millis(5);

impl Listener {
    /// Listens on a port, by TCP and UDP, in a namespace.
    ///
    /// # Errors
    ///
    /// Where the port is taken.
    pub fn new(namespace: &str, port: u16) -> anyhow::Result<Self> {
        let (tcp, udp) = in_netns(namespace, || -> io::Result<_> {
            Ok((
                // Both families.
                TcpListener::bind(("::", port))?,
                UdpSocket::bind(("::", port))?,
            ))
        })?
        .with_context(|| format!("listening on port {port} in {namespace}"))?;
        tcp.set_nonblocking(true)?;
        udp.set_read_timeout(Some(Duration::from_millis(100)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (for_tcp, for_udp) = (Arc::clone(&stop), Arc::clone(&stop));
        let accepted = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&accepted);
        let threads = vec![
            thread::spawn(move || serve_tcp(&tcp, &for_tcp, &counter)),
            thread::spawn(move || serve_udp(&udp, &for_udp)),
        ];
        Ok(Self {
            stop,
            accepted,
            threads,
        })
    }

    /// TCP connections that it has accepted so far.
    #[must_use]
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }
}

fn serve_tcp(listener: &TcpListener, stop: &Arc<AtomicBool>, accepted: &AtomicUsize) {
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, _)) => {
                accepted.fetch_add(1, Ordering::Relaxed);
                let stop = Arc::clone(stop);
                thread::spawn(move || echo(stream, &stop));
            }
            Err(_) => thread::sleep(PAUSE),
        }
    }
}

/// Ends with the connection, at the latest a while after the listener: nobody waits for it.
fn echo(mut stream: TcpStream, stop: &AtomicBool) {
    if stream.set_nonblocking(false).is_err() || stream.set_read_timeout(Some(Duration::from_millis(100))).is_err() {
        return;
    }
    let mut buffer = [0; 4096];
    while !stop.load(Ordering::Relaxed) {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                if stream.write_all(&buffer[..length]).is_err() {
                    return;
                }
            }
            Err(error) if outcome(&error) == Some(TcpOutcome::Silence) => {}
            Err(_) => return,
        }
    }
}

fn serve_udp(socket: &UdpSocket, stop: &AtomicBool) {
    let mut buffer = vec![0; 65536];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            // A sender that has gone does not want its answer.
            let _ = socket.send_to(&buffer[..length], from);
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                eprintln!("a listener's thread has panicked");
            }
        }
    }
}

/// Waits until `done` says so; false where it does not in time.
pub fn wait_until(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// TCP segments that a namespace has sent again so far: each is one that was lost, or seemed so.
///
/// # Errors
///
/// Where the kernel's counters can't be read.
pub fn tcp_retransmits(namespace: &str) -> anyhow::Result<u64> {
    counter(namespace, "snmp", "Tcp:", "RetransSegs")
}

/// TCP segments of which a namespace has heard so far that they have arrived twice (RFC 2883): what was sent again for nothing.
///
/// # Errors
///
/// Where the kernel's counters can't be read.
pub fn tcp_duplicates(namespace: &str) -> anyhow::Result<u64> {
    counter(namespace, "netstat", "TcpExt:", "TCPDSACKRecvSegs")
}

/// TCP segments that a namespace has sent again so far, but for those of which it has heard that they have arrived twice: on a busy
/// machine an acknowledgement may come so late that its segment seems lost. One that was lost seems the same.
///
/// # Errors
///
/// Where the kernel's counters can't be read.
pub fn tcp_lost(namespace: &str) -> anyhow::Result<u64> {
    let again = tcp_retransmits(namespace)?;
    Ok(again.saturating_sub(tcp_duplicates(namespace)?))
}

/// A counter of a protocol (`net/ipv4/proc.c`).
fn counter(namespace: &str, file: &str, protocol: &str, name: &str) -> anyhow::Result<u64> {
    let path = format!("/proc/thread-self/net/{file}");
    let text = in_netns(namespace, || std::fs::read_to_string(path))??;
    let mut lines = text.lines().filter(|line| line.starts_with(protocol));
    let (names, values) = lines.next().zip(lines.next()).context("no such counters")?;
    let mut counters = names.split_whitespace().zip(values.split_whitespace());
    let found = counters.find(|(one, _)| *one == name);
    let (_, count) = found.with_context(|| format!("no {name}"))?;
    Ok(count.parse()?)
}

/// Bytes that a namespace's interfaces have sent so far, but for `lo`.
///
/// # Errors
///
/// Where the kernel's counters can't be read.
pub fn sent_bytes(namespace: &str) -> anyhow::Result<u64> {
    let devices = in_netns(namespace, || std::fs::read_to_string("/proc/thread-self/net/dev"))??;
    let devices = devices.lines().skip(2).filter_map(|line| line.split_once(':'));
    let sent = devices.filter(|(name, _)| name.trim() != "lo").map(|(_, counters)| {
        Ok(counters
            .split_whitespace()
            .nth(8)
            .context("no counter")?
            .parse::<u64>()?)
    });
    sent.sum()
}
