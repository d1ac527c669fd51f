//! Files, directories, pipes, terminals, device nodes, eventfd.

use crate::harness::{Python, World, assert_rebuilds};

#[test]
fn an_unchanged_table_is_captured_alike_twice_and_restored_without_notes() {
    let world = World::new();
    let python = Python::start(&world);
    let image = python.capture(&world);
    assert_eq!(image, python.capture(&world));
    assert!(python.restore(&world, &image).is_empty());
    assert_eq!(image, python.capture(&world));
}

#[test]
fn a_file_gets_its_position_and_flags_back() {
    let world = World::new();
    std::fs::write(world.path("a"), b"0123456789").unwrap();
    let mut python = Python::start(&world);
    python.run("f = os.open('a', os.O_RDWR); os.read(f, 3)");
    let image = python.capture(&world);
    python.run("os.read(f, 3); fcntl.fcntl(f, fcntl.F_SETFL, os.O_APPEND)");
    python.restore(&world, &image);
    python.expect("os.read(f, 2)", "b'34'");
    python.expect("fcntl.fcntl(f, fcntl.F_GETFL) & os.O_APPEND", "0");
}

#[test]
fn a_closed_unlinked_file_is_opened_again_by_inode() {
    let world = World::new();
    std::fs::write(world.path("a"), b"0123456789").unwrap();
    let mut python = Python::start(&world);
    python.run("f = os.open('a', os.O_RDONLY); os.read(f, 4)");
    let image = python.capture(&world);
    python.run("os.close(f); os.unlink('a')");
    python.restore(&world, &image);
    python.expect("os.read(f, 2), os.fstat(f).st_nlink", "(b'45', 0)");
    let image = python.capture(&world);
    assert_rebuilds(&world, &image, &mut python);
}

#[test]
fn a_shared_description_goes_on_sharing_its_position_across_processes() {
    let world = World::new();
    std::fs::write(world.path("a"), b"0123456789").unwrap();
    let mut python = Python::start(&world);
    python.run(
        "f = os.open('a', os.O_RDONLY); g = os.dup(f); h = os.open('a', os.O_RDONLY)\n\
         ask, answer = os.pipe(), os.pipe()\n\
         child = os.fork()\n\
         if not child:\n\
        \x20   while True:\n\
        \x20       os.read(ask[0], 1); os.write(answer[1], os.read(f, 1))",
    );
    let image = python.capture(&world);
    python.run("os.close(f); os.close(h); os.dup2(g, h); os.dup2(ask[0], f)");
    python.restore(&world, &image);
    python.expect("os.read(f, 1)", "b'0'");
    python.expect("os.read(g, 1)", "b'1'");
    python.expect("os.read(h, 1)", "b'0'");
    python.run("os.write(ask[1], b'.')");
    python.expect("os.read(answer[0], 1)", "b'2'");
}

#[test]
fn descriptors_that_changed_places_change_back() {
    let world = World::new();
    for name in ["a", "b", "c"] {
        std::fs::write(world.path(name), name).unwrap();
    }
    let mut python = Python::start(&world);
    python.run("a, b, c = (os.open(n, os.O_RDONLY | os.O_CLOEXEC) for n in 'abc')");
    let image = python.capture(&world);
    python.run(
        "t = os.dup(a); os.dup2(b, a); os.dup2(c, b); os.dup2(t, c)\n\
         os.set_inheritable(a, True)",
    );
    python.restore(&world, &image);
    python.expect(
        "[os.read(n, 1) for n in (a, b, c)], os.get_inheritable(a)",
        "([b'a', b'b', b'c'], False)",
    );
    python.expect("os.fstat(t)", "failed: OSError(9, 'Bad file descriptor')");
}

#[test]
fn a_directory_goes_on_listing_where_it_was() {
    let world = World::new();
    for n in 0..500 {
        std::fs::write(world.path(&format!("file-{n}")), b"").unwrap();
    }
    let mut python = Python::start(&world);
    python.run(
        "d = os.open('.', os.O_RDONLY)\n\
         def more():\n\
        \x20   b = ctypes.create_string_buffer(1000)\n\
        \x20   return b.raw[:libc.syscall(217, d, b, 1000)]\n\
         _ = more()",
    );
    let image = python.capture(&world);
    python.run("first = more()");
    python.restore(&world, &image);
    python.expect("more() == first, len(first) > 0", "(True, True)");
    python.run("os.close(d)");
    python.restore(&world, &image);
    python.expect("more() == first", "True");
}

