//! Requests of the control socket, turned into messages to the daemon's task; and the monitor.

use super::{Command, Names, coordinate::Coordinator};
use crate::{
    api::{Monitor, PacketView, Request, Response},
    codec,
    datapath::EventStream,
    plan::protocol_name,
    source::PodSource,
};
use abi::{AddressKey, DropReason, Event, Family, Hook, Path, event::ALLOWED};
use std::{
    io,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{
    io::AsyncReadExt,
    net::UnixStream,
    sync::{broadcast, mpsc, oneshot},
};

/// Packets that wait for a slow monitor.
const MONITOR_QUEUE: usize = 8192;

/// What requests need.
pub struct Front {
    pub daemon: mpsc::Sender<Command>,
    pub coordinator: Coordinator,
    pub events: broadcast::Sender<Event>,
    pub names: Arc<RwLock<Names>>,
    /// Knows what container runtimes do not say of their pods.
    pub source: Box<dyn PodSource>,
}

pub fn stopping() -> Response {
    Response::Error("hostd is stopping".to_owned())
}

pub async fn reply(stream: &mut UnixStream, response: &Response) -> io::Result<()> {
    codec::write(stream, response).await.map_err(io::Error::other)
}

/// A channel of events that monitors subscribe to.
pub fn event_channel() -> broadcast::Sender<Event> {
    broadcast::channel(MONITOR_QUEUE).0
}

/// Hands the programs' reports to the monitors, and flows that were opened to the daemon's task while it audits them.
pub async fn pump(
    mut stream: EventStream,
    events: broadcast::Sender<Event>,
    daemon: mpsc::Sender<Command>,
    audit: Arc<AtomicBool>,
) {
    loop {
        let read = stream.next(|event| {
            if event.reason == ALLOWED && audit.load(Ordering::Relaxed) {
                // A daemon that can't keep up misses some: the audit is a sample then.
                let _ = daemon.try_send(Command::Opened(event));
            }
            // Without a monitor nobody is there to take it.
            let _ = events.send(event);
        });
        if let Err(error) = read.await {
            tracing::error!("reading the programs' reports: {error}");
            return;
        }
    }
}

impl Front {
    /// Answers one request.
    pub async fn handle(&self, request: Request, mut stream: UnixStream) -> io::Result<()> {
        let response = match request {
            Request::Monitor(what) => return self.monitor(what, stream).await,
            Request::PolicyChange(change) => match self.coordinator.change(change).await {
                Ok(report) => Response::Loaded(Box::new(report)),
                Err(error) => Response::Error(error.to_string()),
            },
            Request::Status => self.ask(Command::Status).await,
            Request::EndpointAdd(add) => self.ask(|reply| Command::EndpointAdd(add, reply)).await,
            Request::EndpointDelete(pod) => self.ask(|reply| Command::EndpointDelete(pod, reply)).await,
            Request::Attach(attach) => return self.attach(*attach, stream).await,
            Request::Detach(attachment) => return self.detach(attachment, stream).await,
            Request::CheckAttachment(asked) => self.ask(|reply| Command::CheckAttachment(asked, reply)).await,
            Request::CollectAttachments { network, valid } => {
                self.ask(|reply| Command::CollectAttachments(network, valid, reply))
                    .await
            }
            Request::Readiness => self.ask(Command::Readiness).await,
            Request::EndpointList => self.ask(Command::EndpointList).await,
            Request::EndpointLabel(label) => self.ask(|reply| Command::EndpointLabel(label, reply)).await,
            Request::IdentityList => self.ask(Command::IdentityList).await,
            Request::IpcacheList => self.ask(Command::IpcacheList).await,
            Request::PolicyShow => self.ask(Command::PolicyShow).await,
            Request::PolicyList => self.ask(Command::PolicyList).await,
            Request::PolicyInspect(name) => self.ask(|reply| Command::PolicyInspect(name, reply)).await,
            Request::PolicyVerify(text) => self.ask(|reply| Command::PolicyVerify(text, reply)).await,
            Request::PolicyAudit => self.ask(Command::PolicyAudit).await,
            Request::Explain(what) => self.ask(|reply| Command::Explain(what, reply)).await,
            Request::NamespaceLabel(change) => self.ask(|reply| Command::NamespaceLabel(change, reply)).await,
            Request::NamespaceList => self.ask(Command::NamespaceList).await,
            Request::ServiceAdd(record) => self.ask(|reply| Command::ServiceAdd(record, reply)).await,
            Request::ServiceDelete(service) => self.ask(|reply| Command::ServiceDelete(service, reply)).await,
            Request::ServiceList => self.ask(Command::ServiceList).await,
            Request::Drain => self.ask(Command::Drain).await,
            Request::NodeDelete(name) => self.ask(|reply| Command::NodeDelete(name, reply)).await,
        };
        reply(&mut stream, &response).await
    }

    pub(super) async fn ask(&self, command: impl FnOnce(oneshot::Sender<Response>) -> Command) -> Response {
        let (reply, answer) = oneshot::channel();
        match self.daemon.send(command(reply)).await {
            Ok(()) => answer.await.unwrap_or_else(|_| stopping()),
            Err(_) => stopping(),
        }
    }

    async fn monitor(&self, what: Monitor, mut stream: UnixStream) -> io::Result<()> {
        let mut events = self.events.subscribe();
        let step = |sign: i32| Command::Report {
            drops: sign * i32::from(what.drops),
            flows: sign * i32::from(what.flows),
        };
        self.daemon.send(step(1)).await.map_err(io::Error::other)?;
        let result = self.stream_events(what, &mut events, &mut stream).await;
        self.daemon.send(step(-1)).await.map_err(io::Error::other)?;
        result
    }

    async fn stream_events(
        &self,
        what: Monitor,
        events: &mut broadcast::Receiver<Event>,
        stream: &mut UnixStream,
    ) -> io::Result<()> {
        codec::write(stream, &Response::Monitoring)
            .await
            .map_err(io::Error::other)?;
        let mut nothing = [0; 1];
        loop {
            let response = tokio::select! {
                event = events.recv() => match event {
                    Ok(event) if (event.reason == ALLOWED && !what.flows) || (event.reason != ALLOWED && !what.drops) => {
                        continue;
                    }
                    Ok(event) => Response::Packet(self.view(&event)),
                    Err(broadcast::error::RecvError::Lagged(missed)) => Response::Missed(missed),
                    Err(broadcast::error::RecvError::Closed) => return Ok(()),
                },
                // The client says nothing more: what can be read is its end.
                _ = stream.read(&mut nothing) => return Ok(()),
            };
            if codec::write(stream, &response).await.is_err() {
                return Ok(()); // it has gone
            }
        }
    }

    fn view(&self, event: &Event) -> PacketView {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        let known = event.family != 0;
        let key = |address| {
            AddressKey::new(
                if event.family == Family::V6 as u8 {
                    Family::V6
                } else {
                    Family::V4
                },
                address,
            )
        };
        let address = |address| known.then(|| key(address).ip());
        let allowed = event.reason == ALLOWED;
        let path = || {
            Path::ALL
                .iter()
                .find(|path| **path as u8 == event.path)
                .map(|path| path.name())
        };
        let reason = || DropReason::from_number(event.reason).map(DropReason::name);
        let hook = Hook::ALL.iter().find(|hook| **hook as u8 == event.hook);
        PacketView {
            time_ms: wall_clock_ms(event.time),
            verdict: if allowed { "allow" } else { "drop" }.to_owned(),
            reason: if allowed { path() } else { reason() }.unwrap_or("unknown").to_owned(),
            hook: hook.map_or("unknown", |hook| hook.name()).to_owned(),
            protocol: if known {
                protocol_name(event.protocol)
            } else {
                String::new()
            },
            source: address(event.source),
            source_port: event.source_port,
            source_name: names.address(&key(event.source)),
            destination: address(event.destination),
            destination_port: event.destination_port,
            destination_name: names.address(&key(event.destination)),
            from: names.identity(event.from),
            to: names.identity(event.to),
            length: event.length,
            generation: event.generation,
        }
    }
}

/// The programs' clock is `CLOCK_MONOTONIC`.
fn wall_clock_ms(monotonic_ns: u64) -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
    let age = Duration::from_nanos((seconds * 1_000_000_000 + nanoseconds).saturating_sub(monotonic_ns));
    let then = SystemTime::now().checked_sub(age).unwrap_or(UNIX_EPOCH);
    u64::try_from(then.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}
