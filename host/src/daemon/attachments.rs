//! Pods that container runtimes attach and end, by way of a CNI plugin.

use super::{Daemon, DaemonError};
use crate::{
    api::{AttachedView, CheckAttachment, EndpointAdd, Failure, PodName},
    attachment::Attachment,
    endpoint::{AddressError, choose_addresses},
    net::{self, NetError, Netns},
    source::Description,
    store::StoreError,
};
use abi::Hook;
use std::collections::BTreeSet;
use tokio::task::block_in_place;

impl DaemonError {
    /// What kind of failure that is to a container runtime.
    pub(super) const fn failure(&self) -> Failure {
        match self {
            Self::Store(StoreError::Unavailable { .. })
            | Self::Address(AddressError::Full { .. })
            | Self::Full(_)
            | Self::Source(_)
            | Self::Draining => Failure::Transient,
            Self::Net(NetError::Netns { .. }) => Failure::NoContainer,
            Self::Request(_) | Self::Net(NetError::Occupied { .. }) | Self::Address(_) => Failure::Invalid,
            _ => Failure::Internal,
        }
    }
}

impl Daemon {
    fn attached(&self, attachment: &Attachment) -> Option<PodName> {
        let its = |local: &super::Local| local.endpoint.attachment.as_ref() == Some(attachment);
        let found = self.locals.iter().find(|(_, local)| its(local));
        found.map(|(pod, _)| pod.clone())
    }

    /// Attaches a container; traffic can flow when this returns. On an error nothing is left.
    pub(super) async fn attach(&mut self, mut request: EndpointAdd) -> Result<AttachedView, DaemonError> {
        if let Some(attachment) = &request.attachment
            && self.attached(attachment).is_some()
        {
            return Err(DaemonError::Request(format!("{attachment} is attached already")));
        }
        // Word of an earlier one of that name is not about this one.
        if let Some(attachment) = &request.attachment {
            self.queue.remove(attachment)?;
        }
        // Another container of the same pod, as a runtime makes one when the pod's sandbox has died.
        if let Some(local) = self.locals.get(&request.pod)
            && local.endpoint.attachment.is_some()
            && Netns::open_path(&local.endpoint.netns).is_err()
        {
            tracing::info!("{}: its container before this one is gone", request.pod);
            self.disconnect(&request.pod.clone()).await?;
        }
        let given = Description {
            labels: std::mem::take(&mut request.labels),
            service_account: std::mem::take(&mut request.service_account),
            ports: std::mem::take(&mut request.ports),
        };
        let pod = request.pod.clone();
        let described = self.source.describe(&pod, given).await.map_err(DaemonError::Source)?;
        request.labels = described.labels;
        request.service_account = described.service_account;
        request.ports = described.ports;
        self.endpoint_add(request).await?;
        let gone = || DaemonError::Request(format!("pod {pod} is gone again"));
        let local = self.locals.get(&pod).ok_or_else(gone)?;
        Ok(AttachedView {
            interface: local.endpoint.interface.clone(),
            mac: super::views::mac_text(local.veth.host_mac),
            pod_mac: super::views::mac_text(local.veth.pod_mac),
            mtu: self.pod_mtu,
            addresses: local
                .endpoint
                .pod
                .addresses()
                .map(|address| (address, net::gateway(address)))
                .collect(),
        })
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
        let unknown = || {
            DaemonError::Net(NetError::Netns {
                path: asked.netns.clone(),
                problem: format!("{} is not attached", asked.attachment),
            })
        };
        let pod = self.attached(&asked.attachment).ok_or_else(unknown)?;
        let local = self.locals.get(&pod).ok_or_else(unknown)?;
        let (endpoint, veth) = (local.endpoint.clone(), local.veth);
        let netns = Netns::open_path(&asked.netns)?;
        let addresses: Vec<_> = endpoint.pod.addresses().collect();
        let pod_interface = endpoint.pod_interface();
        let mut problems =
            block_in_place(|| net::check_pod_link(&endpoint.interface, &netns, pod_interface, &veth, &addresses))?;
        for address in asked.addresses.iter().filter(|address| !addresses.contains(address)) {
            problems.push(format!("{address} is not an address of pod {pod}"));
        }
        if !problems.is_empty() {
            return Ok(problems);
        }
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
