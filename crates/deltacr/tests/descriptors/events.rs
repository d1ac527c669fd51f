//! Timers, signals, watches, epoll, locks, owners, pidfds.

use crate::harness::{Python, World, assert_rebuilds};

/// Calls that python's library does not have.
const CALLS: &str = r#"
def timer(clock=1): return libc.timerfd_create(clock, 0o4000)
def arm(t, value, interval=0.0):
    split = lambda s: (int(s), int(s % 1 * 1e9))
    return libc.timerfd_settime(t, 0, struct.pack('4q', *split(interval), *split(value)), None)
def left(t):
    b = ctypes.create_string_buffer(32); libc.timerfd_gettime(t, b)
    i, j, s, n = struct.unpack('4q', b.raw); return s + n / 1e9
def signals(*numbers, fd=-1):
    mask = sum(1 << n - 1 for n in numbers)
    return libc.syscall(289, fd, ctypes.byref(ctypes.c_uint64(mask)), 8, 0o4000)
def tried(f, *a):
    try: return f(*a)
    except OSError as e: return errno.errorcode[e.errno]
"#;

fn python(world: &World) -> Python {
    let mut python = Python::start(world);
    python.run(CALLS);
    python
}

#[test]
fn a_timer_goes_on_with_the_time_that_remained() {
    let world = World::new();
    let mut python = python(&world);
    python.run("t, off = timer(), timer(); arm(t, 1000)");
    let image = python.capture(&world);
    python.run("arm(t, 5000, 3); arm(off, 7)");
    python.restore(&world, &image);
    python.expect("990 < left(t) <= 1000, left(off)", "(True, 0.0)");
    python.run("os.close(t)");
    python.restore(&world, &image);
    python.expect("990 < left(t) <= 1000", "True");
}

#[test]
fn expirations_that_were_not_read_are_told_again() {
    let world = World::new();
    let mut python = python(&world);
    python.run("t = timer(); arm(t, 0.001); select.select([t], [], [])");
    let image = python.capture(&world);
    python.run("n = os.read(t, 8)");
    python.restore(&world, &image);
    python.expect(
        "os.read(t, 8) == n, tried(os.read, t, 8)",
        "(True, 'EAGAIN')",
    );
    assert_rebuilds(&world, &image, &mut python);
}

#[test]
fn a_periodic_timer_that_expired_goes_on_ticking() {
    let world = World::new();
    let mut python = python(&world);
    python.run("t = timer(); arm(t, 0.001, 0.001); time.sleep(0.01)");
    let image = python.capture(&world);
    python.run("arm(t, 0)");
    python.restore(&world, &image);
    python.expect(
        "select.select([t], [], [], 60)[0] == [t], struct.unpack('q', os.read(t, 8))[0] > 0",
        "(True, True)",
    );
    python.expect("select.select([t], [], [], 60)[0] == [t]", "True");
}

#[test]
fn a_signalfd_is_for_the_same_signals() {
    let world = World::new();
    let mut python = python(&world);
    python.run("signal.pthread_sigmask(signal.SIG_BLOCK, [10, 12]); s = signals(10)");
    let image = python.capture(&world);
    python.run("signals(12, fd=s)");
    python.restore(&world, &image);
    python.run("os.kill(os.getpid(), 12); os.kill(os.getpid(), 10)");
    python.expect(
        "struct.unpack('I', os.read(s, 128)[:4]), tried(os.read, s, 128)",
        "((10,), 'EAGAIN')",
    );
    assert_rebuilds(&world, &image, &mut python);
}

