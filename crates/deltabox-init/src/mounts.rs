//! The sandbox's mounts: its root, and what lies on it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use deltabox_init::Step;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};
use rustix::thread::LinkNameSpaceType;

use crate::sys::{self, Fork, ForkOptions};
use crate::{At, Failure};

/// The host's device nodes that a sandbox has.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// Symbolic links in `/dev`: name and target.
const LINKS: [(&str, &str); 5] = [
    ("dev/fd", "/proc/self/fd"),
    ("dev/stdin", "/proc/self/fd/0"),
    ("dev/stdout", "/proc/self/fd/1"),
    ("dev/stderr", "/proc/self/fd/2"),
    ("dev/ptmx", "pts/ptmx"),
];

/// What tells about the host and is none of the sandbox's business: covered.
const MASKED: [&str; 11] = [
    "proc/acpi",
    "proc/asound",
    "proc/kcore",
    "proc/keys",
    "proc/latency_stats",
    "proc/timer_list",
    "proc/timer_stats",
    "proc/sched_debug",
    "proc/scsi",
    "sys/firmware",
    "sys/devices/virtual/powercap",
];

/// What may be read only.
const READ_ONLY: [&str; 5] = [
    "proc/bus",
    "proc/fs",
    "proc/irq",
    "proc/sys",
    "proc/sysrq-trigger",
];

const QUIET: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

/// Moves this process into a new mount namespace whose root is the detached mount `root`. Returns the host's device
/// nodes as detached mounts, in the order of [`DEVICES`].
pub(crate) fn enter_root(root: &OwnedFd) -> Result<Vec<OwnedFd>, Failure> {
    sys::unshare_mounts().at(Step::Setup, "making a mount namespace")?;
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .at(Step::Setup, "making mounts private")?;
    let devices = DEVICES
        .iter()
        .map(|name| {
            rustix::mount::open_tree(
                CWD,
                format!("/dev/{name}"),
                OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
            )
            .at(Step::Setup, &format!("taking the host's /dev/{name}"))
        })
        .collect::<Result<Vec<_>, _>>()?;
    // A copy: the supervisor goes on using its own, which is in no namespace.
    let root = copy(root).at(Step::Setup, "copying the root mount")?;
    attach(root.as_fd(), CWD, "/").at(Step::Setup, "attaching the root")?;
    rustix::process::fchdir(&root).at(Step::Setup, "entering the root")?;
    // Both arguments the same: the old root ends up on top of the new one, and goes.
    rustix::process::pivot_root(".", ".").at(Step::Setup, "changing the root")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).at(Step::Setup, "leaving the old root")?;
    rustix::process::chdir("/").at(Step::Setup, "entering the new root")?;
    Ok(devices)
}

/// A detached copy of a mount.
fn copy(mount: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    rustix::mount::open_tree(
        mount,
        "",
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH,
    )
}

