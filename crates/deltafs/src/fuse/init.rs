//! The beginning of a connection: what it can do.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::wire::{Reply, Request, opcode};

/// The most bytes that one request reads or writes. More at once leaves the processor's cache before it is written on:
/// with 1 MiB, writing takes half as much processor time again.
pub(crate) const MAX_WRITE: usize = 256 << 10;

/// The protocol version that is spoken: 7.36, the first with 64 feature bits.
const MAJOR: u32 = 7;
const MINOR: u32 = 36;

/// The features that are asked for, as far as the kernel has them. Not among them is `ASYNC_DIO`: of a direct write that is asynchronous the
/// kernel does not drop the pages when it is done, so who read them meanwhile would be left with the old bytes.
mod feature {
    pub(super) const ASYNC_READ: u32 = 1 << 0;
    pub(super) const EXPORT_SUPPORT: u32 = 1 << 4;
    pub(super) const BIG_WRITES: u32 = 1 << 5;
    pub(super) const DONT_MASK: u32 = 1 << 6;
    pub(super) const DO_READDIRPLUS: u32 = 1 << 13;
    pub(super) const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub(super) const NO_OPEN_SUPPORT: u32 = 1 << 17;
    pub(super) const PARALLEL_DIROPS: u32 = 1 << 18;
    pub(super) const POSIX_ACL: u32 = 1 << 20;
    pub(super) const MAX_PAGES: u32 = 1 << 22;
    pub(super) const CACHE_SYMLINKS: u32 = 1 << 23;
    pub(super) const NO_OPENDIR_SUPPORT: u32 = 1 << 24;
    pub(super) const EXPLICIT_INVAL_DATA: u32 = 1 << 25;
    pub(super) const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
    pub(super) const SETXATTR_EXT: u32 = 1 << 29;
}

const FEATURES: u32 = feature::ASYNC_READ
    | feature::EXPORT_SUPPORT
    | feature::BIG_WRITES
    | feature::DONT_MASK
    | feature::DO_READDIRPLUS
    | feature::READDIRPLUS_AUTO
    | feature::NO_OPEN_SUPPORT
    | feature::PARALLEL_DIROPS
    | feature::POSIX_ACL
    | feature::MAX_PAGES
    | feature::CACHE_SYMLINKS
    | feature::NO_OPENDIR_SUPPORT
    | feature::EXPLICIT_INVAL_DATA
    | feature::HANDLE_KILLPRIV_V2
    | feature::SETXATTR_EXT;

/// Answers the request that begins a connection, if it is this one. Tells whether it is.
pub(super) fn answer(bytes: &[u8], channel: &OwnedFd) -> bool {
    let request = Request::parse(bytes);
    let Some(request) = request.ok().filter(|r| r.opcode == opcode::INIT) else {
        return false;
    };
    let mut reply = Reply::default();
    let error = init(request, &mut reply)
        .err()
        .map_or(0, |e| -e.raw_os_error());
    if let Err(error) = rustix::io::write(channel, reply.finish(request.unique, error)) {
        tracing::error!(%error, "a FUSE connection could not begin");
    }
    true
}

/// `struct fuse_init_out`: what the connection can do.
fn init(request: Request<'_>, reply: &mut Reply) -> Result<(), Errno> {
    let mut args = request.args;
    let (major, _minor) = (args.u32()?, args.u32()?);
    if major != MAJOR {
        return Err(Errno::PROTO);
    }
    let read_ahead = args.u32()?;
    let flags = args.u32()? & FEATURES;
    let max_pages = u16::try_from(MAX_WRITE / 4096).unwrap_or(u16::MAX);
    reply.u32(MAJOR).u32(MINOR).u32(read_ahead).u32(flags);
    reply.u16(64).u16(48);
    reply
        .u32(u32::try_from(MAX_WRITE).unwrap_or(u32::MAX))
        .u32(1);
    reply.u16(max_pages).u16(0).raw(&[0; 32]);
    Ok(())
}
