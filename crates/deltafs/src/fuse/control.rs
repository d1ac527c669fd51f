//! The control files of a FUSE connection (`fusectl`), mounted for this without a path.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// For how long requests may be under way while nobody makes new ones.
const PATIENCE: Duration = Duration::from_secs(10);

/// The control files of one connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Control {
    /// The mounted control filesystem.
    files: BorrowedFd<'static>,
    connection: u32,
}

impl Control {
    /// Finds the control files of a mount's connection.
    pub(super) fn open(mount: &OwnedFd) -> io::Result<Self> {
        // The kernel tells the device number without asking the daemon.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let connection = rustix::fs::statx(mount, "", flags, StatxFlags::empty())?.stx_dev_minor;
        let files = mount_control()?;
        Ok(Self { files, connection })
    }

    /// Ends the connection: every request under way fails.
    pub(super) fn abort(&self) -> io::Result<()> {
        rustix::io::write(self.file("abort", OFlags::WRONLY)?, b"1")?;
        Ok(())
    }

    /// Waits until no request is under way.
    pub(super) fn drain(&self) -> io::Result<()> {
        let mut first_try = None;
        while self.waiting()? != 0 {
            let since = *first_try.get_or_insert_with(Instant::now);
            if since.elapsed() > PATIENCE {
                return Err(io::ErrorKind::TimedOut.into());
            }
            // The threads that serve the requests need the processor more.
            std::thread::sleep(Duration::from_micros(20));
        }
        Ok(())
    }

    /// How many requests are under way. The file tells what was true when it was first read.
    fn waiting(&self) -> io::Result<u64> {
        let mut text = [0; 32];
        let len = rustix::io::read(self.file("waiting", OFlags::RDONLY)?, &mut text)?;
        let text = std::str::from_utf8(&text[..len]).unwrap_or_default();
        text.trim()
            .parse()
            .map_err(|_| io::ErrorKind::InvalidData.into())
    }

    fn file(&self, name: &str, flags: OFlags) -> io::Result<OwnedFd> {
        let path = format!("{}/{name}", self.connection);
        Ok(rustix::fs::openat(
            self.files,
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
        )?)
    }
}

/// The one control filesystem of the kernel; mounted once in the life of this process, for all its connections.
fn mount_control() -> io::Result<BorrowedFd<'static>> {
    static MOUNTED: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(mounted) = MOUNTED.get() {
        return Ok(mounted.as_fd());
    }
    let context = rustix::mount::fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(context.as_fd())?;
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    let files = rustix::mount::fsmount(context.as_fd(), flags, MountAttrFlags::empty())?;
    Ok(MOUNTED.get_or_init(|| files).as_fd())
}
