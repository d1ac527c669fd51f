//! Listing a directory: its own entries merged with those of its base directory.

use rustix::io::Errno;

use super::{View, as_dir};
use crate::base::ListEntry;
use crate::node::{Entry, EntryKey, Ino, Node};

/// One entry of a directory, in the order of the offsets.
#[derive(Debug)]
pub(crate) struct Listed {
    pub(crate) key: EntryKey,
    pub(crate) ino: Ino,
    pub(crate) dirent_type: u8,
}

impl View {
    /// Calls `each` for the entries of a directory whose cookie is at least `cookie`, until it says `false`.
    pub(crate) fn list(
        &self,
        dir: &Node,
        cookie: u64,
        mut each: impl FnMut(Listed) -> bool,
    ) -> Result<(), Errno> {
        let body = as_dir(dir)?;
        let listing = body.base.as_ref().map(|base| base.listing()).transpose()?;
        let mut below = listing
            .as_ref()
            .map_or(&[][..], |listing| listing.from(cookie))
            .iter()
            .peekable();
        let first = EntryKey {
            cookie,
            name: std::sync::Arc::from(&b""[..]),
        };
        let mut own = body.entries.range(first..).peekable();
        loop {
            let order = match (own.peek(), below.peek()) {
                (None, None) => return Ok(()),
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, Some(_)) => std::cmp::Ordering::Greater,
                (Some((key, _)), Some(entry)) => (*key).cmp(&entry.key),
            };
            if order.is_eq() {
                below.next();
            }
            let listed = if order.is_gt() {
                below.next().and_then(|entry| Self::list_base(body, entry))
            } else {
                own.next().and_then(|(key, entry)| match *entry {
                    Entry::Inode { ino, dirent_type } => Some(Listed {
                        key: key.clone(),
                        ino,
                        dirent_type,
                    }),
                    Entry::Whiteout => None,
                })
            };
            if let Some(listed) = listed
                && !each(listed)
            {
                return Ok(());
            }
        }
    }

    /// Whether a directory has no entry.
    pub(crate) fn is_empty(&self, dir: &Node) -> Result<bool, Errno> {
        let mut empty = true;
        self.list(dir, 0, |_| {
            empty = false;
            false
        })?;
        Ok(empty)
    }

    /// An entry of the base; none if it is gone from the host.
    fn list_base(body: &crate::node::DirBody, entry: &ListEntry) -> Option<Listed> {
        let inode = body.base.as_ref()?.listed_child(entry).ok()?;
        Some(Listed {
            key: entry.key.clone(),
            ino: inode.ino(),
            dirent_type: entry.dirent_type,
        })
    }
}
