//! Asking etcd, which may be away: what is tried again, for how long, and when it is not even asked.

use super::config::{EtcdConfig, endpoints};
use crate::{
    random,
    store::{Collection, StoreError},
};
use etcd_client::{Client, ConnectOptions, Error, GetOptions, GetResponse, WatchOptions, WatchStream};
use std::{
    error::Error as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};
use tokio::time::timeout;

/// An answer may take so much longer for each mebibyte that is sent or asked for.
const FOR_A_MEBIBYTE: Duration = Duration::from_millis(500);
/// A request is tried so often, and once more for each further member, with a pause that doubles; not again where it has taken
/// so long already that every member could have answered.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_millis(50);
/// While etcd is away it is asked after such a pause by a task of its own, which doubles it up to the second.
const AWAY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// Messages may be so long, in bytes: a page of records, or a part of a module.
const MESSAGE: usize = 256 << 20;

/// A way to one cluster of etcd.
pub struct Connection {
    store: String,
    members: u32,
    options: ConnectOptions,
    /// An answer may take so long.
    answer: Duration,
    /// What may be the reason where nobody answers.
    hint: &'static str,
    /// A key that is asked for to see whether anybody does.
    probe: String,
    state: Mutex<State>,
    me: Weak<Self>,
}

#[derive(Default)]
struct State {
    client: Option<Client>,
    away: Option<Away>,
}

/// Nobody has answered.
struct Away {
    since: Instant,
    problem: String,
}

/// A pause of this length or up to a half less: so that not all nodes do the same at the same time.
pub fn jitter(pause: Duration) -> Duration {
    // Without a random number all that is lost is that.
    let part = random::bytes().map_or(0, u16::from_ne_bytes);
    pause.mul_f64(1.0 - f64::from(part) / f64::from(u16::MAX) / 2.0)
}

