//! Character devices: terminals, pseudo-terminal masters, and nodes such as `/dev/null`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::AtFlags;
use rustix::termios::Winsize;

use super::capture::{Capture, Holder};
use super::model::{Kind, Terminal};
use super::path;
use crate::env::Environment;
use crate::error::Result;
use crate::sys;

/// Majors of `/dev/null` and its kin, of `/dev/tty` and `/dev/ptmx`, and the range of pty slaves.
const MEM_MAJOR: u32 = 1;
const TTYAUX_MAJOR: u32 = 5;
const SLAVE_MAJORS: std::ops::RangeInclusive<u32> = 136..=143;
/// Slaves that one major holds.
const PER_MAJOR: u32 = 1 << 20;

/// Reads what a character device is, with its settings.
pub(crate) fn capture(capture: &mut Capture<'_>, holder: &Holder<'_>) -> Result<Kind> {
    let rdev = holder.raw.file.rdev;
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    match (major, minor) {
        // null, zero, full, random, urandom
        (MEM_MAJOR, 3 | 5 | 7 | 8 | 9) => Ok(Kind::Path {
            path: holder.link()?,
        }),
        (TTYAUX_MAJOR, 0) => Ok(Kind::ControllingTerminal),
        (TTYAUX_MAJOR, 2) => match holder.raw.info.tty_index {
            Some(number) => {
                settings(capture, holder, number)?;
                Ok(Kind::Master { number })
            }
            None => Err(holder.refuse("a pseudo-terminal master without a number")),
        },
        _ if SLAVE_MAJORS.contains(&major) => {
            let number = (major - SLAVE_MAJORS.start()) * PER_MAJOR + minor;
            settings(capture, holder, number)?;
            Ok(Kind::Terminal { number })
        }
        _ => {
            let link = holder.link()?;
            let name = String::from_utf8_lossy(&link);
            Err(holder.refuse(format_args!("{name}, a device that is not carried")))
        }
    }
}

fn settings(capture: &mut Capture<'_>, holder: &Holder<'_>, number: u32) -> Result<()> {
    if capture.image.terminals.contains_key(&number) {
        return Ok(());
    }
    let tty = holder.take()?;
    let terminal = match read_settings(tty.as_fd()) {
        // Hung up: the other side is gone and so are the settings.
        Err(e) if e.raw_os_error() == Some(libc::EIO) => return Ok(()),
        read => holder.during(read, "reading the settings of the terminal")?,
    };
    capture.image.terminals.insert(number, terminal);
    Ok(())
}

fn read_settings(tty: BorrowedFd<'_>) -> io::Result<Terminal> {
    let size = rustix::termios::tcgetwinsize(tty)?;
    Ok(Terminal {
        termios: sys::fd::termios(tty)?.to_vec(),
        size: [size.ws_row, size.ws_col, size.ws_xpixel, size.ws_ypixel],
    })
}

/// Makes a terminal, by either side, have these settings.
pub(crate) fn set(tty: BorrowedFd<'_>, wanted: &Terminal) -> io::Result<()> {
    let now = read_settings(tty)?;
    if now.termios != wanted.termios {
        let raw = wanted.termios.as_slice().try_into();
        let raw = raw.map_err(|_| io::Error::other("not the size of a termios2"))?;
        sys::fd::set_termios(tty, raw)?;
    }
    if now.size != wanted.size {
        let [ws_row, ws_col, ws_xpixel, ws_ypixel] = wanted.size;
        let size = Winsize {
            ws_row,
            ws_col,
            ws_xpixel,
            ws_ypixel,
        };
        rustix::termios::tcsetwinsize(tty, size)?;
    }
    Ok(())
}

/// Opens the slave side.
pub(crate) fn open_slave(env: &dyn Environment, number: u32, flags: i32) -> io::Result<OwnedFd> {
    path::open(env, &slave_path(number), flags | libc::O_NOCTTY)
}

fn slave_path(number: u32) -> Vec<u8> {
    format!("/dev/pts/{number}").into_bytes()
}

/// A new master with this number, which must be free, whose other side belongs to `user`. The kernel gives out the lowest free number, so lower
/// ones are taken for a moment.
pub(crate) fn make_master(
    env: &dyn Environment,
    number: u32,
    flags: i32,
    user: u32,
) -> io::Result<OwnedFd> {
    let mut lower = Vec::new();
    loop {
        let master = path::open(env, b"/dev/pts/ptmx", flags | libc::O_NOCTTY)?;
        let got = sys::fd::pty_number(master.as_fd())?;
        if got == number {
            sys::fd::lock_pty(master.as_fd(), false)?;
            // It is ours, and we are nobody in there.
            let slave = path::open(env, &slave_path(number), libc::O_PATH)?;
            let user = rustix::fs::Uid::from_raw(user);
            rustix::fs::chownat(&slave, "", Some(user), None, AtFlags::EMPTY_PATH)?;
            return Ok(master);
        }
        if got > number {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!("pseudo-terminal {number} is in use by a process outside the tree"),
            ));
        }
        lower.push(master);
    }
}
