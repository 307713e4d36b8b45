//! What a pod asks of its link: its gateway, by ARP and by neighbour discovery.

use super::{
    super::frame::Frame,
    Model, Sent, Step,
    packet::{Fragment, L3, Packet},
    write,
};
use abi::{
    DropReason, Path,
    node::{GATEWAY_V4, GATEWAY_V6},
    policy::ICMPV6,
};
use std::net::IpAddr;

impl Model {
    pub fn arp(&self, frame: &mut [u8], ifindex: u32) -> Step<Sent> {
        let request = frame.get(L3..L3 + 28).ok_or(DropReason::Truncated)?.to_vec();
        if request[..8] != [0, 1, 8, 0, 6, 4, 0, 1] || request[24..28] != GATEWAY_V4 {
            return Err(DropReason::UnexpectedArp);
        }
        let sender: [u8; 4] = request[14..18].try_into().unwrap();
        let pod = self.pods.get(&IpAddr::from(sender)).ok_or(DropReason::SpoofedArp)?;
        if pod.ifindex != ifindex || pod.mac != request[8..14] || pod.mac != frame[6..12] {
            return Err(DropReason::SpoofedArp);
        }
        write::macs(frame, pod.mac, pod.gateway_mac);
        frame[L3 + 7] = 2;
        frame[L3 + 8..L3 + 14].copy_from_slice(&pod.gateway_mac);
        frame[L3 + 14..L3 + 18].copy_from_slice(&GATEWAY_V4);
        frame[L3 + 18..L3 + 24].copy_from_slice(&pod.mac);
        frame[L3 + 24..L3 + 28].copy_from_slice(&sender);
        Ok((Path::ArpReply, ifindex, None))
    }

    pub fn neighbour(&self, frame: &mut [u8], packet: &Packet, ifindex: u32) -> Step<Sent> {
        if packet.link != 135 || packet.fragment != Fragment::None {
            return Err(DropReason::LinkControl);
        }
        let body = frame.get(L3 + 40..L3 + 72).ok_or(DropReason::Truncated)?.to_vec();
        if body[8..24] != GATEWAY_V6.0 {
            return Err(DropReason::LinkControl);
        }
        let whole = frame[L3 + 4..L3 + 8] == [0, 32, ICMPV6, 255];
        if !whole || body[1] != 0 || body[24..26] != [1, 1] {
            return Err(DropReason::SpoofedNeighbour);
        }
        let pod = self.pods.get(&packet.source.0).ok_or(DropReason::SpoofedNeighbour)?;
        if pod.ifindex != ifindex || pod.mac != frame[6..12] || pod.mac != body[26..32] {
            return Err(DropReason::SpoofedNeighbour);
        }
        let mut answer = vec![136, 0, 0, 0, 0xe0, 0, 0, 0];
        answer.extend(GATEWAY_V6.0);
        answer.extend([2, 1]);
        answer.extend(pod.gateway_mac);
        let header = [
            &pod.mac[..],
            &pod.gateway_mac,
            &frame[12..22],
            &GATEWAY_V6.0,
            &write::octets(packet.source.0),
        ];
        let whole = Frame([&header.concat()[..], &answer].concat()).summed();
        frame[..L3 + 72].copy_from_slice(&whole.0);
        Ok((Path::NeighbourReply, ifindex, None))
    }
}
