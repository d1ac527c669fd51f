//! The system calls that have no safe face elsewhere.

pub(crate) mod ring;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

/// `FUSE_DEV_IOC_CLONE`: `_IOR(229, 0, uint32_t)`.
const FUSE_DEV_IOC_CLONE: libc::c_ulong = 0x8004_e500;

/// `FILEID_INO64_GEN`, the type of the handles that FUSE makes.
const FILEID_INO64_GEN: libc::c_int = 0x81;

/// Makes `new`, a fresh descriptor of `/dev/fuse`, one more channel of the connection of `of`.
pub(crate) fn clone_fuse_channel(new: BorrowedFd<'_>, of: BorrowedFd<'_>) -> io::Result<()> {
    let source = of.as_raw_fd().cast_unsigned();
    // SAFETY: the ioctl reads one u32, which lives until the call returns.
    let result = unsafe { libc::ioctl(new.as_raw_fd(), FUSE_DEV_IOC_CLONE, &raw const source) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Does something with the permissions that a user has to files, and no others (`setfsuid(2)`).
pub(crate) fn as_user_of_files<T>(user: u32, act: impl FnOnce() -> T) -> T {
    /// Whether this process could be dumped before, which changing the user puts an end to (`PR_GET_DUMPABLE`).
    static DUMPABLE: OnceLock<bool> = OnceLock::new();
    struct Restore(u32);
    impl Drop for Restore {
        fn drop(&mut self) {
            // SAFETY: both take integers. The first changes the calling thread alone, the second takes back what it does
            // to the process.
            unsafe {
                libc::setfsuid(self.0);
                if DUMPABLE.get() == Some(&true) {
                    libc::prctl(libc::PR_SET_DUMPABLE, libc::c_ulong::from(true), 0, 0, 0);
                }
            }
        }
    }
    // SAFETY: as above; this one changes nothing.
    DUMPABLE.get_or_init(|| unsafe { libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0) } == 1);
    // SAFETY: as above.
    let before = unsafe { libc::setfsuid(user) };
    let _restore = Restore(before.cast_unsigned());
    act()
}

/// `struct file_handle` with the 12 bytes that FUSE puts in it.
#[repr(C)]
struct FuseHandle {
    bytes: libc::c_uint,
    kind: libc::c_int,
    ino_high: u32,
    ino_low: u32,
    generation: u32,
}

/// Opens an inode of a FUSE mount by its node id (`open_by_handle_at(2)`; needs `CAP_DAC_READ_SEARCH`).
/// `mount` is any descriptor of the mount that is not `O_PATH`.
pub(crate) fn open_by_node_id(
    mount: impl AsFd,
    ino: u64,
    generation: u32,
    flags: i32,
) -> io::Result<OwnedFd> {
    let mut handle = FuseHandle {
        bytes: 12,
        kind: FILEID_INO64_GEN,
        // Halves of a u64, so nothing is lost.
        ino_high: (ino >> 32) as u32,
        ino_low: ino as u32,
        generation,
    };
    // SAFETY: the handle is laid out as `struct file_handle` followed by as many bytes as it says it has, and lives
    // until the call returns.
    let fd = unsafe {
        libc::open_by_handle_at(
            mount.as_fd().as_raw_fd(),
            (&raw mut handle).cast(),
            flags | libc::O_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn permissions_are_those_of_the_user_for_as_long_as_it_takes() {
        let dir = tempfile::tempdir().unwrap();
        let secret = dir.path().join("secret");
        std::fs::write(&secret, "").unwrap();
        std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o600)).unwrap();
        let open = || std::fs::File::open(&secret).map_err(|e| e.kind());
        assert!(open().is_ok());
        let opened = as_user_of_files(12_345, open);
        assert_eq!(opened.unwrap_err(), io::ErrorKind::PermissionDenied);
        assert!(open().is_ok());
        // SAFETY: takes integers and changes nothing.
        let dumpable = unsafe { libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0) };
        assert_eq!(dumpable, 1);
        let panicked = std::panic::catch_unwind(|| as_user_of_files(12_345, || panic!("there")));
        assert!(panicked.is_err() && open().is_ok());
    }
}
