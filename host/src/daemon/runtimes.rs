//! Requests of container runtimes, which may have gone by the time of the answer: nobody knows what they have done since.

use super::{
    Command,
    serve::{Front, reply, stopping},
};
use crate::{
    api::{Attach, EndpointAdd, Failure, Response},
    attachment::Attachment,
    source::Description,
};
use rustix::net::{RecvFlags, recv};
use std::{io, time::Duration};
use tokio::{io::AsyncReadExt, net::UnixStream, sync::oneshot};

/// Whoever knows of a pod has to answer within this time.
const DESCRIBE: Duration = Duration::from_secs(10);

impl Front {
    /// Attaches a container. One whose runtime does not hear of it is ended again.
    pub(super) async fn attach(&self, attach: Attach, mut stream: UnixStream) -> io::Result<()> {
        let add = match self.describe(attach).await {
            Ok(add) => Box::new(add),
            Err(problem) => return reply(&mut stream, &Response::Failed(Failure::Transient, problem)).await,
        };
        let attachment = add.attachment.clone();
        let asked = self.ask_runtime(&mut stream, |reply| Command::Attach(add, reply));
        let (there, response) = asked.await;
        let told = match &response {
            Some(response) if there => reply(&mut stream, response).await,
            _ => Ok(()),
        };
        let is_attached = matches!(response, Some(Response::Attached(_)));
        if let Some(attachment) = attachment.filter(|_| is_attached && (!there || told.is_err())) {
            let ended = self.ask(|reply| Command::Detach(attachment, reply)).await;
            if let Response::Failed(_, problem) | Response::Error(problem) = ended {
                tracing::error!("ending a container whose runtime has gone: {problem}");
            }
        }
        told
    }

    /// Ends an attachment.
    pub(super) async fn detach(&self, attachment: Attachment, mut stream: UnixStream) -> io::Result<()> {
        let asked = self.ask_runtime(&mut stream, |reply| Command::Detach(attachment, reply));
        match asked.await {
            (true, Some(response)) => reply(&mut stream, &response).await,
            _ => Ok(()),
        }
    }

    /// Asks the daemon's task as long as the runtime is there: whether it still is, and the answer, if there is one. A runtime
    /// says nothing more: what can be read is its end.
    async fn ask_runtime(
        &self,
        stream: &mut UnixStream,
        command: impl FnOnce(oneshot::Sender<Response>) -> Command,
    ) -> (bool, Option<Response>) {
        let mut nothing = [0; 1];
        // Not by what tokio knows of it yet.
        let look = recv(&*stream, &mut nothing, RecvFlags::PEEK | RecvFlags::DONTWAIT);
        if matches!(look, Ok((_, 0))) {
            return (false, None);
        }
        let (reply, mut answer) = oneshot::channel();
        if self.daemon.send(command(reply)).await.is_err() {
            return (true, Some(stopping()));
        }
        tokio::select! {
            biased;
            _ = stream.read(&mut nothing) => {
                // From here on the daemon's task knows that nobody hears it.
                answer.close();
                (false, answer.try_recv().ok())
            }
            response = &mut answer => (true, Some(response.unwrap_or_else(|_| stopping()))),
        }
    }

    /// Completes what a runtime has said of a pod.
    async fn describe(&self, attach: Attach) -> Result<EndpointAdd, String> {
        let Attach {
            endpoint: mut add,
            arguments,
        } = attach;
        let given = Description {
            labels: std::mem::take(&mut add.labels),
            service_account: std::mem::take(&mut add.service_account),
            ports: std::mem::take(&mut add.ports),
        };
        let described = tokio::time::timeout(DESCRIBE, self.source.describe(&add.pod, &arguments, given));
        let late = |_| format!("nothing is known of pod {} after {} s", add.pod, DESCRIBE.as_secs());
        Description {
            labels: add.labels,
            service_account: add.service_account,
            ports: add.ports,
        } = described.await.map_err(late)??;
        Ok(add)
    }
}
