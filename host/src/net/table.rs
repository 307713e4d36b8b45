//! What the node's stack does with what it routes for pods, as one nftables table that hostd owns and replaces as a
//! whole. Pods of the cluster are reached by the programs alone, which netfilter does not see.

use super::{NetError, VXLAN_DEVICE, veth::GROUP};
use abi::node::{SEEN_MARK, TUNNEL_PORT};
use ipnet::IpNet;
use std::{
    fmt::Write as _,
    io::{self, Write as _},
    net::IpAddr,
    process::{Command, Stdio},
};

/// The table.
const TABLE: &str = "inet wasmgate";

/// What the table is made of.
#[derive(Clone, Copy, Debug)]
pub struct Routed<'a> {
    /// What pods with these addresses send to the outside gets the address of the interface that it leaves by. Connections
    /// that came from outside keep theirs: their replies belong to them.
    pub masqueraded: &'a [IpNet],
    /// But for what goes there.
    pub except: &'a [IpNet],
    /// First and last node port.
    pub node_ports: [u16; 2],
    /// The node's own address, from which and to which the tunnel's packets are sent. They are nobody's connection.
    pub underlay: IpAddr,
}

/// Sets the table. Whatever it is made of, nothing is forwarded into the tunnel, where it would pass for this node's own, but for answers
/// of what has been asked at one of the node's own addresses and was sent on by somebody else's translation (ports that container
/// runtimes publish); nor from pod to pod, which is the programs' to do: where they are gone, nobody's policy would hold. And what
/// others have sent does not leave for a tunnel port with this node's address, which a translation may have given it; and what the
/// programs have not seen does not come in from pods or the tunnel.
///
/// # Errors
///
/// Where `nft` is not there, or refuses.
pub fn set_table(routed: Routed<'_>) -> Result<(), NetError> {
    nft(&script(routed)).map_err(NetError::kernel("setting the table `wasmgate` of nftables"))
}

/// The table as `nft` shows it now; none where it is not there.
///
/// # Errors
///
/// Where `nft` can't be run.
pub fn table() -> Result<Option<String>, NetError> {
    let listed = Command::new("nft")
        .args(["list", "table"])
        .args(TABLE.split(' '))
        .output();
    let listed = listed.map_err(NetError::kernel("listing the table `wasmgate` of nftables"))?;
    let text = || String::from_utf8_lossy(&listed.stdout).into_owned();
    Ok(listed.status.success().then(text))
}

/// Takes that back; that it is not there is no error.
///
/// # Errors
///
/// Where `nft` refuses.
pub fn remove_table() -> Result<(), NetError> {
    match nft(&format!("table {TABLE}\ndelete table {TABLE}\n")) {
        // Then there is no table either.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(NetError::kernel("removing the table `wasmgate` of nftables")),
    }
}

/// The largest range of ports that are neither node ports nor the tunnel's, whose packets nobody translates, nor below 1024.
fn free_ports([first, last]: [u16; 2]) -> [u16; 2] {
    let taken = [first..=last, TUNNEL_PORT..=TUNNEL_PORT];
    let begins = [1024, last.saturating_add(1), TUNNEL_PORT + 1];
    let free = begins
        .into_iter()
        .filter(|begin| !taken.iter().any(|range| range.contains(begin)));
    let ranges = free.map(|begin| {
        let behind = taken.iter().map(|range| *range.start()).filter(|start| *start > begin);
        [begin, behind.min().map_or(u16::MAX, |start| start - 1)]
    });
    ranges.max_by_key(|[begin, end]| end - begin).unwrap_or([u16::MAX; 2])
}

