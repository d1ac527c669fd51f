//! What cannot be carried is refused in plain words, and the sandbox goes on as if nothing had been asked: a test for everything that
//! the table "What is refused" in `docs/limits.md` names. What does not stop is in `tests/stuck.rs`; what the seccomp filter denies, in
//! `tests/isolation.rs`.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::process::PidfdFlags;

use crate::lab::{Lab, PYTHON, Program, installed, output, write_file};

/// A checkpoint must be refused in these words; the program must go on; without its fault a checkpoint works.
fn refused_and_unharmed(script: &str, words: &[&str]) {
    refused_with_help(script, |_| (), words);
}

/// The same, where the fault needs something that is done outside before the program is ready. What that returns is kept
/// until the end.
fn refused_with_help<T>(script: &str, help: impl FnOnce(&mut Program) -> T, words: &[&str]) {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    // By its last argument the program is found outside.
    let token = lab.state_dir();
    let argv = [PYTHON, "-c", script, token.to_str().unwrap()];
    let mut program = Program::start(&sandbox, &argv).unwrap();
    let _help = help(&mut program);
    assert_eq!(program.hear().unwrap(), "ready");
    let error = sandbox.checkpoint(None).unwrap_err().to_string();
    for word in words {
        assert!(error.contains(word), "{word:?} is not in {error:?}");
    }
    assert!(
        sandbox.tree().nodes.is_empty(),
        "a half checkpoint is shown"
    );
    assert_eq!(program.ask("mend").unwrap(), "mended");
    assert_eq!(output(&sandbox, "echo alive"), "alive");
    let id = sandbox.checkpoint(None).unwrap().id;
    sandbox.rollback(id).unwrap();
    assert_eq!(program.ask("again").unwrap(), "again");
}

/// A fault made by `$make` and ended by `$mend`.
fn script(make: &str, mend: &str) -> String {
    format!(
        "import ctypes, fcntl, mmap, os, select, signal, socket, struct, sys\n{make}\nprint('ready', flush=True)\n\
         sys.stdin.readline()\n{mend}\nprint('mended', flush=True)\n\
         print(sys.stdin.readline().strip(), flush=True)\nsys.stdin.readline()\n"
    )
}

/// The program waits for a connection from outside, `c`.
const LISTEN: &str = "server = socket.socket(socket.AF_UNIX)\nserver.bind('/door')\nserver.listen()\n\
                      print(sys.argv[1], flush=True)\nc = server.accept()[0]\nserver.close()\n";

/// Connects from outside to a program that does [`LISTEN`].
fn knock(program: &mut Program) -> UnixStream {
    let token = program.hear().unwrap();
    let is_it = |pid: &str| {
        let read = std::fs::read(format!("/proc/{pid}/cmdline"));
        let told = read.is_ok_and(|line| line.ends_with(format!("\0{token}\0").as_bytes()));
        told.then(|| format!("/proc/{pid}/root/door"))
    };
    let mut processes = std::fs::read_dir("/proc").unwrap().flatten();
    let door = processes.find_map(|entry| is_it(entry.file_name().to_str()?));
    UnixStream::connect(door.unwrap()).unwrap()
}

/// Something that the program got from outside must be named. It has it as `fd`, and does `make` with it; `mend` ends what
/// that was.
fn handed_in(what: BorrowedFd<'_>, make: &str, mend: &str, words: &[&str]) {
    let take = format!("{LISTEN}fd = socket.recv_fds(c, 1, 1)[1][0]\nc.close()\n{make}");
    let send = |program: &mut Program| {
        let fds = [what];
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let (text, none) = ([IoSlice::new(b"x")], SendFlags::empty());
        rustix::net::sendmsg(knock(program), &text, &mut control, none).unwrap();
    };
    refused_with_help(&script(&take, mend), send, words);
}

#[test]
fn a_traced_process_is_named_with_its_tracer() {
    let make = "libc = ctypes.CDLL(None)\npid = os.fork()\nif pid == 0:\n  libc.ptrace(0, 0, 0, 0)\n  \
                os.kill(os.getpid(), signal.SIGSTOP)\n  signal.pause()\nos.waitpid(pid, 0)\n\
                libc.ptrace(7, pid, 0, 0)";
    let mend = "os.kill(pid, signal.SIGKILL)\nos.waitpid(pid, 0)";
    refused_and_unharmed(&script(make, mend), &["traced"]);
}

