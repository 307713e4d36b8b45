//! Pods that container runtimes attach and end, by way of a CNI plugin.

use super::{Daemon, DaemonError, start::find_link};
use crate::{
    api::{AttachedView, CheckAttachment, EndpointAdd, Failure, PodName, Response},
    attachment::Attachment,
    endpoint::{AddressError, choose_addresses},
    net::{self, NetError, Netns},
    store::StoreError,
};
use abi::Hook;
use std::collections::BTreeSet;
use tokio::{sync::oneshot, task::block_in_place};

impl DaemonError {
    /// As a container runtime is told of it.
    pub(super) fn told(&self) -> Response {
        let failure = match self {
            Self::Store(StoreError::Unavailable { .. })
            | Self::Address(AddressError::Full { .. })
            | Self::Full(_)
            | Self::Draining => Failure::Transient,
            Self::NotAttached(_) | Self::Net(NetError::Netns { .. }) => Failure::NoContainer,
            Self::Request(_) | Self::Net(NetError::Occupied { .. }) | Self::Address(_) => Failure::Invalid,
            _ => Failure::Internal,
        };
        Response::Failed(failure, self.to_string())
    }
}

impl Daemon {
    fn attached(&self, attachment: &Attachment) -> Option<PodName> {
        let its = |local: &super::Local| local.endpoint.attachment.as_ref() == Some(attachment);
        let found = self.locals.iter().find(|(_, local)| its(local));
        found.map(|(pod, _)| pod.clone())
    }

    /// Attaches a container; traffic can flow when this returns. On an error nothing is left.
    pub(super) async fn attach(&mut self, request: EndpointAdd) -> Result<AttachedView, DaemonError> {
        let pod = request.pod.clone();
        if let Some(attachment) = &request.attachment {
            // Word of an earlier one of that name is not about this one.
            self.queue.remove(attachment)?;
            let before = self.attached(attachment);
            for earlier in before.iter().chain([&pod]) {
                self.forget_gone(earlier).await?;
            }
            if self.attached(attachment).is_some() {
                return Err(DaemonError::Request(format!("{attachment} is attached already")));
            }
        }
        self.endpoint_add(request).await?;
        let gone = || DaemonError::Request(format!("pod {pod} is gone again"));
        let local = self.locals.get(&pod).ok_or_else(gone)?;
        Ok(AttachedView {
            interface: local.endpoint.interface.clone(),
            mac: super::views::mac_text(local.veth.host_mac),
            pod_mac: super::views::mac_text(local.veth.pod_mac),
            mtu: net::NODE_MTU,
            pod_mtu: self.pod_mtu,
            addresses: local
                .endpoint
                .pod
                .addresses()
                .map(|address| (address, net::gateway(address)))
                .collect(),
        })
    }

    /// The same for a runtime: one that has gone before it had the answer has no container that it would end.
    pub(super) async fn attach_for(&mut self, request: EndpointAdd, reply: oneshot::Sender<Response>) {
        let attachment = request.attachment.clone();
        let attached = self.attach(request).await.map(Response::Attached);
        let done = attached.is_ok();
        let unheard = reply.send(attached.unwrap_or_else(|error| error.told())).is_err();
        if let Some(attachment) = attachment.filter(|_| done && unheard)
            && let Err(error) = self.detach(&attachment).await
        {
            error.complain(&format!("ending {attachment}, of which its runtime has not heard"));
        }
    }

    /// A container whose namespace is gone was not ended: another one of the same pod comes when its sandbox has died, or the same
    /// one again.
    async fn forget_gone(&mut self, pod: &PodName) -> Result<(), DaemonError> {
        let Some(local) = self.locals.get(pod) else {
            return Ok(());
        };
        if local.endpoint.attachment.is_some()
            && matches!(find_link(&local.endpoint), Ok(None) | Err(NetError::Netns { .. }))
        {
            tracing::info!("{pod}: its container before this one is gone");
            self.disconnect(pod).await?;
        }
        Ok(())
    }

    /// Ends an attachment; false where there is none.
    pub(super) async fn detach(&mut self, attachment: &Attachment) -> Result<bool, DaemonError> {
        let Some(pod) = self.attached(attachment) else {
            return Ok(false);
        };
        self.endpoint_delete(&pod).await
    }

