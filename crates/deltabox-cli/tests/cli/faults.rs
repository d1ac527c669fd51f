//! The service's life: started once, killed, cleaned up after.

use std::fs;

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Home, Ran, gone, wait_for};

#[test]
fn commands_that_come_at_once_start_one_service() {
    let home = Home::new();
    let children: Vec<_> = (0..6)
        .map(|_| home.command(&["ls"]).spawn().unwrap())
        .collect();
    for child in children {
        let ran = Ran::from(child.wait_with_output().unwrap());
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{ran:?}");
    }
    let pid = home.service();
    home.ok(&["ls"]);
    assert_eq!(home.service(), pid);
}

#[test]
fn a_second_service_on_the_same_state_is_refused() {
    let home = Home::new();
    home.ok(&["ls"]);
    let ran = home.run(&["service", "run"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr.contains("deltabox: the state directory"),
        "{ran:?}"
    );
    home.ok(&["ls"]);
    assert_eq!(leftover_sockets(&home), 1);
}

fn leftover_sockets(home: &Home) -> usize {
    let entries = fs::read_dir(home.path()).unwrap();
    let name = |entry: fs::DirEntry| entry.file_name().into_string().unwrap();
    entries
        .map(|entry| name(entry.unwrap()))
        .filter(|name| name.contains("sock"))
        .count()
}

#[test]
fn a_state_directory_that_cannot_be_used_is_named() {
    let home = Home::new();
    let file = home.path().join("file");
    fs::write(&file, "").unwrap();
    let ran = home.run(&["--state-dir", file.to_str().unwrap(), "ls"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains(file.to_str().unwrap()), "{ran:?}");
}

#[test]
fn after_a_killed_service_the_next_one_cleans_up_and_says_so() {
    let home = Home::with_box();
    // A time that no other process sleeps for marks the one of this test.
    let mark = format!("98765.{}", std::process::id());
    home.ok(&["exec", "-d", "box", "--", "sleep", &mark]);
    let inside = sleeper(&mark).expect("the command runs");
    let service = home.service();
    kill_process(service, Signal::KILL).unwrap();
    wait_for("the service is gone", || gone(service));

    let ran = home.run(&["ls", "--json"]);
    assert_eq!(
        (ran.code, ran.stdout.as_str()),
        (Some(0), "[]\n"),
        "{ran:?}"
    );
    assert!(ran.stderr.starts_with("deltabox: "), "{ran:?}");
    wait_for("the process in the sandbox is gone", || gone(inside));
    assert_eq!(mounts_of(&home), Vec::<String>::new());
    home.ok(&["create", "--name", "box"]);
    assert_eq!(home.run(&["ls"]).stderr, "", "told once");
}

#[test]
fn a_service_that_is_killed_while_it_copies_memory_leaves_nothing() {
    let home = Home::with_box();
    let mark = format!("98763.{}", std::process::id());
    let program = format!(
        "import os, time; m = bytearray(b'x') * (64 << 20); \
         os.execvp('sleep', ['sleep', '{mark}']) if os.fork() == 0 else time.sleep(1000)"
    );
    home.ok(&["exec", "-d", "box", "--", "python3", "-c", &program]);
    let mut inside = None;
    wait_for("the program has its memory, and a child", || {
        inside = sleeper(&mark);
        inside.is_some()
    });
    let inside = inside.unwrap();
    home.checkpoint();
    // 64 MiB take longer to copy than this.
    let service = home.service();
    kill_process(service, Signal::KILL).unwrap();
    wait_for("the service is gone", || gone(service));
    let ran = home.run(&["ls", "--json"]);
    assert_eq!(ran.stdout, "[]\n", "{ran:?}");
    wait_for("the process in the sandbox is gone", || gone(inside));
    assert_eq!(mounts_of(&home), Vec::<String>::new());
    home.ok(&["create", "--name", "box"]);
    let again = home.checkpoint();
    home.ok(&["rollback", "box", &again]);
}

#[test]
fn a_service_that_is_killed_while_it_copies_does_not_wait_for_files_that_only_it_could_write() {
    let home = Home::with_box();
    let mark = format!("98762.{}", std::process::id());
    // Two mappings of a file that always has changes which the service has not been told of.
    let program = format!(
        "import mmap, os; m = bytearray(b'x') * (256 << 20); f = open('/file', 'w+b'); \
         f.truncate(1 << 20); s = mmap.mmap(f.fileno(), 0); \
         p = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE); p[0] = s[0] = 1\n\
         if os.fork() == 0: os.execvp('sleep', ['sleep', '{mark}'])\n\
         n = 0\n\
         while True: n = (n + 1) % 256; s[::4096] = bytes([n]) * 256"
    );
    home.ok(&["exec", "-d", "box", "--", "python3", "-c", &program]);
    wait_for("the program has its memory", || sleeper(&mark).is_some());
    let inside = sleeper(&mark).unwrap();
    let service = home.service();
    home.checkpoint();
    kill_process(service, Signal::KILL).unwrap();
    wait_for("the service is gone", || gone(service));
    wait_for("the process in the sandbox is gone", || gone(inside));
    assert_eq!(home.run(&["ls", "--json"]).stdout, "[]\n");
    assert_eq!(mounts_of(&home), Vec::<String>::new());
}

#[test]
fn after_rm_and_stop_nothing_is_left() {
    let home = Home::with_box();
    let mark = format!("98764.{}", std::process::id());
    home.ok(&["exec", "-d", "box", "--", "sleep", &mark]);
    let inside = sleeper(&mark).expect("the command runs");
    home.checkpoint();
    home.ok(&["rm", "box"]);
    assert!(gone(inside));
    assert_eq!(mounts_of(&home), Vec::<String>::new());
    let service = home.service();
    home.ok(&["service", "stop"]);
    assert!(gone(service));
    assert_eq!(leftover_sockets(&home), 0);
}

/// The process `sleep mark`.
fn sleeper(mark: &str) -> Option<Pid> {
    let wanted = format!("sleep\0{mark}\0");
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut pids = processes.filter_map(|p| p.file_name().to_str()?.parse().ok());
    let named = |pid: &i32| fs::read(format!("/proc/{pid}/comm")).is_ok_and(|c| c == b"sleep\n");
    let found = pids.find(|pid: &i32| {
        // The command line of a process that hangs cannot be read; ours does not.
        named(pid)
            && fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line == wanted.as_bytes())
    });
    Pid::from_raw(found?)
}

fn mounts_of(home: &Home) -> Vec<String> {
    let state = home.path().to_str().unwrap().to_owned();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    mounts
        .lines()
        .filter(|line| line.contains(&state))
        .map(String::from)
        .collect()
}
