//! Files that a process opens by itself: quicker than to open them for it and to pass them, which is done where that does not work.

use std::io;

use rustix::fs::{OFlags, ResolveFlags};

use crate::env::Environment;
use crate::remote::{Batch, CallId, DataRef, Remote, longs};

/// `struct stat` of x86-64, of which device and inode come first.
const STAT: usize = 144;
/// `struct open_how`.
const HOW: usize = 24;
/// The longest path that is tried.
const LONGEST: usize = 1024;

/// A file of the versioned filesystem.
pub(crate) struct Wanted<'a> {
    pub(crate) path: &'a [u8],
    pub(crate) inode: u64,
    pub(crate) flags: OFlags,
}

/// Has a process open files by their paths. Returns the numbers of its descriptors, close-on-exec; none where that led to no file or
/// another one. What a path leads to is the sandbox's choice, so the process waits for nothing there.
pub(crate) fn open(
    remote: &mut Remote,
    env: &dyn Environment,
    wanted: &[Wanted<'_>],
) -> io::Result<Vec<Option<i32>>> {
    let mut batch = Batch::new();
    let tried: Vec<_> = wanted.iter().map(|w| add(&mut batch, w)).collect();
    if batch.is_empty() {
        return Ok(vec![None; wanted.len()]);
    }
    let outcome = remote.run(&batch)?;
    let mut others = Batch::new();
    let judge = |(wanted, tried): (&Wanted<'_>, Option<(CallId, DataRef)>)| {
        let (opened, stat) = tried?;
        let fd = outcome.result(opened).ok()? as i32;
        let found = (outcome.long(stat.at(0, 8)), outcome.long(stat.at(8, 8)));
        let right = found == (env.fs_device(), wanted.inode);
        if !right {
            others.call(libc::SYS_close, &[fd.into()]);
        }
        right.then_some(fd)
    };
    let fds = wanted.iter().zip(tried).map(judge).collect();
    if !others.is_empty() {
        remote.run(&others)?;
    }
    Ok(fds)
}

fn add(batch: &mut Batch, wanted: &Wanted<'_>) -> Option<(CallId, DataRef)> {
    let path = wanted.path;
    let fits = path.starts_with(b"/") && path.len() < LONGEST && !path.contains(&0);
    if !fits || !batch.fits(2, LONGEST + STAT + HOW) {
        return None;
    }
    let path = batch.input(&[path, b"\0"].concat());
    let flags = wanted.flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let how = batch.input(&longs(&[flags.bits().into(), 0, resolve.bits()]));
    let args = [libc::AT_FDCWD.into(), path.into(), how.into(), HOW.into()];
    let opened = batch.call(libc::SYS_openat2, &args);
    let stat = batch.output(STAT);
    batch.call(libc::SYS_fstat, &[opened.into(), stat.into()]);
    Some((opened, stat))
}