#[test]
fn a_pipe_gets_its_content_back_and_none_is_lost_by_looking() {
    let world = World::new();
    let mut python = Python::start(&world);
    python.run("r, w = os.pipe(); os.write(w, b'one'); os.write(w, b'two' * 9000)");
    let image = python.capture(&world);
    python.expect("os.read(r, 4)", "b'onet'");
    python.run("os.write(w, b'later')");
    python.restore(&world, &image);
    python.expect("os.read(r, 30000) == b'one' + b'two' * 9000", "True");
    assert_rebuilds(&world, &image, &mut python);
}

#[test]
fn packets_of_a_pipe_stay_packets() {
    let world = World::new();
    let mut python = Python::start(&world);
    python.run("r, w = os.pipe2(os.O_DIRECT); [os.write(w, p) for p in (b'a', b'bc', b'def')]");
    let image = python.capture(&world);
    python.run("os.read(r, 9), os.close(w), os.read(r, 9)");
    python.restore(&world, &image);
    python.expect("[os.read(r, 9) for _ in '123']", "[b'a', b'bc', b'def']");
}

#[test]
fn a_pipe_whose_writer_was_closed_is_at_its_end_again() {
    let world = World::new();
    let mut python = Python::start(&world);
    python
        .run("r, w = os.pipe(); fcntl.fcntl(w, 1031, 1 << 18); os.write(w, b'last'); os.close(w)");
    let image = python.capture(&world);
    python.run("os.read(r, 9); os.close(r)");
    python.restore(&world, &image);
    python.expect("os.read(r, 9), os.read(r, 9)", "(b'last', b'')");
    python.expect("fcntl.fcntl(r, 1032)", "262144");
}

#[test]
fn pipe_ends_closed_and_swapped_meet_again() {
    let world = World::new();
    let mut python = Python::start(&world);
    python.run("r, w = os.pipe(); s, x = os.pipe(); os.write(w, b'1'); os.write(x, b'2')");
    let image = python.capture(&world);
    python.run("os.dup2(x, w); os.close(s); os.read(r, 1)");
    python.restore(&world, &image);
    python.run("os.write(w, b'3'); os.write(x, b'4')");
    python.expect("os.read(r, 9), os.read(s, 9)", "(b'13', b'24')");
}

#[test]
fn a_fifo_is_the_same_fifo_again() {
    let world = World::new();
    let mut python = Python::start(&world);
    python.run(
        "os.mkfifo('p'); r = os.open('p', os.O_RDONLY | os.O_NONBLOCK)\n\
         w = os.open('p', os.O_WRONLY); os.write(w, b'in it')",
    );
    let image = python.capture(&world);
    python.run("os.close(r); os.close(w)");
    python.restore(&world, &image);
    python.expect("os.read(r, 9)", "b'in it'");
    python.run("os.write(w, b'more')");
    python.expect("os.read(r, 9)", "b'more'");
}

#[test]
fn the_streams_of_a_session_are_taken_up_again() {
    let world = World::new();
    let mut python = Python::start(&world);
    let image = python.capture(&world);
    // Everything that the python says now would go to the file.
    python.run("saved = os.dup(1); f = os.open('/dev/null', 1)");
    writeln_without_answer(&mut python);
    python.restore(&world, &image);
    python.expect("'back'", "'back'");
    python.expect(
        "os.fstat(saved)",
        "failed: OSError(9, 'Bad file descriptor')",
    );
    assert_rebuilds(&world, &image, &mut python);
}

fn writeln_without_answer(python: &mut Python) {
    python.send("os.dup2(f, 1)");
    // The next command is read only after the first was done.
    std::thread::sleep(std::time::Duration::from_millis(100));
}

#[test]
fn device_nodes_and_proc_files_are_opened_again() {
    let world = World::new();
    let mut python = Python::start(&world);
    python.run(
        "z = os.open('/dev/zero', os.O_RDWR); n = os.open('/dev/null', os.O_WRONLY)\n\
         p = os.open('/proc/self/status', os.O_RDONLY); name = os.read(p, 12)",
    );
    let image = python.capture(&world);
    python.run("os.close(z); os.close(n); os.close(p)");
    python.restore(&world, &image);
    python.expect(
        "os.read(z, 3), os.write(n, b'gone')",
        "(b'\\x00\\x00\\x00', 4)",
    );
    python.expect("os.lseek(p, 0, 1), len(os.read(p, 4))", "(12, 4)");
}

