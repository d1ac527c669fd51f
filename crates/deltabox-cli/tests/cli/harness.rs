//! A state directory whose service ends with the test, also when that fails.

use std::ffi::CString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// How long anything may take before a test gives up: not a measurement.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Home {
    /// Gone before its directory.
    disk: Option<SmallDisk>,
    pub(crate) dir: TempDir,
}

/// A filesystem in memory; unmounted at the end.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(path: &Path, bytes: u64) -> Self {
        let options = CString::new(format!("size={bytes}")).unwrap();
        let flags = MountFlags::empty();
        mount("tmpfs", path, "tmpfs", flags, Some(options.as_c_str())).unwrap();
        Self(path.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = unmount(&self.0, UnmountFlags::DETACH);
        assert!(
            unmounted.is_ok() || std::thread::panicking(),
            "{unmounted:?}"
        );
    }
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).expect("text"),
            stderr: String::from_utf8(output.stderr).expect("text"),
        }
    }
}

impl Home {
    pub(crate) fn new() -> Self {
        Self {
            disk: None,
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// In a filesystem of this many bytes.
    pub(crate) fn with_small_disk(bytes: u64) -> Self {
        let mut home = Self::new();
        home.disk = Some(SmallDisk::mount(home.path(), bytes));
        home
    }

    /// With one sandbox, called `box`.
    pub(crate) fn with_box() -> Self {
        let home = Self::new();
        assert_eq!(home.ok(&["create", "--name", "box"]), "box\n");
        home
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_deltabox"));
        command
            .env("DELTABOX_STATE_DIR", self.dir.path())
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        self.command(args).output().unwrap().into()
    }

    pub(crate) fn run_with(&self, args: &[&str], input: &[u8]) -> Ran {
        let mut child = self.command(args).stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        std::thread::scope(|scope| {
            // A command that does not read to the end is not this function's concern.
            scope.spawn(move || stdin.write_all(input));
            child.wait_with_output().unwrap().into()
        })
    }

    /// The output of a command that must succeed.
    #[track_caller]
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        assert_eq!(ran.code, Some(0), "{args:?}: {ran:?}");
        ran.stdout
    }

    #[track_caller]
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let text = self.ok(&[args, &["--json"]].concat());
        serde_json::from_str(&text).expect(&text)
    }

    /// The output of a script in `box`.
    #[track_caller]
    pub(crate) fn sh(&self, script: &str) -> String {
        self.sh_in("box", script)
    }

    #[track_caller]
    pub(crate) fn sh_in(&self, sandbox: &str, script: &str) -> String {
        self.ok(&["exec", sandbox, "--", "sh", "-c", script])
    }

    #[track_caller]
    pub(crate) fn checkpoint(&self) -> String {
        let id = self.ok(&["checkpoint", "box"]);
        id.trim_end().to_owned()
    }

    /// The process of the service.
    pub(crate) fn service(&self) -> Pid {
        let status = self.json(&["service", "status"]);
        let pid = status["pid"].as_i64().unwrap() as i32;
        Pid::from_raw(pid).unwrap()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The test may have killed the service: a new one removes what that left.
            self.run(&["ls"]);
        }
        let ran = self.run(&["service", "stop"]);
        if !std::thread::panicking() {
            assert_eq!(ran.code, Some(0), "{ran:?}");
        }
    }
}

pub(crate) fn kill(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Waits until `done`, or fails saying what did not happen.
#[track_caller]
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether a process has ended; who its parent is now, and when that takes note, is not our concern.
pub(crate) fn gone(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    stat.map_or(true, |stat| stat.contains(") Z "))
}
