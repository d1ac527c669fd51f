//! What a sandbox shows of the host, and what it lets happen to it.

mod common;

use common::*;
use deltabox::SandboxSpec;

#[test]
fn the_sandbox_has_namespaces_of_its_own() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    for ns in ["user", "pid", "mnt", "ipc", "uts", "net", "cgroup"] {
        let inside = output(&sandbox, &format!("readlink /proc/self/ns/{ns}"));
        let outside = std::fs::read_link(format!("/proc/self/ns/{ns}")).unwrap();
        assert!(inside.starts_with(ns), "{inside}");
        assert_ne!(inside, outside.to_string_lossy(), "shared {ns} namespace");
    }
    assert_eq!(output(&sandbox, "hostname"), "box1");
    assert_eq!(output(&sandbox, "cat /proc/1/comm"), "deltabox-init");
    // Only init, the shell and its children.
    assert_eq!(output(&sandbox, "ls /proc | grep -c '^[0-9]*$'"), "4");
}

#[test]
fn root_inside_is_nobody_outside() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    assert_eq!(
        output(&sandbox, "id -u; stat -c %u:%g /etc/passwd /root"),
        "0\n0:0\n0:0"
    );
    let map = output(&sandbox, "cat /proc/self/uid_map");
    let numbers: Vec<u32> = map.split_whitespace().map(|n| n.parse().unwrap()).collect();
    assert_eq!((numbers[0], numbers[2]), (0, 65536));
    assert!(numbers[1] >= 1_000_000);
    // The base stays as it was, whatever is written over it.
    let marker = f.dir.path().join("marker");
    std::fs::write(&marker, "base").unwrap();
    let path = marker.display();
    assert_eq!(
        output(
            &sandbox,
            &format!("cat {path}; echo changed > {path}; cat {path}")
        ),
        "basechanged"
    );
    assert_eq!(std::fs::read_to_string(&marker).unwrap(), "base");
}

#[test]
fn loopback_is_up_and_nothing_else_is_there() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    assert_eq!(output(&sandbox, "ls /sys/class/net"), "lo");
    let script = "python3 -c '
import socket
s = socket.socket(); s.bind((\"127.0.0.1\", 80)); s.listen()
c = socket.create_connection((\"127.0.0.1\", 80)); print(\"connected\")'";
    assert_eq!(output(&sandbox, script), "connected");
}

#[test]
fn devices_are_there_and_others_cannot_be_made() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    output(
        &sandbox,
        "echo x > /dev/null && head -c 8 /dev/zero | cmp -n 8 - /dev/zero",
    );
    output(
        &sandbox,
        "head -c 8 /dev/urandom > /dev/null; head -c 8 /dev/random > /dev/null",
    );
    output(&sandbox, "! echo x > /dev/full");
    output(&sandbox, "echo hello | cat /dev/stdin > /dev/fd/1");
    assert_eq!(output(&sandbox, "stat -c %a /tmp /dev/shm"), "1777\n1777");
    // All on the versioned filesystem.
    assert_eq!(
        output(&sandbox, "stat -c %d / /tmp /dev/shm | uniq | wc -l"),
        "1"
    );
    output(&sandbox, "! mknod /tmp/sda b 8 0");
    output(&sandbox, "! ls /dev/userfaultfd 2>/dev/null");
    output(&sandbox, "! rm /dev/null");
    output(
        &sandbox,
        "python3 -c 'import multiprocessing as m; m.Semaphore()'",
    );
}

#[test]
fn what_tells_about_the_host_is_covered_or_read_only() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    assert_eq!(
        output(
            &sandbox,
            "cat /proc/kcore /proc/keys /proc/timer_list | wc -c"
        ),
        "0"
    );
    assert_eq!(output(&sandbox, "ls /sys/firmware | wc -l"), "0");
    output(&sandbox, "! echo b > /proc/sysrq-trigger");
    output(&sandbox, "! echo 1 > /proc/sys/kernel/ns_last_pid");
    output(&sandbox, "! echo x > /proc/sys/kernel/hostname");
    output(&sandbox, "! mkdir /sys/fs/cgroup/x");
    // Nothing of the host's mounts is left.
    let mounts = output(&sandbox, "cut -d' ' -f5 /proc/self/mountinfo");
    for mount in mounts.lines() {
        assert!(
            ["/proc", "/sys", "/dev"]
                .iter()
                .any(|top| mount.starts_with(top))
                || mount == "/",
            "{mount}"
        );
    }
}

#[test]
fn commands_have_few_capabilities_and_no_new_ones() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let status = output(
        &sandbox,
        "grep -E '^(Cap|NoNew|Seccomp:)' /proc/self/status",
    );
    let field = |name: &str| {
        let line = status.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    // CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT MKNOD AUDIT_WRITE
    // SETFCAP, as Docker's default.
    let docker = "00000000a80425fb";
    assert_eq!(field("CapBnd"), docker);
    assert_eq!(field("CapEff"), docker);
    assert_eq!(field("CapInh"), "0000000000000000");
    assert_eq!(field("NoNewPrivs"), "1");
    assert_eq!(field("Seccomp"), "2");
    let mut command = sh("grep CapEff /proc/self/status");
    command.user = Some("nobody".into());
    let ended = wait(&sandbox.spawn(command).unwrap());
    assert!(text(&ended.stdout).ends_with("0000000000000000\n"));
}

#[test]
fn init_cannot_be_killed_traced_or_looked_into_from_inside() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    output(&sandbox, "kill -9 1; kill -TERM 1; kill -STOP 1; true");
    output(
        &sandbox,
        "! ls /proc/1/fd 2>/dev/null && ! cat /proc/1/environ 2>/dev/null && ! readlink /proc/1/exe",
    );
    let script = "python3 -c '
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.ptrace(16, 1, 0, 0) == -1
print(ctypes.get_errno())'";
    assert_eq!(output(&sandbox, script), libc::EPERM.to_string());
    assert_eq!(output(&sandbox, "echo on"), "on");
}

