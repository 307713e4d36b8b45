//! Many short connections.

use crate::in_netns;
use anyhow::Context;
use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Duration,
};

const WAIT: Duration = Duration::from_secs(90);
/// Threads that accept.
const SERVERS: usize = 4;

/// What came of many connections, each of which was opened, asked by, answered, and closed.
#[derive(Debug)]
pub struct Short {
    /// How many went well.
    pub done: u64,
    /// Why the others did not.
    pub problems: Vec<String>,
}

/// Opens so many connections from a namespace to an [`answer_each`], by so many threads.
///
/// # Errors
///
/// Where there is no such namespace.
pub fn short_connections(from: &str, to: SocketAddr, count: u64, threads: u64) -> anyhow::Result<Short> {
    let done = AtomicU64::new(0);
    let client = || {
        let mut problems = Vec::new();
        for _ in 0..count / threads {
            match short_connection(to) {
                Ok(()) => {
                    done.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => problems.push(error.to_string()),
            }
        }
        problems
    };
    let problems = thread::scope(|scope| {
        let clients: Vec<_> = (0..threads).map(|_| scope.spawn(|| in_netns(from, client))).collect();
        let ended = clients.into_iter().map(thread::ScopedJoinHandle::join);
        ended
            .map(|problems| problems.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect::<anyhow::Result<Vec<_>>>()
    })?;
    Ok(Short {
        done: done.into_inner(),
        problems: problems.concat(),
    })
}

fn short_connection(to: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, WAIT)?;
    stream.set_read_timeout(Some(WAIT))?;
    stream.write_all(b"?")?;
    // To its end: the server closes first, and so has to wait, and not the client with its few ports.
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    if answer == b"!" {
        Ok(())
    } else {
        Err(io::Error::other("no answer"))
    }
}

/// Answers short connections at a port of a namespace, of both families, until the process ends.
///
/// # Errors
///
/// Where the port is taken.
pub fn answer_each(netns: &str, port: u16) -> anyhow::Result<()> {
    let listener = in_netns(netns, || TcpListener::bind(("::", port)))?
        .with_context(|| format!("listening on port {port} in {netns}"))?;
    for _ in 0..SERVERS {
        let socket = listener.try_clone()?;
        thread::spawn(move || {
            for stream in socket.incoming() {
                let Ok(mut stream) = stream else { return };
                // A client that has gone wants no answer.
                let _ = stream.read_exact(&mut [0; 1]).and_then(|()| stream.write_all(b"!"));
            }
        });
    }
    Ok(())
}
