//! POSIX access lists and file capabilities: the extended attributes that hold ids or carry meaning.
//!
//! The kernel checks access lists itself (`FUSE_POSIX_ACL`); inheriting them, and keeping them in step
//! with the mode, is left to the filesystem.

use rustix::io::Errno;

use crate::ids::IdMap;
use crate::node::{DIRECTORY, TYPE_MASK};
use crate::xattr::{SetMode, Xattrs};

/// The list that guards an inode.
pub(crate) const ACCESS: &[u8] = b"system.posix_acl_access";
/// The list that new entries of a directory get.
pub(crate) const DEFAULT: &[u8] = b"system.posix_acl_default";
const CAPABILITY: &[u8] = b"security.capability";

const VERSION: u32 = 2;
const USER_OBJ: u16 = 1;
const USER: u16 = 2;
const GROUP_OBJ: u16 = 4;
const GROUP: u16 = 8;
const MASK: u16 = 16;
const OTHER: u16 = 32;

/// One line of an access list.
#[derive(Clone, Copy, Debug)]
struct Line {
    tag: u16,
    perm: u16,
    id: u32,
}

fn parse(blob: &[u8]) -> Result<Vec<Line>, Errno> {
    let (version, rest) = blob.split_first_chunk::<4>().ok_or(Errno::INVAL)?;
    let (lines, []) = rest.as_chunks::<8>() else {
        return Err(Errno::INVAL);
    };
    if u32::from_le_bytes(*version) != VERSION {
        return Err(Errno::NOTSUP);
    }
    let lines = lines.iter().map(|[t0, t1, p0, p1, i0, i1, i2, i3]| Line {
        tag: u16::from_le_bytes([*t0, *t1]),
        perm: u16::from_le_bytes([*p0, *p1]) & 7,
        id: u32::from_le_bytes([*i0, *i1, *i2, *i3]),
    });
    Ok(lines.collect())
}

fn build(lines: &[Line]) -> Vec<u8> {
    let mut blob = VERSION.to_le_bytes().to_vec();
    for line in lines {
        blob.extend(line.tag.to_le_bytes());
        blob.extend(line.perm.to_le_bytes());
        blob.extend(line.id.to_le_bytes());
    }
    blob
}

/// Whether a list says no more than a mode does.
pub(crate) fn is_minimal(blob: &[u8]) -> Result<bool, Errno> {
    Ok(parse(blob)?
        .iter()
        .all(|line| matches!(line.tag, USER_OBJ | GROUP_OBJ | OTHER)))
}

/// The permission bits of the mode that goes with a list; none for an empty list.
pub(crate) fn permissions(blob: &[u8]) -> Result<Option<u32>, Errno> {
    let lines = parse(blob)?;
    let of = |tag| {
        lines
            .iter()
            .find(|line| line.tag == tag)
            .map(|line| u32::from(line.perm))
    };
    let Some(owner) = of(USER_OBJ) else {
        return Ok(None);
    };
    let group = of(MASK).or_else(|| of(GROUP_OBJ)).unwrap_or(0);
    Ok(Some(owner << 6 | group << 3 | of(OTHER).unwrap_or(0)))
}

/// Brings the access list in step with a new mode.
pub(crate) fn chmod(xattrs: &mut Xattrs, mode: u32) -> Result<(), Errno> {
    let Some(blob) = xattrs.get(ACCESS)? else {
        return Ok(());
    };
    let mut lines = parse(&blob)?;
    apply_mode(&mut lines, mode);
    xattrs.set(ACCESS, &build(&lines), SetMode::Any)
}

/// The mode and the attributes that a new inode gets in a directory with these attributes.
pub(crate) fn inherit(dir: &Xattrs, mode: u32, umask: u32) -> Result<(u32, Xattrs), Errno> {
    let Some(default) = dir.get(DEFAULT)? else {
        return Ok((mode & !(umask & 0o777), Xattrs::EMPTY));
    };
    let mut lines = parse(&default)?;
    let allowed = permissions(&default)?.unwrap_or(0o777);
    let mode = mode & (allowed | !0o777);
    apply_mode(&mut lines, mode);
    let mut xattrs = Xattrs::EMPTY;
    let access = build(&lines);
    if !is_minimal(&access)? {
        xattrs.set(ACCESS, &access, SetMode::Any)?;
    }
    if mode & TYPE_MASK == DIRECTORY {
        xattrs.set(DEFAULT, &default, SetMode::Any)?;
    }
    Ok((mode, xattrs))
}

