//! Parsing, from the RFCs and the list of what is carried, over plain bytes.

use abi::{
    DropReason,
    policy::{ICMP, ICMPV6, SCTP, TCP, UDP},
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub type End = (IpAddr, u16);

pub const L3: usize = 14;
const MOST_EXTENSIONS: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    None,
    First,
    Later,
    Ahead,
}

/// What a packet says of itself.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is one thing that a packet says")]
pub struct Packet {
    pub v6: bool,
    pub protocol: u8,
    pub source: End,
    pub destination: End,
    pub flags: u8,
    pub related: bool,
    pub about: IpAddr,
    pub request: bool,
    pub answer: bool,
    pub link: u8,
    pub fragment: Fragment,
    pub identification: u32,
    pub offset: u32,
    pub length: u32,
    pub transport: usize,
    pub quoted: usize,
    pub quoted_transport: usize,
}

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

enum Kind {
    /// With the request's type, or 0 for an echo's.
    Request(u16),
    Reply(u16),
    Error,
    Link,
}

fn kind(protocol: u8, number: u8) -> Option<Kind> {
    Some(match (protocol, number) {
        (ICMP, 8) | (ICMPV6, 128) => Kind::Request(0),
        (ICMP, 0) | (ICMPV6, 129) => Kind::Reply(0),
        (ICMP, 13 | 42) | (ICMPV6, 160) => Kind::Request(number.into()),
        (ICMP, 14 | 43) | (ICMPV6, 161) => Kind::Reply(u16::from(number) - 1),
        (ICMP, 3 | 11 | 12) | (ICMPV6, 1..=4) => Kind::Error,
        (ICMPV6, 130..=137 | 143) => Kind::Link,
        _ => return None,
    })
}

fn bytes(frame: &[u8], offset: usize, length: usize) -> Result<&[u8], DropReason> {
    frame.get(offset..offset + length).ok_or(DropReason::Truncated)
}

pub fn word(frame: &[u8], offset: usize) -> Result<u16, DropReason> {
    let bytes = bytes(frame, offset, 2)?;
    Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
}

pub fn address(frame: &[u8], offset: usize, v6: bool) -> Result<IpAddr, DropReason> {
    Ok(if v6 {
        let octets: [u8; 16] = bytes(frame, offset, 16)?.try_into().unwrap();
        Ipv6Addr::from(octets).into()
    } else {
        let octets: [u8; 4] = bytes(frame, offset, 4)?.try_into().unwrap();
        Ipv4Addr::from(octets).into()
    })
}

pub fn ethertype(frame: &[u8]) -> Result<u16, DropReason> {
    match word(frame, 12)? {
        known @ (0x0800 | 0x0806 | 0x86dd) => Ok(known),
        0x8100 | 0x88a8 => Err(DropReason::VlanTag),
        _ => Err(DropReason::UnknownEthertype),
    }
}

fn is_reserved(address: Ipv6Addr) -> bool {
    let octets = address.octets();
    let embedded =
        octets[..8] == [0; 8] && matches!(octets[8..12], [0, 0, 0 | 0xff, 0 | 0xff]) && octets[10] == octets[11];
    address.is_multicast() || embedded
}

impl Packet {
    pub fn parse(frame: &[u8]) -> Result<Self, DropReason> {
        let v6 = match ethertype(frame)? {
            0x0800 => false,
            0x86dd => true,
            _ => return Err(DropReason::UnknownEthertype),
        };
        let none: IpAddr = Ipv4Addr::UNSPECIFIED.into();
        let mut packet = Self {
            v6,
            protocol: 0,
            source: (none, 0),
            destination: (none, 0),
            flags: 0,
            related: false,
            about: none,
            request: false,
            answer: false,
            link: 0,
            fragment: Fragment::None,
            identification: 0,
            offset: 0,
            length: 0,
            transport: 0,
            quoted: 0,
            quoted_transport: 0,
        };
        let (transport, length) = if v6 { packet.ipv6(frame)? } else { packet.ipv4(frame)? };
        if packet.fragment == Fragment::Later {
            return if packet.offset == 8 && packet.protocol == TCP {
                Err(DropReason::FragmentTiny)
            } else {
                Ok(packet)
            };
        }
        let first = packet.fragment == Fragment::First;
        packet.upper(frame, transport, length).map_err(|reason| match reason {
            DropReason::Truncated if first => DropReason::FragmentTiny,
            _ => reason,
        })?;
        Ok(packet)
    }

