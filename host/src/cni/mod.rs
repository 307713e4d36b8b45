//! The CNI plugin, a thin client of hostd's control socket: CNI specification 1.1.0, and versions from 0.3.0 on.
//!
//! A runtime starts it for each operation, with the network's configuration on stdin. Everything that it needs to know hostd
//! knows; where hostd is not there, a container can go all the same: word of it is left for hostd.

mod config;
mod error;
mod result;

use crate::{
    api::{self, Attach, CheckAttachment, ClientError, EndpointAdd, Request, Response},
    attachment::Queue,
};
pub use config::check_network;
use config::{Environment, Network, check_version, spoken, version_of};
use error::{Code, Error};
use serde_json::{Map, Value};
use std::{
    env,
    io::{Read, Write},
    os::unix::fs::MetadataExt,
    process::ExitCode,
    time::Duration,
};

/// Name of the plugin's file.
pub const PLUGIN: &str = "wasmgate-cni";

/// hostd has to answer within this time.
const ANSWER: Duration = Duration::from_mins(1);
/// And within this one, where word is left for it already.
const ONCE_MORE: Duration = Duration::from_secs(2);

/// Does what the environment asks for. Status 1: an error, which is on stdout.
#[must_use]
pub fn main() -> ExitCode {
    let mut text = String::new();
    let read = std::io::stdin().read_to_string(&mut text);
    let done = match read {
        Ok(_) => run(&text),
        Err(error) => Err(Error::new(Code::Io, error.to_string())),
    };
    let (printed, status) = match done {
        Ok(Some(answer)) => (
            serde_json::to_string_pretty(&answer).unwrap_or_default(),
            ExitCode::SUCCESS,
        ),
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => (error.print(spoken(&version_of(&text))), ExitCode::FAILURE),
    };
    match writeln!(std::io::stdout(), "{printed}") {
        Ok(()) => status,
        Err(error) => {
            eprintln!("{PLUGIN}: stdout: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(text: &str) -> Result<Option<Value>, Error> {
    let command = env::var("CNI_COMMAND").unwrap_or_default();
    let parse = match command.as_str() {
        "VERSION" => return Ok(Some(result::versions(&version_of(text)))),
        "ADD" | "CHECK" | "STATUS" => Network::parse,
        "DEL" | "GC" => Network::parse_to_end,
        "" => return Err(Error::new(Code::Environment, "CNI_COMMAND must be set")),
        other => {
            let details = format!("CNI_COMMAND={other}: it is ADD, DEL, CHECK, STATUS, GC or VERSION");
            return Err(Error::new(Code::Environment, details));
        }
    };
    config::decode::<Map<String, Value>>(text)?;
    check_version(text, &command)?;
    let network = parse(text)?;
    let environment = Environment::read(&command, |name| env::var(name).ok())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Error::new(Code::Failed, error.to_string()))?;
    runtime.block_on(async {
        match command.as_str() {
            "ADD" => add(network, &environment).await.map(Some),
            "DEL" => delete(&network, &environment).await.map(|()| None),
            "CHECK" => check(&network, &environment).await.map(|()| None),
            "GC" => collect(&network).await.map(|()| None),
            _ => status(&network).await.map(|()| None),
        }
    })
}

async fn ask(network: &Network, request: Request) -> Result<Response, Error> {
    match tokio::time::timeout(ANSWER, api::call(&network.socket, &request)).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(late()),
    }
}

fn late() -> Error {
    Error::new(
        Code::Later,
        format!("hostd has not answered for {} s", ANSWER.as_secs()),
    )
}

fn unexpected() -> Error {
    Error::new(Code::Failed, "hostd answered something else: is it another version?")
}

async fn add(network: Network, environment: &Environment) -> Result<Value, Error> {
    check_netns(&environment.netns)?;
    let attachment = environment.attachment(&network.name);
    let pod = network.pod(environment)?;
    let request = EndpointAdd {
        pod: pod.name,
        netns: environment.netns.clone(),
        labels: pod.labels,
        service_account: String::new(),
        ports: Vec::new(),
        addresses: pod.addresses,
        attachment: Some(attachment),
    };
    let request = Request::Attach(Box::new(Attach {
        endpoint: request,
        arguments: environment.arguments.clone(),
    }));
    let answer = tokio::time::timeout(ANSWER, api::call(&network.socket, &request)).await;
    if matches!(answer, Err(_) | Ok(Err(ClientError::Closed | ClientError::Codec(_)))) {
        // It may be attached all the same, and its runtime may not come back to end it.
        end_later(&network, environment).await?;
    }
    match answer.map_err(|_| late())?? {
        Response::Attached(attached) => {
            let (interface, netns) = (&environment.interface, &environment.netns);
            Ok(result::added(network, &attached, interface, netns))
        }
        _ => Err(unexpected()),
    }
}

/// The namespace is the container's, not the one that this runs in, unless that is wanted (`CNI_NETNS_OVERRIDE`).
fn check_netns(netns: &str) -> Result<(), Error> {
    let of = |path: &str| std::fs::metadata(path).map(|file| (file.dev(), file.ino()));
    let missing = |error| Error::new(Code::Container, format!("CNI_NETNS={netns}: {error}"));
    let allowed = env::var("CNI_NETNS_OVERRIDE").is_ok_and(|value| matches!(value.as_str(), "1" | "true" | "TRUE"));
    if of(netns).map_err(missing)? == of("/proc/self/ns/net").map_err(missing)? && !allowed {
        let details = format!("CNI_NETNS={netns}: that is the node's own network namespace, not a container's");
        return Err(Error::new(Code::Environment, details));
    }
    Ok(())
}

/// Ends an attachment. Where hostd is not there it hears of it when it is.
async fn delete(network: &Network, environment: &Environment) -> Result<(), Error> {
    let request = Request::Detach(environment.attachment(&network.name));
    let away = |error: &ClientError| {
        matches!(
            error,
            ClientError::Connect { .. } | ClientError::Closed | ClientError::Codec(_) | ClientError::Refused(_)
        )
    };
    match tokio::time::timeout(ANSWER, api::call(&network.socket, &request)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) if !away(&error) => Err(error.into()),
        Ok(Err(_)) | Err(_) => end_later(network, environment).await,
    }
}

