//! Starting a command as a new session.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use deltabox_init::Spawn;
use rustix::fs::{Gid, Mode, OFlags, ResolveFlags, Uid};

use crate::descendants::MARK;
use crate::error::{Doing, Error, Result};
use crate::generation::Generation;
use crate::report::SessionId;
use crate::session::Session;
use crate::sessions::{NewSession, Shared};
use crate::spec::{CommandSpec, WindowSize};
use crate::streams::{End, Streams, pipe};
use crate::sys;
use crate::users::{self, Identity};

/// Where commands are looked for unless the caller says otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The group of terminals, by convention everywhere.
const TTY_GROUP: u32 = 5;

/// Terminals that are opened to come to a wanted number.
const MAX_TERMINALS: usize = 4096;

/// The two sides of a session's streams.
struct Ends {
    outside: Streams,
    inside: Vec<OwnedFd>,
    terminal: Option<u32>,
}

/// Starts `command` in the sandbox whose id `first_id` outside is 0 inside.
pub(crate) fn spawn(
    shared: &Arc<Shared>,
    first_id: u32,
    command: CommandSpec,
) -> Result<Arc<Session>> {
    check(&command)?;
    let root = shared.container.root();
    let user = users::look_up(root, command.user.as_deref())?;
    let owner = first_id + user.uid;
    let ends = match command.tty {
        Some(size) => on_terminal(root, size, owner, first_id + TTY_GROUP)?,
        None => on_pipes(root, command.stdin, owner)?,
    };
    let argv = if command.argv.is_empty() {
        let shell = String::from_utf8_lossy(&user.shell).into_owned();
        vec![shell, "-l".to_owned()]
    } else {
        command.argv.clone()
    };
    let new = NewSession {
        argv: argv.clone(),
        owner: user.uid,
        terminal: ends.terminal,
        streams: ends.outside,
        timeout: command.timeout,
    };
    shared.add(new, |id| {
        let fds: Vec<_> = ends.inside.iter().map(AsFd::as_fd).collect();
        let cwd = match &command.cwd {
            Some(cwd) => cwd.as_os_str().as_bytes(),
            None if command.tty.is_some() && is_directory(root, &user.home) => &user.home,
            None => b"/",
        };
        let request = Spawn {
            argv: argv.iter().map(|a| a.clone().into_bytes()).collect(),
            env: environment(&command, &user, id, shared.generation.get()),
            cwd: cwd.to_vec(),
            uid: user.uid,
            gid: user.gid,
            groups: user.groups,
            tty: command.tty.is_some(),
        };
        shared.container.spawn(request, &fds)
    })
}

fn check(command: &CommandSpec) -> Result<()> {
    let invalid = |why: &str| Err(Error::Invalid(why.to_owned()));
    if command.argv.first().is_some_and(String::is_empty) {
        return invalid("the program's name is empty");
    }
    if command.argv.iter().any(|a| a.contains('\0')) {
        return invalid("an argument contains a zero byte");
    }
    for (name, value) in &command.env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(Error::Invalid(format!(
                "{name:?} cannot be an environment variable"
            )));
        }
    }
    match &command.cwd {
        Some(cwd) if !cwd.is_absolute() => {
            invalid("the working directory must be an absolute path")
        }
        _ => Ok(()),
    }
}

fn environment(
    command: &CommandSpec,
    user: &Identity,
    id: SessionId,
    generation: Option<&Generation>,
) -> Vec<Vec<u8>> {
    let mut env = std::collections::BTreeMap::from([
        (b"PATH".to_vec(), PATH.into()),
        (b"HOME".to_vec(), user.home.clone()),
        (b"LANG".to_vec(), b"C.UTF-8".to_vec()),
    ]);
    if command.tty.is_some() {
        env.insert(b"TERM".to_vec(), b"xterm-256color".to_vec());
    }
    env.extend(generation.iter().flat_map(|g| g.environment()));
    for (name, value) in &command.env {
        env.insert(name.clone().into(), value.clone().into());
    }
    env.insert(MARK.into(), id.to_string().into());
    env.into_iter()
        .map(|(name, value)| [&name, &b"="[..], &value].concat())
        .collect()
}

fn is_directory(root: BorrowedFd<'_>, path: &[u8]) -> bool {
    rustix::fs::openat2(
        root,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT,
    )
    .is_ok()
}

fn on_pipes(root: BorrowedFd<'_>, stdin: bool, owner: u32) -> Result<Ends> {
    let make = |writes| pipe(writes, owner).doing("making a pipe for a command");
    let mut outside = Streams::default();
    let input = if stdin {
        let (end, inside) = make(false)?;
        outside.stdin = Some(end);
        inside
    } else {
        open_device(root, "dev/null", OFlags::RDONLY).doing("opening /dev/null of the sandbox")?
    };
    let mut inside = vec![input];
    for channel in [
        crate::streams::Channel::Stdout,
        crate::streams::Channel::Stderr,
    ] {
        let (end, writes) = make(true)?;
        *outside.slot(channel) = Some(end);
        inside.push(writes);
    }
    Ok(Ends {
        outside,
        inside,
        terminal: None,
    })
}

fn open_device(root: BorrowedFd<'_>, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat2(
        root,
        path,
        flags | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS,
    )?)
}

fn on_terminal(root: BorrowedFd<'_>, size: WindowSize, owner: u32, group: u32) -> Result<Ends> {
    let (master, number) = open_terminal(root, None)?;
    let inside = sys::open_peer(master.fd()).doing("opening a terminal in the sandbox")?;
    rustix::fs::fchown(
        &inside,
        Some(Uid::from_raw(owner)),
        Some(Gid::from_raw(group)),
    )
    .doing("giving a terminal to its user")?;
    sys::set_window_size(master.fd(), size).doing("sizing a terminal")?;
    let outside = Streams {
        master: Some(master),
        ..Streams::default()
    };
    Ok(Ends {
        outside,
        inside: vec![inside],
        terminal: Some(number),
    })
}

/// Opens a new terminal (its master) of the sandbox, the one of number `wanted` if given. Returns its number.
pub(crate) fn open_terminal(root: BorrowedFd<'_>, wanted: Option<u32>) -> Result<(End, u32)> {
    let doing = "opening a terminal in the sandbox";
    let mut others = Vec::new();
    while others.len() < MAX_TERMINALS {
        let flags = OFlags::RDWR | OFlags::NONBLOCK;
        let master = open_device(root, "dev/pts/ptmx", flags).doing(doing)?;
        let number = sys::terminal_number(master.as_fd()).doing(doing)?;
        if wanted.is_none_or(|w| w == number) {
            sys::unlock_terminal(master.as_fd()).doing(doing)?;
            return Ok((End::new(master).doing(doing)?, number));
        }
        // The kernel gives the lowest free number: keep the lower ones until the wanted one comes.
        others.push(master);
    }
    Err(io::Error::from(rustix::io::Errno::NOSPC)).doing(doing)
}