impl Connection {
    pub fn new(store: &str, config: &EtcdConfig) -> Result<Arc<Self>, StoreError> {
        let options = config.options()?;
        Ok(Arc::new_cyclic(|me| Self {
            store: store.to_owned(),
            members: u32::try_from(endpoints(store).len()).unwrap_or(u32::MAX),
            options,
            answer: Duration::from_secs(u64::from(config.answer_seconds)),
            // Members that ask for a certificate end the connection of whoever has none.
            hint: if config.ca.is_some() && config.certificate.is_none() {
                " (do they ask for a certificate? `etcd.certificate`)"
            } else {
                ""
            },
            probe: format!("{}/{}/", config.prefix, Collection::Cluster.name()),
            state: Mutex::default(),
            me: me.clone(),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks, and asks again where that can help. While etcd is away whoever asks has an error at once.
    pub async fn ask<T, F>(&self, mebibytes: u32, what: impl Fn(Client, u32) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        if let Some(away) = &self.state().away {
            return Err(self.unavailable(away));
        }
        let limit = self.answer + FOR_A_MEBIBYTE * mebibytes;
        let began = Instant::now();
        let mut pause = PAUSE;
        let mut tries = 0;
        loop {
            tries += 1;
            let asked = timeout(limit, async {
                let client = self.client().await?;
                what(client, tries - 1).await
            });
            let problem = match asked.await {
                Ok(Ok(answer)) => {
                    self.answered();
                    return Ok(answer);
                }
                Ok(Err(error)) => match explain(&error) {
                    Problem::Away(problem) => problem,
                    Problem::Refused(problem) => {
                        self.answered();
                        return Err(self.refused(problem));
                    }
                },
                Err(_) => format!("no answer within {} ms", limit.as_millis()),
            };
            if tries >= TRIES + self.members - 1 || began.elapsed() > limit * self.members {
                return Err(self.gone(problem));
            }
            tokio::time::sleep(jitter(pause)).await;
            pause *= 2;
        }
    }

    /// Asks whether etcd is back that has been away since then, until it is, so that nobody else has to wait for that.
    async fn probe(connection: Weak<Self>, since: Instant) {
        let mut pause = AWAY.0;
        loop {
            tokio::time::sleep(jitter(pause)).await;
            pause = (pause * 2).min(AWAY.1);
            let Some(this) = connection.upgrade() else { return };
            // Each member has its turn.
            for _ in 0..this.members {
                let asked = timeout(this.answer, async {
                    get(&this.client().await?, this.probe.as_bytes(), GetOptions::new()).await
                });
                let problem = match asked.await {
                    Ok(Ok(_)) => return this.answered(),
                    Ok(Err(error)) => match explain(&error) {
                        Problem::Away(problem) => problem,
                        Problem::Refused(_) => return this.answered(),
                    },
                    Err(_) => format!("no answer within {} ms", this.answer.as_millis()),
                };
                match &mut this.state().away {
                    Some(away) if away.since == since => away.problem = problem,
                    // Somebody else has had an answer.
                    _ => return,
                }
            }
        }
    }

    /// The client; it is made where there is none, which takes an answer of etcd's where there is a user.
    async fn client(&self) -> Result<Client, Error> {
        let known = self.state().client.clone();
        if let Some(client) = known {
            return Ok(client);
        }
        let client = Client::connect(endpoints(&self.store), Some(self.options.clone())).await?;
        self.state().client = Some(client.clone());
        Ok(client)
    }

    fn answered(&self) {
        if let Some(away) = self.state().away.take() {
            tracing::info!("the store is back after {} s", away.since.elapsed().as_secs());
        }
    }

    /// Why nobody answers.
    pub fn problem(&self) -> Option<String> {
        let state = self.state();
        state.away.as_ref().map(|away| self.unavailable(away).to_string())
    }

    fn gone(&self, problem: String) -> StoreError {
        let mut state = self.state();
        let away = state.away.get_or_insert_with(|| {
            tracing::warn!("{}: {problem}; pods keep talking, and changes wait", self.store);
            let since = Instant::now();
            tokio::spawn(Self::probe(self.me.clone(), since));
            Away {
                since,
                problem: String::new(),
            }
        });
        away.problem = problem;
        self.unavailable(away)
    }

    fn unavailable(&self, away: &Away) -> StoreError {
        StoreError::Unavailable {
            store: self.store.clone(),
            seconds: away.since.elapsed().as_secs(),
            problem: format!("{}{}", away.problem, self.hint),
        }
    }

    pub fn refused(&self, problem: String) -> StoreError {
        StoreError::Refused {
            store: self.store.clone(),
            problem,
        }
    }

    /// What a stream has ended with, as an error of the store.
    pub fn error(&self, error: &Error) -> StoreError {
        match explain(error) {
            Problem::Away(problem) => self.gone(problem),
            Problem::Refused(problem) => self.refused(problem),
        }
    }
}

enum Problem {
    /// Nobody has answered, or nobody who could.
    Away(String),
    /// Etcd will not.
    Refused(String),
}

/// What an error of the client means: codes as in etcd's api/v3rpc/rpctypes/error.go (3.4).
fn explain(error: &Error) -> Problem {
    match error {
        Error::TransportError(error) => Problem::Away(chain(error)),
        Error::IoError(error) => Problem::Away(error.to_string()),
        Error::WatchError(problem) | Error::LeaseKeepAliveError(problem) => Problem::Away(problem.clone()),
        Error::GRpcStatus(status) => {
            // By number, since the library has no name for the type.
            let said = status.message();
            match status.code() as i32 {
                // Cancelled, Unknown, DeadlineExceeded, Aborted, Internal, Unavailable
                1 | 2 | 4 | 10 | 13 | 14 if status.source().is_some() => Problem::Away(chain(status)),
                1 | 2 | 4 | 10 | 13 | 14 => Problem::Away(said.to_owned()),
                // PermissionDenied, Unauthenticated
                7 | 16 => Problem::Refused(format!(
                    "{said}: the user in `etcd.user` needs a role with readwrite on all keys that begin with `etcd.prefix`"
                )),
                // ResourceExhausted
                8 if said.contains("too many requests") => Problem::Away(said.to_owned()),
                8 if said.contains("space") => Problem::Refused(format!(
                    "{said}: compact and defragment it, or raise its `--quota-backend-bytes`, then `etcdctl alarm disarm`"
                )),
                // InvalidArgument, for a moment after users or roles were changed
                3 if said.contains("auth store is old") => Problem::Away(said.to_owned()),
                _ => Problem::Refused(said.to_owned()),
            }
        }
        other => Problem::Refused(other.to_string()),
    }
}

/// What an error comes from: the ones before it say only that there is one.
fn chain(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

/// Gets a value, or a page of them.
pub async fn get(client: &Client, key: &[u8], options: GetOptions) -> Result<GetResponse, Error> {
    let mut keys = client.kv_client().max_decoding_message_size(MESSAGE);
    keys.get(key, Some(options)).await
}

/// Begins a watch.
pub async fn watch(client: &Client, key: &[u8], options: WatchOptions) -> Result<WatchStream, Error> {
    let mut watches = client.watch_client().max_decoding_message_size(MESSAGE);
    watches.watch(key, Some(options)).await
}