#[test]
fn watches_keep_their_numbers() {
    let world = World::new();
    for name in ["a", "b", "c"] {
        std::fs::write(world.path(name), b"").unwrap();
    }
    let mut python = python(&world);
    python.run(
        "i = libc.inotify_init1(0o4000)\n\
         a, b = (libc.inotify_add_watch(i, n, 0xfff) for n in (b'a', b'b'))\n\
         libc.inotify_rm_watch(i, a); d = libc.inotify_add_watch(i, b'.', 0x100); os.read(i, 99)",
    );
    let image = python.capture(&world);
    python.run(
        "libc.inotify_rm_watch(i, b); c = libc.inotify_add_watch(i, b'c', 2)\n\
         libc.inotify_add_watch(i, b'.', 0x200)",
    );
    assert!(python.restore(&world, &image).is_empty());
    python.expect("tried(os.read, i, 99), (a, b, d)", "('EAGAIN', (1, 2, 3))");
    python.run("open('new', 'w').close()");
    python.expect(
        "struct.unpack('iIII3s', os.read(i, 99)[:19])",
        "(3, 256, 0, 16, b'new')",
    );
    python.run("os.close(i)");
    python.restore(&world, &image);
    python.run("os.utime('b')");
    python.expect("struct.unpack('i', os.read(i, 99)[:4])", "(2,)");
}

#[test]
fn an_epoll_watches_what_it_watched() {
    let world = World::new();
    let mut python = python(&world);
    python.run(
        "r, w = os.pipe(); e, f = os.eventfd(0), os.eventfd(0)\n\
         p, outer = select.epoll(), select.epoll()\n\
         p.register(r, select.EPOLLIN); p.register(e, select.EPOLLIN | select.EPOLLET)\n\
         outer.register(p.fileno(), select.EPOLLIN)",
    );
    let image = python.capture(&world);
    // The pipe is another one, the eventfd not watched, another one watched.
    python.run(
        "p.unregister(e); p.register(f, select.EPOLLIN); os.close(r); os.close(w)\n\
         q = os.pipe(); os.eventfd_write(f, 1)",
    );
    python.restore(&world, &image);
    python.expect("p.poll(0)", "[]");
    python.run("os.write(w, b'.')");
    python.expect(
        "p.poll(60) == [(r, select.EPOLLIN)], len(outer.poll(60))",
        "(True, 1)",
    );
    python.run("os.eventfd_write(e, 1)");
    python.expect("(e, select.EPOLLIN) in p.poll(60)", "True");
    python.run("p.close()");
    python.restore(&world, &image);
    python.run("p = select.epoll.fromfd(os.dup(p.fileno())) if not p.closed else None");
    assert_rebuilds(&world, &image, &mut python);
}

/// The registration keeps the number that the file had then, whether or not something else has it now.
#[test]
fn an_epoll_watches_a_file_by_a_number_that_it_no_longer_has() {
    for occupant in ["", "; os.dup2(0, e)"] {
        let world = World::new();
        let mut python = python(&world);
        python.run(&format!(
            "p = select.epoll(); e = os.eventfd(0)\n\
             p.register(e, select.EPOLLIN); g = os.dup(e); os.close(e){occupant}"
        ));
        let image = python.capture(&world);
        python.run("os.close(g)");
        python.restore(&world, &image);
        python.run("os.eventfd_write(g, 1)");
        python.expect("p.poll(60) == [(e, select.EPOLLIN)]", "True");
        python.run("p.close()");
        python.restore(&world, &image);
        assert_rebuilds(&world, &image, &mut python);
    }
}

#[test]
fn an_epoll_watches_what_only_another_process_has() {
    let world = World::new();
    let mut python = python(&world);
    python.run("p = select.epoll(); e = os.eventfd(0)");
    let image = python.capture(&world);
    python.run(
        "n = e; g = os.dup(e); p.register(e, select.EPOLLIN)\n\
         r, w = os.pipe(); x, y = os.pipe(); child = os.fork()\n\
         if not child: p.close(); os.close(w); os.write(y, b'.'); os.read(r, 1); os.eventfd_write(e, 1); os.read(r, 1); os._exit(0)\n\
         os.read(x, 1); os.close(x); os.close(y); os.close(r); os.close(e); os.close(g)",
    );
    let apart = python.capture(&world);
    python.run("p.close(); p = select.epoll()");
    python.restore(&world, &apart);
    python.run("os.write(w, b'.')");
    python.expect("p.poll(60) == [(n, select.EPOLLIN)]", "True");
    python.run("os.close(w); os.waitpid(child, 0)");
    python.restore(&world, &image);
    python.run("os.eventfd_write(e, 1)");
    python.expect("p.poll(0)", "[]");
}