#[test]
fn a_lock_on_a_file_that_is_only_in_flight_is_named() {
    let make = "import fcntl\na, b = socket.socketpair()\n\
                with open('/tmp/locked', 'w') as file:\n  \
                fcntl.flock(file, fcntl.LOCK_EX)\n  \
                socket.send_fds(a, [b'x'], [file.fileno()])";
    let mend = "socket.recv_fds(b, 10, 10)";
    refused_and_unharmed(&script(make, mend), &["waits a file with a lock"]);
}

#[test]
fn a_connection_with_descriptors_that_waits_to_be_accepted_is_named() {
    let make = "server = socket.socket(socket.AF_UNIX)\nserver.bind('/tmp/s')\nserver.listen()\n\
                client = socket.socket(socket.AF_UNIX)\nclient.connect('/tmp/s')\n\
                socket.send_fds(client, [b'early'], [0])";
    let mend = "assert len(socket.recv_fds(server.accept()[0], 9, 9)[1]) == 1";
    refused_and_unharmed(&script(make, mend), &["has sent descriptors", "accept it"]);
}

#[test]
fn a_netlink_socket_of_a_rare_family_is_named() {
    let make = "s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)";
    refused_and_unharmed(
        &script(make, "s.close()"),
        &["descriptor", "socket of family"],
    );
}

#[test]
fn processes_that_share_what_is_for_threads_are_named() {
    let mend = "os.kill(pid, signal.SIGKILL)\nos.waitpid(pid, 0x40000000)";
    let memory = "libc = ctypes.CDLL(None)\nstack = ctypes.create_string_buffer(65536)\n\
                  top = ctypes.c_void_p(ctypes.addressof(stack) + 60000 & ~15)\n\
                  pid = libc.clone(libc.pause, top, 0x100 | signal.SIGCHLD, None)\nassert pid > 0";
    refused_and_unharmed(&script(memory, mend), &["address space together with"]);
    let descriptors = "libc = ctypes.CDLL(None)\n\
                       pid = libc.syscall(56, 0x400 | signal.SIGCHLD, 0, 0, 0, 0)\n\
                       if pid == 0:\n  signal.pause()";
    refused_and_unharmed(
        &script(descriptors, mend),
        &["descriptor table together with"],
    );
}

/// A child waits in a call that the kernel ends with `EINTR` when it stops the thread, and hears of that if it happens: it
/// calls the C library itself, for Python would call again.
#[test]
fn a_refused_checkpoint_interrupts_no_call() {
    let script = "import ctypes, os, select, socket, sys\nlibc = ctypes.CDLL(None)\n\
                  rare = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)\nr, w = os.pipe()\npid = os.fork()\n\
                  if pid == 0:\n  ep = select.epoll()\n  ep.register(r, select.EPOLLIN)\n  \
                  room = ctypes.create_string_buffer(12)\n  \
                  os._exit(0 if libc.epoll_wait(ep.fileno(), room, 1, -1) == 1 else 1)\n\
                  print('ready', flush=True)\nsys.stdin.readline()\nos.write(w, b'x')\n\
                  print(os.waitpid(pid, 0)[1], flush=True)\nsys.stdin.readline()\n";
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut program = Program::start(&sandbox, &[PYTHON, "-c", script]).unwrap();
    assert_eq!(program.hear().unwrap(), "ready");
    for _ in 0..20 {
        std::thread::sleep(std::time::Duration::from_millis(10));
        sandbox.checkpoint(None).unwrap_err();
    }
    assert_eq!(program.ask("go").unwrap(), "0");
}

#[test]
fn a_process_whose_first_thread_has_ended_is_named() {
    let make = "import threading, time\npid = os.fork()\nif pid == 0:\n  \
                threading.Thread(target=time.sleep, args=[1000]).start()\n  \
                ctypes.CDLL(None).syscall(60, 0)\n\
                while ') Z ' not in open(f'/proc/{pid}/stat').read(): time.sleep(0.01)";
    let mend = "os.kill(pid, signal.SIGKILL)\nos.waitpid(pid, 0)";
    refused_and_unharmed(&script(make, mend), &["first thread has ended"]);
}

