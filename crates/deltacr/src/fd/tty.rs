//! Character devices: terminals, pseudo-terminal masters, and nodes such as `/dev/null`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Gid, Mode, Uid};
use rustix::termios::Winsize;

use super::capture::{Capture, Holder};
use super::model::{Descriptors, Kind, Terminal};
use super::{Procs, path, unread};
use crate::env::Environment;
use crate::error::{During, Result};
use crate::owners::Owners;
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
        (TTYAUX_MAJOR, 0) => {
            let number = holder.take()?;
            let number = holder.during(number_of(number.as_fd()), "asking which terminal it is")?;
            Ok(Kind::ControllingTerminal { number })
        }
        (TTYAUX_MAJOR, 2) => match holder.raw.info.tty_index {
            Some(number) => {
                settings(capture, holder, number)?;
                Ok(Kind::Master { number })
            }
            None => Err(holder.refuse("a pseudo-terminal master without a number")),
        },
        _ if SLAVE_MAJORS.contains(&major) => {
            let number = (major - SLAVE_MAJORS.start()) * PER_MAJOR + minor;
            let hung_up = settings(capture, holder, number)?;
            Ok(Kind::Terminal { number, hung_up })
        }
        _ => {
            let link = holder.link()?;
            let name = String::from_utf8_lossy(&link);
            Err(holder.refuse(format_args!("{name}, a device that is not carried")))
        }
    }
}

/// Takes the settings down, once for each terminal. Tells whether it is hung up, and has none.
fn settings(capture: &mut Capture<'_>, holder: &Holder<'_>, number: u32) -> Result<bool> {
    if capture.image.terminals.contains_key(&number) {
        return Ok(false);
    }
    let tty = holder.take()?;
    let owners = capture.owners()?;
    let terminal = match read_settings(tty.as_fd(), capture.env, owners, number) {
        Err(e) if e.raw_os_error() == Some(libc::EIO) => return Ok(true),
        read => holder.during(read, "reading the settings of the terminal")?,
    };
    capture.image.terminals.insert(number, terminal);
    Ok(false)
}

fn read_settings(
    tty: BorrowedFd<'_>,
    env: &dyn Environment,
    owners: &Owners,
    number: u32,
) -> io::Result<Terminal> {
    let size = rustix::termios::tcgetwinsize(tty)?;
    let side = rustix::fs::fstat(tty)?;
    let node = match SLAVE_MAJORS.contains(&rustix::fs::major(side.st_rdev)) {
        true => side,
        false => rustix::fs::fstat(slave_node(env, number)?)?,
    };
    Ok(Terminal {
        termios: sys::fd::termios(tty)?.to_vec(),
        size: [size.ws_row, size.ws_col, size.ws_xpixel, size.ws_ypixel],
        owner: owners.inside((node.st_uid, node.st_gid)),
        mode: node.st_mode & 0o7777,
        ..Terminal::default()
    })
}

/// The device node of the slave side.
fn slave_node(env: &dyn Environment, number: u32) -> io::Result<OwnedFd> {
    path::open(env, &slave_path(number), libc::O_PATH)
}

/// Completes the image of terminals by what their sides alone tell, and by what waits in them, which is taken and put back.
pub(crate) fn look_inside(image: &mut Descriptors, procs: &Procs<'_>) -> Result<()> {
    for number in image.terminals.keys().copied().collect::<Vec<_>>() {
        let Some(mut terminal) = image.terminals.remove(&number) else {
            continue;
        };
        for (side, read) in image
            .sides(number)
            .into_iter()
            .zip([read_slave, read_master])
        {
            let Some((pid, fd)) = side.map(|index| image.objects[index].home) else {
                continue;
            };
            let tty = procs.get(&pid).ok_or(io::ErrorKind::NotFound.into());
            tty.and_then(|remote| remote.take_fd(fd))
                .and_then(|tty| read(tty.as_fd(), &mut terminal))
                .during(pid, &format!("reading the terminal at descriptor {fd}"))?;
        }
        image.terminals.insert(number, terminal);
    }
    Ok(())
}

fn read_slave(slave: BorrowedFd<'_>, terminal: &mut Terminal) -> io::Result<()> {
    terminal.exclusive = sys::fd::is_exclusive(slave)?;
    terminal.input = unread::take_input(slave)?;
    match &terminal.input {
        Some(input) if !input.is_empty() => {
            unread::put_input(slave, input, &sys::fd::termios(slave)?)
        }
        _ => Ok(()),
    }
}

fn read_master(master: BorrowedFd<'_>, terminal: &mut Terminal) -> io::Result<()> {
    terminal.locked = sys::fd::pty_is_locked(master)?;
    terminal.packets = sys::fd::in_packet_mode(master)?;
    terminal.left = unread::is_left(master)?;
    terminal.output = unread::take_output(master)?;
    unread::put_output(master, terminal.output.as_deref().unwrap_or_default())
}

