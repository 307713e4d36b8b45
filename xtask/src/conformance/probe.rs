//! Probes: whether a connection opens.

use anyhow::Context;
use harness::in_netns;
use std::{
    fmt,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

/// What became of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The answer came.
    Open,
    /// Nothing came.
    Silence,
    /// Something else did: a reset, an ICMP error. Neither policy nor a listener answers so.
    Error(String),
}

impl Outcome {
    /// Whether it is what was expected.
    pub fn is(&self, allowed: bool) -> bool {
        *self == if allowed { Self::Open } else { Self::Silence }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open => out.write_str("the answer came"),
            Self::Silence => out.write_str("nothing came back"),
            Self::Error(problem) => out.write_str(problem),
        }
    }
}

/// One probe.
#[derive(Clone, Debug)]
pub struct Probe {
    /// Network namespace that it comes from.
    pub netns: String,
    /// Address that it is sent from.
    pub from: IpAddr,
    pub to: IpAddr,
    pub tcp: bool,
    pub port: u16,
}

impl Probe {
    /// Sends it, and waits so long.
    pub fn send(&self, wait: Duration) -> anyhow::Result<Outcome> {
        in_netns(&self.netns, || if self.tcp { self.tcp(wait) } else { self.udp(wait) })?
            .with_context(|| format!("{self:?}"))
    }

    fn tcp(&self, wait: Duration) -> anyhow::Result<Outcome> {
        let deadline = Instant::now() + wait;
        // The source is chosen by binding; the standard library can't bind a stream, so the kernel is asked.
        let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None)?;
        rustix::net::bind(&socket, &SocketAddr::new(self.from, 0))?;
        let mut stream = TcpStream::from(socket);
        stream.set_nonblocking(true)?;
        match rustix::net::connect(&stream, &SocketAddr::new(self.to, self.port)) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
            Err(error) => return Ok(Outcome::Error(error.to_string())),
        }
        let mut wanted = [rustix::event::PollFd::new(&stream, rustix::event::PollFlags::OUT)];
        let timeout = rustix::event::Timespec::try_from(wait)?;
        if rustix::event::poll(&mut wanted, Some(&timeout))? == 0 {
            return Ok(Outcome::Silence);
        }
        if let Some(error) = stream.take_error()? {
            return Ok(failed(&error));
        }
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(deadline.saturating_duration_since(Instant::now()).max(wait / 2)))?;
        let mut answer = [0; 6];
        Ok(
            match stream
                .write_all(b"hello\n")
                .and_then(|()| stream.read_exact(&mut answer))
            {
                Ok(()) => Outcome::Open,
                Err(error) => failed(&error),
            },
        )
    }

    fn udp(&self, wait: Duration) -> anyhow::Result<Outcome> {
        let socket = UdpSocket::bind((self.from, 0))?;
        socket.connect(SocketAddr::new(self.to, self.port))?;
        socket.set_read_timeout(Some(wait))?;
        let mut answer = [0; 16];
        Ok(match socket.send(b"hello").and_then(|_| socket.recv(&mut answer)) {
            Ok(_) => Outcome::Open,
            Err(error) => failed(&error),
        })
    }
}

fn failed(error: &std::io::Error) -> Outcome {
    match error.kind() {
        ErrorKind::TimedOut | ErrorKind::WouldBlock => Outcome::Silence,
        _ => Outcome::Error(error.to_string()),
    }
}