/// The parent of a vfork cannot be stopped: it waits in the kernel until its child executes or ends. Another child waits for a long time.
const VFORK: &str = "#include <errno.h>\n#include <linux/futex.h>\n#include <stdio.h>\n#include <sys/mman.h>\n\
    #include <sys/syscall.h>\n#include <sys/wait.h>\n#include <time.h>\n#include <unistd.h>\n\
    static void say(const char *text) { puts(text); fflush(stdout); getchar(); }\n\
    int main(void) {\n\
    int *word = mmap(0, 4096, 3, MAP_SHARED | MAP_ANONYMOUS, -1, 0), status, waiter = fork();\n\
    struct timespec time = {600, 0};\n\
    if (waiter == 0) _exit(syscall(SYS_futex, word, FUTEX_WAIT, 0, &time, 0, 0) ? errno : 0);\n\
    usleep(100000); puts(\"ready\"); fflush(stdout);\n\
    if (vfork() == 0) { char c; while (read(0, &c, 1) == 1 && c != '\\n'); _exit(0); }\n\
    say(\"mended\"); say(\"again\");\n\
    while (waitpid(waiter, &status, WNOHANG) == 0) syscall(SYS_futex, word, FUTEX_WAKE, 1, 0, 0, 0);\n\
    printf(\"the wait ended with %d\", status >> 8); say(\"\"); return 0; }";

#[test]
fn a_parent_in_vfork_is_carried_or_named() {
    if !installed("/usr/bin/cc") {
        return;
    }
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    write_file(&sandbox, "/vfork.c", VFORK.as_bytes());
    output(&sandbox, "cc -o /vfork /vfork.c");
    let mut program = Program::start(&sandbox, &["/vfork"]).unwrap();
    assert_eq!(program.hear().unwrap(), "ready");
    if let Err(error) = sandbox.checkpoint(None) {
        let error = error.to_string();
        assert!(error.contains("vfork"), "{error}");
    }
    assert_eq!(program.ask("mend").unwrap(), "mended");
    let (id, mark) = (sandbox.checkpoint(None).unwrap().id, program.mark());
    assert_eq!(program.ask("").unwrap(), "again");
    sandbox.rollback(id).unwrap();
    program.went_back(mark);
    assert_eq!(program.ask("").unwrap(), "again");
    // The wait was met by stops that were given up.
    assert_eq!(program.ask("").unwrap(), "the wait ended with 0");
}

/// A wait whose call the registers tell the first time only, and that was a checkpoint which came to nothing.
#[test]
fn a_wait_goes_on_after_a_refusal_and_a_rollback() {
    let make = "libc = ctypes.CDLL(None, use_errno=True)\nword = mmap.mmap(-1, 4096)\n\
                at = ctypes.addressof(ctypes.c_int.from_buffer(word))\n\
                def futex(operation, time): return libc.syscall(202, ctypes.c_void_p(at), operation, 0, time, 0, 0)\n\
                pid = os.fork()\nif pid == 0:\n  r = futex(0, struct.pack('qq', 600, 0))\n  \
                os._exit(0 if r == 0 else ctypes.get_errno())\n\
                while open(f'/proc/{pid}/syscall').read().split()[0] != '202': pass\n\
                rare = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)";
    let end = "while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0): futex(1, None)\nprint(ended[1], flush=True)\n";
    let text = format!(
        "{}{end}sys.stdin.readline()\n",
        script(make, "rare.close()")
    );
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut program = Program::start(&sandbox, &[PYTHON, "-c", &text]).unwrap();
    assert_eq!(program.hear().unwrap(), "ready");
    sandbox.checkpoint(None).unwrap_err();
    assert_eq!(program.ask("mend").unwrap(), "mended");
    let id = sandbox.checkpoint(None).unwrap().id;
    sandbox.rollback(id).unwrap();
    assert_eq!(program.ask("again").unwrap(), "again");
    assert_eq!(program.ask("wake").unwrap(), "0");
}

/// A program that makes no system call; it is found out by how its registers are.
#[test]
fn a_32_bit_program_is_named() {
    if !installed("/usr/bin/cc") {
        return;
    }
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let build = |name: &str, text: &str| {
        let text = format!(".globl _start\n_start:\n{text}\n.section .note.GNU-stack\n");
        write_file(&sandbox, &format!("/{name}.S"), text.as_bytes());
        let cc = format!("cc -m32 -nostdlib -static -o /{name} /{name}.S");
        output(&sandbox, &cc);
    };
    build("spins", "pause\njmp _start");
    build("asks", "mov $20, %eax\nint $0x80\njmp _start");
    let program = Program::start(&sandbox, &["/spins"]).unwrap();
    let begun = "until grep -q 'spins' /proc/[0-9]*/comm; do sleep 0.01; done";
    output(&sandbox, begun);
    let error = sandbox.checkpoint(None).unwrap_err().to_string();
    assert!(error.contains("it is a 32-bit program"), "{error}");
    let state = "grep -l spins /proc/[0-9]*/comm | xargs dirname | xargs -I% cut -d' ' -f3 %/stat";
    assert_eq!(output(&sandbox, state), "R");
    program.kill().unwrap();
    sandbox.checkpoint(None).unwrap();
    let killed = sandbox.run(&["/asks"]).unwrap().status;
    assert_eq!(killed, 128 + libc::SIGSYS);
}