    /// What is not as it should be of an attachment.
    pub(super) fn check_attachment(&mut self, asked: &CheckAttachment) -> Result<Vec<String>, DaemonError> {
        let unknown = || DaemonError::NotAttached(asked.attachment.clone());
        let pod = self.attached(&asked.attachment).ok_or_else(unknown)?;
        let local = self.locals.get(&pod).ok_or_else(unknown)?;
        let (endpoint, veth) = (local.endpoint.clone(), local.veth);
        let netns = match Netns::open_path(&asked.netns) {
            // Its address and all else are still here: the runtime has to end it.
            Err(error @ NetError::Netns { .. }) => return Ok(vec![error.to_string()]),
            other => other?,
        };
        let addresses: Vec<_> = endpoint.pod.addresses().collect();
        let made = net::Made {
            node: &endpoint.interface,
            pod: endpoint.pod_interface(),
            veth: &veth,
            addresses: &addresses,
            routes: &asked.routes,
        };
        let mut problems = block_in_place(|| net::check_pod_link(made, &netns))?;
        let mac = super::views::mac_text(veth.pod_mac);
        if let Some(other) = asked.mac.as_ref().filter(|other| !other.eq_ignore_ascii_case(&mac)) {
            problems.push(format!(
                "{other} is not the MAC address of pod {pod}'s interface: that is {mac}"
            ));
        }
        for address in asked.addresses.iter().filter(|address| !addresses.contains(address)) {
            problems.push(format!("{address} is not an address of pod {pod}"));
        }
        if !problems.is_empty() {
            return Ok(problems);
        }
        // The node's own routes and neighbours go when somebody takes its end of the pair down.
        let (underlay, mtu) = (self.config.underlay, self.pod_mtu);
        block_in_place(|| net::prepare_node(&endpoint.interface, &veth, &addresses, underlay, mtu))?;
        for hook in [Hook::FromPod, Hook::ToPod] {
            if let Some(wrong) = block_in_place(|| self.datapath.keep_attached(hook, &endpoint.interface))? {
                self.watch.repairs += 1;
                tracing::warn!("{} on {}: {wrong}; it is first again", hook.name(), endpoint.interface);
            }
        }
        if self.unplaced.contains(&endpoint.pod.address.into()) {
            problems.push(format!("pod {pod} has no place in the policy: nothing reaches it"));
        }
        Ok(problems)
    }

    /// Ends all attachments to a network but those that are still valid; what was ended.
    pub(super) async fn collect_attachments(
        &mut self,
        network: &str,
        valid: &BTreeSet<(String, String)>,
    ) -> Result<Vec<Attachment>, DaemonError> {
        let is_stale = |attachment: &&Attachment| {
            attachment.network == network
                && !valid.contains(&(attachment.container.clone(), attachment.interface.clone()))
        };
        let attachments = self
            .locals
            .values()
            .filter_map(|local| local.endpoint.attachment.as_ref());
        let stale: Vec<Attachment> = attachments.filter(is_stale).cloned().collect();
        let mut problem = None;
        for attachment in &stale {
            // The others all the same.
            problem = self.detach(attachment).await.err().or(problem);
        }
        problem.map_or(Ok(stale), Err)
    }

    /// Why no container can be attached now; empty where one can.
    pub(super) fn readiness(&self) -> Vec<String> {
        let mut problems: Vec<String> = self
            .store
            .problem()
            .into_iter()
            .chain(self.out_of_step.clone())
            .chain(self.drained.map(|_| DaemonError::Draining.to_string()))
            .collect();
        let most = self.config.maps.endpoints;
        if self.locals.len() >= most as usize {
            problems.push(DaemonError::Full(most).to_string());
        }
        let owner = |address: std::net::IpAddr| self.pods.find(&address.into()).map(|(_, pod)| pod.record.full_name());
        problems.extend(
            choose_addresses(&self.config.pod_cidrs, &[], owner)
                .err()
                .map(|error| error.to_string()),
        );
        problems
    }

    /// Ends what was ended while hostd was not there.
    pub(super) async fn end_queued(&mut self) {
        let ended = match self.queue.list() {
            Ok(ended) => ended,
            Err(error) => return tracing::warn!("attachments that were ended meanwhile: {error}"),
        };
        for attachment in ended {
            let done = match self.detach(&attachment).await {
                Ok(_) => self.queue.remove(&attachment).map_err(DaemonError::from),
                Err(error) => Err(error),
            };
            match done {
                Ok(()) => tracing::info!("{attachment} was ended while hostd was not there"),
                Err(error) => error.complain(&format!("ending {attachment}")),
            }
        }
    }
}
