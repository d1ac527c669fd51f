//! The system calls that have no safe face elsewhere.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

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

/// Does something with the permissions that a user has to files, and nothing more (`setfsuid(2)`).
pub(crate) fn as_user_of_files<T>(user: u32, act: impl FnOnce() -> T) -> T {
    struct Restore(u32);
    impl Drop for Restore {
        fn drop(&mut self) {
            // SAFETY: takes an integer, and changes the calling thread alone.
            unsafe { libc::setfsuid(self.0) };
        }
    }
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