/// Makes a terminal that is as `now`, if that is known, be as `wanted`, by those of its sides that are open. What waits there that
/// should not is dropped.
pub(crate) fn set(
    [slave, master]: [Option<BorrowedFd<'_>>; 2],
    env: &dyn Environment,
    number: u32,
    now: Option<&Terminal>,
    wanted: &Terminal,
) -> io::Result<()> {
    let Some(tty) = slave.or(master) else {
        return Ok(());
    };
    if now.is_none_or(|now| (now.owner, now.mode) != (wanted.owner, wanted.mode)) {
        set_owner(env, number, wanted)?;
    }
    let settings = wanted.termios.as_slice().try_into();
    let settings = settings.map_err(|_| io::Error::other("not the size of a termios2"))?;
    if let Some(slave) = slave {
        let now = unread::take_input(slave)?;
        // What is too much is not known, and stays.
        match wanted.input.as_ref().filter(|_| now.is_some()) {
            Some(input) => unread::put_input(slave, input, settings)?,
            None => sys::fd::set_termios(slave, settings)?,
        }
        if sys::fd::is_exclusive(slave)? != wanted.exclusive {
            sys::fd::set_exclusive(slave, wanted.exclusive)?;
        }
    } else if sys::fd::termios(tty)? != *settings {
        sys::fd::set_termios(tty, settings)?;
    }
    set_size(tty, wanted.size)?;
    let Some(master) = master else {
        return Ok(());
    };
    if let (Some(output), Some(_)) = (&wanted.output, unread::take_output(master)?) {
        unread::put_output(master, output)?;
    }
    if slave.is_none() && wanted.left && !unread::is_left(master)? {
        drop(open_slave(env, number, libc::O_RDWR)?);
    }
    if sys::fd::in_packet_mode(master)? != wanted.packets {
        sys::fd::set_packet_mode(master, wanted.packets)?;
    }
    if sys::fd::pty_is_locked(master)? != wanted.locked {
        sys::fd::lock_pty(master, wanted.locked)?;
    }
    Ok(())
}

fn set_size(
    tty: BorrowedFd<'_>,
    [ws_row, ws_col, ws_xpixel, ws_ypixel]: [u16; 4],
) -> io::Result<()> {
    let wanted = Winsize {
        ws_row,
        ws_col,
        ws_xpixel,
        ws_ypixel,
    };
    // Who sets it to what it is tells nobody of a change, but the kernel looks.
    Ok(rustix::termios::tcsetwinsize(tty, wanted)?)
}

fn set_owner(env: &dyn Environment, number: u32, wanted: &Terminal) -> io::Result<()> {
    let node = slave_node(env, number)?;
    let (user, group) = Owners::of(env)?.outside(wanted.owner);
    let now = rustix::fs::fstat(&node)?;
    if (now.st_uid, now.st_gid) != (user, group) {
        let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
        rustix::fs::chownat(&node, "", Some(user), Some(group), AtFlags::EMPTY_PATH)?;
    }
    if now.st_mode & 0o7777 != wanted.mode {
        let path = format!("/proc/self/fd/{}", node.as_raw_fd());
        rustix::fs::chmod(path, Mode::from_raw_mode(wanted.mode))?;
    }
    Ok(())
}

/// The number of the terminal whose slave side a file is, whatever it was opened as; none if it is hung up.
pub(crate) fn number_of(tty: BorrowedFd<'_>) -> io::Result<Option<u32>> {
    match sys::fd::terminal_device(tty) {
        Err(e) if e.raw_os_error() == Some(libc::EIO) => Ok(None),
        Err(e) => Err(e),
        Ok((major, minor)) if SLAVE_MAJORS.contains(&major) => {
            Ok(Some((major - SLAVE_MAJORS.start()) * PER_MAJOR + minor))
        }
        Ok(_) => Err(io::Error::other("it is no pseudo-terminal")),
    }
}

/// Opens a terminal, whichever, and hangs it up.
pub(crate) fn open_hung_up(env: &dyn Environment, flags: i32) -> io::Result<OwnedFd> {
    let master = path::open(env, b"/dev/pts/ptmx", libc::O_RDWR | libc::O_NOCTTY)?;
    sys::fd::lock_pty(master.as_fd(), false)?;
    open_slave(env, sys::fd::pty_number(master.as_fd())?, flags)
}

/// Opens the slave side.
pub(crate) fn open_slave(env: &dyn Environment, number: u32, flags: i32) -> io::Result<OwnedFd> {
    path::open(env, &slave_path(number), flags | libc::O_NOCTTY)
}

fn slave_path(number: u32) -> Vec<u8> {
    format!("/dev/pts/{number}").into_bytes()
}

/// A new master with this number, which must be free. The kernel gives out the lowest free number, so lower ones are taken for a
/// moment.
pub(crate) fn make_master(env: &dyn Environment, number: u32, flags: i32) -> io::Result<OwnedFd> {
    let mut lower = Vec::new();
    loop {
        let master = path::open(env, b"/dev/pts/ptmx", flags | libc::O_NOCTTY)?;
        let got = sys::fd::pty_number(master.as_fd())?;
        if got == number {
            sys::fd::lock_pty(master.as_fd(), false)?;
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
