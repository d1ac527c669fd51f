//! A FUSE connection: a mount without a path, and the threads that serve it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use super::control::Control;
use super::crew::Crew;
use super::desk::{Desk, Service};
use super::init::{self, MAX_WRITE};
use super::ring;
use crate::error::{Error, Result};
use crate::sys;

/// A mounted connection. Dropping it ends it: nobody is left waiting, and whoever still uses the mount gets `ENOTCONN`.
#[derive(Debug)]
pub struct Session {
    device: Arc<OwnedFd>,
    /// Whether the kernel drops inodes when it is told to.
    prunes: OnceLock<bool>,
    mount: OwnedFd,
    device_number: u64,
    control: Control,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Session {
    /// Makes a mount that `threads` threads (at least one) serve; or, where the kernel offers that requests come over `io_uring`, one for each
    /// processor. The service must have a directory `root` in the root of the mount, which is node 1.
    ///
    /// # Errors
    /// If there is no `/dev/fuse`, it cannot be mounted, or the service does not answer for the directory.
    pub fn start<S: Service>(service: &Arc<S>, threads: usize) -> Result<Self> {
        if let Some(queues) = ring::queues() {
            match Self::begin(service, 1, queues) {
                Err(error) => tracing::warn!(%error, "a mount goes without io_uring"),
                started => return started,
            }
        }
        Self::begin(service, threads.max(1), 0)
    }

    /// Makes a mount with so many threads for `/dev/fuse`, and for rings.
    fn begin<S: Service>(service: &Arc<S>, threads: usize, queues: u16) -> Result<Self> {
        let device = Arc::new(open_device().map_err(failed("opening /dev/fuse"))?);
        let mount = mount(device.as_fd())?;
        let device_number =
            device_number(&mount).map_err(failed("asking for the mount's device number"))?;
        let control =
            Control::open(&mount).map_err(failed("opening the connection's control files"))?;
        let over_rings = init::begin(&device, queues > 0);
        let over_rings = over_rings.map_err(failed("beginning the connection"))?;
        let mut session = Self {
            device: Arc::clone(&device),
            prunes: OnceLock::new(),
            mount,
            device_number,
            control,
            threads: Mutex::default(),
        };
        session.serve(service, threads)?;
        if over_rings {
            session.serve_rings(service, queues)?;
        }
        let inner = super::outer::inner(&session.mount);
        session.mount = inner.map_err(failed("taking the volume's root out of the mount"))?;
        read_ahead(device_number);
        Ok(session)
    }

    /// Starts the threads that serve `/dev/fuse`.
    fn serve<S: Service>(&self, service: &Arc<S>, threads: usize) -> Result<()> {
        let crew = Arc::<Crew>::default();
        for index in 0..threads {
            let leads = index == 0;
            let channel = if leads {
                Arc::clone(&self.device)
            } else {
                let channel = open_channel(self.device.as_fd());
                Arc::new(channel.map_err(failed("opening one more channel of /dev/fuse"))?)
            };
            let (service, crew) = (Arc::clone(service), Arc::clone(&crew));
            self.start_thread(move || {
                let mut desk = Desk::new(&*service, &channel);
                match leads {
                    true => crew.lead(&mut desk),
                    false => crew.help(&mut desk),
                }
            })?;
        }
        Ok(())
    }

    /// Starts the threads that serve rings. The kernel lets all requests wait until each has begun.
    fn serve_rings<S: Service>(&self, service: &Arc<S>, queues: u16) -> Result<()> {
        for queue in 0..queues {
            let (service, device) = (Arc::clone(service), Arc::clone(&self.device));
            let control = self.control;
            self.start_thread(move || {
                let serve = AssertUnwindSafe(|| ring::serve(&*service, &device, queue));
                let ended = catch_unwind(serve);
                if !matches!(ended, Ok(Ok(()))) {
                    tracing::error!(
                        ?ended,
                        queue,
                        "a ring of a DeltaFS mount is not served any more, so the mount ends"
                    );
                    // Nobody else serves it: better an error than to wait for ever.
                    let _ = control.abort();
                }
            })?;
        }
        Ok(())
    }

    fn start_thread(&self, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new().name("deltafs".to_owned());
        let thread = thread.spawn(work).map_err(failed("starting a thread"))?;
        self.threads.lock().push(thread);
        Ok(())
    }

    /// The mount of the directory `root`; an `O_PATH` descriptor.
    pub fn mount(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }

    /// Where notices are sent.
    pub(crate) fn device(&self) -> &Arc<OwnedFd> {
        &self.device
    }

    /// Whether the kernel knows how to drop many inodes at one word (Linux 6.18).
    pub(crate) fn prunes(&self) -> bool {
        *self
            .prunes
            .get_or_init(|| super::notify::prune(self.device.as_fd(), &[]).is_ok())
    }

    /// `st_dev` of the mount.
    pub(crate) fn device_number(&self) -> u64 {
        self.device_number
    }

    /// Waits until the kernel has no request under way. Returning from `syncfs(2)` only means that
    /// the pages were sent.
    pub(crate) fn drain(&self) -> io::Result<()> {
        self.control.drain()
    }

    /// Ends the connection and its threads.
    pub(crate) fn stop(&self) {
        let threads = std::mem::take(&mut *self.threads.lock());
        if threads.is_empty() {
            return;
        }
        if let Err(error) = self.control.abort() {
            tracing::error!(%error, "cannot abort a FUSE connection; its threads stay until the mount is gone");
            return;
        }
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.stop();
    }
}

fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Mount {
        what,
        source: source.into(),
    }
}

fn open_device() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    Ok(rustix::fs::open("/dev/fuse", flags, Mode::empty())?)
}

fn open_channel(of: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let channel = open_device()?;
    sys::clone_fuse_channel(channel.as_fd(), of)?;
    Ok(channel)
}

fn mount(device: BorrowedFd<'_>) -> Result<OwnedFd> {
    use rustix::mount::{fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen};
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("fsopen(fuse)"))?;
    let context = context.as_fd();
    let device = device.as_raw_fd().to_string();
    for (key, value) in [
        ("source", "deltafs"),
        ("subtype", "deltafs"),
        ("fd", &*device),
        ("rootmode", "40000"),
        ("user_id", "0"),
        ("group_id", "0"),
    ] {
        fsconfig_set_string(context, key, value).map_err(failed("setting a mount option"))?;
    }
    for key in ["default_permissions", "allow_other"] {
        fsconfig_set_flag(context, key).map_err(failed("setting a mount flag"))?;
    }
    fsconfig_create(context).map_err(failed("making the superblock"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV;
    fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed("fsmount"))
}

/// The kernel tells the device number without asking the daemon.
fn device_number(mount: &OwnedFd) -> io::Result<u64> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let attributes = rustix::fs::statx(mount, "", flags, StatxFlags::empty())?;
    Ok(rustix::fs::makedev(
        attributes.stx_dev_major,
        attributes.stx_dev_minor,
    ))
}

/// Has the kernel read as much ahead as one request brings, which is twice of what it does on its own. The answer to `INIT`, which
/// must have been given before, can only make it less.
fn read_ahead(device: u64) {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    if let Err(error) = std::fs::write(&path, (MAX_WRITE >> 10).to_string()) {
        tracing::debug!(%error, path, "large files are read in smaller pieces");
    }
}
