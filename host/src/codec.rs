//! The one place that knows the wire and disk format: bincode behind a header with a version and a checksum.
//!
//! | bytes | what |
//! | --- | --- |
//! | 4 | `WGF1` |
//! | 4 | version of the content, little-endian |
//! | 4 | length of the content in bytes, little-endian |
//! | 4 | CRC-32 (IEEE 802.3) of the content, little-endian |
//! | n | the content, bincode 2 with its standard configuration |

use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const MAGIC: [u8; 4] = *b"WGF1";
const HEADER: usize = 16;

/// Version of everything that is encoded. Raise it with every change to an encoded type.
pub const VERSION: u32 = 1;

/// Content of one frame at the most, in bytes: room for a large policy module.
pub const MAX_CONTENT: usize = 48 << 20;

/// Why bytes could not be read, or a value not be written.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// Not what hostd writes.
    #[error("not a Wasmgate file or frame (it does not begin with `WGF1`)")]
    Magic,
    /// Written by another version of hostd.
    #[error("format version {found}, but this hostd reads version {VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// Longer than the limit.
    #[error("{length} bytes of content; at most {MAX_CONTENT} are read")]
    TooLong {
        /// The length announced.
        length: usize,
    },
    /// The end is missing, or there is more than announced.
    #[error("{found} bytes of content where {announced} were announced")]
    Length {
        /// Announced by the header.
        announced: usize,
        /// Present.
        found: usize,
    },
    /// The content was changed or torn.
    #[error("wrong checksum")]
    Checksum,
    /// The content is not a value of the type.
    #[error("content: {0}")]
    Decode(#[from] bincode::error::DecodeError),
    /// The value can't be written.
    #[error("content: {0}")]
    Encode(#[from] bincode::error::EncodeError),
    /// The stream failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// Content of one message at the most, as bincode counts it: what it allocates for lengths that the bytes announce.
fn configuration() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<MAX_CONTENT>()
}

/// Encodes a value with its header.
///
/// # Errors
///
/// Where the value is too long.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    let content = bincode::serde::encode_to_vec(value, configuration())?;
    let length = u32::try_from(content.len())
        .ok()
        .filter(|length| *length as usize <= MAX_CONTENT)
        .ok_or(CodecError::TooLong { length: content.len() })?;
    let mut bytes = Vec::with_capacity(HEADER + content.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(&content).to_le_bytes());
    bytes.extend_from_slice(&content);
    Ok(bytes)
}

struct Header {
    length: usize,
    checksum: u32,
}

fn header(bytes: &[u8; HEADER]) -> Result<Header, CodecError> {
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if bytes[..4] != MAGIC {
        return Err(CodecError::Magic);
    }
    if word(4) != VERSION {
        return Err(CodecError::Version { found: word(4) });
    }
    let length = word(8) as usize;
    if length > MAX_CONTENT {
        return Err(CodecError::TooLong { length });
    }
    Ok(Header {
        length,
        checksum: word(12),
    })
}

fn content<T: DeserializeOwned>(header: &Header, content: &[u8]) -> Result<T, CodecError> {
    if crc32fast::hash(content) != header.checksum {
        return Err(CodecError::Checksum);
    }
    let (value, read) = bincode::serde::decode_from_slice(content, configuration())?;
    if read != content.len() {
        return Err(CodecError::Length {
            announced: read,
            found: content.len(),
        });
    }
    Ok(value)
}

/// Decodes what [`encode`] made.
///
/// # Errors
///
/// Where the bytes are of another version, torn, or no such value.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let (head, rest) = bytes.split_first_chunk::<HEADER>().ok_or(CodecError::Magic)?;
    let head = header(head)?;
    if rest.len() != head.length {
        return Err(CodecError::Length {
            announced: head.length,
            found: rest.len(),
        });
    }
    content(&head, rest)
}

/// Reads one frame; `None` where the stream ends before it.
///
/// # Errors
///
/// As [`decode`], and where the stream fails or ends within the frame.
pub async fn read<T: DeserializeOwned>(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<T>, CodecError> {
    let mut head = [0; HEADER];
    let first = stream.read(&mut head).await?;
    if first == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut head[first..]).await?;
    let head = header(&head)?;
    // Grows with what arrives, not with what was announced.
    let mut bytes = Vec::new();
    let found = stream.take(head.length as u64).read_to_end(&mut bytes).await?;
    if found != head.length {
        return Err(CodecError::Length {
            announced: head.length,
            found,
        });
    }
    content(&head, &bytes).map(Some)
}

/// Writes one frame.
///
/// # Errors
///
/// As [`encode`], and where the stream fails.
pub async fn write<T: Serialize>(stream: &mut (impl AsyncWrite + Unpin), value: &T) -> Result<(), CodecError> {
    stream.write_all(&encode(value)?).await?;
    stream.flush().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{CodecError, MAX_CONTENT, decode, encode, read};

    #[test]
    fn what_was_encoded_is_decoded() {
        let value = ("pod".to_owned(), vec![1_u32, 2, 3]);
        assert_eq!(decode::<(String, Vec<u32>)>(&encode(&value).unwrap()).unwrap(), value);
    }

    #[test]
    fn a_torn_or_changed_file_is_noticed() {
        let bytes = encode(&"some text").unwrap();
        assert!(matches!(
            decode::<String>(&bytes[..bytes.len() - 1]),
            Err(CodecError::Length { .. })
        ));
        assert!(matches!(decode::<String>(&bytes[..7]), Err(CodecError::Magic)));
        let mut changed = bytes.clone();
        *changed.last_mut().unwrap() ^= 1;
        assert!(matches!(decode::<String>(&changed), Err(CodecError::Checksum)));
        let mut newer = bytes;
        newer[4] = 9;
        assert!(matches!(
            decode::<String>(&newer),
            Err(CodecError::Version { found: 9 })
        ));
    }

    #[tokio::test]
    async fn a_hostile_length_allocates_nothing() {
        let mut bytes = encode(&"x").unwrap();
        bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(
            read::<String>(&mut bytes.as_slice()).await,
            Err(CodecError::TooLong { .. })
        ));
        bytes[8..12].copy_from_slice(&u32::try_from(MAX_CONTENT).unwrap().to_le_bytes());
        assert!(matches!(
            read::<String>(&mut bytes.as_slice()).await,
            Err(CodecError::Length { .. })
        ));
    }

    #[tokio::test]
    async fn an_ended_stream_is_no_error_and_half_a_frame_is() {
        assert!(read::<String>(&mut [].as_slice()).await.unwrap().is_none());
        let bytes = encode(&"x").unwrap();
        assert!(read::<String>(&mut &bytes[..9]).await.is_err());
    }
}
