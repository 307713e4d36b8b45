//! Asking a running hostd.

use super::{Failure, Monitor, Request, Response};
use crate::codec::{self, CodecError};
use std::{io, path::Path, path::PathBuf};
use tokio::net::UnixStream;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "cannot reach hostd at {socket}: {source}; is `hostd run` running, with this socket (`--socket`, HOSTD_SOCKET), and are you root?"
    )]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection failed.
    #[error("talking to hostd: {0}")]
    Codec(#[from] CodecError),
    /// The connection ended before the answer.
    #[error("hostd closed the connection without an answer; its log says why")]
    Closed,
    /// hostd refused.
    #[error("{0}")]
    Refused(String),
    /// hostd could not do what a container runtime has asked for.
    #[error("{1}")]
    Failed(Failure, String),
}

async fn ask(socket: &Path, request: &Request) -> Result<UnixStream, ClientError> {
    let mut stream = UnixStream::connect(socket)
        .await
        .map_err(|source| ClientError::Connect {
            socket: socket.to_owned(),
            source,
        })?;
    // A server that refuses the caller closes at once; what it said first is still there to be read.
    match codec::write(&mut stream, request).await {
        Ok(()) => {}
        Err(CodecError::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => {}
        Err(error) => return Err(error.into()),
    }
    Ok(stream)
}

async fn answer(stream: &mut UnixStream) -> Result<Response, ClientError> {
    match codec::read(stream).await? {
        Some(Response::Error(problem)) => Err(ClientError::Refused(problem)),
        Some(Response::Failed(failure, problem)) => Err(ClientError::Failed(failure, problem)),
        Some(response) => Ok(response),
        None => Err(ClientError::Closed),
    }
}

/// Asks, and waits for the answer.
///
/// # Errors
///
/// Where hostd can't be reached or refuses.
pub async fn call(socket: &Path, request: &Request) -> Result<Response, ClientError> {
    answer(&mut ask(socket, request).await?).await
}

/// Asks for reports, and hands them to `sink` until it says no or hostd ends.
///
/// # Errors
///
/// Where hostd can't be reached or refuses.
pub async fn monitor(socket: &Path, what: Monitor, mut sink: impl FnMut(Response) -> bool) -> Result<(), ClientError> {
    let mut stream = ask(socket, &Request::Monitor(what)).await?;
    while sink(answer(&mut stream).await?) {}
    Ok(())
}