#[test]
fn file_locks_of_every_kind_are_taken_again() {
    let world = World::new();
    std::fs::write(world.path("a"), b"0123456789").unwrap();
    let mut python = python(&world);
    python.run(
        "def lock(fd, kind, start, len, command=6):\n\
        \x20   return fcntl.fcntl(fd, command, struct.pack('hhxxxxqqixxxx', kind, 0, start, len, 0))\n\
         f, g, h = (os.open('a', os.O_RDWR) for _ in '123')\n\
         lock(f, 1, 2, 3); fcntl.flock(g, fcntl.LOCK_SH); lock(h, 0, 8, 0, 37)\n\
         ask, answer = os.pipe(), os.pipe()\n\
         child = os.fork()\n\
         if not child:\n\
        \x20   while os.read(ask[0], 1):\n\
        \x20       k = os.open('a', os.O_RDWR)\n\
        \x20       got = (tried(lock, k, 1, 2, 1), tried(lock, k, 1, 5, 1), tried(lock, k, 0, 9, 1, 37),\n\
        \x20           tried(lock, k, 1, 9, 1, 37), tried(fcntl.flock, k, fcntl.LOCK_EX | fcntl.LOCK_NB),\n\
        \x20           tried(fcntl.flock, k, fcntl.LOCK_SH | fcntl.LOCK_NB))\n\
        \x20       os.close(k); got = ' '.join(x if isinstance(x, str) else 'ok' for x in got)\n\
        \x20       os.write(answer[1], got.encode())\n\
         def seen():\n\
        \x20   os.write(ask[1], b'.'); return os.read(answer[0], 99)",
    );
    let held = "b'EAGAIN ok ok EAGAIN EAGAIN ok'";
    python.expect("seen()", held);
    let image = python.capture(&world);
    python.run("lock(f, 2, 0, 0); lock(f, 1, 5, 1); fcntl.flock(g, fcntl.LOCK_UN); os.close(h)");
    python.restore(&world, &image);
    python.expect("seen()", held);
    python.run("os.close(f); os.close(g)");
    python.expect("seen()", "b'ok ok ok EAGAIN EAGAIN ok'");
    python.restore(&world, &image);
    python.expect("seen()", held);
}

#[test]
fn a_file_that_signals_its_owner_does_so_again() {
    let world = World::new();
    let mut python = python(&world);
    python.run(
        "r, w = os.pipe(); signal.pthread_sigmask(signal.SIG_BLOCK, [34, 35])\n\
         fcntl.fcntl(r, fcntl.F_SETOWN, os.getpid()); fcntl.fcntl(r, 10, 34)\n\
         fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)",
    );
    let image = python.capture(&world);
    python.run("fcntl.fcntl(r, 10, 35); fcntl.fcntl(r, fcntl.F_SETFL, 0)");
    python.restore(&world, &image);
    python.run("os.write(w, b'.')");
    python.expect("signal.sigtimedwait([34, 35], 60).si_signo", "34");
    python.run("os.close(r)");
    python.restore(&world, &image);
    python.run("os.write(w, b'.')");
    python.expect("signal.sigtimedwait([34, 35], 60).si_signo", "34");
}

#[test]
fn a_pidfd_is_of_the_same_process() {
    let world = World::new();
    let mut python = python(&world);
    python.run(
        "child = os.fork()\n\
         if not child: signal.pause()\n\
         p = os.pidfd_open(child)",
    );
    let image = python.capture(&world);
    python.run("os.close(p)");
    python.restore(&world, &image);
    python.run("signal.pidfd_send_signal(p, 9)");
    python.expect("os.waitpid(child, 0)[1]", "9");
}