    fn piece(&mut self, identification: u32, offset: u32, more: bool, length: u32) -> Result<(), DropReason> {
        if offset == 0 && !more {
            return Ok(());
        }
        if length == 0 || (more && !length.is_multiple_of(8)) || offset + length > 65535 {
            return Err(DropReason::InvalidHeader);
        }
        self.fragment = if offset == 0 { Fragment::First } else { Fragment::Later };
        (self.identification, self.offset, self.length) = (identification, offset, length);
        Ok(())
    }

    fn ipv4(&mut self, frame: &[u8]) -> Result<(usize, u32), DropReason> {
        let header = bytes(frame, L3, 20)?;
        self.protocol = header[9];
        self.source.0 = address(frame, L3 + 12, false)?;
        self.destination.0 = address(frame, L3 + 16, false)?;
        let total = usize::from(word(frame, L3 + 2)?);
        if header[0] >> 4 != 4 || header[0] & 15 < 5 || total < 20 {
            return Err(DropReason::InvalidHeader);
        }
        if header[0] & 15 > 5 {
            return Err(DropReason::IpOptions);
        }
        if L3 + total > frame.len() {
            return Err(DropReason::Truncated);
        }
        if self.protocol == ICMPV6 {
            return Err(DropReason::UnknownProtocol);
        }
        let length = u32::try_from(total - 20).unwrap();
        let offset = word(frame, L3 + 6)?;
        let identification = u32::from(word(frame, L3 + 4)?);
        self.piece(
            identification,
            u32::from(offset & 0x1fff) * 8,
            offset & 0x2000 != 0,
            length,
        )?;
        Ok((L3 + 20, length))
    }

    fn ipv6(&mut self, frame: &[u8]) -> Result<(usize, u32), DropReason> {
        let header = bytes(frame, L3, 40)?;
        let (source, destination) = (address(frame, L3 + 8, true)?, address(frame, L3 + 24, true)?);
        (self.source.0, self.destination.0) = (source, destination);
        if header[0] >> 4 != 6 {
            return Err(DropReason::InvalidHeader);
        }
        let (IpAddr::V6(from), IpAddr::V6(to)) = (source, destination) else {
            unreachable!()
        };
        let multicast = to.is_multicast();
        if (is_reserved(to) && !multicast) || (is_reserved(from) && !(from.is_unspecified() && multicast)) {
            return Err(DropReason::ReservedAddress);
        }
        let payload = usize::from(word(frame, L3 + 4)?);
        if L3 + 40 + payload > frame.len() {
            return Err(DropReason::Truncated);
        }
        let (mut next, mut offset, mut left) = (header[6], L3 + 40, u32::try_from(payload).unwrap());
        for index in 0..=6 {
            let size = match next {
                0 if index > 0 => return Err(DropReason::InvalidHeader),
                0 | 43 | 60 => {
                    let header = bytes(frame, offset, 4)?;
                    if next == 43 && header[3] != 0 {
                        return Err(DropReason::ExtensionHeaders);
                    }
                    next = header[0];
                    (usize::from(header[1]) + 1) * 8
                }
                44 => {
                    let header = bytes(frame, offset, 8)?;
                    next = header[0];
                    let place = word(frame, offset + 2)?;
                    let identification = u32::from_be_bytes(header[4..8].try_into().unwrap());
                    let rest = left.checked_sub(8).ok_or(DropReason::Truncated)?;
                    self.piece(identification, u32::from(place & 0xfff8), place & 1 != 0, rest)?;
                    if self.fragment == Fragment::Later {
                        self.protocol = next;
                        return Ok((offset, rest));
                    }
                    8
                }
                ICMP => return Err(DropReason::UnknownProtocol),
                _ => {
                    self.protocol = next;
                    return Ok((offset, left));
                }
            };
            if size > MOST_EXTENSIONS || offset + size > L3 + 40 + MOST_EXTENSIONS {
                return Err(DropReason::ExtensionHeaders);
            }
            offset += size;
            left = left
                .checked_sub(u32::try_from(size).unwrap())
                .ok_or(DropReason::Truncated)?;
        }
        Err(DropReason::ExtensionHeaders)
    }

