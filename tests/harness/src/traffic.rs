//! Traffic that goes on while something is done.

use crate::{
    in_netns,
    patience::more_time,
    probe::{outcome, wait_until},
};
use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// So many datagrams must have come back, one of them at the end.
const ENOUGH: u64 = 100;
const ENOUGH_TIME: Duration = Duration::from_secs(20);

/// UDP echoes from one pod to another, one after the other, until it is stopped: each datagram that does not come back
/// is a lost packet, since nothing sends it again.
pub struct Traffic {
    stop: Arc<AtomicBool>,
    /// Answered so far.
    answered: Arc<AtomicU64>,
    thread: JoinHandle<anyhow::Result<Counts>>,
}

/// What became of the datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Came back.
    pub answered: u64,
    /// Did not.
    pub lost: u64,
    /// The longest time that one took to come back.
    pub slowest: Duration,
}

impl Traffic {
    /// Starts sending; after `wait` the next datagram goes out, and one is lost that has not come back until the end.
    #[must_use]
    pub fn start(namespace: &str, to: IpAddr, port: u16, wait: Duration) -> Self {
        Self::paced(namespace, to, port, wait, Duration::ZERO)
    }

    /// The same with a pause between two of them.
    #[must_use]
    pub fn paced(namespace: &str, to: IpAddr, port: u16, wait: Duration, pause: Duration) -> Self {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (namespace, told, count) = (namespace.to_owned(), Arc::clone(&stop), Arc::clone(&answered));
        let echo = move || echo_until(&told, &count, to, port, wait, pause);
        Self {
            stop,
            answered,
            thread: thread::spawn(move || in_netns(&namespace, echo)?),
        }
    }

    /// Stops when enough datagrams have come back to say something, also on a slow machine, and says what became of all of them.
    ///
    /// # Errors
    ///
    /// Where nothing could be sent.
    ///
    /// # Panics
    ///
    /// Where the sending thread has.
    pub fn stop(self) -> anyhow::Result<Counts> {
        let before = self.answered.load(Ordering::Relaxed);
        let enough = || self.answered.load(Ordering::Relaxed) > ENOUGH.max(before);
        // Where nothing comes back, that is what is said.
        wait_until(ENOUGH_TIME, || enough() || self.thread.is_finished());
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Stops.
    ///
    /// # Panics
    ///
    /// Where a datagram was lost, or so few were sent that it says little.
    pub fn lost_nothing(self) {
        let counts = self.stop().expect("datagrams can be sent");
        assert!(counts.lost == 0 && counts.answered > ENOUGH, "{counts:?}");
    }
}

fn echo_until(
    stop: &AtomicBool,
    answered: &AtomicU64,
    to: IpAddr,
    port: u16,
    wait: Duration,
    pause: Duration,
) -> anyhow::Result<Counts> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(SocketAddr::new(to, port))?;
    socket.set_read_timeout(Some(wait))?;
    let mut counts = Counts::default();
    let mut number = 0_u64;
    let mut missing = BTreeSet::new();
    let mut answer = [0; 8];
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        if !pause.is_zero() {
            thread::sleep(pause);
        }
        let sent = Instant::now();
        socket.send(&number.to_be_bytes())?;
        loop {
            match socket.recv(&mut answer) {
                Ok(_) if answer == number.to_be_bytes() => {
                    counts.answered += 1;
                    answered.fetch_add(1, Ordering::Relaxed);
                    counts.slowest = counts.slowest.max(sent.elapsed());
                    break;
                }
                // A late answer.
                Ok(_) => counts.answered += u64::from(missing.remove(&u64::from_be_bytes(answer))),
                Err(error) if outcome(&error).is_some() => {
                    missing.insert(number);
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    // Those on their way arrive still.
    while !missing.is_empty() {
        socket.set_read_timeout(Some(more_time()))?;
        match socket.recv(&mut answer) {
            Ok(_) => counts.answered += u64::from(missing.remove(&u64::from_be_bytes(answer))),
            Err(_) => break,
        }
    }
    counts.lost = u64::try_from(missing.len())?;
    Ok(counts)
}