/// Segments of System V that are made of them are for those only who may lock memory outside.
#[test]
fn huge_pages_are_named() {
    let map = "libc = ctypes.CDLL(None)\nlibc.mmap.restype = ctypes.c_void_p\nSIZE = 2 << 20\n\
               def anonymous(): return libc.mmap(None, SIZE, 3, 0x44022, -1, 0)\n\
               def of_a_memfd():\n  fd = libc.memfd_create(b'huge', 4)\n  os.ftruncate(fd, SIZE)\n  \
               at = libc.mmap(None, SIZE, 3, 0x4001, fd, 0)\n  os.close(fd)\n  return at\n";
    for kind in ["anonymous", "of_a_memfd"] {
        let make = format!("{map}at = {kind}()\nassert at not in (None, 2 ** 64 - 1), at");
        let mend = "assert libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(SIZE)) == 0";
        refused_and_unharmed(&script(&make, mend), &["hugetlb pages are not carried"]);
    }
}

#[test]
fn a_mapping_of_what_has_no_path_is_named() {
    let make = "s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)\n\
                s.setsockopt(263, 5, struct.pack('IIII', 4096, 1, 4096, 1))\n\
                ring = mmap.mmap(s.fileno(), 4096)";
    let mend = "ring.close()\ns.close()";
    refused_and_unharmed(&script(make, mend), &["socket:[", "mapped at"]);
}

#[test]
fn a_mapping_of_a_file_outside_is_named() {
    // On a filesystem that is not the base's.
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(4096).unwrap();
    let path = file.path().to_str().unwrap().to_owned();
    // Whoever reads such a path inside finds another file there, or none.
    let make = "libc = ctypes.CDLL(None)\nlibc.mmap.restype = ctypes.c_void_p\n\
                at = ctypes.c_void_p(libc.mmap(None, 4096, 1, 2, fd, 0))\nos.close(fd)";
    let words = [&*path, "cannot be opened again by its path"];
    let (file, _path) = file.into_parts();
    handed_in(file.as_fd(), make, "libc.munmap(at, 4096)", &words);
}

#[test]
fn files_outside_are_named() {
    let regular = tempfile::tempfile().unwrap();
    let device = File::open("/dev/loop-control").unwrap();
    for (file, words) in [
        (regular, "not on the sandbox's filesystem"),
        (device, "a device that is not carried"),
    ] {
        handed_in(file.as_fd(), "", "os.close(fd)", &["descriptor", words]);
    }
}

#[test]
fn a_namespace_outside_is_named() {
    let network = File::open("/proc/self/ns/net").unwrap();
    let words = ["descriptor", "net:["];
    handed_in(network.as_fd(), "", "os.close(fd)", &words);
}

#[test]
fn the_handle_of_a_process_outside_is_named() {
    let own = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).unwrap();
    let words = ["descriptor", "a pidfd of a process that is not in the tree"];
    handed_in(own.as_fd(), "", "os.close(fd)", &words);
}

#[test]
fn the_handle_of_a_thread_is_named() {
    let make = "import threading, time\nthread = threading.Thread(target=time.sleep, args=[1000], daemon=True)\n\
                thread.start()\nfd = ctypes.CDLL(None).syscall(434, thread.native_id, 0x80)\nassert fd > 0";
    let words = ["descriptor", "a pidfd"];
    refused_and_unharmed(&script(make, "os.close(fd)"), &words);
}

#[test]
fn a_unix_socket_connected_to_the_outside_is_named() {
    let words = ["descriptor", "a unix socket that was made outside the tree"];
    refused_with_help(&script(LISTEN, "c.close()"), knock, &words);
}

#[test]
fn an_epoll_that_watches_what_only_others_have_is_named() {
    let make = format!(
        "{LISTEN}r, w = os.pipe()\nep = select.epoll()\nep.register(r, select.EPOLLIN)\n\
         socket.send_fds(c, [b'x'], [r])\nos.close(r)\nc.close()"
    );
    let words = ["descriptor", "which no process has open"];
    refused_with_help(&script(&make, "ep.close()"), knock, &words);
}

