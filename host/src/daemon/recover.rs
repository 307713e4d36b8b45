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
        let problem = match self.file.load() {
            // One that is gone, as at the very first start; then there are no interfaces either.
            Ok(_) if !self.file.exists() => "the file of this node's endpoints is gone".to_owned(),
            Err(error @ StoreError::Content { .. }) => error.to_string(),
            other => return Ok(other?),
        };
        if block_in_place(net::pod_links)?.is_empty() {
            return Ok(Vec::new());
        }
        tracing::error!("{problem}: asking the kernel and the store for this node's pods");
        let found = self.find_endpoints().await?;
        if self.file.exists() {
            let aside = self.file.put_aside()?;
            tracing::warn!("a copy of the file is {}", aside.display());
        }
        // Before anything else: a start that is cut short after this must not find nothing.
        self.file.save(found.iter())?;
        tracing::warn!("{} pods found", found.len());
        Ok(found)
    }

    async fn find_endpoints(&self) -> Result<Vec<LocalEndpoint>, DaemonError> {
        let mut links = block_in_place(net::find_pods)?;
        let mut endpoints = Vec::new();
        for (key, value) in self.store.list(Collection::Pods).await? {
            let pod: PodRecord = records::decode(&key, &value.value)?;
            let interface = endpoint::interface_name(&pod.namespace, &pod.name);
            if pod.is_on(&self.config.node)
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