/// Leaves word that an attachment has ended.
async fn end_later(network: &Network, environment: &Environment) -> Result<(), Error> {
    let attachment = environment.attachment(&network.name);
    let queue = Queue::beside(&network.socket);
    let failed = |error: crate::store::StoreError| Error::new(Code::Later, error.to_string());
    queue.put(&attachment).map_err(failed)?;
    // hostd may have come up, and read the queue, in between.
    let once_more = Request::Detach(attachment.clone());
    let again = tokio::time::timeout(ONCE_MORE, api::call(&network.socket, &once_more));
    if matches!(again.await, Ok(Ok(_))) {
        queue.remove(&attachment).map_err(failed)?;
    }
    Ok(())
}

async fn check(network: &Network, environment: &Environment) -> Result<(), Error> {
    let expected = network.prev_result.as_ref();
    let expected = expected.ok_or_else(|| Error::new(Code::Config, "`prevResult` is missing"))?;
    let unknown = || {
        let details = format!("`prevResult` has no interface {} of a container", environment.interface);
        Error::new(Code::Tampered, details)
    };
    let told = result::told(expected, &environment.interface).ok_or_else(unknown)?;
    let request = CheckAttachment {
        attachment: environment.attachment(&network.name),
        netns: environment.netns.clone().into(),
        addresses: told.addresses,
        mac: told.mac,
        routes: told.routes,
    };
    match ask(network, Request::CheckAttachment(request)).await? {
        Response::Problems(problems) if problems.is_empty() => Ok(()),
        Response::Problems(problems) => Err(Error::new(Code::Tampered, problems.join("; "))),
        _ => Err(unexpected()),
    }
}

async fn collect(network: &Network) -> Result<(), Error> {
    let request = Request::CollectAttachments {
        network: network.name.clone(),
        valid: network.valid()?,
    };
    match ask(network, request).await? {
        Response::Collected(_) => Ok(()),
        _ => Err(unexpected()),
    }
}

async fn status(network: &Network) -> Result<(), Error> {
    match ask(network, Request::Readiness).await {
        Ok(Response::Problems(problems)) if problems.is_empty() => Ok(()),
        Ok(Response::Problems(problems)) => Err(Error::new(Code::NotAvailable, problems.join("; "))),
        Ok(_) => Err(unexpected()),
        Err(error) => Err(Error::new(Code::NotAvailable, error.details)),
    }
}