#[test]
fn an_eventfd_counts_what_it_counted() {
    let world = World::new();
    let mut python = Python::start(&world);
    python.run("e = os.eventfd(7); s = os.eventfd(3, os.EFD_SEMAPHORE); g = os.eventfd(1)");
    let image = python.capture(&world);
    python.run(
        "os.eventfd_read(e); os.eventfd_write(e, 1); os.eventfd_write(s, 5)\n\
         os.eventfd_read(s); os.close(g)",
    );
    python.restore(&world, &image);
    python.expect("os.eventfd_read(e), os.eventfd_read(g)", "(7, 1)");
    python.expect("[os.eventfd_read(s) for _ in '123']", "[1, 1, 1]");
    assert_rebuilds(&world, &image, &mut python);
}

#[test]
fn a_pty_inside_keeps_number_settings_and_size() {
    let world = World::new();
    let mut python = Python::start(&world);
    python.run(
        "m, s = os.openpty(); name = os.ttyname(s)\n\
         fcntl.ioctl(s, termios.TIOCSWINSZ, struct.pack('4H', 24, 80, 0, 0))",
    );
    let image = python.capture(&world);
    python.run(
        "import tty; tty.setraw(s)\n\
         fcntl.ioctl(s, termios.TIOCSWINSZ, struct.pack('4H', 50, 132, 0, 0)); os.close(s)",
    );
    python.restore(&world, &image);
    python.expect("os.ttyname(s) == name", "True");
    python.expect(
        "struct.unpack('4H', fcntl.ioctl(s, termios.TIOCGWINSZ, b' ' * 8))",
        "(24, 80, 0, 0)",
    );
    python.expect("bool(termios.tcgetattr(s)[3] & termios.ICANON)", "True");
    python.run("os.write(m, b'typed\\n')");
    python.expect("os.read(s, 9)", "b'typed\\n'");
}

#[test]
fn a_pty_whose_both_sides_were_closed_has_its_number_again() {
    let world = World::new();
    let mut python = Python::start(&world);
    // The slave side has the lower descriptor.
    python.run("m, s = os.openpty(); s, m = os.dup2(s, 40), os.dup2(m, 41); name = os.ttyname(s)");
    let image = python.capture(&world);
    python.run("os.close(s); os.close(m); os.closerange(3, 10)");
    python.restore(&world, &image);
    python.expect("os.ttyname(s) == name", "True");
    python.run("os.write(m, b'typed\\n')");
    python.expect("os.read(s, 9)", "b'typed\\n'");
}

#[test]
fn what_is_not_carried_is_named() {
    let world = World::new();
    let mut python = Python::start(&world);
    python.run("u = libc.syscall(425, 4, ctypes.create_string_buffer(120))");
    if python.eval("u") != "-1" {
        let refusal = python.refusal(&world);
        assert!(refusal.contains("(python3)"), "{refusal}");
        assert!(refusal.contains("io_uring"), "{refusal}");
    }
}

#[test]
fn a_memfd_comes_back_with_contents_position_and_seals() {
    let world = World::new();
    let mut python = Python::start(&world);
    python.run(
        "m = os.memfd_create('name', os.MFD_ALLOW_SEALING); os.write(m, b'0123456789')\n\
         os.lseek(m, 4, 0); fcntl.fcntl(m, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)",
    );
    let image = python.capture(&world);
    let memory = world.shared.take();
    python.run("os.read(m, 2); os.pwrite(m, b'changed', 0)");
    world.shared.restore(&memory).unwrap();
    python.restore(&world, &image);
    python.expect(
        "os.read(m, 2), os.pread(m, 99, 0)",
        "(b'45', b'0123456789')",
    );
    python.run("os.close(m)");
    python.restore(&world, &image);
    python.expect(
        "os.read(m, 2), os.pread(m, 99, 0)",
        "(b'45', b'0123456789')",
    );
    python.expect("fcntl.fcntl(m, fcntl.F_GET_SEALS)", "4");
    python.expect(
        "os.readlink('/proc/self/fd/%d' % m)",
        "'/memfd:name (deleted)'",
    );
}
