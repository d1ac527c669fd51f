//! The system calls on the base.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;

use crate::node::Time;
use crate::xattr::XattrMap;

/// A base inode's identity on the host.
pub(super) type HostId = (u64, u64);

/// The kernel's 32-bit form of a device number.
pub(super) fn encode_device(device: rustix::fs::Dev) -> u32 {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

pub(super) fn time(stamp: rustix::fs::StatxTimestamp) -> Time {
    Time {
        sec: stamp.tv_sec,
        nsec: stamp.tv_nsec,
    }
}

pub(super) fn host_id(attributes: &Statx) -> HostId {
    let device = rustix::fs::makedev(attributes.stx_dev_major, attributes.stx_dev_minor);
    (device, attributes.stx_ino)
}

pub(super) fn confined() -> ResolveFlags {
    ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV
}

pub(super) fn stat<Fd: AsFd>(dir: Fd, name: &[u8]) -> Result<Statx, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::EMPTY_PATH;
    rustix::fs::statx(dir, OsStr::from_bytes(name), flags, StatxFlags::BASIC_STATS)
}

/// A copy of the directory's mount in which no other mount shows; the directory itself where the kernel refuses to
/// copy it (it is such a copy already).
pub(super) fn single_filesystem(root: OwnedFd) -> OwnedFd {
    use rustix::mount::OpenTreeFlags;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    rustix::mount::open_tree(&root, "", flags).unwrap_or(root)
}

pub(super) fn find_hidden(root: &OwnedFd, path: &Path) -> Option<HostId> {
    let relative = path.strip_prefix("/").unwrap_or(path);
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd =
        rustix::fs::openat2(root, relative, flags, Mode::empty(), ResolveFlags::IN_ROOT).ok()?;
    Some(host_id(&stat(&fd, b"").ok()?))
}

/// Whether what has this name in a directory may have extended attributes.
pub(super) fn has_xattrs(dir: &OwnedFd, name: &[u8]) -> bool {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    let none: &mut [u8] = &mut [];
    !matches!(
        rustix::fs::llistxattr(path, none),
        Ok(0) | Err(Errno::NOTSUP)
    )
}

pub(super) fn read_xattrs(fd: &OwnedFd) -> Result<Option<Arc<XattrMap>>, Errno> {
    // The calls that take a descriptor refuse O_PATH ones; the link in /proc leads to the very inode.
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let mut names = vec![0; 65_536];
    let len = match rustix::fs::listxattr(&path, &mut names[..]) {
        Ok(len) => len,
        Err(Errno::NOTSUP) => 0,
        Err(error) => return Err(error),
    };
    let mut map = XattrMap::new();
    let mut value = vec![0; if len == 0 { 0 } else { 65_536 }];
    for name in names[..len]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        match rustix::fs::getxattr(&path, OsStr::from_bytes(name), &mut value[..]) {
            Ok(len) => {
                map.insert(name.to_vec(), value[..len].to_vec());
            }
            Err(Errno::NODATA | Errno::NOTSUP) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Some(map).filter(|map| !map.is_empty()).map(Arc::new))
}