/// Nobody takes connections from a queue that is full.
#[test]
fn a_tcp_connection_that_is_still_being_made_is_named() {
    let make = "server = socket.socket()\nserver.bind(('127.0.0.1', 0))\nserver.listen(0)\nclients = []\n\
                while len(clients) < 8:\n  s = socket.socket()\n  s.setblocking(False)\n  \
                s.connect_ex(server.getsockname())\n  clients.append(s)";
    let mend = "for s in clients: s.close()";
    refused_and_unharmed(&script(make, mend), &["descriptor", "being made"]);
}

/// It waits for the first bytes.
#[test]
fn a_tcp_connection_that_may_not_be_accepted_yet_is_named() {
    let make = "server = socket.socket()\nserver.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 60)\n\
                server.bind(('127.0.0.1', 0))\nserver.listen()\ns = socket.create_connection(server.getsockname())";
    refused_and_unharmed(&script(make, "s.close()"), &["descriptor", "being made"]);
}

#[test]
fn an_urgent_byte_is_named() {
    let make = "a, b = socket.socketpair()\na.send(b'x', socket.MSG_OOB)";
    refused_and_unharmed(
        &script(make, "a.close(); b.close()"),
        &["descriptor", "urgent"],
    );
    let make = "s = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\na = socket.create_connection(s.getsockname())\n\
                b = s.accept()[0]\na.send(b'x', socket.MSG_OOB)\nselect.select([], [], [b], 20)";
    refused_and_unharmed(
        &script(make, "a.close(); b.close()"),
        &["descriptor", "urgent"],
    );
}

#[test]
fn a_datagram_socket_whose_peer_has_left_it_is_named() {
    let make = "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n\
                ctypes.CDLL(None).connect(b.fileno(), bytes(16), 16)";
    refused_and_unharmed(
        &script(make, "a.close()"),
        &["descriptor", "without a name"],
    );
}

#[test]
fn a_watch_outside_the_filesystem_is_named() {
    for path in ["/proc", "/sys", "/dev/pts"] {
        let make = format!(
            "libc = ctypes.CDLL(None)\nfd = libc.inotify_init()\n\
             assert libc.inotify_add_watch(fd, b'{path}', 2) > 0"
        );
        let words = [
            "descriptor",
            "an inotify with a watch on a file that is not",
        ];
        refused_and_unharmed(&script(&make, "os.close(fd)"), &words);
    }
}

#[test]
fn files_that_signal_whom_nobody_can_name_again_are_named() {
    let signals = "def signals(s, whom):\n  fcntl.fcntl(s, fcntl.F_SETOWN, whom)\n  \
                   fcntl.fcntl(s, fcntl.F_SETFL, os.O_ASYNC)\na, b = socket.socketpair()\n";
    let in_flight = format!(
        "{signals}r, w = os.pipe()\nsignals(r, os.getpid())\nsocket.send_fds(a, [b'x'], [r])\nos.close(r)"
    );
    let words = ["a file that signals, which no process has open"];
    refused_and_unharmed(&script(&in_flight, "socket.recv_fds(b, 1, 1)"), &words);
    let leaderless = format!(
        "{signals}r, w = os.pipe()\nleader = os.fork()\nif leader == 0:\n  os.setpgid(0, 0)\n  \
         member = os.fork()\n  if member == 0: signal.pause()\n  os.write(w, b'%d' % member)\n  os._exit(0)\n\
         member = int(os.read(r, 9))\nos.waitpid(leader, 0)\nsignals(a, -leader)"
    );
    let mend = "fcntl.fcntl(a, fcntl.F_SETFL, 0)\nos.kill(member, signal.SIGKILL)";
    let words = ["a file that signals a group whose leader has ended"];
    refused_and_unharmed(&script(&leaderless, mend), &words);
}

#[test]
fn very_many_timers_are_named() {
    let make = "libc = ctypes.CDLL(None)\nids = []\nfor _ in range(257):\n  id = ctypes.c_int()\n  \
                assert libc.syscall(222, 0, None, ctypes.byref(id)) == 0\n  ids.append(id)";
    let mend = "for id in ids: libc.syscall(226, id)";
    refused_and_unharmed(&script(make, mend), &["more than 256 POSIX timers"]);
}
