//! How long it takes from a change until packets meet it.

use anyhow::{Context, ensure};
use harness::{Cluster, in_netns};
use hostd::api::{self, EndpointLabel, PodName, Request};
use std::{
    collections::BTreeMap,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use wasmgate_tests::report::Samples;

/// Pause between two datagrams: how exactly a moment is known.
const PAUSE: Duration = Duration::from_micros(250);
/// From the change on, longer than anything that is still measured.
const LATE: Duration = Duration::from_secs(5);
/// What was sent before a change has come back after this time, or never does.
const SETTLED: Duration = Duration::from_millis(30);

/// A pod that asks another one all the time, and when it asked what was answered.
pub struct Prober {
    stop: Arc<AtomicBool>,
    answered: Arc<Mutex<Vec<Instant>>>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Prober {
    pub fn start(from: &str, to: SocketAddr) -> Self {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let (from, told, note) = (from.to_owned(), Arc::clone(&stop), Arc::clone(&answered));
        let thread = thread::spawn(move || in_netns(&from, || probe(to, &told, &note))?);
        Self {
            stop,
            answered,
            thread: Some(thread),
        }
    }

    fn answers(&self) -> MutexGuard<'_, Vec<Instant>> {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When it was answered first after a moment, or last, where it is answered no longer.
    fn turned(&self, began: Instant, open: bool) -> anyhow::Result<Instant> {
        loop {
            let after: Vec<Instant> = self.answers().iter().copied().filter(|sent| *sent >= began).collect();
            if open && let Some(first) = after.first() {
                return Ok(*first);
            }
            let last = after.last().copied().unwrap_or(began);
            if !open && last.elapsed() > SETTLED {
                return Ok(last);
            }
            ensure!(began.elapsed() < LATE, "the change is not enforced after {LATE:?}");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(Err(error)) = self.thread.take().and_then(|thread| thread.join().ok()) {
            eprintln!("asking: {error:#}");
        }
    }
}

fn probe(to: SocketAddr, stop: &AtomicBool, answered: &Mutex<Vec<Instant>>) -> anyhow::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_nonblocking(true)?;
    let began = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let now = u64::try_from(began.elapsed().as_nanos())?;
        socket.send_to(&now.to_be_bytes(), to)?;
        let mut answer = [0; 8];
        while socket.recv(&mut answer).is_ok() {
            let sent = began + Duration::from_nanos(u64::from_be_bytes(answer));
            answered.lock().unwrap_or_else(PoisonError::into_inner).push(sent);
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// Makes the pod that is asked `dns`, which everybody reaches, and something else in turn; milliseconds from each request
/// until it holds for all who ask.
pub fn relabel(cluster: &Cluster, probers: &[Prober], pod: &str, times: usize) -> anyhow::Result<Samples> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (namespace, name) = pod.split_once('/').context("a pod is NAMESPACE/NAME")?;
    let socket = cluster.nodes[cluster.pod(pod).node].socket();
    let mut samples = Samples::default();
    for number in 0..times {
        let open = number % 2 == 0;
        let app = if open { "dns" } else { "other" };
        let request = Request::EndpointLabel(EndpointLabel {
            pod: PodName {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
            },
            set: BTreeMap::from([("app".to_owned(), app.to_owned())]),
            remove: Vec::new(),
        });
        for prober in probers {
            prober.answers().clear();
        }
        let began = Instant::now();
        runtime.block_on(api::call(&socket, &request))?;
        let mut held = began;
        for prober in probers {
            held = held.max(prober.turned(began, open)?);
        }
        samples.push((held - began).as_secs_f64() * 1000.0);
        thread::sleep(SETTLED);
    }
    Ok(samples)
}
