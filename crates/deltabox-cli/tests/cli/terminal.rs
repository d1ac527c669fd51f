//! `-it`: raw mode and its end, window sizes, keys.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::harness::{Home, PATIENCE, gone, kill, wait_for};

/// A terminal: our side and the program's.
struct Terminal {
    ours: File,
    theirs: OwnedFd,
    seen: String,
}

impl Terminal {
    fn open() -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let name = ptsname(&ours, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let theirs = open(name.as_c_str(), flags, Mode::empty()).unwrap();
        let mut terminal = Self {
            ours: ours.into(),
            theirs,
            seen: String::new(),
        };
        terminal.resize(20, 70);
        terminal
    }

    fn resize(&mut self, rows: u16, cols: u16) {
        let size = Winsize {
            ws_row: rows,
            ws_col: cols,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.ours, size).unwrap();
    }

    fn start(&self, home: &Home, args: &[&str]) -> Child {
        let side = || Stdio::from(self.theirs.try_clone().unwrap());
        home.command(args)
            .stdin(side())
            .stdout(side())
            .stderr(side())
            .spawn()
            .unwrap()
    }

    fn cooked(&self) -> bool {
        let modes = tcgetattr(&self.theirs).unwrap().local_modes;
        modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    fn type_keys(&mut self, keys: &[u8]) {
        self.ours.write_all(keys).unwrap();
    }

    fn read_until(&mut self, wanted: &str) {
        while !self.seen.contains(wanted) {
            let mut ready = [PollFd::new(&self.ours, PollFlags::IN)];
            let patience = Timespec {
                tv_sec: PATIENCE.as_secs() as i64,
                tv_nsec: 0,
            };
            let n = poll(&mut ready, Some(&patience)).unwrap();
            assert!(n > 0, "{wanted:?} was never written: {:?}", self.seen);
            let mut buffer = [0; 4096];
            let n = self.ours.read(&mut buffer).expect(&self.seen);
            self.seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
    }
}

#[test]
fn a_shell_on_a_terminal_gets_keys_sizes_and_ctrl_c_and_leaves_the_terminal_as_it_was() {
    let home = Home::with_box();
    let mut terminal = Terminal::open();
    assert!(terminal.cooked());
    let mut child = terminal.start(&home, &["exec", "-it", "box", "--", "sh"]);
    wait_for("raw mode", || !terminal.cooked());
    terminal.type_keys(b"stty size; echo si''ze\r");
    terminal.read_until("size\r\n");
    assert!(terminal.seen.contains("20 70"), "{:?}", terminal.seen);

    terminal.resize(33, 44);
    // The kernel sends it to those whose controlling terminal this is; ours is a terminal without a session.
    kill(&child, Signal::WINCH);
    terminal.type_keys(b"until stty size | grep '33 44'; do sleep 0.05; done; echo res''ized\r");
    terminal.read_until("resized\r\n");

    // What says so is in the foreground by then; the shell itself may miss the key just before.
    terminal.type_keys(b"sh -c 'echo begin\"\"ning; exec sleep 1000'\r");
    terminal.read_until("beginning\r\n");
    terminal.type_keys(b"\x03");
    terminal.type_keys(b"echo inter''rupted; exit 6\r");
    terminal.read_until("interrupted\r\n");
    assert_eq!(child.wait().unwrap().code(), Some(6));
    assert!(terminal.cooked());
}

#[test]
fn a_terminated_client_restores_the_terminal_and_the_shell_stays() {
    let home = Home::with_box();
    let mut terminal = Terminal::open();
    let mut child = terminal.start(&home, &["shell", "box"]);
    wait_for("raw mode", || !terminal.cooked());
    terminal.type_keys(b"x=stay''ed; echo ready$x\r");
    terminal.read_until("readystayed\r\n");
    kill(&child, Signal::TERM);
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(terminal.cooked());

    let sessions = home.json(&["inspect", "box"])["sessions"].clone();
    assert_eq!(sessions[0]["exit"], serde_json::Value::Null, "{sessions}");
    let id = sessions[0]["id"].as_str().unwrap();
    let mut again = Terminal::open();
    let mut child = again.start(&home, &["attach", "-i", "box", id]);
    again.read_until("readystayed\r\n");
    again.type_keys(b"echo still$x; exit\r");
    again.read_until("stillstayed\r\n");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(again.cooked());
}

#[test]
fn a_killed_service_does_not_leave_the_terminal_raw() {
    let home = Home::with_box();
    let terminal = Terminal::open();
    let mut child = terminal.start(&home, &["shell", "box"]);
    wait_for("raw mode", || !terminal.cooked());
    let service = home.service();
    rustix::process::kill_process(service, Signal::KILL).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(terminal.cooked());
    wait_for("the service is gone", || gone(service));
    // Its sandboxes are removed by the next one.
    home.ok(&["ls"]);
}
