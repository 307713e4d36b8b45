//! The control socket's server.

use super::{Request, Response};
use crate::codec;
use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::timeout,
};

/// A request has to be complete within this time.
const REQUEST_TIME: Duration = Duration::from_secs(10);

/// Connections at once; more wait.
const CONNECTIONS: usize = 64;

/// A socket that is listened on.
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
}

impl Server {
    /// Listens on a socket that only its owner may connect to. One that an earlier hostd left is replaced; one that
    /// somebody listens on is not.
    ///
    /// # Errors
    ///
    /// Where the socket can't be made, or another hostd listens on it.
    pub fn bind(path: &Path) -> io::Result<Self> {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            let problem = format!("{}: another hostd listens on it", path.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, problem));
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        remove(path)?;
        // Under a name that nobody knows until its mode is right.
        let aside = aside(path);
        remove(&aside)?;
        let listener = UnixListener::bind(&aside)?;
        fs::set_permissions(&aside, fs::Permissions::from_mode(0o600))?;
        fs::rename(&aside, path)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }
}

fn aside(path: &Path) -> PathBuf {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".new");
    aside.into()
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes what a hostd that was killed has left of its socket.
///
/// # Errors
///
/// Where it can't be removed.
pub fn remove_socket(path: &Path) -> io::Result<()> {
    remove(&aside(path))?;
    remove(path)
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!("removing {}: {error}", self.path.display());
        }
    }
}

/// Serves requests until the future is dropped. `handle` gets the connection of a request that has an answer of many frames.
///
/// # Errors
///
/// Where connections can no longer be accepted.
pub async fn serve<F, H>(server: &Server, handle: H) -> io::Result<()>
where
    F: Future<Output = io::Result<()>> + Send,
    H: Fn(Request, UnixStream) -> F + Send + Sync + 'static,
{
    let handle = Arc::new(handle);
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let (stream, _) = server.listener.accept().await?;
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return Ok(());
        };
        let handle = Arc::clone(&handle);
        tokio::spawn(async move {
            if let Err(error) = connection(stream, &*handle).await {
                tracing::debug!("a control connection: {error}");
            }
            drop(place);
        });
    }
}

async fn connection<F, H>(mut stream: UnixStream, handle: &H) -> Result<(), codec::CodecError>
where
    F: Future<Output = io::Result<()>> + Send,
    H: Fn(Request, UnixStream) -> F + Send + Sync,
{
    // The mode keeps others out; this holds even if somebody loosens it.
    let uid = stream.peer_cred()?.uid();
    if uid != 0 && uid != rustix::process::geteuid().as_raw() {
        let refusal = Response::Error(format!("user {uid} may not control hostd: only root may"));
        return codec::write(&mut stream, &refusal).await;
    }
    let request = match timeout(REQUEST_TIME, codec::read::<Request>(&mut stream)).await {
        Ok(Ok(Some(request))) => request,
        Ok(Ok(None)) => return Ok(()),
        Ok(Err(error)) => {
            let refusal = Response::Error(format!("the request could not be read: {error}"));
            return codec::write(&mut stream, &refusal).await;
        }
        Err(_) => {
            let refusal = Response::Error(format!("no request within {} s", REQUEST_TIME.as_secs()));
            return codec::write(&mut stream, &refusal).await;
        }
    };
    Ok(handle(request, stream).await?)
}
