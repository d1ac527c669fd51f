//! Extended attributes of one inode.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustix::io::Errno;

use crate::base::BaseInode;

/// The longest name, value and list that the kernel's interface takes.
const MAX_NAME: usize = 255;
const MAX_VALUE: usize = 65_536;
const MAX_LIST: usize = 65_536;
/// What all attributes of an inode may take together; they are kept in memory.
const MAX_TOTAL: usize = 128 * 1024;

/// Names and values.
pub(crate) type XattrMap = BTreeMap<Vec<u8>, Vec<u8>>;

/// The extended attributes of one version of an inode.
#[derive(Clone, Debug)]
pub(crate) enum Xattrs {
    /// Those of the base inode, fetched when first asked for.
    Base(Arc<BaseInode>),
    /// Its own.
    Own(Option<Arc<XattrMap>>),
}

/// What `setxattr(2)` demands of the attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SetMode {
    Any,
    /// It must not exist (`XATTR_CREATE`).
    Create,
    /// It must exist (`XATTR_REPLACE`).
    Replace,
}

impl Xattrs {
    /// None at all.
    pub(crate) const EMPTY: Self = Self::Own(None);

    /// The value of an attribute.
    pub(crate) fn get(&self, name: &[u8]) -> Result<Option<Vec<u8>>, Errno> {
        Ok(self.map()?.and_then(|map| map.get(name).cloned()))
    }

    /// All attributes.
    pub(crate) fn map(&self) -> Result<Option<Arc<XattrMap>>, Errno> {
        match self {
            Self::Own(map) => Ok(map.clone()),
            Self::Base(inode) => inode.xattrs(),
        }
    }

    /// Bytes of names and values that are not those of the base.
    pub(crate) fn own_bytes(&self) -> usize {
        match self {
            Self::Own(Some(map)) => map.iter().map(|(n, v)| n.len() + v.len()).sum(),
            Self::Own(None) | Self::Base(_) => 0,
        }
    }

    /// Sets an attribute.
    pub(crate) fn set(&mut self, name: &[u8], value: &[u8], mode: SetMode) -> Result<(), Errno> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(Errno::RANGE);
        }
        if value.len() > MAX_VALUE {
            return Err(Errno::TOOBIG);
        }
        let map = self.map()?;
        let known = map.as_ref().is_some_and(|map| map.contains_key(name));
        match mode {
            SetMode::Create if known => return Err(Errno::EXIST),
            SetMode::Replace if !known => return Err(Errno::NODATA),
            _ => {}
        }
        let others = || {
            let all = map.iter().flat_map(|map| map.iter());
            all.filter(|(known, _)| &known[..] != name)
        };
        let listed: usize = others().map(|(name, _)| name.len() + 1).sum();
        let held: usize = others().map(|(name, value)| name.len() + value.len()).sum();
        if listed + name.len() + 1 > MAX_LIST || held + name.len() + value.len() > MAX_TOTAL {
            return Err(Errno::NOSPC);
        }
        let mut map = map.unwrap_or_default();
        Arc::make_mut(&mut map).insert(name.to_vec(), value.to_vec());
        *self = Self::Own(Some(map));
        Ok(())
    }

    /// Removes an attribute; tells whether it was there.
    pub(crate) fn remove(&mut self, name: &[u8]) -> Result<bool, Errno> {
        let Some(mut map) = self.map()?.filter(|map| map.contains_key(name)) else {
            return Ok(false);
        };
        Arc::make_mut(&mut map).remove(name);
        *self = Self::Own(Some(map).filter(|map| !map.is_empty()));
        Ok(true)
    }

    /// Whether the two hold the same attributes.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Base(a), Self::Base(b)) => Arc::ptr_eq(a, b),
            _ => match (self.map(), other.map()) {
                (Ok(a), Ok(b)) => a.unwrap_or_default() == b.unwrap_or_default(),
                _ => false,
            },
        }
    }
}
