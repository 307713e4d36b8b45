//! Filters on the clsact qdisc.

use super::{
    NetError,
    netlink::{get, netlink_here},
};
use futures::{FutureExt, TryStreamExt};
use rtnetlink::packet_route::tc::{TcAttribute, TcFilterBpfOption, TcMessage, TcOption};

/// Ids of the BPF programs among the filters of an interface, in the order in which they run; `None` for a filter that
/// is no BPF program.
///
/// # Errors
///
/// Where there is no such interface, or netlink fails.
pub fn filters(interface: &str, ingress: bool) -> Result<Vec<Option<u32>>, NetError> {
    let name = interface.to_owned();
    netlink_here(move |handle| {
        async move {
            let index = get(&handle, &name).await?.header.index;
            let request = handle.traffic_filter(i32::try_from(index).unwrap_or(i32::MAX)).get();
            let request = if ingress { request.ingress() } else { request.egress() };
            let mut listed = request.execute();
            let mut filters = Vec::new();
            while let Some(filter) = listed
                .try_next()
                .await
                .map_err(NetError::kernel(format!("listing the filters of {name}")))?
            {
                // Without a handle it is the head of the filters of a priority.
                if u32::from(filter.header.handle) != 0 {
                    filters.push(program(&filter));
                }
            }
            Ok(filters)
        }
        .boxed()
    })
}

fn program(filter: &TcMessage) -> Option<u32> {
    filter.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => options.iter().find_map(|option| match option {
            TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
            _ => None,
        }),
        _ => None,
    })
}
