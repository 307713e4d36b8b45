//! Addresses as map keys: a family byte and a scope with every one of them.

/// Address family of a key; the numbers are the kernel's `AF_INET` and `AF_INET6`.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4 = 2,
    /// IPv6.
    V6 = 10,
}

/// The scope that all addresses are in today. Others are kept free for tenants with overlapping pod CIDRs.
pub const SHARED_SCOPE: u16 = 0;

/// 16 bytes in network byte order; IPv4 takes the first four and leaves the others zero. Aligned, so that programs move
/// words and not bytes.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(pub [u8; 16]);

impl Address {
    /// All zero: no address.
    pub const NONE: Self = Self([0; 16]);

    /// An IPv4 address, given in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn v4(octets: [u8; 4]) -> Self {
        let [a, b, c, d] = octets;
        Self([a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    }

    /// Four words, each in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn words(&self) -> [u32; 4] {
        // SAFETY: 16 bytes, aligned as words are, are four words, whatever the bytes. Put together from single bytes, they
        // would be loaded one by one.
        unsafe { core::ptr::from_ref(self).cast::<[u32; 4]>().read() }
    }
}

/// Key of the endpoint map, the ipcache and the node map.
///
/// The family is part of the key, because an IPv4 address and an IPv6 address may have the same 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressKey {
    /// [`SHARED_SCOPE`].
    pub scope: u16,
    /// A [`Family`].
    pub family: u8,
    /// Zero.
    pub zero: u8,
    /// The address.
    pub address: Address,
}

impl AddressKey {
    /// The key of an IPv4 address, given in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn v4(octets: [u8; 4]) -> Self {
        Self::new(Family::V4, Address::v4(octets))
    }

    /// The key of an address in the shared scope.
    #[inline(always)]
    #[must_use]
    pub const fn new(family: Family, address: Address) -> Self {
        Self {
            scope: SHARED_SCOPE,
            family: family as u8,
            zero: 0,
            address,
        }
    }
}

#[cfg(feature = "user")]
mod user {
    use super::{Address, AddressKey, Family};
    use std::net::IpAddr;

    impl From<IpAddr> for AddressKey {
        fn from(address: IpAddr) -> Self {
            match address {
                IpAddr::V4(v4) => Self::v4(v4.octets()),
                IpAddr::V6(v6) => Self::new(Family::V6, Address(v6.octets())),
            }
        }
    }

    impl AddressKey {
        /// The address that this is the key of.
        #[must_use]
        pub fn ip(&self) -> IpAddr {
            ip(self.family, self.address)
        }
    }

    /// An address as the maps hold it, in the standard library's form.
    #[must_use]
    pub fn ip(family: u8, address: Address) -> IpAddr {
        if family == Family::V6 as u8 {
            IpAddr::from(address.0)
        } else {
            let [a, b, c, d, ..] = address.0;
            IpAddr::from([a, b, c, d])
        }
    }
}
#[cfg(feature = "user")]
pub use user::ip;

const _: () = assert!(size_of::<AddressKey>() == 20);