/// Attaches a detached mount.
fn attach(mount: BorrowedFd<'_>, dir: BorrowedFd<'_>, path: &str) -> rustix::io::Result<()> {
    rustix::mount::move_mount(
        mount,
        "",
        dir,
        path,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
}

/// Puts `/proc`, `/sys` and `/dev` in place. The root's files may come from a sandbox that was forked, so that nothing
/// about them is taken for granted; but nothing runs in it yet.
pub(crate) fn furnish(
    host_proc: &OwnedFd,
    init: i32,
    first_id: u32,
    devices: &[OwnedFd],
) -> Result<(), Failure> {
    for (path, mode) in [
        ("proc", 0o555),
        ("sys", 0o555),
        ("dev", 0o755),
        ("dev/pts", 0o755),
        ("dev/shm", 0o1777),
        ("tmp", 0o1777),
    ] {
        directory(path, mode).at(Step::Setup, &format!("making /{path}"))?;
    }
    // Bases have it as a mere mount point.
    rustix::fs::chmod("dev/shm", Mode::from_raw_mode(0o1777))
        .at(Step::Setup, "opening /dev/shm to all")?;
    for (name, target) in LINKS {
        link(name, target).at(Step::Setup, &format!("making /{name}"))?;
    }
    for (name, device) in DEVICES.iter().zip(devices) {
        let path = format!("dev/{name}");
        file(&path).at(Step::Setup, &format!("making /{path}"))?;
        attach(device.as_fd(), CWD, &path).at(Step::Setup, &format!("attaching /{path}"))?;
    }
    // The group is tty's, 5 everywhere.
    let options = format!("newinstance,ptmxmode=0666,mode=0620,gid={}", first_id + 5);
    mount(
        "devpts",
        "dev/pts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        &options,
    )
    .at(Step::Setup, "mounting /dev/pts")?;
    mount_from_inside(host_proc, init)?;
    let empty = empty_directory().at(Step::Setup, "making an empty directory")?;
    for path in MASKED {
        mask(path, &devices[0], &empty).at(Step::Setup, &format!("masking /{path}"))?;
    }
    for path in READ_ONLY {
        read_only(path).at(Step::Setup, &format!("making /{path} read-only"))?;
    }
    Ok(())
}

fn mount(kind: &str, path: &str, flags: MountFlags, options: &str) -> rustix::io::Result<()> {
    let options = std::ffi::CString::new(options).map_err(|_| Errno::INVAL)?;
    rustix::mount::mount(kind, path, kind, flags, &*options)
}

/// `/proc` and `/sys` show the namespaces of the process that mounts them: a child that is in init's.
fn mount_from_inside(host_proc: &OwnedFd, init: i32) -> Result<(), Failure> {
    for (name, kind) in [
        ("pid", LinkNameSpaceType::ProcessID),
        ("net", LinkNameSpaceType::Network),
    ] {
        let ns = rustix::fs::openat(
            host_proc,
            format!("{init}/ns/{name}"),
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .at(Step::Setup, "opening a namespace of init")?;
        rustix::thread::move_into_link_name_space(ns.as_fd(), Some(kind))
            .at(Step::Setup, "entering a namespace of init")?;
    }
    match sys::fork(&ForkOptions::default()).at(Step::Setup, "starting the mounter of /proc")? {
        Fork::Child => {
            let done = mount("proc", "proc", QUIET, "")
                .and_then(|()| mount("sysfs", "sys", QUIET | MountFlags::RDONLY, ""));
            sys::exit(done.map_or_else(Errno::raw_os_error, |()| 0));
        }
        Fork::Parent(pid) => {
            let pid = rustix::process::Pid::from_raw(pid);
            let status = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty())
                .at(Step::Setup, "waiting for the mounter of /proc")?;
            match status.and_then(|(_, s)| s.exit_status()) {
                Some(0) => Ok(()),
                errno => Err(Errno::from_raw_os_error(errno.unwrap_or(libc::EINTR)))
                    .at(Step::Setup, "mounting /proc and /sys"),
            }
        }
    }
}

fn is(path: &str, kind: FileType) -> rustix::io::Result<bool> {
    match rustix::fs::lstat(path) {
        Ok(stat) => Ok(FileType::from_raw_mode(stat.st_mode) == kind),
        Err(Errno::NOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Removes whatever is there, other than a directory.
fn clear(path: &str) -> rustix::io::Result<()> {
    match rustix::fs::unlink(path) {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

fn directory(path: &str, mode: u32) -> rustix::io::Result<()> {
    if !is(path, FileType::Directory)? {
        clear(path)?;
        rustix::fs::mkdir(path, Mode::from_raw_mode(mode))?;
        rustix::fs::chmod(path, Mode::from_raw_mode(mode))?;
    }
    Ok(())
}

/// Something that a device can be attached to.
fn file(path: &str) -> rustix::io::Result<()> {
    if is(path, FileType::Symlink)? {
        clear(path)?;
    }
    if is(path, FileType::Directory)? {
        rustix::fs::rmdir(path)?;
    }
    match rustix::fs::lstat(path) {
        Err(Errno::NOENT) => rustix::fs::mknodat(
            CWD,
            path,
            FileType::RegularFile,
            Mode::from_raw_mode(0o666),
            0,
        ),
        other => other.map(drop),
    }
}

fn link(path: &str, target: &str) -> rustix::io::Result<()> {
    if is(path, FileType::Symlink)? {
        return Ok(());
    }
    clear(path)?;
    rustix::fs::symlink(target, path)
}

/// A detached, empty, read-only directory.
fn empty_directory() -> rustix::io::Result<OwnedFd> {
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
    let fs = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&fs, "size", "4096")?;
    rustix::mount::fsconfig_create(&fs)?;
    rustix::mount::fsmount(
        &fs,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )
}

/// Covers a file with `/dev/null`, a directory with an empty one.
fn mask(path: &str, null: &OwnedFd, empty: &OwnedFd) -> rustix::io::Result<()> {
    let stat = match rustix::fs::lstat(path) {
        Err(Errno::NOENT) => return Ok(()),
        other => other?,
    };
    let cover = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => empty,
        _ => null,
    };
    attach(copy(cover)?.as_fd(), CWD, path)
}

fn read_only(path: &str) -> rustix::io::Result<()> {
    if rustix::fs::accessat(CWD, path, rustix::fs::Access::EXISTS, AtFlags::empty()).is_err() {
        return Ok(());
    }
    rustix::mount::mount_bind(path, path)?;
    rustix::mount::mount_remount(path, QUIET | MountFlags::BIND | MountFlags::RDONLY, c"")
}
