//! Random numbers, from the kernel.

use rustix::rand::{GetRandomFlags, getrandom};
use std::io;

/// Random bytes.
///
/// # Errors
///
/// Where the kernel gives none.
pub fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let given = getrandom(&mut bytes, GetRandomFlags::empty())?;
    if given < N {
        return Err(io::Error::other("the kernel gives too few random bytes"));
    }
    Ok(bytes)
}
