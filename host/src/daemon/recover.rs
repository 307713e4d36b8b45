//! What the kernel and the store know of this node's pods, where the file of its endpoints is lost.

use super::{Daemon, DaemonError};
use crate::{
    attachment::Attachment,
    endpoint::{self, LocalEndpoint},
    net,
    store::{
        Collection, StoreError,
        records::{self, PodRecord},
    },
};
use tokio::task::block_in_place;

impl Daemon {
    /// The endpoints that were saved last. Where the file is torn, or another version's, it is put aside, and they are
    /// found by their records in the store and their interfaces in the kernel.
    pub(super) async fn known_endpoints(&self) -> Result<Vec<LocalEndpoint>, DaemonError> {
        match self.file.load() {
            Err(error @ StoreError::Content { .. }) => {
                tracing::error!("{error}: asking the kernel and the store for this node's pods");
                let aside = self.file.put_aside()?;
                let found = self.find_endpoints().await?;
                tracing::warn!("{} pods found; the file is now {}", found.len(), aside.display());
                Ok(found)
            }
            other => Ok(other?),
        }
    }

    async fn find_endpoints(&self) -> Result<Vec<LocalEndpoint>, DaemonError> {
        let mut links = block_in_place(net::find_pods)?;
        let mut endpoints = Vec::new();
        for (key, value) in self.store.list(Collection::Pods).await? {
            let pod: PodRecord = records::decode(&key, &value.value)?;
            let interface = endpoint::interface_name(&pod.namespace, &pod.name);
            if pod.node == self.config.node
                && let Some(found) = links.remove(&interface)
            {
                endpoints.push(LocalEndpoint {
                    attachment: Attachment::from_alias(&found.alias),
                    netns: found.netns,
                    interface,
                    pod,
                });
            }
        }
        Ok(endpoints)
    }
}
