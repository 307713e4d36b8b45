//! Entries of LRU maps: the kernel may hand an element to another key while a program still reads it.

use abi::{AffinityEntry, ConntrackEntry, FragmentEntry};
use core::mem::offset_of;

/// An entry that begins with its cookie, a hash of its own key, and with the time at which it runs out.
///
/// # Safety
///
/// It is whole 64-bit words of integers, and the first two are those.
pub unsafe trait Entry {}

macro_rules! entries {
    ($($type:ty),*) => {$(
        const _: () = assert!(
            offset_of!($type, cookie) == 0 && offset_of!($type, expires) == 8 && size_of::<$type>().is_multiple_of(8)
        );
        // SAFETY: what is asserted above; the types are integers without padding.
        unsafe impl Entry for $type {}
    )*};
}
entries!(AffinityEntry, ConntrackEntry, FragmentEntry);

/// Copies an entry out of its map, where it is the one with this cookie, whole, and has not run out.
#[inline(always)]
pub fn copy_out<T: Entry>(from: *const T, to: &mut T, cookie: u64, now: u64) -> bool {
    let to = core::ptr::from_mut(to).cast::<u64>();
    let from = from.cast::<u64>();
    // SAFETY: the kernel never unmaps an LRU element, it only gives it to another key: the reads are of valid memory. They
    // are volatile because that may happen at any moment; the cookie, read before and after the copy, tells. The copy goes
    // by words: at once it would go through the stack.
    unsafe {
        let before = core::ptr::read_volatile(from);
        for word in 0..size_of::<T>() / size_of::<u64>() {
            core::ptr::write_volatile(to.add(word), core::ptr::read_volatile(from.add(word)));
        }
        let after = core::ptr::read_volatile(from);
        before == cookie && after == cookie && *to.add(1) > now
    }
}