/// Calls system calls by number and prints the errors, one a line.
fn errors_of(sandbox: &deltabox::Sandbox, calls: &[&[i64]]) -> Vec<i32> {
    let calls: Vec<String> = calls
        .iter()
        .map(|c| {
            let numbers: Vec<String> = c.iter().map(|n| format!("ctypes.c_long({n})")).collect();
            format!("({},)", numbers.join(","))
        })
        .collect();
    let script = format!(
        "python3 -c 'import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for call in [{}]:
    ctypes.set_errno(0)
    r = libc.syscall(*call)
    print(ctypes.get_errno() if r == -1 else 0)'",
        calls.join(",")
    );
    output(sandbox, &script)
        .lines()
        .map(|l| l.parse().unwrap())
        .collect()
}

#[test]
fn system_calls_that_cannot_be_carried_are_refused_with_the_error_that_makes_programs_fall_back() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let absent = [
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_io_setup,
        libc::SYS_userfaultfd,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_memfd_secret,
        libc::SYS_mseal,
        libc::SYS_mq_open,
        libc::SYS_fanotify_init,
        libc::SYS_landlock_create_ruleset,
        libc::SYS_process_madvise,
        libc::SYS_process_mrelease,
        libc::SYS_clone3,
        0x4000_0000 | libc::SYS_getpid,
    ];
    let calls: Vec<Vec<i64>> = absent.iter().map(|nr| vec![*nr, 0, 0, 0, 0, 0]).collect();
    let calls: Vec<&[i64]> = calls.iter().map(Vec::as_slice).collect();
    assert_eq!(
        errors_of(&sandbox, &calls),
        vec![libc::ENOSYS; absent.len()]
    );
    let forbidden = [
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
        libc::SYS_fsopen,
        libc::SYS_fsmount,
        libc::SYS_fspick,
        libc::SYS_move_mount,
        libc::SYS_open_tree,
        libc::SYS_mount_setattr,
        libc::SYS_setns,
        libc::SYS_open_by_handle_at,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_kexec_load,
        libc::SYS_kexec_file_load,
        libc::SYS_reboot,
        libc::SYS_swapon,
        libc::SYS_clock_settime,
        libc::SYS_settimeofday,
        libc::SYS_modify_ldt,
        libc::SYS_kcmp,
    ];
    let mut calls: Vec<Vec<i64>> = forbidden.map(|nr| vec![nr, 0, 0, 0, 0, 0]).into();
    calls.push(vec![libc::SYS_personality, 0x0008]);
    let in_clone = [
        libc::CLONE_NEWNS,
        libc::CLONE_NEWCGROUP,
        libc::CLONE_NEWUTS,
        libc::CLONE_NEWIPC,
        libc::CLONE_NEWUSER,
        libc::CLONE_NEWPID,
        libc::CLONE_NEWNET,
    ];
    for namespace in in_clone.into_iter().chain([libc::CLONE_NEWTIME]) {
        calls.push(vec![libc::SYS_unshare, namespace.into()]);
    }
    for namespace in in_clone {
        let flags = i64::from(namespace | libc::SIGCHLD);
        calls.push(vec![libc::SYS_clone, flags, 0, 0, 0, 0]);
    }
    let calls: Vec<&[i64]> = calls.iter().map(Vec::as_slice).collect();
    assert_eq!(errors_of(&sandbox, &calls), vec![libc::EPERM; calls.len()]);
    // Write no code, dispatch system calls, sockets of several paths.
    let unknown: &[&[i64]] = &[
        &[libc::SYS_prctl, 65, 1, 0, 0, 0],
        &[libc::SYS_prctl, 59, 1, 0, 0, 0],
        &[libc::SYS_socket, 2, 1, 262],
    ];
    assert_eq!(errors_of(&sandbox, unknown), [libc::EINVAL; 3]);
    // What programs do all the time is not in the way.
    let allowed: &[&[i64]] = &[
        &[libc::SYS_unshare, libc::CLONE_FILES as i64],
        &[libc::SYS_personality, 0xffff_ffff],
    ];
    assert_eq!(errors_of(&sandbox, allowed), [0, 0]);
    output(
        &sandbox,
        "python3 -c 'import threading as t; x = t.Thread(target=print); x.start(); x.join()'",
    );
}

#[test]
fn the_state_directory_is_hidden_inside() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let state = f.dir.path().join("state").canonicalize().unwrap();
    output(
        &sandbox,
        &format!("ls {}/..; ! ls {}", state.display(), state.display()),
    );
}

#[test]
fn sandboxes_do_not_see_each_other() {
    let f = Fixture::new();
    let named = |name: &str| {
        f.host
            .create(SandboxSpec {
                name: Some(name.into()),
                ..SandboxSpec::default()
            })
            .unwrap()
    };
    let (one, two) = (named("one"), named("two"));
    output(&one, "echo secret > /tmp/secret");
    output(&two, "! cat /tmp/secret");
    one.spawn(sh("sleep 12345")).unwrap();
    output(&two, "! pgrep -f 'sleep 1234[5]'");
    let map = |s| output(s, "cat /proc/self/uid_map");
    assert_ne!(map(&one), map(&two));
}
