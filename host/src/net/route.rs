//! Routes of the node to its pod CIDRs.

use super::{NetError, netlink::netlink_here};
use futures::FutureExt;
use ipnet::IpNet;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::route::{RouteMessage, RouteType},
};
use std::net::{Ipv4Addr, Ipv6Addr};

/// Metric of the route to a pod CIDR as a whole: any other route is better.
const LAST_RESORT: u32 = u32::MAX;

fn unreachable_route(cidr: IpNet) -> RouteMessage {
    macro_rules! route {
        ($family:ty, $cidr:expr) => {
            RouteMessageBuilder::<$family>::new()
                .destination_prefix($cidr.network(), $cidr.prefix_len())
                .kind(RouteType::Unreachable)
                .priority(LAST_RESORT)
                .build()
        };
    }
    match cidr {
        IpNet::V4(cidr) => route!(Ipv4Addr, cidr),
        IpNet::V6(cidr) => route!(Ipv6Addr, cidr),
    }
}

/// Makes the node refuse what is for an address of a pod CIDR that no pod has, where it has no better route.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn make_unreachable(cidr: IpNet) -> Result<(), NetError> {
    netlink_here(move |handle| {
        async move {
            let added = handle.route().add(unreachable_route(cidr)).replace().execute().await;
            added.map_err(NetError::kernel(format!("setting the node's route to {cidr}")))
        }
        .boxed()
    })
}

/// Takes that back; that it is not there is no error.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn make_reachable(cidr: IpNet) -> Result<(), NetError> {
    netlink_here(move |handle| {
        async move {
            match handle.route().del(unreachable_route(cidr)).execute().await {
                Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -NO_SUCH_PROCESS => Ok(()),
                result => result.map_err(NetError::kernel(format!("removing the node's route to {cidr}"))),
            }
        }
        .boxed()
    })
}

/// `ESRCH`: what the kernel answers where there is no such route.
const NO_SUCH_PROCESS: i32 = 3;
