//! Ports that the node's own connections may begin at.

use std::fs;

/// Ranges of ports, as `/proc/sys/net/ipv4` writes them: `32768<tab>60999`, or `30000-32767,8080`.
fn ranges(text: &str) -> Vec<[u16; 2]> {
    let range = |part: &str| {
        let mut ends = part.split(['-', '\t', ' ']).filter_map(|end| end.trim().parse().ok());
        let first = ends.next()?;
        Some([first, ends.next().unwrap_or(first)])
    };
    text.trim().split(',').filter_map(range).collect()
}

/// How many of these ports the kernel may give to connections that the node opens itself
/// (`Documentation/networking/ip-sysctl.rst`: `ip_local_port_range`, `ip_local_reserved_ports`).
fn given(ports: [u16; 2], local: &str, reserved: &str) -> usize {
    let reserved = ranges(reserved);
    let within = |port: u16, ranges: &[[u16; 2]]| ranges.iter().any(|[first, last]| (*first..=*last).contains(&port));
    let local = ranges(local);
    (ports[0]..=ports[1])
        .filter(|port| within(*port, &local) && !within(*port, &reserved))
        .count()
}

/// The same for this node; none where the kernel does not say.
#[must_use]
pub fn given_to_connections(ports: [u16; 2]) -> usize {
    let read = |name: &str| fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default();
    given(ports, &read("ip_local_port_range"), &read("ip_local_reserved_ports"))
}

#[cfg(test)]
mod tests {
    use super::given;

    #[test]
    fn node_ports_should_be_nobodys() {
        let node_ports = [30_000, 32_767];
        assert_eq!(given(node_ports, "32768\t60999\n", "\n"), 0);
        assert_eq!(given(node_ports, "1024\t65535\n", "\n"), 2768);
        assert_eq!(given(node_ports, "1024\t65535\n", "30000-32766,8080\n"), 1);
        assert_eq!(given(node_ports, "1024\t65535\n", "8080,30000-32767\n"), 0);
    }
}
