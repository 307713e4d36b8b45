//! Pods as container runtimes know them: an interface of a container on a network (CNI specification 1.1.0, section 2).

use crate::{
    store::{Durability, StoreError, replace_file},
    wasm::sha256,
};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

/// An interface of a container on a network.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Attachment {
    /// Name of the network.
    pub network: String,
    /// The runtime's name for the container (`CNI_CONTAINERID`).
    pub container: String,
    /// Name of the interface inside the container (`CNI_IFNAME`).
    pub interface: String,
}

/// Bytes of an interface's alias at the most (`IFALIASZ` in `include/uapi/linux/if.h`, with the byte at its end).
const MAX_ALIAS: usize = 255;

impl Attachment {
    /// As the alias of the node's interface says it, with the pod that it is; without the attachment where it would be too
    /// long. No name has a space in it.
    #[must_use]
    pub fn alias(pod: &str, attachment: Option<&Self>) -> String {
        let whole = attachment.map(|one| format!("{pod} {} {} {}", one.network, one.container, one.interface));
        whole
            .filter(|text| text.len() <= MAX_ALIAS)
            .unwrap_or_else(|| pod.to_owned())
    }

    /// Reads it back.
    #[must_use]
    pub fn from_alias(alias: &str) -> Option<Self> {
        let mut parts = alias.split(' ').skip(1).map(str::to_owned);
        Some(Self {
            network: parts.next()?,
            container: parts.next()?,
            interface: parts.next()?,
        })
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "interface {} of container {} on network {}",
            self.interface, self.container, self.network
        )
    }
}

/// Attachments that were ended while hostd was not there: a file for each, in a folder beside hostd's socket.
#[derive(Clone, Debug)]
pub struct Queue(PathBuf);

impl Queue {
    /// The queue of the hostd with this socket.
    #[must_use]
    pub fn beside(socket: &Path) -> Self {
        let mut folder = socket.as_os_str().to_owned();
        folder.push(".ended");
        Self(folder.into())
    }

    fn file(&self, attachment: &Attachment) -> PathBuf {
        self.0.join(sha256(attachment.to_string().as_bytes()))
    }

    /// Leaves word that an attachment has ended.
    ///
    /// # Errors
    ///
    /// Where it can't be written.
    pub fn put(&self, attachment: &Attachment) -> Result<(), StoreError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.0);
        made.map_err(|source| self.failed("create", source))?;
        self.check_owner()?;
        // Text, which a plugin and a hostd of different versions both understand.
        let text = serde_json::to_vec(attachment).map_err(|error| self.failed("write", error.into()))?;
        replace_file(&self.file(attachment), &text, Durability::Memory)
    }

    /// The attachments of which word was left. A file that is none of ours is removed.
    ///
    /// # Errors
    ///
    /// Where they can't be read.
    pub fn list(&self) -> Result<Vec<Attachment>, StoreError> {
        let files = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|source| self.failed("list", source))?,
        };
        self.check_owner()?;
        let mut ended = Vec::new();
        for file in files {
            let path = file.map_err(|source| self.failed("list", source))?.path();
            let hidden = path
                .file_name()
                .is_none_or(|name| name.to_string_lossy().starts_with('.'));
            if hidden || !path.symlink_metadata().is_ok_and(|file| file.is_file()) {
                continue; // still being written, or none of ours
            }
            let bytes = fs::read(&path).map_err(|source| self.failed("read", source))?;
            match serde_json::from_slice::<Attachment>(&bytes) {
                Ok(attachment) => ended.push(attachment),
                Err(error) => {
                    tracing::warn!("removing {}: {error}", path.display());
                    fs::remove_file(&path).map_err(|source| self.failed("remove", source))?;
                }
            }
        }
        Ok(ended)
    }

    /// Forgets the word about an attachment; that there is none is no error.
    ///
    /// # Errors
    ///
    /// Where the file can't be removed.
    pub fn remove(&self, attachment: &Attachment) -> Result<(), StoreError> {
        match fs::remove_file(self.file(attachment)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.failed("remove", error)),
            _ => Ok(()),
        }
    }

    /// Removes the folder.
    ///
    /// # Errors
    ///
    /// Where it can't be removed.
    pub fn clear(&self) -> Result<(), StoreError> {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.failed("remove", error)),
            _ => Ok(()),
        }
    }

    /// Nobody else may have made the folder, or write into it.
    fn check_owner(&self) -> Result<(), StoreError> {
        let folder = fs::symlink_metadata(&self.0).map_err(|source| self.failed("look at", source))?;
        if folder.is_dir() && folder.uid() == rustix::process::geteuid().as_raw() && folder.mode() & 0o022 == 0 {
            return Ok(());
        }
        let problem = io::Error::other("it is not a folder that only its owner may write into");
        Err(self.failed("believe", problem))
    }

    fn failed(&self, what: &str, source: io::Error) -> StoreError {
        StoreError::Io {
            what: format!("{what} {}", self.0.display()),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Attachment, Queue};

    #[test]
    fn word_is_left_read_and_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let queue = Queue::beside(&folder.path().join("hostd.sock"));
        assert_eq!(queue.list().unwrap(), []);
        let one = Attachment {
            network: "net".to_owned(),
            container: "../../etc/passwd".to_owned(),
            interface: "eth0".to_owned(),
        };
        queue.remove(&one).unwrap();
        queue.put(&one).unwrap();
        queue.put(&one).unwrap();
        assert_eq!(queue.list().unwrap(), std::slice::from_ref(&one));
        std::fs::write(folder.path().join("hostd.sock.ended/foreign"), "x").unwrap();
        assert_eq!(queue.list().unwrap(), std::slice::from_ref(&one));
        assert!(!folder.path().join("hostd.sock.ended/foreign").exists());
        queue.remove(&one).unwrap();
        assert_eq!(queue.list().unwrap(), []);
        queue.clear().unwrap();
        queue.clear().unwrap();
    }

    #[test]
    fn an_interfaces_alias_says_what_it_is_attached_to() {
        let mut one = Attachment {
            network: "net".to_owned(),
            container: "c1".to_owned(),
            interface: "eth0".to_owned(),
        };
        let alias = Attachment::alias("red/web", Some(&one));
        assert_eq!(alias, "red/web net c1 eth0");
        assert_eq!(Attachment::from_alias(&alias), Some(one.clone()));
        assert_eq!(Attachment::from_alias(&Attachment::alias("red/web", None)), None);
        one.container = "c".repeat(300);
        assert_eq!(Attachment::alias("red/web", Some(&one)), "red/web");
    }
}