fn apply_mode(lines: &mut [Line], mode: u32) {
    let has_mask = lines.iter().any(|line| line.tag == MASK);
    for line in lines {
        let shift = match line.tag {
            USER_OBJ => 6,
            MASK => 3,
            GROUP_OBJ if !has_mask => 3,
            OTHER => 0,
            _ => continue,
        };
        // Masked to three bits, so it fits.
        line.perm = (mode >> shift & 7) as u16;
    }
}

/// The value of an attribute as the kernel is to see it: with ids of the host.
pub(crate) fn to_kernel(name: &[u8], value: Vec<u8>, ids: IdMap) -> Vec<u8> {
    match name {
        ACCESS | DEFAULT => map_list(&value, |id| ids.outside(id)).unwrap_or(value),
        CAPABILITY => with_root(value, ids.outside(0)),
        _ => value,
    }
}

/// The value of an attribute as it is kept: with ids inside the sandbox.
pub(crate) fn from_kernel(name: &[u8], value: &[u8], ids: IdMap) -> Vec<u8> {
    match name {
        ACCESS | DEFAULT => map_list(value, |id| ids.inside(id)).unwrap_or_else(|_| value.to_vec()),
        CAPABILITY => without_root(value, ids.outside(0)),
        _ => value.to_vec(),
    }
}

fn map_list(blob: &[u8], map: impl Fn(u32) -> u32) -> Result<Vec<u8>, Errno> {
    let mut lines = parse(blob)?;
    for line in &mut lines {
        if matches!(line.tag, USER | GROUP) {
            line.id = map(line.id);
        }
    }
    Ok(build(&lines))
}

/// Capabilities as version 2 (without a root id) and 3 (with one), by `linux/capability.h`.
const REVISION_2: u8 = 2;
const REVISION_3: u8 = 3;
const LEN_2: usize = 20;

/// Capabilities of the sandbox's root hold in the user namespace of that root only.
fn with_root(mut value: Vec<u8>, root: u32) -> Vec<u8> {
    if root != 0 && value.len() == LEN_2 && value[3] == REVISION_2 {
        value[3] = REVISION_3;
        value.extend(root.to_le_bytes());
    }
    value
}

fn without_root(value: &[u8], root: u32) -> Vec<u8> {
    let mut value = value.to_vec();
    if value.len() == LEN_2 + 4 && value[3] == REVISION_3 && value[LEN_2..] == root.to_le_bytes() {
        value.truncate(LEN_2);
        value[3] = REVISION_2;
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(lines: &[(u16, u16, u32)]) -> Vec<u8> {
        let lines: Vec<_> = lines
            .iter()
            .map(|&(tag, perm, id)| Line { tag, perm, id })
            .collect();
        build(&lines)
    }

    #[test]
    fn a_default_list_replaces_the_umask() {
        let none = u32::MAX;
        let default = list(&[
            (USER_OBJ, 7, none),
            (USER, 6, 5),
            (GROUP_OBJ, 5, none),
            (MASK, 7, none),
            (OTHER, 0, none),
        ]);
        let mut dir = Xattrs::EMPTY;
        dir.set(DEFAULT, &default, SetMode::Any).unwrap();
        let (mode, xattrs) = inherit(&dir, 0o100_666, 0o077).unwrap();
        assert_eq!(mode, 0o100_660);
        assert_eq!(
            permissions(&xattrs.get(ACCESS).unwrap().unwrap()).unwrap(),
            Some(0o660)
        );
        assert!(xattrs.get(DEFAULT).unwrap().is_none());
    }

    #[test]
    fn ids_in_lists_and_capabilities_shift_there_and_back() {
        let ids = IdMap {
            outside_first: 100_000,
            count: 65_536,
        };
        let inside = list(&[(USER_OBJ, 7, u32::MAX), (USER, 6, 5)]);
        let outside = to_kernel(ACCESS, inside.clone(), ids);
        assert_eq!(parse(&outside).unwrap()[1].id, 100_005);
        assert_eq!(from_kernel(ACCESS, &outside, ids), inside);
        let mut capability = vec![0; LEN_2];
        capability[3] = REVISION_2;
        let shown = to_kernel(CAPABILITY, capability.clone(), ids);
        assert_eq!(shown[LEN_2..], 100_000_u32.to_le_bytes());
        assert_eq!(from_kernel(CAPABILITY, &shown, ids), capability);
    }

    #[test]
    fn a_broken_list_is_an_error() {
        assert!(permissions(b"xyz").is_err());
        assert!(permissions(&[2, 0, 0, 0, 1]).is_err());
    }
}