/// One transaction: whatever was in the table goes, and this takes its place.
fn script(routed: Routed<'_>) -> String {
    let Routed {
        masqueraded,
        except,
        node_ports,
        underlay,
    } = routed;
    let family = if underlay.is_ipv4() { "ip" } else { "ip6" };
    let mut text = format!(
        "table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n  chain forward {{\n    \
         type filter hook forward priority filter; policy accept;\n    \
         oifname \"{VXLAN_DEVICE}\" ct direction reply ct status dnat accept\n    oifname \"{VXLAN_DEVICE}\" drop\n    \
         iifgroup {GROUP} oifgroup {GROUP} drop\n    \
         oifgroup {GROUP} meta nfproto ipv6 fib saddr type local drop\n  }}\n  chain leaving {{\n    \
         type filter hook postrouting priority 300; policy accept;\n    \
         {family} saddr {underlay} udp dport {TUNNEL_PORT} iif != 0 iifname != \"{VXLAN_DEVICE}\" drop\n  }}\n"
    );
    // The programs mark what they have seen. On a pod's interface or the tunnel without its program, nothing passes.
    let unseen = [format!("iifgroup {GROUP}"), format!("iifname \"{VXLAN_DEVICE}\"")]
        .map(|from| format!("    {from} meta mark != {SEEN_MARK} drop\n    {from} meta mark set 0\n"))
        .concat();
    // Other nodes' packets come by the way that the routes lead back by: there the underlay keeps strangers from their addresses.
    let astray = format!("    {family} daddr {underlay} udp dport {TUNNEL_PORT} fib saddr . iif oif missing drop\n");
    let unseen = unseen + &astray;
    for (hook, end, before) in [("prerouting", "daddr", unseen.as_str()), ("output", "saddr", "")] {
        let _ = writeln!(
            text,
            "  chain {hook} {{\n    type filter hook {hook} priority raw; policy accept;\n{before}    \
             {family} {end} {underlay} udp dport {TUNNEL_PORT} notrack\n  }}"
        );
    }
    // Who asks at a published port must not claim to be a pod behind the tunnel: the answer would go there in this node's name.
    let _ = writeln!(
        text,
        "  chain asked {{\n    type filter hook prerouting priority -101; policy accept;\n    \
         iifname != \"{VXLAN_DEVICE}\" ct state new fib daddr type local fib saddr oifname \"{VXLAN_DEVICE}\" drop\n  }}"
    );
    if masqueraded.is_empty() {
        return text + "}\n";
    }
    let _ = writeln!(
        text,
        "  chain postrouting {{\n    type nat hook postrouting priority srcnat; policy accept;\n    oifgroup {GROUP} accept"
    );
    let rule = |cidr: &IpNet, end: &str| {
        let family = if cidr.addr().is_ipv4() { "ip" } else { "ip6" };
        format!("{family} {end} {}", cidr.trunc())
    };
    for cidr in except {
        let _ = writeln!(text, "    {} accept", rule(cidr, "daddr"));
    }
    // What answers one that looked as if it came from a node port would go to the service.
    let [first, last] = free_ports(node_ports);
    for cidr in masqueraded {
        let rule = rule(cidr, "saddr");
        let _ = writeln!(
            text,
            "    {rule} meta l4proto {{ tcp, udp }} masquerade to :{first}-{last}"
        );
        let _ = writeln!(text, "    {rule} masquerade");
    }
    text + "  }\n}\n"
}

fn nft(script: &str) -> io::Result<()> {
    let mut child = Command::new("nft")
        .args(["--file", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| io::Error::new(error.kind(), format!("nft (Debian package nftables): {error}")))?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(script.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(
        String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use super::{Routed, free_ports, script};

    #[test]
    fn the_table_is_replaced_as_a_whole() {
        let cidr = |text: &str| text.parse().unwrap();
        let pods = [cidr("10.1.0.0/24"), cidr("fd00:10:1::/64")];
        let routed = Routed {
            masqueraded: &pods,
            except: &[cidr("172.16.5.9/12")],
            node_ports: [30_000, 32_767],
            underlay: "192.0.2.1".parse().unwrap(),
        };
        let text = script(routed);
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        assert_eq!(lines[..2], ["table inet wasmgate", "delete table inet wasmgate"]);
        assert!(lines.contains(&"ip daddr 172.16.0.0/12 accept"), "{text}");
        assert!(lines.contains(&"ip saddr 10.1.0.0/24 masquerade"), "{text}");
        assert!(lines.contains(&"ip6 saddr fd00:10:1::/64 masquerade"), "{text}");
        let guard = "oifname \"wasmgate_vxlan\" drop";
        assert!(lines.contains(&guard), "{text}");
        assert!(lines.contains(&"iifgroup 22343 oifgroup 22343 drop"), "{text}");
        for from in ["iifgroup 22343", "iifname \"wasmgate_vxlan\""] {
            let unseen = format!("{from} meta mark != {} drop", 0x5747_0001);
            assert!(lines.contains(&unseen.as_str()), "{text}");
        }
        // Not what the node itself sends, nor the tunnel.
        let leaving = "ip saddr 192.0.2.1 udp dport 8472 iif != 0 iifname != \"wasmgate_vxlan\" drop";
        assert!(lines.contains(&leaving), "{text}");
        let ports = "ip saddr 10.1.0.0/24 meta l4proto { tcp, udp } masquerade to :32768-65535";
        assert!(lines.contains(&ports), "{text}");
        assert_eq!(free_ports([1024, u16::MAX - 1]), [u16::MAX, u16::MAX]);
        // The tunnel's port is nobody's to be translated to.
        assert_eq!(free_ports([50_000, 60_000]), [8473, 49_999]);
        assert_eq!(free_ports([9000, 65_000]), [1024, 8471]);
        assert_eq!(free_ports([2000, 9000]), [9001, u16::MAX]);
        let without = script(Routed {
            masqueraded: &[],
            underlay: "2001:db8::1".parse().unwrap(),
            ..routed
        });
        assert!(without.contains(guard) && !without.contains("masquerade"), "{without}");
        for (text, untracked) in [
            (&text, "ip daddr 192.0.2.1 udp dport 8472 notrack"),
            (&text, "ip saddr 192.0.2.1 udp dport 8472 notrack"),
            (&without, "ip6 daddr 2001:db8::1 udp dport 8472 notrack"),
        ] {
            assert!(text.lines().any(|line| line.trim() == untracked), "{text}");
        }
    }
}
