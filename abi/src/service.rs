//! Services: virtual addresses and ports, each with the backends that stand behind it.
//!
//! A frontend's backends and the table that spreads connections over them are one value of one inner map: hostd puts
//! another in its place at once, so that a program sees all of the old one or all of the new one.

use crate::address::Address;

/// Backends of a service at the most.
pub const MAX_BACKENDS: u32 = 1024;

/// Slots of the table: a prime, Cilium's default size. Each backend has a share of them that differs from the others' by
/// a percent or so for as many as 160 backends (Eisenbud et al., "Maglev", NSDI 2016, section 5.3).
pub const SLOTS: u32 = 16_381;

/// Slots in one word of the table.
pub const SLOTS_PER_WORD: u32 = 4;
const WORDS: usize = (SLOTS as usize).div_ceil(SLOTS_PER_WORD as usize);

/// Key of a frontend.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// Its address; all zero for a node port, which is at every node's address.
    pub address: Address,
    /// Its port, in network byte order.
    pub port: u16,
    /// Scope of the address.
    pub scope: u16,
    /// [`Family`](crate::Family) of the address.
    pub family: u8,
    /// IP protocol number: TCP or UDP.
    pub protocol: u8,
    /// Zero.
    pub zero: u16,
}

/// Where connections go.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend {
    /// Its address, of the frontend's family.
    pub address: Address,
    /// Its port, in network byte order; zero where there is no backend.
    pub port: u16,
    /// Zero.
    pub zero: u16,
}

/// What the programs know of a frontend.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// The frontend that this is the entry of: the kernel may hand an element of a hash to another key while a program
    /// still reads it.
    pub key: ServiceKey,
    /// Backends; with none there is no table.
    pub backends: u32,
    /// A client gets the same backend for so many seconds after its last new connection; zero: each connection for itself.
    pub affinity: u32,
    /// Backends by number. A backend has the same number for as long as it is one.
    pub backend: [Backend; MAX_BACKENDS as usize],
    /// Maglev's table: numbers of backends, [`SLOTS_PER_WORD`] to a word, the first in the low bits.
    pub slots: [u64; WORDS],
}

impl Service {
    /// A frontend without backends.
    #[must_use]
    #[cfg_attr(
        feature = "user",
        expect(clippy::large_stack_arrays, reason = "hostd makes one at a time, and boxes it")
    )]
    pub const fn none(key: ServiceKey) -> Self {
        Self {
            key,
            backends: 0,
            affinity: 0,
            backend: [Backend {
                address: Address::NONE,
                port: 0,
                zero: 0,
            }; MAX_BACKENDS as usize],
            slots: [0; WORDS],
        }
    }
}

/// Key of a client's affinity.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AffinityKey {
    /// The frontend.
    pub frontend: ServiceKey,
    /// The client's address.
    pub client: Address,
}

/// Which backend a client has.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AffinityEntry {
    /// Hash of the entry's own key, as in [`ConntrackEntry`](crate::ConntrackEntry).
    pub cookie: u64,
    /// When the entry ends, in nanoseconds of `CLOCK_MONOTONIC`.
    pub expires: u64,
    /// The backend.
    pub backend: Backend,
    /// Its number.
    pub number: u32,
}

const _: () = assert!(size_of::<ServiceKey>() == 24);
const _: () = assert!(size_of::<Backend>() == 20);
const _: () = assert!(size_of::<Service>() == 24 + 8 + 20 * 1024 + 8 * 4096);
const _: () = assert!(size_of::<AffinityKey>() == 40);
const _: () = assert!(size_of::<AffinityEntry>() == 40);
