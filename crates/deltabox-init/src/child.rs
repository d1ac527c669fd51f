//! Starting a command: everything between fork and exec.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use deltabox_init::{CAPABILITIES, Spawn, Step};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process};

use crate::serve::Init;
use crate::sys::{self, Fork, ForkOptions};
use crate::{At, Failure};

/// How long a new process may take until its program runs.
const PATIENCE: Timespec = Timespec {
    tv_sec: 20,
    tv_nsec: 0,
};

/// Open files that a process may have unless it raises its own limit.
const OPEN_FILES: u64 = 1024;

/// Runs a command; returns its pid when it was executed, or why it was not.
pub(crate) fn spawn(init: &Init, spawn: &Spawn, fds: &[OwnedFd]) -> Result<i32, Failure> {
    if fds.len() != if spawn.tty { 1 } else { 3 } {
        return Err(Errno::BADF).at(Step::Request, "counting descriptors");
    }
    let (report, failed) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .at(Step::Clone, "making a pipe")?;
    let options = ForkOptions {
        cgroup: Some(init.payload.as_fd()),
        ..ForkOptions::default()
    };
    match sys::fork(&options).at(Step::Clone, "making a process")? {
        Fork::Parent(pid) => {
            drop(failed);
            let mut word = [0; 5];
            let got = await_report(pid, &report, &mut word)
                .at(Step::Exec, "waiting for the program to start")?;
            // End of file: exec closed the pipe.
            if got < word.len() {
                return Ok(pid);
            }
            let [code, e0, e1, e2, e3] = word;
            Err(Failure {
                step: Step::from_code(code).unwrap_or(Step::Exec),
                errno: i32::from_le_bytes([e0, e1, e2, e3]),
                what: String::new(),
            })
        }
        Fork::Child => {
            let Err(failure) = run(init, spawn, fds) else {
                sys::exit(127);
            };
            let mut word = [failure.step.code(), 0, 0, 0, 0];
            word[1..].copy_from_slice(&failure.errno.to_le_bytes());
            // Nobody is left to tell if this fails.
            let _ = rustix::io::write(failed, &word);
            sys::exit(127);
        }
    }
}

/// Reads what a new process has to report, or the end of file that is left when all went well. One that does neither is
/// killed: others inside may stop it, and init must go on.
pub(crate) fn await_report(pid: i32, report: &OwnedFd, word: &mut [u8]) -> Result<usize, Errno> {
    let mut fds = [PollFd::new(report, PollFlags::IN)];
    loop {
        match poll(&mut fds, Some(&PATIENCE)) {
            Ok(0) => {
                // It cannot be reaped by anybody else, so the number is still its own.
                let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::KILL));
                return Err(Errno::TIMEDOUT);
            }
            Ok(_) => match rustix::io::read(report, &mut *word) {
                Err(Errno::INTR) => {}
                other => return other,
            },
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
}

fn run(init: &Init, spawn: &Spawn, fds: &[OwnedFd]) -> Result<(), Failure> {
    sys::reset_signals();
    rustix::process::setsid().at(Step::Prepare, "making a session")?;
    for at in 0..3 {
        let fd = fds.get(at).unwrap_or(&fds[0]);
        // Init holds 0 to 2 itself, so that no received descriptor is below 3.
        sys::place(fd.as_fd(), at as i32).at(Step::Prepare, "placing descriptors")?;
    }
    sys::close_from(3, true).at(Step::Prepare, "closing descriptors")?;
    if spawn.tty {
        sys::take_terminal().at(Step::Prepare, "taking the terminal")?;
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    limit_resources().at(Step::Prepare, "setting limits")?;
    drop_capabilities().at(Step::Prepare, "dropping capabilities")?;
    sys::become_user(spawn.uid, spawn.gid, &spawn.groups).at(Step::User, "becoming the user")?;
    rustix::process::chdir(&*spawn.cwd).at(Step::Cwd, "changing directory")?;
    install(&init.filters).at(Step::Prepare, "installing the filter")?;
    let argv = strings(&spawn.argv).at(Step::Exec, "reading the arguments")?;
    let env = strings(&spawn.env).at(Step::Exec, "reading the environment")?;
    Err(execute(&argv, &env)).at(Step::Exec, "executing")
}

fn strings(list: &[Vec<u8>]) -> io::Result<Vec<CString>> {
    list.iter()
        .map(|s| CString::new(&**s).map_err(|_| Errno::INVAL.into()))
        .collect()
}

fn limit_resources() -> rustix::io::Result<()> {
    let files = rustix::process::getrlimit(Resource::Nofile);
    let soft = files.maximum.map_or(OPEN_FILES, |max| max.min(OPEN_FILES));
    rustix::process::setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(soft),
            maximum: files.maximum,
        },
    )?;
    // A core dump would go to a program of the host.
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    rustix::process::setrlimit(Resource::Core, none)
}

/// Takes all but [`CAPABILITIES`] out of the bounding set. What is left is what root gets by exec.
fn drop_capabilities() -> io::Result<()> {
    sys::clear_inheritable()?;
    for capability in (0..64).filter(|c| !CAPABILITIES.contains(c)) {
        match sys::drop_from_bounding_set(capability) {
            // Past the last one that this kernel knows.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => break,
            other => other?,
        }
    }
    Ok(())
}

fn install(filters: &[Vec<libc::sock_filter>]) -> io::Result<()> {
    sys::set_no_new_privs()?;
    filters.iter().try_for_each(|f| sys::install_filter(f))
}

/// Makes this process like one that was started by [`spawn`], but for its capabilities, which the engine needs until
/// it gives it those that it had.
pub(crate) fn confine(filters: &[Vec<libc::sock_filter>]) -> io::Result<()> {
    sys::reset_signals();
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    limit_resources()?;
    drop_capabilities()?;
    install(filters)
}

/// As `execvpe(3)`: looks the program up in the `PATH` of the new environment.
fn execute(argv: &[CString], env: &[CString]) -> io::Error {
    let Some(program) = argv.first() else {
        return Errno::NOENT.into();
    };
    if program.as_bytes().contains(&b'/') {
        return execute_file(program, argv, env);
    }
    let path = env
        .iter()
        .find_map(|e| e.as_bytes().strip_prefix(b"PATH="))
        .unwrap_or(b"/usr/local/bin:/usr/bin:/bin");
    let mut error = io::Error::from(Errno::NOENT);
    for dir in path.split(|&b| b == b':') {
        let dir = if dir.is_empty() { b"." } else { dir };
        let Ok(file) = CString::new([dir, b"/", program.as_bytes()].concat()) else {
            continue;
        };
        let e = execute_file(&file, argv, env);
        match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => {}
            // Found, but not for us: another one may do, else this is the reason.
            Some(libc::EACCES) => error = e,
            _ => return e,
        }
    }
    error
}

/// As the shells do, a file that is no program is run by `/bin/sh`.
fn execute_file(file: &CString, argv: &[CString], env: &[CString]) -> io::Error {
    let error = sys::execute(file, argv, env);
    if error.raw_os_error() != Some(libc::ENOEXEC) {
        return error;
    }
    let shell = CString::from(c"/bin/sh");
    let mut args = vec![shell.clone(), file.clone()];
    args.extend_from_slice(&argv[1..]);
    sys::execute(&shell, &args, env)
}
