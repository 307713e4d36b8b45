//! Frames, built byte by byte.

pub const POD_A_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
pub const POD_B_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xb];
pub const GATEWAY_A: [u8; 6] = [2, 1, 0, 0, 0, 0xa];
pub const GATEWAY_B: [u8; 6] = [2, 1, 0, 0, 0, 0xb];

pub const POD_A: [u8; 4] = [10, 1, 0, 2];
pub const POD_B: [u8; 4] = [10, 1, 0, 3];
pub const REMOTE: [u8; 4] = [10, 2, 0, 2];
pub const NODE: [u8; 4] = [192, 0, 2, 1];
pub const OTHER_NODE: [u8; 4] = [192, 0, 2, 2];
pub const NOBODY: [u8; 4] = [203, 0, 113, 9];

pub const POD_A6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2];
pub const POD_B6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 3];
pub const REMOTE6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 2];
pub const NOBODY6: [u8; 16] = [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
/// `ff02::1:ff00:1`, where a solicitation for the gateway goes (RFC 4291, section 2.7.1).
pub const SOLICITED_GATEWAY: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0, 0, 1];

pub const SYN: u8 = 0x02;
pub const ACK: u8 = 0x10;
pub const FIN: u8 = 0x01;
pub const RST: u8 = 0x04;

/// A frame, and how to change it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame(pub Vec<u8>);

pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

fn tcp_header(from: u16, to: u16, flags: u8) -> Vec<u8> {
    let mut header = vec![0; 20];
    header[..2].copy_from_slice(&from.to_be_bytes());
    header[2..4].copy_from_slice(&to.to_be_bytes());
    header[12] = 0x50;
    header[13] = flags;
    header
}

/// With four bytes behind it.
fn udp_header(from: u16, to: u16) -> Vec<u8> {
    let mut header = vec![0; 12];
    header[..2].copy_from_slice(&from.to_be_bytes());
    header[2..4].copy_from_slice(&to.to_be_bytes());
    header[5] = 12;
    header
}

