//! Why a packet was dropped: each reason has a number, a name and a sentence, defined here and nowhere else.

macro_rules! reasons {
    ($($number:literal $variant:ident $name:literal $text:literal;)*) => {
        /// Why a packet was dropped. The numbers are stable; a new reason takes a new one.
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum DropReason {
            $(#[doc = $text] $variant = $number,)*
        }

        impl DropReason {
            /// All reasons, by number.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Name, as in metrics and on the command line.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What it means, in one sentence.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

reasons! {
    1 Internal "internal" "A map of the datapath has no entry that it always has: a defect.";
    2 Truncated "truncated" "The packet is shorter than its headers.";
    3 UnknownEthertype "unknown_ethertype" "The ethertype is none of IPv4, IPv6 and ARP.";
    4 ReservedAddress "reserved_address" "An IPv6 packet with an address that no packet may have there: unspecified, multicast, loopback or IPv4-mapped.";
    5 VlanTag "vlan_tag" "Pods may not send frames with a VLAN tag.";
    6 InvalidHeader "invalid_header" "An IP header with a wrong version, header length or total length.";
    7 IpOptions "ip_options" "IPv4 options are not carried.";
    8 FragmentUnknown "fragment_unknown" "A later fragment without its first one, between two that policy lets not talk at all.";
    9 UnknownProtocol "unknown_protocol" "ICMP in IPv6, or ICMPv6 in IPv4.";
    10 IcmpType "icmp_type" "An ICMP type that is neither a request that is carried (echo, timestamp, extended echo), nor its reply, nor an error.";
    11 IcmpUnrelated "icmp_unrelated" "An ICMP error or reply that belongs to no flow.";
    12 SpoofedAddress "spoofed_address" "A pod sent from an address that is not its own.";
    13 SpoofedMac "spoofed_mac" "A pod sent from a MAC address that is not its own.";
    14 SpoofedArp "spoofed_arp" "A pod sent an ARP packet with an address that is not its own.";
    15 UnexpectedArp "unexpected_arp" "An ARP packet other than a pod's request for its gateway.";
    16 NotForGateway "not_for_gateway" "A pod sent a frame to another MAC address than its gateway's.";
    17 TunnelPort "tunnel_port" "UDP to the tunnel port of an address that is no pod's, or from that port to a node port, whose answers would go there; or a tunnel of another kind (IPIP, 6in4, GRE) to a node.";
    18 UnknownDestination "unknown_destination" "No pod has the destination address, which is one of a pod CIDR or no unicast address.";
    19 UnknownSource "unknown_source" "The node routed a packet to a pod from an address that is a pod's, its own, or no unicast address.";
    20 TtlExceeded "ttl_exceeded" "The time to live, or the hop limit, ran out.";
    21 EgressDenied "egress_denied" "Policy does not let the sender reach this destination.";
    22 IngressDenied "ingress_denied" "Policy does not let the receiver be reached by this source.";
    23 MidStream "mid_stream" "A TCP packet in the middle of a flow that is not tracked and not allowed both ways; a pod of this node that sent it was told.";
    24 ConntrackFull "conntrack_full" "The conntrack map took no new entry.";
    25 NoTunnelKey "no_tunnel_key" "A packet on the vxlan device without tunnel metadata.";
    26 UnknownNode "unknown_node" "A vxlan packet whose outer source is not the underlay address of another node.";
    27 WrongNode "wrong_node" "A vxlan packet whose inner source does not live behind the node that sent it.";
    28 ReservedVni "reserved_vni" "A VNI that neither a pod, nor another node, nor what came in by its node ports may have.";
    29 WrongVni "wrong_vni" "A VNI that is not the identity of the inner source.";
    30 NotLocal "not_local" "A packet from the tunnel for an address that is neither a pod of this node nor the node itself.";
    31 TunnelFailed "tunnel_failed" "The kernel refused the tunnel key.";
    32 ExtensionHeaders "extension_headers" "IPv6 extension headers that are not carried: too many, too long, or a source route.";
    33 LinkControl "link_control" "Neighbour discovery or multicast control that concerns no gateway; pods have no neighbours.";
    34 SpoofedNeighbour "spoofed_neighbour" "A pod asked for its gateway from an address that is not its own, or in a malformed way.";
    35 FragmentTiny "fragment_tiny" "A first fragment without its whole transport header, or one that begins inside it.";
    36 FragmentOverlap "fragment_overlap" "A fragment that overlaps the first one of its packet.";
    37 TooBig "too_big" "The packet is larger than the path to the other node takes; the sender was told, where it can be.";
    38 ConntrackShare "conntrack_share" "The conntrack map is nearly full, and the pod has used up its share of it.";
    39 NoService "no_service" "The address is a service's, which has no such port; the sender was told.";
    40 NoBackends "no_backends" "The service has no backends; the sender was told.";
    41 BackendGone "backend_gone" "The backend of a connection through a service is gone; the sender was told.";
    42 ServicePorts "service_ports" "The client has a connection from this port to the same backend, by way of another service or directly; where that is TCP, it was told.";
    43 ForeignTunnel "foreign_tunnel" "A vxlan packet that was not sent to this node's underlay address.";
    44 NoRouteBack "no_route_back" "A client asked at a node port from an address that the node's routes reach by another interface, or not at all.";
}

/// Elements of the counter map: one more than the highest number.
pub const DROP_REASONS: u32 = 45;

impl DropReason {
    /// The reason with this number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| *reason as u8 == number)
    }
}

const _: () = assert!(DropReason::ALL.len() + 1 == DROP_REASONS as usize);
