//! Silence, and slowness: on a machine that is busy with other things an answer may come late.

use std::{
    io::{self, ErrorKind},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

/// Threads that start and end one after the other, to see how long the machine takes for what is nothing.
const THREADS: u32 = 8;
/// An exchange may take so many times as long.
const MORE: u32 = 20;
const LEAST: Duration = Duration::from_millis(50);
const MOST: Duration = Duration::from_secs(20);

/// How long to wait for an answer that has not come in time, before it is taken for none: as long as this machine may take for
/// it at the moment.
pub(crate) fn more_time() -> Duration {
    let began = Instant::now();
    for _ in 0..THREADS {
        // One that can't be started shows how busy the machine is, too.
        if let Ok(thread) = thread::Builder::new().spawn(|| ()) {
            let _ = thread.join();
        }
    }
    (began.elapsed() * MORE).clamp(LEAST, MOST)
}

/// Waits for an answer once more where none has come in time.
pub(crate) fn patiently<T>(wait: Duration, mut receive: impl FnMut(Duration) -> io::Result<T>) -> io::Result<T> {
    match receive(wait) {
        Err(error) if is_silence(&error) => receive(more_time()),
        other => other,
    }
}

/// Opens a TCP connection. One that is not answered is tried once more, for longer where the machine is busy.
pub(crate) fn connect(to: SocketAddr, wait: Duration) -> io::Result<TcpStream> {
    match TcpStream::connect_timeout(&to, wait) {
        Err(error) if is_silence(&error) => TcpStream::connect_timeout(&to, more_time().max(wait)),
        other => other,
    }
}

fn is_silence(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock)
}