    fn upper(&mut self, frame: &[u8], transport: usize, length: u32) -> Result<(), DropReason> {
        let least = match self.protocol {
            TCP => 20,
            UDP | SCTP | ICMP | ICMPV6 => 8,
            _ => 0,
        };
        if length < least {
            return Err(DropReason::Truncated);
        }
        self.transport = transport;
        match self.protocol {
            TCP => {
                let header = bytes(frame, transport, 14)?;
                if header[12] >> 4 < 5 {
                    return Err(DropReason::InvalidHeader);
                }
                self.flags = header[13];
                self.ports(frame, transport)
            }
            UDP | SCTP => self.ports(frame, transport),
            ICMP | ICMPV6 => self.icmp(frame, transport),
            _ => Ok(()),
        }
    }

    fn ports(&mut self, frame: &[u8], transport: usize) -> Result<(), DropReason> {
        self.source.1 = word(frame, transport)?;
        self.destination.1 = word(frame, transport + 2)?;
        Ok(())
    }

    fn icmp(&mut self, frame: &[u8], transport: usize) -> Result<(), DropReason> {
        let identifier = word(frame, transport + 4)?;
        match kind(self.protocol, bytes(frame, transport, 8)?[0]).ok_or(DropReason::IcmpType)? {
            Kind::Request(of) => {
                self.request = true;
                (self.source.1, self.destination.1) = (identifier, of);
            }
            Kind::Reply(of) => {
                self.answer = true;
                (self.source.1, self.destination.1) = (of, identifier);
            }
            Kind::Link => self.link = frame[transport],
            Kind::Error if self.fragment != Fragment::None => return Err(DropReason::IcmpUnrelated),
            Kind::Error => return self.error(frame, transport + 8),
        }
        Ok(())
    }

    /// An error belongs to the flow that it quotes, and travels as its replies do.
    fn error(&mut self, frame: &[u8], quoted: usize) -> Result<(), DropReason> {
        let unrelated = Err(DropReason::IcmpUnrelated);
        self.quoted = quoted;
        let (sender, transport);
        if self.v6 {
            let header = bytes(frame, quoted, 40)?;
            sender = address(frame, quoted + 8, true)?;
            self.about = address(frame, quoted + 24, true)?;
            if header[0] >> 4 != 6 {
                return unrelated;
            }
            let (mut next, mut offset) = (header[6], quoted + 40);
            for _ in 0..4 {
                let header = bytes(frame, offset, 4)?;
                offset += match next {
                    44 if word(frame, offset + 2)? & 0xfff8 != 0 => return unrelated,
                    44 => 8,
                    0 | 43 | 60 => (usize::from(header[1]) + 1) * 8,
                    _ => break,
                };
                next = header[0];
            }
            (self.protocol, transport) = (next, offset);
        } else {
            let header = bytes(frame, quoted, 20)?;
            if header[0] != 0x45 || word(frame, quoted + 6)? & 0x1fff != 0 {
                return unrelated;
            }
            sender = address(frame, quoted + 12, false)?;
            self.about = address(frame, quoted + 16, false)?;
            (self.protocol, transport) = (header[9], quoted + 20);
        }
        if sender != self.destination.0 {
            return unrelated;
        }
        self.related = true;
        self.quoted_transport = transport;
        let ports = bytes(frame, transport, 8)?;
        match (self.protocol, kind(self.protocol, ports[0])) {
            (TCP | UDP | SCTP, _) => {
                self.destination.1 = word(frame, transport)?;
                self.source.1 = word(frame, transport + 2)?;
            }
            (ICMP | ICMPV6, Some(Kind::Request(of))) => {
                (self.source.1, self.destination.1) = (of, word(frame, transport + 4)?);
            }
            (ICMP | ICMPV6, Some(Kind::Reply(of))) => {
                (self.source.1, self.destination.1) = (word(frame, transport + 4)?, of);
            }
            _ => return unrelated,
        }
        Ok(())
    }

    pub fn is_syn(&self) -> bool {
        self.protocol == TCP && self.flags & (SYN | ACK | RST) == SYN
    }
}
