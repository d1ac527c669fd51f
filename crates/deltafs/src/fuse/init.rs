//! The beginning of a connection: what it can do.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::wire::{Reply, Request, opcode};

/// The most bytes that one request reads or writes. More at once leaves the processor's cache before it is written on:
/// with 1 MiB, writing takes half as much processor time again.
pub(crate) const MAX_WRITE: usize = 256 << 10;

/// Less room for a request the kernel does not accept.
const MIN_READ: usize = 8192;

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
    /// That there are more, beyond these 32.
    pub(super) const INIT_EXT: u32 = 1 << 30;

    pub(super) mod more {
        pub(in super::super) const OVER_IO_URING: u32 = 1 << (41 - 32);
    }
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

/// Takes the request with which the kernel begins a connection, and answers it. Requests may come over rings if `rings` says so;
/// tells whether they will.
pub(super) fn begin(device: &OwnedFd, rings: bool) -> Result<bool, Errno> {
    let mut bytes = vec![0; MIN_READ];
    let len = rustix::io::read(device, &mut bytes[..])?;
    let request = Request::parse(&bytes[..len])?;
    if request.opcode != opcode::INIT {
        return Err(Errno::PROTO);
    }
    let mut reply = Reply::default();
    let done = init(request, rings, &mut reply);
    let error = done.map_or_else(|errno| -errno.raw_os_error(), |_| 0);
    rustix::io::write(device, reply.finish(request.unique, error))?;
    done
}

/// `struct fuse_init_out`: what the connection can do. Tells whether requests will come over rings.
fn init(request: Request<'_>, rings: bool, reply: &mut Reply) -> Result<bool, Errno> {
    let mut args = request.args;
    let (major, _minor) = (args.u32()?, args.u32()?);
    if major != MAJOR {
        return Err(Errno::PROTO);
    }
    let (read_ahead, offered) = (args.u32()?, args.u32()?);
    let more = match offered & feature::INIT_EXT {
        0 => 0,
        _ => args.u32()?,
    };
    let rings = rings && more & feature::more::OVER_IO_URING != 0;
    let (flags, more) = match rings {
        true => (FEATURES | feature::INIT_EXT, feature::more::OVER_IO_URING),
        false => (FEATURES, 0),
    };
    let max_pages = u16::try_from(MAX_WRITE / 4096).unwrap_or(u16::MAX);
    reply.u32(MAJOR).u32(MINOR).u32(read_ahead);
    reply.u32(offered & flags).u16(64).u16(48);
    reply
        .u32(u32::try_from(MAX_WRITE).unwrap_or(u32::MAX))
        .u32(1);
    reply.u16(max_pages).u16(0).u32(more).raw(&[0; 28]);
    Ok(rings)
}
