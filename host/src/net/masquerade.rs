//! Masquerade: what pods send to the outside leaves with the node's address.
//!
//! One nftables table that hostd owns, replaced as a whole. Only what the node's stack routes passes it: pods of the
//! cluster are reached by the programs alone.

use super::NetError;
use ipnet::IpNet;
use std::{
    fmt::Write as _,
    io::{self, Write as _},
    process::{Command, Stdio},
};

/// The table.
const TABLE: &str = "inet wasmgate";

/// Gives what is sent from `pods` to the outside the address of the interface that it leaves by, but for `except`.
/// Connections that came from outside keep theirs: their replies belong to them.
///
/// # Errors
///
/// Where `nft` is not there, or refuses.
pub fn masquerade(pods: &[IpNet], except: &[IpNet]) -> Result<(), NetError> {
    nft(&script(pods, except)).map_err(NetError::kernel("setting the nftables table of masquerade"))
}

/// Takes that back; that it is not there is no error.
///
/// # Errors
///
/// Where `nft` refuses.
pub fn no_masquerade() -> Result<(), NetError> {
    match nft(&format!("table {TABLE}\ndelete table {TABLE}\n")) {
        // Then there is no table either.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(NetError::kernel("removing the nftables table of masquerade")),
    }
}

/// One transaction: whatever was in the table goes, and this takes its place.
fn script(pods: &[IpNet], except: &[IpNet]) -> String {
    let mut text = format!(
        "table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n  chain postrouting {{\n    \
         type nat hook postrouting priority srcnat; policy accept;\n    oifname \"wg-*\" accept\n"
    );
    let rule = |cidr: &IpNet, end: &str| {
        let family = if cidr.addr().is_ipv4() { "ip" } else { "ip6" };
        format!("{family} {end} {}", cidr.trunc())
    };
    for cidr in except {
        let _ = writeln!(text, "    {} accept", rule(cidr, "daddr"));
    }
    for cidr in pods {
        let _ = writeln!(text, "    {} masquerade", rule(cidr, "saddr"));
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
    use super::script;

    #[test]
    fn the_table_is_replaced_as_a_whole() {
        let cidr = |text: &str| text.parse().unwrap();
        let text = script(&[cidr("10.1.0.0/24"), cidr("fd00:10:1::/64")], &[cidr("172.16.5.9/12")]);
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        assert_eq!(lines[..2], ["table inet wasmgate", "delete table inet wasmgate"]);
        assert!(lines.contains(&"ip daddr 172.16.0.0/12 accept"), "{text}");
        assert!(lines.contains(&"ip saddr 10.1.0.0/24 masquerade"), "{text}");
        assert!(lines.contains(&"ip6 saddr fd00:10:1::/64 masquerade"), "{text}");
    }
}
