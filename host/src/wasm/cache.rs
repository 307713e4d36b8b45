//! Compiled modules on disk: by content, for this engine, authenticated before they are believed.
//!
//! Machine code that anybody could have put there must not be run. So the folder is root's alone, and each file begins
//! with an HMAC (RFC 2104) under a key that only this node has. A file that is torn, foreign or of another engine is
//! compiled anew.

use hmac::{Hmac, KeyInit, Mac};
use rustix::rand::{GetRandomFlags, getrandom};
use sha2::Sha256;
use std::{
    fs::{self, DirBuilder, OpenOptions},
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};
use wasmtime::Engine;

/// Bytes of an HMAC-SHA256, and of the key.
const TAG: usize = 32;
/// Files that are kept: the ones used longest ago go first.
const MAX_FILES: usize = 64;

/// The folder.
pub struct Cache {
    folder: PathBuf,
    key: [u8; TAG],
    engine: u64,
}

impl Cache {
    /// Opens the folder, which is made where it is missing.
    pub fn open(folder: &Path, engine: &Engine) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let metadata = fs::metadata(folder)?;
        if metadata.uid() != rustix::process::geteuid().as_raw() || metadata.mode() & 0o077 != 0 {
            return Err(io::Error::other(
                "others than its owner may look into it (want mode 0700)",
            ));
        }
        let mut hasher = DefaultHasher::new();
        engine.precompile_compatibility_hash().hash(&mut hasher);
        Ok(Self {
            key: node_key(&folder.join("key"))?,
            folder: folder.to_owned(),
            engine: hasher.finish(),
        })
    }

    fn file(&self, sha256: &str) -> PathBuf {
        self.folder.join(format!("{sha256}.compiled"))
    }

    fn mac(&self, sha256: &str, artifact: &[u8]) -> Option<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).ok()?;
        mac.update(sha256.as_bytes());
        mac.update(&self.engine.to_le_bytes());
        mac.update(artifact);
        Some(mac)
    }

    /// The compiled form of a module, where there is one that is whole and ours.
    pub fn get(&self, sha256: &str) -> Option<Vec<u8>> {
        let path = self.file(sha256);
        let bytes = fs::read(&path).ok()?;
        let authentic = bytes.split_at_checked(TAG).and_then(|(tag, artifact)| {
            let mac = self.mac(sha256, artifact)?;
            mac.verify_slice(tag).ok()
        });
        if authentic.is_none() {
            tracing::warn!(
                "{}: torn, foreign or of another hostd; the module is compiled anew",
                path.display()
            );
            return None;
        }
        // Used just now: so it is not the next one to go. Where that can't be noted it may be compiled again one day.
        let _ = fs::File::open(&path).and_then(|file| file.set_modified(std::time::SystemTime::now()));
        Some(bytes[TAG..].to_vec())
    }

    /// Keeps the compiled form of a module.
    pub fn put(&self, sha256: &str, artifact: &[u8]) -> io::Result<()> {
        let mac = self
            .mac(sha256, artifact)
            .ok_or_else(|| io::Error::other("a key that HMAC does not take"))?;
        replace(&self.file(sha256), &[&mac.finalize().into_bytes(), artifact])?;
        self.prune()
    }

    fn prune(&self) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            if entry
                .path()
                .extension()
                .is_some_and(|extension| extension == "compiled")
            {
                files.push((entry.metadata()?.modified()?, entry.path()));
            }
        }
        files.sort();
        let excess = files.len().saturating_sub(MAX_FILES);
        for (_, path) in files.into_iter().take(excess) {
            fs::remove_file(path)?;
        }
        Ok(())
    }
}

/// The node's key; a new one where there is none, or half of one.
fn node_key(path: &Path) -> io::Result<[u8; TAG]> {
    let mut key = [0; TAG];
    let read = OpenOptions::new().read(true).open(path);
    if read.and_then(|mut file| file.read_exact(&mut key)).is_ok() {
        return Ok(key);
    }
    let mut filled = 0;
    while filled < TAG {
        filled += getrandom(&mut key[filled..], GetRandomFlags::empty())?;
    }
    replace(path, &[&key])?;
    Ok(key)
}

/// Writes a file that only its owner may read: whole, or not at all.
fn replace(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let aside = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&aside)?;
    for part in parts {
        file.write_all(part)?;
    }
    fs::rename(&aside, path)
}

#[cfg(test)]
mod tests {
    use super::Cache;
    use std::{fs, os::unix::fs::PermissionsExt};

    #[test]
    fn what_is_torn_or_foreign_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache");
        let engine = super::super::engine().unwrap();
        let cache = Cache::open(&path, &engine).unwrap();
        assert_eq!(cache.get("abc"), None);
        cache.put("abc", b"machine code").unwrap();
        assert_eq!(cache.get("abc").as_deref(), Some(&b"machine code"[..]));
        // Another hostd of this node reads it, another node's does not.
        assert!(Cache::open(&path, &engine).unwrap().get("abc").is_some());
        fs::copy(path.join("abc.compiled"), path.join("abd.compiled")).unwrap();
        assert_eq!(cache.get("abd"), None, "another module's");

        let mut bytes = fs::read(path.join("abc.compiled")).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(path.join("abc.compiled"), &bytes).unwrap();
        assert_eq!(cache.get("abc"), None, "changed");
        fs::write(path.join("abc.compiled"), b"short").unwrap();
        assert_eq!(cache.get("abc"), None, "torn");

        cache.put("abc", b"machine code").unwrap();
        fs::remove_file(path.join("key")).unwrap();
        assert_eq!(Cache::open(&path, &engine).unwrap().get("abc"), None, "another key");

        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(Cache::open(&path, &engine).is_err());
    }
}