/// An IPv6 fragment header (RFC 8200, section 4.5) and what is behind it.
pub fn piece6(next: u8, identification: u32, offset: u16, more: bool, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![next, 0];
    bytes.extend((offset | u16::from(more)).to_be_bytes());
    bytes.extend(identification.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The checksum of an ICMPv6 packet, as it should be: zero when the one in it is right.
pub fn checksum6(frame: &Frame) -> u16 {
    let payload = &frame.0[54..];
    let mut bytes = frame.0[22..54].to_vec();
    bytes.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
    bytes.extend([0, 0, 0, 58]);
    bytes.extend(payload);
    checksum(&bytes)
}

impl Frame {
    /// IPv4 from pod A to its gateway's MAC, with this payload behind the IP header.
    pub fn ipv4(source: [u8; 4], destination: [u8; 4], protocol: u8, payload: &[u8]) -> Self {
        let (mac, gateway) = if source == POD_B {
            (POD_B_MAC, GATEWAY_B)
        } else {
            (POD_A_MAC, GATEWAY_A)
        };
        let mut bytes = [&gateway[..], &mac, &[8, 0]].concat();
        let total = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
        bytes.extend([0x45, 0, total[0], total[1], 0, 1, 0x40, 0, 64, protocol, 0, 0]);
        bytes.extend(source);
        bytes.extend(destination);
        bytes.extend(payload);
        Self(bytes).with_checksum()
    }

    /// The same for IPv6, with extension headers before the payload perhaps: `next` is the first header's number.
    pub fn ipv6(source: [u8; 16], destination: [u8; 16], next: u8, payload: &[u8]) -> Self {
        let (mac, gateway) = if source == POD_B6 {
            (POD_B_MAC, GATEWAY_B)
        } else {
            (POD_A_MAC, GATEWAY_A)
        };
        let mut bytes = [&gateway[..], &mac, &[0x86, 0xdd]].concat();
        let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
        bytes.extend([0x60, 0, 0, 0, length[0], length[1], next, 64]);
        bytes.extend(source);
        bytes.extend(destination);
        bytes.extend(payload);
        Self(bytes)
    }

    pub fn tcp6(source: [u8; 16], from: u16, destination: [u8; 16], to: u16, flags: u8) -> Self {
        Self::ipv6(source, destination, 6, &tcp_header(from, to, flags))
    }

    pub fn udp6(source: [u8; 16], from: u16, destination: [u8; 16], to: u16) -> Self {
        Self::ipv6(source, destination, 17, &udp_header(from, to))
    }

    pub fn echo6(source: [u8; 16], destination: [u8; 16], reply: bool, identifier: u16) -> Self {
        let [high, low] = identifier.to_be_bytes();
        let kind = if reply { 129 } else { 128 };
        Self::ipv6(source, destination, 58, &[kind, 0, 0, 0, high, low, 0, 1])
    }

    /// An ICMPv6 error of this type from `source`, about `quoted`, to whoever sent that.
    pub fn error6(source: [u8; 16], kind: u8, quoted: &Self) -> Self {
        let to = quoted.0[22..38].try_into().unwrap();
        let mut payload = vec![kind, 0, 0, 0, 0, 0, 0, 0];
        payload.extend(&quoted.0[14..]);
        Self::ipv6(source, to, 58, &payload)
    }

    /// A neighbour solicitation with the sender's MAC address.
    pub fn solicitation(source: [u8; 16], mac: [u8; 6], target: [u8; 16]) -> Self {
        let mut payload = vec![135, 0, 0, 0, 0, 0, 0, 0];
        payload.extend(target);
        payload.extend([1, 1]);
        payload.extend(mac);
        let multicast = [0x33, 0x33, 0xff, 0, 0, 1];
        Self::ipv6(source, SOLICITED_GATEWAY, 58, &payload)
            .with(21, &[255])
            .with(0, &multicast)
    }

    /// One piece of an IPv4 packet: offset in bytes, and whether more follow.
    pub fn piece(self, identification: u16, offset: u16, more: bool) -> Self {
        let word = (offset / 8) | if more { 0x2000 } else { 0 };
        self.with(18, &identification.to_be_bytes())
            .with(20, &word.to_be_bytes())
    }

    pub fn tcp(source: [u8; 4], from: u16, destination: [u8; 4], to: u16, flags: u8) -> Self {
        Self::ipv4(source, destination, 6, &tcp_header(from, to, flags))
    }

    pub fn udp(source: [u8; 4], from: u16, destination: [u8; 4], to: u16) -> Self {
        Self::ipv4(source, destination, 17, &udp_header(from, to))
    }

    pub fn echo(source: [u8; 4], destination: [u8; 4], reply: bool, identifier: u16) -> Self {
        let [high, low] = identifier.to_be_bytes();
        let kind = if reply { 0 } else { 8 };
        Self::ipv4(source, destination, 1, &[kind, 0, 0, 0, high, low, 0, 1])
    }

    /// An ICMP error from `source`, about `quoted`, to whoever sent that.
    pub fn unreachable(source: [u8; 4], quoted: &Self) -> Self {
        let to = quoted.0[26..30].try_into().unwrap();
        let mut payload = vec![3, 3, 0, 0, 0, 0, 0, 0];
        payload.extend(&quoted.0[14..42]);
        Self::ipv4(source, to, 1, &payload)
    }

    pub fn arp(operation: u8, sender_mac: [u8; 6], sender: [u8; 4], target: [u8; 4]) -> Self {
        let mut bytes = [&[0xff; 6][..], &sender_mac, &[8, 6]].concat();
        bytes.extend([0, 1, 8, 0, 6, 4, 0, operation]);
        bytes.extend(sender_mac);
        bytes.extend(sender);
        bytes.extend([0; 6]);
        bytes.extend(target);
        Self(bytes)
    }

    /// The same where there is a whole header to put it into.
    pub fn summed_if_whole(self) -> Self {
        let v6 = self.0[12] == 0x86;
        let (start, protocol) = if v6 { (54, self.0[20]) } else { (34, self.0[23]) };
        let least = match protocol {
            6 => 20,
            17 | 1 | 58 => 8,
            _ => usize::MAX,
        };
        if self.0.len().saturating_sub(start) >= least {
            self.summed()
        } else {
            self
        }
    }

    /// Puts the right checksum into TCP, UDP or ICMP behind an IP header without options or extensions.
    pub fn summed(mut self) -> Self {
        let v6 = self.0[12] == 0x86;
        let (start, protocol) = if v6 { (54, self.0[20]) } else { (34, self.0[23]) };
        let at = start
            + match protocol {
                6 => 16,
                17 => 6,
                _ => 2,
            };
        self.0[at..at + 2].fill(0);
        let payload = self.0[start..].to_vec();
        let addresses = if v6 { &self.0[22..54] } else { &self.0[26..34] };
        let mut bytes = if protocol == 1 { Vec::new() } else { addresses.to_vec() };
        if protocol != 1 {
            bytes.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
            bytes.extend([0, 0, 0, protocol]);
        }
        bytes.extend(payload);
        let sum = checksum(&bytes);
        self.0[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        self
    }

    /// Overwrites bytes and mends the IP checksum.
    pub fn with(mut self, offset: usize, bytes: &[u8]) -> Self {
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
        if self.0[12..14] == [8, 0] {
            self.with_checksum()
        } else {
            self
        }
    }

    pub fn ttl(self, ttl: u8) -> Self {
        self.with(22, &[ttl])
    }

    /// The first bytes alone.
    pub fn cut(mut self, length: usize) -> Self {
        self.0.truncate(length);
        self
    }

    fn with_checksum(mut self) -> Self {
        self.0[24..26].fill(0);
        let sum = checksum(&self.0[14..34]);
        self.0[24..26].copy_from_slice(&sum.to_be_bytes());
        self
    }

    /// As it arrives after one hop: other MAC addresses, a lower TTL or hop limit, a right checksum.
    pub fn after_hop(self, destination: [u8; 6], source: [u8; 6]) -> Self {
        let offset = if self.0[12] == 0x86 { 21 } else { 22 };
        let hops = self.0[offset] - 1;
        self.with(offset, &[hops]).delivered(destination, source)
    }

    /// As it arrives out of the tunnel: other MAC addresses.
    pub fn delivered(self, destination: [u8; 6], source: [u8; 6]) -> Self {
        self.with(0, &destination).with(6, &source)
    }
}
