//! Sockets: pairs, unix connections, loopback TCP, UDP, netlink.

use std::os::unix::net::UnixListener;

use deltacr::ids::InnerPid;

use crate::harness::{Python, World, assert_rebuilds, assert_rolls_back_with_a_new};

const CALLS: &str = r#"
def tried(f, *a):
    try: return f(*a)
    except OSError as e: return errno.errorcode[e.errno]
STREAM, DGRAM, PACKETS = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET
UNIX, INET, INET6 = socket.AF_UNIX, socket.AF_INET, socket.AF_INET6
def listening(family, address, kind=STREAM, backlog=5):
    s = socket.socket(family, kind); s.bind(address); s.listen(backlog); return s
def connected(listener, accept=True):
    c = socket.socket(listener.family, listener.type); c.connect(listener.getsockname())
    c.settimeout(60)
    if not accept: return c
    s = listener.accept()[0]; s.settimeout(60)
    return c, s
def peer(s): return struct.unpack('3i', s.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
"#;

fn python(world: &World) -> Python {
    let mut python = Python::start(world);
    python.run(CALLS);
    python
}

#[test]
fn a_socketpair_gets_its_queues_back_in_place() {
    let world = World::new();
    let mut python = python(&world);
    python.run("a, b = socket.socketpair(); a.send(b'to b'); b.send(b'to '); b.send(b'a')");
    let image = python.capture(&world);
    assert_eq!(image, python.capture(&world));
    python.run("b.recv(2); a.recv(9); a.send(b'more')");
    python.restore(&world, &image);
    python.expect("a.recv(99), b.recv(99)", "(b'to a', b'to b')");
    python.run("a.settimeout(0)");
    python.expect("tried(a.recv, 1)", "'EAGAIN'");
    assert_rebuilds(&world, &image, &mut python);
}

#[test]
fn messages_of_datagram_and_packet_pairs_keep_their_bounds() {
    let world = World::new();
    for kind in ["DGRAM", "PACKETS"] {
        let mut python = python(&world);
        python.run(&format!(
            "a, b = socket.socketpair(UNIX, {kind}); [a.send(m) for m in (b'1', b'23', b'456')]"
        ));
        let image = python.capture(&world);
        python.run("b.recv(9); os.close(a.fileno())");
        python.restore(&world, &image);
        python.expect("[b.recv(9) for _ in '123']", "[b'1', b'23', b'456']");
        python.run("b.send(b'back')");
        python.expect("a.recv(9)", "b'back'");
        assert_rebuilds(&world, &image, &mut python);
    }
}

#[test]
fn a_pair_whose_one_end_was_closed_meets_again_and_tells_the_same_creator() {
    let world = World::new();
    let mut python = python(&world);
    python.run(
        "a, b = socket.socketpair(); a.send(b'kept'); b.shutdown(socket.SHUT_WR)\n\
         creator = peer(a)",
    );
    let image = python.capture(&world);
    python.run("n = b.fileno(); b.close(); a.close()");
    python.restore(&world, &image);
    python.run("a = socket.socket(fileno=n - 1); b = socket.socket(fileno=n)");
    python.expect(
        "peer(a) == creator == os.getpid(), peer(b) == creator",
        "(True, True)",
    );
    python.expect(
        "a.recv(9), b.recv(9), tried(b.send, b'x')",
        "(b'', b'kept', 'EPIPE')",
    );
}

#[test]
fn what_a_closed_peer_sent_is_received_before_the_end() {
    let world = World::new();
    let mut python = python(&world);
    python.run("a, b = socket.socketpair(); a.send(b'last words'); a.close()");
    let image = python.capture(&world);
    python.run("b.recv(99)");
    python.restore(&world, &image);
    python.expect("b.recv(99), b.recv(99)", "(b'last words', b'')");
    assert_rebuilds(&world, &image, &mut python);
}

#[test]
fn socket_options_come_back() {
    let world = World::new();
    let mut python = python(&world);
    python.run(
        "a, b = socket.socketpair(); SOL = socket.SOL_SOCKET\n\
         a.setsockopt(SOL, socket.SO_SNDBUF, 50000); a.setsockopt(SOL, socket.SO_PASSCRED, 1)\n\
         a.setsockopt(SOL, socket.SO_RCVTIMEO, struct.pack('qq', 3, 0))\n\
         def told():\n\
        \x20   return (a.getsockopt(SOL, socket.SO_SNDBUF), a.getsockopt(SOL, socket.SO_PASSCRED),\n\
        \x20       struct.unpack('qq', a.getsockopt(SOL, socket.SO_RCVTIMEO, 16)))",
    );
    let image = python.capture(&world);
    python.run(
        "a.setsockopt(SOL, socket.SO_SNDBUF, 90000); a.setsockopt(SOL, socket.SO_PASSCRED, 0)\n\
         a.setsockopt(SOL, socket.SO_RCVTIMEO, struct.pack('qq', 0, 0))",
    );
    python.restore(&world, &image);
    python.expect("told()", "(100000, 1, (3, 0))");
    assert_rebuilds(&world, &image, &mut python);
}

#[test]
fn a_unix_server_is_bound_and_connected_again() {
    let world = World::new();
    for address in ["'sock'", "'\\0deltacr-test-%d' % os.getpid()"] {
        let mut python = python(&world);
        python.run(&format!(
            "l = listening(UNIX, {address}); c, s = connected(l); c.send(b'ask'); s.send(b'answer')\n\
             name, numbers = l.getsockname(), [x.fileno() for x in (l, c, s)]"
        ));
        let image = python.capture(&world);
        python.run("c.recv(9); d, t = connected(l)");
        python.restore(&world, &image);
        python.expect("c.recv(9), s.recv(9)", "(b'answer', b'ask')");
        // With connections of its own waiting, which must not be there afterwards.
        python.run("d = connected(l, False); [os.close(n) for n in numbers]");
        python.restore(&world, &image);
        python.expect(
            "c.recv(9), s.recv(9), s.getsockname() == name",
            "(b'answer', b'ask', True)",
        );
        python.expect("peer(c) == peer(s) == os.getpid()", "True");
        python.run("l.settimeout(0)");
        python.expect("tried(l.accept)", "'EAGAIN'");
        python.run("l.settimeout(60); e, u = connected(l); e.send(b'new')");
        python.expect("u.recv(9)", "b'new'");
        let _ = std::fs::remove_file(world.path("sock"));
    }
}

#[test]
fn a_connection_that_was_not_accepted_waits_again() {
    let world = World::new();
    let inet = "INET, ('127.0.0.1', 0)";
    for address in ["UNIX, '\\0deltacr-wait-%d' % os.getpid()", inet] {
        let mut python = python(&world);
        python.run(&format!(
            "l = listening({address}); c = connected(l, False)"
        ));
        let image = python.capture(&world);
        python.restore(&world, &image);
        python.run("n = c.fileno(); os.close(n); s = l.accept()[0].detach()");
        python.restore(&world, &image);
        python.run("s = l.accept()[0]; c.send(b'at last')");
        python.expect("s.recv(9)", "b'at last'");
    }
}

#[test]
fn a_tcp_server_with_connections_comes_back() {
    let world = World::new();
    for address in ["INET, ('127.0.0.1', 0)", "INET6, ('::1', 0)"] {
        let mut python = python(&world);
        python.run(&format!(
            "l = listening({address}); c, s = connected(l); c.send(b'ask'); s.send(b'answer')\n\
             name, numbers = l.getsockname(), [x.fileno() for x in (l, c, s)]\n\
             c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)"
        ));
        let image = python.capture(&world);
        assert_eq!(image, python.capture(&world));
        // In place, with other data under way.
        python.run("c.recv(3); s.recv(9); s.send(b'other')");
        python.restore(&world, &image);
        python.expect("c.recv(9), s.recv(9)", "(b'answer', b'ask')");
        // Anew.
        python.run("[os.close(n) for n in numbers]");
        python.restore(&world, &image);
        python.expect(
            "c.recv(9), s.recv(9), l.getsockname() == name",
            "(b'answer', b'ask', True)",
        );
        python.expect("c.getpeername() == name == s.getsockname()", "True");
        python.expect("c.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)", "1");
        // Large data both ways: the windows of the rebuilt connection work.
        python.run(
            "import threading; big = os.urandom(4_000_000)\n\
             def all(x):\n\
            \x20   got = b''\n\
            \x20   while len(got) < len(big): got += x.recv(1 << 20)\n\
            \x20   return got == big\n\
             def both(a, b):\n\
            \x20   t = threading.Thread(target=a.sendall, args=(big,)); t.start(); r = all(b); t.join()\n\
            \x20   return r",
        );
        python.expect("both(c, s), both(s, c)", "(True, True)");
        python.run("d, t = connected(l); d.send(b'new')");
        python.expect("t.recv(9)", "b'new'");
        assert_rebuilds(&world, &image, &mut python);
    }
}

#[test]
fn tcp_data_that_its_reader_has_no_room_for_is_not_lost() {
    let world = World::new();
    let mut python = python(&world);
    python.run(
        "l = listening(INET, ('127.0.0.1', 0)); c, s = connected(l); c.settimeout(0); n = 0\n\
         s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20000)\n\
         c.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 200000)\n\
         def chunk(i): return bytes((i * 7 + k) & 255 for k in range(1000))\n\
         try:\n\
        \x20   while n < 300: c.send(chunk(n)); n += 1\n\
         except BlockingIOError: pass\n\
         def intact():\n\
        \x20   got = b''\n\
        \x20   while len(got) < n * 1000: got += s.recv(n * 1000 - len(got))\n\
        \x20   return got == b''.join(map(chunk, range(n)))",
    );
    let image = python.capture(&world);
    python.expect("intact()", "True");
    python.restore(&world, &image);
    python.expect("n > 20, intact()", "(True, True)");
    python.run("[os.close(x.fileno()) for x in (c, s)]");
    python.restore(&world, &image);
    python.expect("intact()", "True");
}

#[test]
fn a_half_closed_tcp_connection_is_half_closed_again() {
    let world = World::new();
    let mut python = python(&world);
    python.run(
        "l = listening(INET, ('127.0.0.1', 0)); c, s = connected(l); c.send(b'request')\n\
         c.shutdown(socket.SHUT_WR); numbers = [x.fileno() for x in (c, s)]",
    );
    let image = python.capture(&world);
    for change in [
        "s.recv(99); s.send(b'reply')",
        "[os.close(n) for n in numbers]",
    ] {
        python.run(change);
        python.restore(&world, &image);
        python.expect(
            "s.recv(99), s.recv(99), s.send(b'reply')",
            "(b'request', b'', 5)",
        );
        python.expect("c.recv(99), tried(c.send, b'x')", "(b'reply', 'EPIPE')");
    }
}

#[test]
fn a_tcp_connection_whose_peer_has_closed_has_its_last_words() {
    let world = World::new();
    let mut python = python(&world);
    python.run(
        "l = listening(INET, ('127.0.0.1', 0)); c, s = connected(l); c.send(b'bye'); c.close()\n\
         time.sleep(0.05); number = s.fileno()",
    );
    let image = python.capture(&world);
    python.run("s.recv(9); os.close(number)");
    python.restore(&world, &image);
    python.expect("s.recv(9), s.recv(9)", "(b'bye', b'')");
}

#[test]
fn a_connection_to_the_outside_is_kept_if_nothing_moved_and_cut_otherwise() {
    let world = World::new();
    let mut python = python(&world);
    let outside = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = outside.local_addr().unwrap().port();
    python.run(&format!(
        "c = socket.create_connection(('127.0.0.1', {port}), 60)"
    ));
    let (mut ours, _) = outside.accept().unwrap();
    let image = python.capture(&world);
    assert!(python.restore(&world, &image).is_empty());
    std::io::Write::write_all(&mut ours, b"still").unwrap();
    python.expect("c.recv(9)", "b'still'");
    let notes = python.restore(&world, &image);
    assert!(
        notes[0].contains("connection to the outside is cut"),
        "{notes:?}"
    );
    python.expect("tried(c.recv, 9)", "'ECONNRESET'");
    python.run("n = c.fileno(); c.close()");
    let notes = python.restore(&world, &image);
    assert!(
        notes[0].contains("connection to the outside is cut"),
        "{notes:?}"
    );
    python.run("c = socket.socket(fileno=n); c.settimeout(60)");
    python.expect("tried(c.recv, 9)", "'ECONNRESET'");
}

#[test]
fn a_unix_connection_to_the_outside_and_a_lock_in_flight_are_refused() {
    let world = World::new();
    let mut python = python(&world);
    let _outside = UnixListener::bind(world.path("outside")).unwrap();
    python.run("c = socket.socket(UNIX); c.connect('outside')");
    let refusal = python.refusal(&world);
    assert!(refusal.contains("outside the tree"), "{refusal}");
    python.run(
        "c.close(); a, b = socket.socketpair(); f = os.open('f', os.O_CREAT)\n\
         fcntl.flock(f, fcntl.LOCK_EX); socket.send_fds(a, [b'x'], [f]); os.close(f)",
    );
    let refusal = python.refusal(&world);
    assert!(refusal.contains("waits a file with a lock"), "{refusal}");
    python.expect("len(socket.recv_fds(b, 9, 9)[1])", "1");
}

#[test]
fn datagrams_come_again_from_whom_they_came() {
    let world = World::new();
    let mut python = python(&world);
    python.run(
        "r, a, b, g = (socket.socket(INET, DGRAM) for _ in '1234')\n\
         [x.bind(('127.0.0.1', 0)) for x in (r, a, g)]\n\
         a.sendto(b'one', r.getsockname()); b.connect(r.getsockname()); b.send(b'two')\n\
         g.sendto(b'gone', r.getsockname())\n\
         names = [x.getsockname() for x in (a, b, g)]; g.close(); r.settimeout(60)\n\
         expected = [(m, n) for m, n in zip((b'one', b'two', b'gone'), names)]",
    );
    let image = python.capture(&world);
    python.run("r.recvfrom(9); a.sendto(b'later', r.getsockname())");
    python.restore(&world, &image);
    python.expect("[r.recvfrom(9) for _ in '123'] == expected", "True");
    python.run("r.settimeout(0)");
    python.expect("tried(r.recvfrom, 9)", "'EAGAIN'");
    assert_rebuilds(&world, &image, &mut python);
}

#[test]
fn unix_datagrams_to_a_name_come_again() {
    let world = World::new();
    let mut python = python(&world);
    python.run(
        "r, a, b = (socket.socket(UNIX, DGRAM) for _ in '123'); r.bind('r'); a.bind('a')\n\
         a.sendto(b'one', 'r'); b.connect('r'); b.send(b'two'); numbers = [x.fileno() for x in (r, b)]\n\
         r.settimeout(60)",
    );
    let image = python.capture(&world);
    python.run("r.recv(9)");
    python.restore(&world, &image);
    python.expect(
        "r.recvfrom(9), r.recvfrom(9)",
        "((b'one', 'a'), (b'two', None))",
    );
    python.run("[os.close(n) for n in numbers]");
    python.restore(&world, &image);
    python.expect(
        "r.recvfrom(9), r.recvfrom(9)",
        "((b'one', 'a'), (b'two', None))",
    );
    python.run("b.send(b'three'); a.sendto(b'four', 'r')");
    python.expect("r.recv(9), r.recv(9)", "(b'three', b'four')");
}

#[test]
fn a_route_socket_can_be_asked_again() {
    let world = World::new();
    let mut python = python(&world);
    python.run(
        "n = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE); n.bind((0, 0))\n\
         name = n.getsockname(); number = n.fileno()",
    );
    let image = python.capture(&world);
    python.run("os.close(number)");
    python.restore(&world, &image);
    python.run("n.send(struct.pack('IHHIIBxxx', 20, 18, 0x301, 1, 0, 0))");
    python.expect(
        "n.getsockname() == name, len(n.recv(9999)) > 16",
        "(True, True)",
    );
}

#[test]
fn what_a_process_shared_is_shared_again_when_it_is_built_anew() {
    let world = World::new();
    std::fs::write(world.path("file"), b"0123456789").unwrap();
    let mut python = python(&world);
    python.run(
        "f = os.open('file', os.O_RDWR); r, w = os.pipe(); os.write(w, b'piped')\n\
         a, b = socket.socketpair(); a.send(b'sent'); e = os.eventfd(3)\n\
         l = listening(INET, ('127.0.0.1', 0)); c, s = connected(l); c.send(b'ask')\n\
         u = listening(UNIX, '\\0deltacr-shared-%d' % os.getpid()); v, x = connected(u); x.send(b'answer')\n\
         p = select.epoll(); p.register(r, select.EPOLLIN); p.register(b, select.EPOLLIN)\n\
         child = os.fork()\n\
         if not child: signal.pause()\n\
         kept = [n.fileno() for n in (b, s, c)]\n\
         [os.close(n.fileno()) for n in (a, s, x, u)]; os.close(w)",
    );
    let image = python.capture(&world);
    let child = python.eval("child").parse().unwrap();
    python.run("os.kill(child, 9); os.waitpid(child, 0); b.recv(9); os.read(f, 5); os.read(r, 9)");
    assert_rolls_back_with_a_new(&world, &image, &python, InnerPid(child));
    python.expect(
        "os.read(r, 9), b.recv(9), v.recv(9)",
        "(b'piped', b'sent', b'answer')",
    );
}
