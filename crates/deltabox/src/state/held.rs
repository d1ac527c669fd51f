//! Which files of a sandbox are in use, as `/proc` tells it of its stopped processes.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::io::Errno;

use crate::cgroup;
use crate::container::Container;

/// The numbers of all inodes on the filesystem `device` that a process of the sandbox has open, has mapped or
/// runs, or stands in or has as its root.
/// All of them must be stopped.
///
/// # Errors
/// If a process is there and does not show what it holds.
pub(crate) fn inodes(container: &Container, device: u64) -> io::Result<HashSet<u64>> {
    let mut held = Held {
        device,
        inodes: HashSet::new(),
    };
    let pids = cgroup::processes(container.payload())?;
    for pid in pids.into_iter().chain([container.init()]) {
        match held.process(&Path::new("/proc").join(pid.to_string())) {
            // It has ended meanwhile and holds nothing.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {}
            done => done?,
        }
    }
    Ok(held.inodes)
}

struct Held {
    device: u64,
    inodes: HashSet<u64>,
}

impl Held {
    fn process(&mut self, proc: &Path) -> io::Result<()> {
        self.file(&proc.join("exe"))?;
        for line in fs::read_to_string(proc.join("maps"))?.lines() {
            if let Some((device, inode)) = mapped(line)
                && device == self.device
            {
                self.inodes.insert(inode);
            }
        }
        // A thread may have descriptors and a working directory of its own.
        for thread in fs::read_dir(proc.join("task"))? {
            let thread = thread?.path();
            self.file(&thread.join("cwd"))?;
            self.file(&thread.join("root"))?;
            for descriptor in fs::read_dir(thread.join("fd"))? {
                self.file(&descriptor?.path())?;
            }
        }
        Ok(())
    }

    /// Follows a link of `/proc` to what it stands for, without asking the filesystem anything.
    fn file(&mut self, link: &Path) -> io::Result<()> {
        let found = match rustix::fs::statx(CWD, link, AtFlags::STATX_DONT_SYNC, StatxFlags::INO) {
            Ok(found) => found,
            // A kernel thread or a process that has ended but was not waited for runs nothing.
            Err(Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor) == self.device {
            self.inodes.insert(found.stx_ino);
        }
        Ok(())
    }
}

/// The device and the inode of a line of `/proc/PID/maps`.
fn mapped(line: &str) -> Option<(u64, u64)> {
    let mut fields = line.split_ascii_whitespace().skip(3);
    let (major, minor) = fields.next()?.split_once(':')?;
    let number = |text| u32::from_str_radix(text, 16).ok();
    let device = rustix::fs::makedev(number(major)?, number(minor)?);
    let inode = fields.next()?.parse().ok()?;
    Some((device, inode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps_tell_device_and_inode() {
        let line = "7f00-7f10 r-xp 00001000 fe:1f 12345   /lib/a b (deleted)";
        assert_eq!(mapped(line), Some((rustix::fs::makedev(0xfe, 0x1f), 12345)));
        assert_eq!(mapped("7f00-7f10 rw-p 0 00:00 0 "), Some((0, 0)));
        assert_eq!(mapped("7f00-7f10 rw-p"), None);
    }

    #[test]
    fn what_this_process_has_open_and_mapped_is_found() {
        let file = tempfile::tempfile().unwrap();
        let of = |file: &fs::File| {
            use std::os::unix::fs::MetadataExt;
            let meta = file.metadata().unwrap();
            (meta.dev(), meta.ino())
        };
        let exe = fs::File::open("/proc/self/exe").unwrap();
        for (device, inode) in [of(&file), of(&exe)] {
            let mut held = Held {
                device,
                inodes: HashSet::new(),
            };
            held.process(Path::new("/proc/self")).unwrap();
            assert!(held.inodes.contains(&inode));
        }
    }
}
