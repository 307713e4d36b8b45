//! Netlink requests, and what interfaces are asked in common.

use super::NetError;
use futures::{FutureExt, TryStreamExt, future::BoxFuture};
use rtnetlink::{
    Handle, LinkUnspec, new_connection,
    packet_route::link::{LinkAttribute, LinkMessage},
};
use std::{fs, io};

/// Runs netlink requests on a connection of the calling thread's network namespace.
pub(super) fn netlink<T>(run: impl FnOnce(Handle) -> BoxFuture<'static, Result<T, NetError>>) -> Result<T, NetError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(NetError::kernel("starting a netlink connection"))?;
    runtime.block_on(async {
        let (connection, handle, _) = new_connection().map_err(NetError::kernel("opening a netlink socket"))?;
        let connection = tokio::spawn(connection);
        let answer = run(handle).await;
        connection.abort();
        answer
    })
}

/// The same for a caller that is inside an async runtime: on a thread of its own, in the process's namespace.
pub(super) fn netlink_here<T: Send>(
    run: impl FnOnce(Handle) -> BoxFuture<'static, Result<T, NetError>> + Send,
) -> Result<T, NetError> {
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| netlink(run));
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Whether the kernel says that there is no such interface.
pub(super) fn is_gone(error: &rtnetlink::Error) -> bool {
    let rtnetlink::Error::NetlinkError(error) = error else {
        return false;
    };
    let error = error.to_io();
    // ENODEV has no kind of its own in the standard library.
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(19)
}

pub(super) async fn find(handle: &Handle, name: &str) -> Result<Option<LinkMessage>, NetError> {
    match handle
        .link()
        .get()
        .match_name(name.to_owned())
        .execute()
        .try_next()
        .await
    {
        Ok(link) => Ok(link),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(NetError::kernel(format!("looking for {name}"))(error)),
    }
}

pub(super) async fn get(handle: &Handle, name: &str) -> Result<LinkMessage, NetError> {
    find(handle, name)
        .await?
        .ok_or_else(|| NetError::kernel(format!("looking for {name}"))("it is gone"))
}

pub(super) fn mac(link: &LinkMessage) -> [u8; 6] {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Address(bytes) => bytes.as_slice().try_into().ok(),
            _ => None,
        })
        .unwrap_or_default()
}

pub(super) fn mtu(link: &LinkMessage) -> u32 {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        })
        .unwrap_or_default()
}

/// Brings an interface up.
///
/// # Errors
///
/// Where it is not there.
pub fn bring_up(name: &str) -> Result<(), NetError> {
    let name = name.to_owned();
    netlink_here(move |handle| {
        async move {
            let index = get(&handle, &name).await?.header.index;
            handle
                .link()
                .set(LinkUnspec::new_with_index(index).up().build())
                .execute()
                .await
                .map_err(NetError::kernel(format!("bringing {name} up")))
        }
        .boxed()
    })
}

/// Deletes an interface; that it is gone already is no error.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn delete_link(name: &str) -> Result<(), NetError> {
    let name = name.to_owned();
    netlink_here(move |handle| {
        async move {
            let Some(link) = find(&handle, &name).await? else {
                return Ok(());
            };
            match handle.link().del(link.header.index).execute().await {
                Err(rtnetlink::Error::NetlinkError(error)) if error.to_io().raw_os_error() == Some(19) => Ok(()),
                other => other.map_err(NetError::kernel(format!("deleting {name}"))),
            }
        }
        .boxed()
    })
}

/// An interface of the node towards pods: it needs no address of its own, and asks nobody.
pub(super) const NODE_SIDE: [(&str, &str); 5] = [
    ("disable_ipv6", "0"),
    ("addr_gen_mode", "1"),
    ("accept_ra", "0"),
    ("accept_dad", "0"),
    // Whether the node forwards is said for all interfaces; without this the programs could not ask for its routes.
    ("forwarding", "1"),
];
/// Settings of an interface for IPv6 (`conf/INTERFACE` in `Documentation/networking/ip-sysctl.rst`).
pub(super) fn set_ipv6(interface: &str, settings: &[(&str, &str)]) -> Result<(), NetError> {
    for (setting, value) in settings {
        let path = format!("/proc/sys/net/ipv6/conf/{interface}/{setting}");
        fs::write(&path, value).map_err(NetError::kernel(format!("writing {path}")))?;
    }
    Ok(())
}

/// The kernel's own traffic on an interface that carries no IPv6 would only be counted as drops.
pub(super) fn disable_ipv6(interface: &str) -> Result<(), NetError> {
    // Otherwise a kernel without IPv6.
    if fs::exists("/proc/sys/net/ipv6").unwrap_or(false) {
        set_ipv6(interface, &[("disable_ipv6", "1")])?;
    }
    Ok(())
}
