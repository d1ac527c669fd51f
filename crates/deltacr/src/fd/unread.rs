//! What waits to be read in a pseudo-terminal.
//!
//! It can only be read by taking it, and is put back as if it came again (`TIOCSTI`), under settings that leave every byte
//! as it is.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::model::Input;
use crate::sys::fd::{self as sys, RawTermios};

/// More than this is left alone: the line discipline has room for 4095 bytes, behind which the terminal may hold more.
const MOST: usize = 3000;
/// More than any line has.
const LINE: usize = 8192;

/// Where `struct termios2` has its flags and control characters, and how many those are.
const INPUT_FLAGS: usize = 0;
const LOCAL_FLAGS: usize = 12;
const CHARACTERS: usize = 17;
const CHARACTER_COUNT: usize = 19;

fn flags(termios: &RawTermios, at: usize) -> u32 {
    u32::from_ne_bytes(termios[at..at + 4].try_into().expect("four bytes"))
}

fn set_flags(termios: &mut RawTermios, at: usize, flags: u32) {
    termios[at..at + 4].copy_from_slice(&flags.to_ne_bytes());
}

/// Whether input is read by lines.
fn by_lines(termios: &RawTermios) -> bool {
    flags(termios, LOCAL_FLAGS) & (libc::ICANON | libc::EXTPROC) == libc::ICANON
}

/// Settings under which whatever there is can be read at once.
fn by_bytes(termios: &RawTermios) -> RawTermios {
    let mut raw = *termios;
    set_flags(
        &mut raw,
        LOCAL_FLAGS,
        flags(termios, LOCAL_FLAGS) & !libc::ICANON,
    );
    raw[CHARACTERS + libc::VMIN] = 0;
    raw[CHARACTERS + libc::VTIME] = 0;
    raw
}

/// Settings under which what comes is input as it is. `end_of_file` ends a line without being part of it.
fn as_it_is(termios: &RawTermios, end_of_file: u8) -> RawTermios {
    let mut quiet = *termios;
    // Output that is stopped would go on if it could not be stopped any more; what has passed has none of the characters for it.
    let flow = flags(termios, INPUT_FLAGS) & libc::IXON;
    set_flags(&mut quiet, INPUT_FLAGS, flow);
    let kept = libc::ICANON | libc::EXTPROC | libc::IEXTEN;
    set_flags(&mut quiet, LOCAL_FLAGS, flags(termios, LOCAL_FLAGS) & kept);
    for name in 0..CHARACTER_COUNT {
        let kept = match name {
            libc::VEOL | libc::VEOL2 => true,
            libc::VSTART | libc::VSTOP => flow != 0,
            _ => false,
        };
        if !kept {
            quiet[CHARACTERS + name] = 0;
        }
    }
    quiet[CHARACTERS + libc::VEOF] = end_of_file;
    quiet
}

/// The characters that end a line and belong to it.
fn ends(termios: &RawTermios) -> Vec<u8> {
    let others = [libc::VEOL, libc::VEOL2].map(|name| termios[CHARACTERS + name]);
    let others = others.into_iter().filter(|character| *character != 0);
    [b'\n'].into_iter().chain(others).collect()
}

/// What there is to be read or told of. Who asks has the kernel bring what is on its way.
fn ready(tty: BorrowedFd<'_>) -> io::Result<PollFlags> {
    let mut fds = [PollFd::from_borrowed_fd(
        tty,
        PollFlags::IN | PollFlags::PRI,
    )];
    poll(&mut fds, Some(&Timespec::default()))?;
    Ok(fds[0].revents())
}

/// Takes the input that waits at a slave side. `None` where that is more than can be put back.
pub(crate) fn take_input(slave: BorrowedFd<'_>) -> io::Result<Option<Input>> {
    let termios = sys::termios(slave)?;
    let mut taken = Input::default();
    let mut line_waits = by_lines(&termios) && ready(slave)?.contains(PollFlags::IN);
    let readable = sys::readable(slave)?;
    if readable > MOST {
        return Ok(None);
    }
    while line_waits {
        let mut line = vec![0; LINE];
        let len = rustix::io::read(slave, &mut line)?;
        line.truncate(len);
        taken.lines.push(line);
        line_waits = ready(slave)?.contains(PollFlags::IN);
    }
    if by_lines(&termios) || readable > 0 {
        // A line that has not ended shows only when it is not read by lines.
        sys::set_termios(slave, &by_bytes(&termios))?;
        let rest = take_bytes(slave);
        sys::set_termios(slave, &termios)?;
        taken.rest = rest?;
    }
    Ok(Some(taken))
}

/// Takes what can be read now.
fn take_bytes(tty: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        let len = sys::readable(tty)?;
        if len == 0 {
            return Ok(bytes);
        }
        let begin = bytes.len();
        bytes.resize(begin + len, 0);
        let len = rustix::io::read(tty, &mut bytes[begin..])?;
        bytes.truncate(begin + len);
        // There is room for more now.
        ready(tty)?;
    }
}

/// Puts input back at a slave side where none waits. The settings are these from then on.
pub(crate) fn put_input(
    slave: BorrowedFd<'_>,
    input: &Input,
    settings: &RawTermios,
) -> io::Result<()> {
    if input.is_empty() {
        return sys::set_termios(slave, settings);
    }
    let used = |byte| {
        let mut bytes = input.lines.iter().flatten().chain(&input.rest);
        bytes.any(|b| *b == byte)
    };
    let end_of_file = (1..=u8::MAX).find(|&byte| byte != b'\n' && !used(byte));
    let end_of_file =
        end_of_file.ok_or_else(|| io::Error::other("bytes of every kind wait to be read"))?;
    sys::set_termios(slave, &as_it_is(settings, end_of_file))?;
    let ends = ends(settings);
    let put = || {
        for line in &input.lines {
            put_bytes(slave, line)?;
            if !line.last().is_some_and(|last| ends.contains(last)) {
                sys::pretend_input(slave, end_of_file)?;
            }
        }
        put_bytes(slave, &input.rest)
    };
    let done = put();
    sys::set_termios(slave, settings)?;
    done
}

fn put_bytes(tty: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    bytes
        .iter()
        .try_for_each(|byte| sys::pretend_input(tty, *byte))
}

/// Whether nobody has the slave side of a master any more.
pub(crate) fn is_left(master: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(ready(master)?.contains(PollFlags::HUP))
}

/// Takes the output that waits at a master side. `None` where that is more than can be put back, or where the terminal has
/// something else to tell first (packet mode).
pub(crate) fn take_output(master: BorrowedFd<'_>) -> io::Result<Option<Vec<u8>>> {
    let ready = ready(master)?;
    if ready.contains(PollFlags::PRI) || sys::readable(master)? > MOST {
        return Ok(None);
    }
    if !ready.contains(PollFlags::IN) || sys::readable(master)? == 0 {
        return Ok(Some(Vec::new()));
    }
    let packets = sys::in_packet_mode(master)?;
    if packets {
        sys::set_packet_mode(master, false)?;
    }
    let taken = take_bytes(master);
    if packets {
        sys::set_packet_mode(master, true)?;
    }
    taken.map(Some)
}

/// Puts output back at a master side where none waits.
pub(crate) fn put_output(master: BorrowedFd<'_>, output: &[u8]) -> io::Result<()> {
    put_bytes(master, output)
}
