"""Unix, TCP and UDP sockets with what is queued in them."""

import fcntl


def stream_pair(one, two):
    one.send(b"to two" * 1000)
    two.send(b"to one")

    def mutate():
        one.recv(100)
        two.recv(100)
        one.send(b"late")
        one.close()
        two.shutdown(socket.SHUT_RDWR)

    def check():
        equal(one.recv(100), b"to one", "queued for one")
        equal(two.recv(6000, socket.MSG_WAITALL), b"to two" * 1000, "queued for two")
        one.setblocking(False)
        raises(errno.EAGAIN, one.recv, 1)
        one.setblocking(True)
        one.sendall(b"ping")
        equal(two.recv(10), b"ping", "sent on")
        two.sendall(b"pong")
        equal(one.recv(10), b"pong", "answered")

    return mutate, check


@case
def socketpair_stream_with_queued_data():
    return stream_pair(*socket.socketpair())


@case
def socketpair_shut_down_one_way():
    one, two = socket.socketpair()
    one.send(b"farewell")
    one.shutdown(socket.SHUT_WR)

    def mutate():
        two.recv(100)
        one.close()

    def check():
        equal(two.recv(100), b"farewell", "queued")
        equal(two.recv(100), b"", "end of file")
        two.send(b"back")
        equal(one.recv(100), b"back", "the other way")
        raises(errno.EPIPE, one.send, b"x")

    return mutate, check


@case
def socketpair_whose_peer_was_closed():
    one, two = socket.socketpair()
    one.send(b"farewell")
    one.close()

    def mutate():
        two.recv(100)

    def check():
        equal(two.recv(100), b"farewell", "queued")
        equal(two.recv(100), b"", "end of file")
        raises(errno.EPIPE, two.send, b"x")

    return mutate, check


def messages(kind):
    one, two = socket.socketpair(socket.AF_UNIX, kind)
    for message in (b"1", b"22", b"333"):
        one.send(message)
    two.setblocking(False)

    def mutate():
        two.recv(100)
        one.send(b"4444")

    def check():
        for message in (b"1", b"22", b"333"):
            equal(two.recv(100), message, "message")
        raises(errno.EAGAIN, two.recv, 1)
        two.send(b"reply")
        equal(one.recv(100), b"reply", "the other way")

    return mutate, check


@case
def socketpair_dgram_with_queued_messages():
    return messages(socket.SOCK_DGRAM)


@case
def socketpair_seqpacket_with_queued_messages():
    return messages(socket.SOCK_SEQPACKET)


def unix_listener(address):
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen(5)
    client = socket.socket(socket.AF_UNIX)
    client.connect(address)
    accepted, _ = server.accept()
    client.send(b"request")
    accepted.send(b"response")

    def mutate():
        accepted.recv(100)
        client.recv(100)
        server.close()
        if isinstance(address, str):
            os.unlink(address)

    def check():
        equal(accepted.recv(100), b"request", "queued at the server")
        equal(client.recv(100), b"response", "queued at the client")
        equal(client.getpeername(), address, "name of the peer")
        equal(server.getsockname(), address, "name")
        another = socket.socket(socket.AF_UNIX)
        another.connect(address)
        peer, _ = server.accept()
        another.send(b"new")
        equal(peer.recv(10), b"new", "a new connection")

    return mutate, check


@case
def unix_listener_and_connection():
    return unix_listener("/playground/socket")


@case
def unix_listener_with_an_abstract_name():
    return unix_listener(b"\0deltabox-test")


@case
def unix_dgram_with_senders():
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind("/playground/receiver")
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sender.bind("/playground/sender")
    sender.sendto(b"one", "/playground/receiver")
    sender.connect("/playground/receiver")
    sender.send(b"two")
    receiver.setblocking(False)

    def mutate():
        receiver.recv(10)
        sender.close()
        os.unlink("/playground/sender")

    def check():
        equal(receiver.recvfrom(10), (b"one", "/playground/sender"), "first")
        equal(receiver.recvfrom(10), (b"two", "/playground/sender"), "second")
        raises(errno.EAGAIN, receiver.recv, 1)
        sender.send(b"three")
        equal(receiver.recvfrom(10), (b"three", "/playground/sender"), "sent on")
        receiver.sendto(b"back", "/playground/sender")
        equal(sender.recv(10), b"back", "to the sender's name")

    return mutate, check


@case
def tcp_listening():
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", 0))
    server.listen(7)
    name = server.getsockname()

    def mutate():
        server.close()
        taken = socket.socket()
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(name)
        taken.listen(1)
        put("taken", taken)

    def check():
        equal(server.getsockname(), name, "name")
        equal(server.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR), 1, "SO_REUSEADDR")
        client = socket.create_connection(name, timeout=20)
        server.settimeout(20)
        peer, _ = server.accept()
        client.send(b"hello")
        equal(peer.recv(10), b"hello", "a new connection")

    return mutate, check


@case
def tcp6_listening():
    server = socket.socket(socket.AF_INET6)
    server.bind(("::1", 0))
    server.listen(7)
    name = server.getsockname()

    def mutate():
        server.close()

    def check():
        client = socket.create_connection(name[:2], timeout=20)
        server.settimeout(20)
        peer, _ = server.accept()
        client.send(b"hello")
        equal(peer.recv(10), b"hello", "a new connection")

    return mutate, check


def tcp_pair():
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    client = socket.create_connection(server.getsockname())
    accepted, _ = server.accept()
    return server, client, accepted


@case
def tcp_established_with_queued_data():
    server, client, accepted = tcp_pair()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    names = client.getsockname(), client.getpeername()
    client.sendall(b"request" * 500)
    accepted.sendall(b"response")
    eventually(lambda: len(accepted.recv(3500, socket.MSG_PEEK)) == 3500, "arrival")

    def mutate():
        accepted.recv(100)
        client.recv(100)
        accepted.sendall(b"late")
        client.close()

    def check():
        equal((client.getsockname(), client.getpeername()), names, "names")
        equal(client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), 1, "TCP_NODELAY")
        client.settimeout(20)
        accepted.settimeout(20)
        equal(accepted.recv(3500), b"request" * 500, "queued at the server")
        equal(client.recv(100), b"response", "queued at the client")
        client.sendall(b"ping")
        equal(accepted.recv(10), b"ping", "sent on")
        accepted.sendall(b"pong" * 50_000)
        answer = b""
        while len(answer) < 200_000:
            answer += client.recv(200_000)
        equal(answer == b"pong" * 50_000, True, "answered")
        client.shutdown(socket.SHUT_RDWR)
        equal(accepted.recv(10), b"", "end of file")

    return mutate, check


@case
def tcp_idle_connection_closed_since():
    server, client, accepted = tcp_pair()

    def mutate():
        client.sendall(b"x" * 1000)
        accepted.close()
        server.close()

    def check():
        accepted.settimeout(20)
        client.settimeout(20)
        client.sendall(b"ping")
        equal(accepted.recv(10), b"ping", "sent on")
        accepted.sendall(b"pong")
        equal(client.recv(10), b"pong", "answered")

    return mutate, check


@case
def tcp_half_closed():
    server, client, accepted = tcp_pair()
    client.sendall(b"farewell")
    client.shutdown(socket.SHUT_WR)

    def mutate():
        accepted.recv(100)
        accepted.sendall(b"late")

    def check():
        accepted.settimeout(20)
        client.settimeout(20)
        equal(accepted.recv(100), b"farewell", "queued")
        equal(accepted.recv(100), b"", "end of file")
        accepted.sendall(b"back")
        equal(client.recv(100), b"back", "the other way")

    return mutate, check


@case
def unix_socket_whose_directory_is_gone():
    os.makedirs("/playground/gone/deep")
    path = "/playground/gone/deep/socket"
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    accepted = server.accept()[0]
    os.unlink(path)
    os.removedirs("/playground/gone/deep")

    def mutate():
        server.close()
        accepted.close()

    def check():
        client.settimeout(20)
        accepted.sendall(b"still")
        equal(client.recv(100), b"still", "the connection")
        equal(server.getsockname(), path, "the name")
        equal(os.path.exists("/playground/gone"), False, "the directory is there again")

    return mutate, check


@case
def tcp_ended_by_both_sides():
    server, client, accepted = tcp_pair()
    client.shutdown(socket.SHUT_WR)
    equal(accepted.recv(100), b"", "end of file")
    accepted.shutdown(socket.SHUT_WR)
    equal(client.recv(100), b"", "end of file")
    name = accepted.getsockname()

    def mutate():
        client.close()

    def check():
        client.settimeout(20)
        # SO_PEERNAME: the peer is told although there is no connection any more.
        peer = client.getsockopt(socket.SOL_SOCKET, 28, 16)
        equal(struct.unpack("!xxH", peer[:4])[0], name[1], "port of the peer")
        equal(accepted.getsockname(), name, "name")
        equal(client.recv(100), b"", "end of file")
        raises(errno.EPIPE, client.send, b"late")

    return mutate, check


@case
def options_and_a_foreign_address():
    stream = socket.socket()
    for option in (socket.SO_DONTROUTE, socket.SO_KEEPALIVE):
        stream.setsockopt(socket.SOL_SOCKET, option, 1)
    free = socket.socket()
    free.setsockopt(socket.IPPROTO_IP, 15, 1)
    free.bind(("10.9.8.7", 4321))
    free.setsockopt(socket.IPPROTO_IP, 15, 0)

    def mutate():
        stream.close()
        free.close()

    def check():
        equal(stream.getsockopt(socket.SOL_SOCKET, socket.SO_DONTROUTE), 1, "SO_DONTROUTE")
        equal(free.getsockname(), ("10.9.8.7", 4321), "address")
        equal(free.getsockopt(socket.IPPROTO_IP, 15), 0, "IP_FREEBIND")

    return mutate, check


@case
def a_queue_larger_than_the_buffer_of_a_new_socket():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    left.setblocking(False)
    sent = 0
    try:
        while True:
            left.send(bytes([sent % 256]) * 1000)
            sent += 1
    except BlockingIOError:
        pass

    def mutate():
        for _ in range(sent // 2):
            right.recv(2000)

    def check():
        right.settimeout(20)
        for number in range(sent):
            equal(right.recv(2000), bytes([number % 256]) * 1000, f"message {number}")

    return mutate, check


@case
def udp_with_queued_datagrams():
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", 0))
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.connect(receiver.getsockname())
    sender.send(b"one")
    sender.send(b"two")
    names = sender.getsockname(), receiver.getsockname()
    receiver.settimeout(20)

    def mutate():
        receiver.recv(100)
        sender.close()
        receiver.sendto(b"nobody", names[0])

    def check():
        equal((sender.getsockname(), receiver.getsockname()), names, "names")
        equal(receiver.recvfrom(100), (b"one", names[0]), "first")
        equal(receiver.recvfrom(100), (b"two", names[0]), "second")
        sender.send(b"three")
        equal(receiver.recvfrom(100), (b"three", names[0]), "sent on")
        receiver.sendto(b"back", names[0])
        equal(sender.recv(10), b"back", "answered")

    return mutate, check


@case
def udp_shut_down():
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.bind(("127.0.0.1", 0))
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", 0))
    sender.connect(receiver.getsockname())
    receiver.connect(sender.getsockname())
    sender.send(b"before")
    receiver.shutdown(socket.SHUT_WR)
    receiver.settimeout(20)

    def mutate():
        receiver.recv(100)
        sender.shutdown(socket.SHUT_RDWR)

    def check():
        equal(receiver.recv(100), b"before", "queued")
        sender.send(b"after")
        equal(receiver.recv(100), b"after", "sent on")
        raises(errno.EPIPE, receiver.send, b"back")

    return mutate, check


# struct sock_filter: take all of a packet, take the first 3 bytes.
TAKE_ALL = struct.pack("HBBI", 6, 0, 0, 0xFFFF)
TAKE_THREE = struct.pack("HBBI", 6, 0, 0, 3)
SO_ATTACH_FILTER, SO_DETACH_FILTER, SO_LOCK_FILTER = 26, 27, 44


def attach(end, program):
    code = ctypes.create_string_buffer(program, len(program))
    end.setsockopt(
        socket.SOL_SOCKET,
        SO_ATTACH_FILTER,
        struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)),
    )


def filtered(locked):
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    one.send(b"before the filter")
    attach(two, TAKE_THREE)
    two.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, locked)
    one.send(b"behind it")
    two.settimeout(20)

    def mutate():
        two.recv(100)
        if not locked:
            attach(two, TAKE_ALL)
            two.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
        one.send(b"late")

    def check():
        equal(two.recv(100), b"before the filter", "first")
        equal(two.recv(100), b"beh", "second")
        one.send(b"more")
        equal(two.recv(100), b"mor", "through the filter")
        two.settimeout(0)
        raises(errno.EAGAIN, two.recv, 1)
        if locked:
            raises(errno.EPERM, attach, two, TAKE_ALL)
        else:
            two.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)

    return mutate, check


@case
def filter_of_what_is_received():
    return filtered(0)


@case
def filter_that_is_locked():
    return filtered(1)


@case
def raw_and_packet_sockets():
    raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, 253)
    raw.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 7)
    raw.bind(("127.0.0.1", 0))
    icmp = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    icmp.setsockopt(255, 1, struct.pack("I", ~(1 << 8) & 0xFFFFFFFF))
    packet = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
    packet.bind(("lo", 0x800))
    packet.setsockopt(263, 8, 1)
    name = packet.getsockname()
    ends = raw, icmp, packet
    for end in ends:
        end.settimeout(20)

    def mutate():
        raw.sendto(b"late", ("127.0.0.1", 0))
        packet.close()
        icmp.close()

    def check():
        equal(raw.getsockopt(socket.IPPROTO_IP, socket.IP_TTL), 7, "IP_TTL")
        equal(packet.getsockname(), name, "name")
        equal(packet.getsockopt(263, 8), 1, "PACKET_AUXDATA")
        raw.sendto(b"hello", ("127.0.0.1", 0))
        equal(raw.recv(100)[20:], b"hello", "a raw packet")
        equal(packet.recv(100)[20:], b"hello", "the same by the other socket")
        echo = struct.pack("BBHHH", 8, 0, 0xF7FD, 1, 1)
        icmp.sendto(echo, ("127.0.0.1", 0))
        equal(icmp.recv(100)[20], 8, "the request, for which alone the filter asks")

    return mutate, check


@case
def unix_sockets_whose_names_were_taken_by_others():
    def bound(kind, path):
        end = socket.socket(socket.AF_UNIX, kind)
        end.bind(path)
        return end

    receiver = bound(socket.SOCK_DGRAM, "/playground/one")
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sender.connect("/playground/one")
    itself = bound(socket.SOCK_DGRAM, "/playground/itself")
    itself.connect("/playground/itself")
    itself.send(b"to itself")
    server = bound(socket.SOCK_STREAM, "/playground/two")
    server.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect("/playground/two")
    accepted = server.accept()[0]
    waiting = socket.socket(socket.AF_UNIX)
    waiting.connect("/playground/two")
    os.unlink("/playground/one")
    os.mkfifo("/playground/one")
    os.unlink("/playground/two")
    other = bound(socket.SOCK_STREAM, "/playground/two")
    other.listen()
    for end in (receiver, itself, server, client, accepted, waiting, other):
        end.settimeout(20)

    def mutate():
        receiver.close()
        itself.recv(100)
        accepted.close()
        server.close()

    def check():
        sender.send(b"hello")
        equal(receiver.recv(100), b"hello", "a datagram")
        equal(sender.getpeername(), "/playground/one", "whom it is sent to")
        equal(itself.recv(100), b"to itself", "queued")
        itself.send(b"again")
        equal(itself.recv(100), b"again", "sent to itself")
        accepted.send(b"hello")
        equal(client.recv(100), b"hello", "through the connection")
        equal(client.getpeername(), "/playground/two", "name of the peer")
        second = server.accept()[0]
        waiting.send(b"hello")
        equal(second.recv(100), b"hello", "through the connection that waited")
        other.setblocking(False)
        raises(errno.EAGAIN, other.accept)
        equal(os.stat("/playground/one").st_mode & 0o170000, 0o010000, "the fifo")

    return mutate, check


@case
def tcp_with_a_port_that_is_shared():
    one, two = socket.socket(), socket.socket()
    for end in (one, two):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.bind(("127.0.0.1", 0))
    two.bind(one.getsockname())
    one.listen()
    two.listen()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
    name = one.getsockname()

    def mutate():
        one.close()
        two.close()

    def check():
        equal((one.getsockname(), two.getsockname()), (name, name), "names")
        shared = [end.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) for end in (one, two)]
        equal(shared, [0, 1], "SO_REUSEPORT")
        client = socket.create_connection(name, timeout=20)
        ready, _, _ = select.select([one, two], [], [], 20)
        peer, _ = ready[0].accept()
        client.send(b"hello")
        equal(peer.recv(10), b"hello", "a connection to one of them")

    return mutate, check


def early_birds(family, address, kind=socket.SOCK_STREAM):
    """Connections that wait to be accepted: with what was sent already, and some that are closed."""
    server = socket.socket(family, kind)
    server.bind(address)
    server.listen(9)
    address = server.getsockname()

    def connect():
        client = socket.socket(family, kind)
        client.settimeout(20)
        client.connect(address)
        return client

    talker, quiet, gone, half = (connect() for _ in range(4))
    talker.send(b"early " * 100)
    talker.send(b"bird")
    names = [end.getsockname() for end in (talker, quiet, gone, half)]
    gone.send(b"farewell")
    gone.close()
    half.send(b"half")
    half.shutdown(socket.SHUT_WR)
    poll = select.epoll()
    poll.register(talker, select.EPOLLIN | select.EPOLLHUP)

    def everything(end):
        pieces = b""
        while piece := end.recv(1000):
            pieces += piece
        return pieces

    def mutate():
        accepted, _ = server.accept()
        accepted.recv(3)
        connect().send(b"late")
        talker.send(b"more")
        half.close()

    def check():
        server.settimeout(20)
        ends = [server.accept() for _ in names]
        if family != socket.AF_UNIX:
            equal([name for _, name in ends], names, "who has connected")
        one, two, three, four = (end for end, _ in ends)
        server.setblocking(False)
        raises(errno.EAGAIN, server.accept)
        one.settimeout(20)
        sent = one.recv(600, socket.MSG_WAITALL)
        equal((sent, one.recv(4)), (b"early " * 100, b"bird"), "sent early")
        equal(everything(three), b"farewell", "sent before it was closed")
        equal(everything(four), b"half", "sent before it was shut down")
        equal(poll.poll(0), [], "nothing to hear yet")
        for here, there in ((one, talker), (two, quiet), (four, half)):
            here.send(b"answer")
            equal(there.recv(10), b"answer", "answered")
        one.send(b"!")
        equal(poll.poll(20), [(talker.fileno(), select.EPOLLIN)], "told of")
        quiet.send(b"first")
        equal(two.recv(10), b"first", "sent late")
        one.close()
        equal(talker.recv(10), b"!", "sent last")
        equal(talker.recv(10), b"", "the end")

    return mutate, check


@case
def unix_connections_that_wait_with_data():
    return early_birds(socket.AF_UNIX, "/playground/socket")


@case
def unix_packets_that_wait_with_their_connection():
    return early_birds(socket.AF_UNIX, b"\0abstract", socket.SOCK_SEQPACKET)


@case
def tcp_connections_that_wait_with_data():
    return early_birds(socket.AF_INET, ("127.0.0.1", 0))


@case
def tcp6_connections_that_wait_with_data():
    return early_birds(socket.AF_INET6, ("::1", 0))


def peer(end):
    return struct.unpack("iII", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))


@case
def unix_peers_are_who_they_were():
    """Of connections, pairs and listening sockets, made by processes that are there and that have ended, as other users."""
    mine = socket.socketpair()
    server = socket.socket(socket.AF_UNIX)
    server.bind("/playground/peers")
    os.chmod("/playground/peers", 0o777)
    server.listen()

    def become(user):
        os.setresgid(user + 1, user + 1, 0)
        os.setresuid(user, user, 0)

    def born(user, act):
        """A child that makes sockets in the table of its parent, as it were."""
        here, there = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            become(user)
            made = act()
            socket.send_fds(there, [b"x"], [end.fileno() for end in made])
            signal.pause()
        _, numbers, _, _ = socket.recv_fds(here, 1, 9)
        return pid, [socket.socket(fileno=number) for number in numbers]

    def connect():
        client = socket.socket(socket.AF_UNIX)
        client.connect("/playground/peers")
        return [client]

    living, (one,) = born(2000, connect)
    accepted, _ = server.accept()
    dead, pair = born(3000, socket.socketpair)
    os.kill(dead, signal.SIGKILL)
    os.waitpid(dead, 0)
    ends = [*mine, server, one, accepted, *pair]
    before = [peer(end) for end in ends]
    equal(before[4], (living, 2000, 2001), "who has connected")
    equal(before[5], (dead, 3000, 3001), "who has made the pair")

    def mutate():
        for end in ends:
            end.close()

    def check():
        equal([peer(end) for end in ends], before, "peers")
        pair[0].send(b"still")
        equal(pair[1].recv(9), b"still", "sent")
        raises(errno.ESRCH, os.kill, dead, 0)

    return mutate, check


@case
def tcp_shut_down_for_reading():
    server, client, accepted = tcp_pair()
    client.sendall(b"too late")
    eventually(lambda: struct.unpack("i", fcntl.ioctl(accepted, 0x541B, bytes(4)))[0] == 8, "the data")
    accepted.shutdown(socket.SHUT_RD)

    def mutate():
        accepted.recv(100)
        client.close()

    def check():
        accepted.settimeout(20)
        client.settimeout(20)
        equal(accepted.recv(100), b"too late", "queued")
        equal(accepted.recv(100), b"", "the end that it has made itself")
        accepted.sendall(b"spoken")
        equal(client.recv(100), b"spoken", "the other way")

    return mutate, check


@case
def netlink_as_the_c_library_uses_it():
    route = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    route.bind((0, 1))  # RTMGRP_LINK
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 15)  # NETLINK_KOBJECT_UEVENT
    events.bind((0, 1))
    audit = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 9)  # NETLINK_AUDIT, as message buses hold it
    audit.bind((0, 0))
    sockets = (route, events, audit)
    names = [s.getsockname() for s in sockets]
    others = []

    def links(s):
        """The interfaces that a dump tells of."""
        s.send(struct.pack("=IHHII", 32, 18, 0x301, 9, 0) + bytes(16))
        found = []
        while True:
            answer, at = s.recv(65536), 0
            while at < len(answer):
                length, kind = struct.unpack_from("=IH", answer, at)
                if kind == 3:
                    return found
                found.append(struct.unpack_from("=i", answer, at + 20)[0])
                at += length + 3 & ~3

    here = links(route)

    def mutate():
        for s in sockets:
            s.close()
        others.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE))

    def check():
        equal([s.getsockname() for s in sockets], names, "numbers and groups")
        equal(links(route), here, "interfaces")
        equal(links(route), [index for index, _ in socket.if_nameindex()], "interfaces by the C library")

    return mutate, check


@case
def unix_listeners_whose_files_have_other_names():
    os.mkdir("/playground/names")
    os.chdir("/playground/names")

    def listener(bound, mode):
        s = socket.socket(socket.AF_UNIX)
        s.bind(bound)
        os.chmod(bound, mode)
        s.listen()
        return s

    linked = listener("/playground/names/linked.temporary", 0o700)
    os.link("linked.temporary", "linked")  # As OpenSSH does, so that nothing is overwritten.
    os.unlink("linked.temporary")
    renamed = listener("renamed.temporary", 0o710)
    os.rename("renamed.temporary", "renamed")
    twice = listener("/playground/names/twice", 0o711)
    os.link("twice", "once more")
    replaced = listener("replaced", 0o701)
    os.rename("replaced", "first")
    second = listener("replaced", 0o702)
    sockets = [(linked, "linked"), (renamed, "renamed"), (twice, "twice"), (twice, "once more"), (replaced, "first"), (second, "replaced")]
    names = [s.getsockname() for s, _ in sockets]
    files = lambda: sorted((name, oct(os.stat(name).st_mode), os.stat(name).st_nlink) for name in os.listdir("."))
    before = files()

    def mutate():
        for s, name in sockets:
            s.close()
            os.unlink(name)

    def check():
        equal([s.getsockname() for s, _ in sockets], names, "their own names")
        equal(files(), before, "files")
        for s, name in sockets:
            client = socket.socket(socket.AF_UNIX)
            client.connect(name)
            accepted, _ = s.accept()
            accepted.send(name.encode())
            equal(client.recv(100), name.encode(), "a connection")

    return mutate, check


@case
def socketpair_dgram_of_which_one_has_a_name():
    named, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    named.bind("/playground/named")
    other.send(b"queued")

    def mutate():
        equal(named.recv(100), b"queued", "what waits")
        named.close()
        os.unlink("/playground/named")

    def check():
        equal(named.getsockname(), "/playground/named", "its name")
        equal(named.recv(100), b"queued", "what waits")
        named.send(b"there")
        equal(other.recvfrom(100), (b"there", "/playground/named"), "from the named one")
        # Who is connected takes nothing from others.
        raises(errno.EPERM, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto, b"x", "/playground/named")

    return mutate, check


def datagram_socket(name=None, family=socket.AF_UNIX):
    end = socket.socket(family, socket.SOCK_DGRAM)
    end.settimeout(20)
    if name:
        end.bind(name)
    return end


@case
def datagrams_whose_senders_are_gone_or_send_elsewhere():
    receiver, other = (datagram_socket(f"/playground/{name}") for name in ("receiver", "other"))
    names = ["/playground/left", "/playground/removed", "/playground/busy"]
    left, removed, busy = (datagram_socket(name) for name in names)
    for sender in (left, removed, busy):
        sender.sendto(b"hello", "/playground/receiver")
    busy.connect("/playground/other")
    left.close()
    removed.close()
    os.unlink("/playground/removed")
    files = sorted(os.listdir("/playground"))

    def mutate():
        receiver.recv(100)

    def check():
        equal([receiver.recvfrom(100) for _ in names], [(b"hello", name) for name in names], "datagrams")
        equal(sorted(os.listdir("/playground")), files, "files")
        busy.send(b"elsewhere")
        equal(other.recv(100), b"elsewhere", "sent elsewhere")

    return mutate, check


@case
def udp_whose_senders_are_gone_or_send_elsewhere():
    local = ("127.0.0.1", 0)
    receiver, other, busy = (datagram_socket(local, socket.AF_INET) for _ in range(3))
    unbound, gone, foreign = (datagram_socket(None, socket.AF_INET) for _ in range(3))
    foreign.setsockopt(socket.IPPROTO_IP, 19, 1)  # IP_TRANSPARENT
    foreign.bind(("10.1.2.3", 5353))
    senders = busy, unbound, gone, foreign
    for sender in senders:
        sender.sendto(b"hello", receiver.getsockname())
    names = [(host if host != "0.0.0.0" else "127.0.0.1", port) for host, port in (s.getsockname() for s in senders)]
    busy.connect(other.getsockname())
    gone.close()
    foreign.close()

    def mutate():
        receiver.recv(100)

    def check():
        equal([receiver.recvfrom(100) for _ in names], [(b"hello", name) for name in names], "datagrams")
        busy.send(b"elsewhere")
        equal(other.recvfrom(100), (b"elsewhere", names[0]), "sent elsewhere")
        equal(busy.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR), 0, "SO_REUSEADDR")

    return mutate, check


@case
def unix_sockets_renamed_since_they_were_bound():
    renamed = datagram_socket("/playground/renamed.new")
    os.rename("/playground/renamed.new", "/playground/renamed")
    linked = socket.socket(socket.AF_UNIX)
    linked.bind("/playground/linked.new")
    linked.listen()
    os.link("/playground/linked.new", "/playground/linked")
    os.unlink("/playground/linked.new")
    os.mkdir("/playground/place")
    os.chdir("/playground/place")
    relative = datagram_socket("relative")
    os.chmod("relative", 0o123)
    os.chdir("/")

    def mutate():
        for end in (renamed, linked, relative):
            end.close()

    def check():
        sender = datagram_socket()
        for end, name in ((renamed, "/playground/renamed"), (relative, "/playground/place/relative")):
            sender.sendto(b"hello", name)
            equal(end.recv(100), b"hello", "a datagram")
        client = socket.socket(socket.AF_UNIX)
        client.connect("/playground/linked")
        linked.settimeout(20)
        linked.accept()[0].send(b"hello")
        equal(client.recv(100), b"hello", "through a connection")
        equal(sorted(os.listdir("/playground")), ["linked", "place", "renamed"], "files")
        equal(os.listdir("/playground/place"), ["relative"], "files")
        equal(os.stat("/playground/place/relative").st_mode & 0o7777, 0o123, "mode")
        equal([end.getsockname() for end in (renamed, relative)], ["/playground/renamed.new", "relative"], "names")

    return mutate, check


@case
def unix_sockets_whose_peers_are_gone():
    left = datagram_socket("/playground/left")
    peer = datagram_socket("/playground/peer")
    left.connect("/playground/peer")
    peer.close()
    server = socket.socket(socket.AF_UNIX)
    server.bind("/playground/server")
    server.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect("/playground/server")
    accepted, _ = server.accept()
    client.send(b"farewell")
    client.close()

    def mutate():
        left.close()
        accepted.close()

    def check():
        raises(errno.ECONNREFUSED, left.send, b"hello")
        datagram_socket().sendto(b"hello", "/playground/left")
        equal((left.getsockname(), left.recv(100)), ("/playground/left", b"hello"), "its name, and by that a datagram")
        equal(accepted.getsockname(), "/playground/server", "name of the server")
        equal([accepted.recv(100) for _ in range(2)], [b"farewell", b""], "what was sent")
        server.setblocking(False)
        raises(errno.EAGAIN, server.accept)

    return mutate, check


@case
def more_connections_wait_than_may():
    listening = [socket.socket(family) for family in (socket.AF_UNIX, socket.AF_INET)]
    for end, name in zip(listening, ("/playground/server", ("127.0.0.1", 0))):
        end.bind(name)
        end.listen(20)
    clients = [[socket.socket(end.family) for _ in range(10)] for end in listening]
    for end, mine in zip(listening, clients):
        for client in mine:
            client.connect(end.getsockname())
        end.listen(1)

    def mutate():
        for end in listening:
            end.close()

    def check():
        for end, mine in zip(listening, clients):
            end.settimeout(20)
            accepted = [end.accept()[0] for _ in mine]
            for other in accepted:
                other.send(b"hello")
            equal([client.recv(10) for client in mine], [b"hello"] * 10, "through the connections")

    return mutate, check


@case
def unix_connections_from_another_root():
    os.mkdir("/playground/root", 0o755)
    server = socket.socket(socket.AF_UNIX)
    server.settimeout(20)
    server.bind("/playground/server")
    server.listen()

    def connect():
        for name in ("accepted", "waiting"):
            put(name, socket.socket(socket.AF_UNIX)).connect("/playground/server")
        os.chroot("/playground/root")
        os.chdir("/")

    child = Child(connect)
    child.ask("waiting.fileno()")
    first, _ = server.accept()

    def mutate():
        child.ask("[accepted.close(), waiting.close()]")

    def check():
        child.ask("[end.send(b'hello') for end in (accepted, waiting)]")
        equal(first.recv(10), b"hello", "through the connection")
        equal(server.accept()[0].recv(10), b"hello", "through the one that waited")
        equal(child.ask("(os.getcwd(), os.listdir('/'))"), ("/", []), "where it is")

    return mutate, check


@case
def tcp_connected_to_itself():
    end = socket.socket()
    end.settimeout(20)
    end.bind(("127.0.0.1", 0))
    end.connect(end.getsockname())
    end.send(b"queued")

    def mutate():
        end.close()

    def check():
        equal(end.recv(10), b"queued", "sent before")
        end.send(b"again")
        equal(end.recv(10), b"again", "sent since")
        equal(end.getpeername(), end.getsockname(), "names")

    return mutate, check


@case
def kinds_of_timestamps_changed_since():
    end = datagram_socket()
    end.setsockopt(socket.SOL_SOCKET, 29, 1)  # SO_TIMESTAMP

    def mutate():
        end.setsockopt(socket.SOL_SOCKET, 29, 0)
        end.setsockopt(socket.SOL_SOCKET, 35, 1)  # SO_TIMESTAMPNS

    def check():
        equal([end.getsockopt(socket.SOL_SOCKET, name) for name in (29, 35)], [1, 0], "options")

    return mutate, check


@case
def datagrams_from_before_it_was_connected():
    """To another one than who has sent them, who may not send any more."""
    sockets = [[datagram_socket(f"/playground/{name}") for name in ("receiver", "sender", "peer")]]
    sockets.append([datagram_socket(("127.0.0.1", 0), socket.AF_INET) for _ in range(3)])
    pairs = [datagram_socket(f"/playground/{name}") for name in ("one", "two")]
    sockets[0][1].sendto(b"early", "/playground/one")
    pairs[0].connect("/playground/two")
    pairs[1].connect("/playground/one")
    pairs[1].send(b"of the peer")
    for receiver, sender, peer in sockets:
        sender.sendto(b"early", receiver.getsockname())
        receiver.connect(peer.getsockname())
    # Its port is gone when it is not connected any more.
    late = datagram_socket(None, socket.AF_INET)
    late.connect(sockets[1][2].getsockname())
    names = [end.getsockname() for end in (late, *(ends[0] for ends in sockets))]

    def mutate():
        pairs[0].recv(100)
        for receiver, _, _ in sockets:
            receiver.recv(100)

    def check():
        for receiver, sender, peer in sockets:
            equal(receiver.recvfrom(100), (b"early", sender.getsockname()), "a datagram")
            receiver.send(b"hello")
            equal(peer.recvfrom(100), (b"hello", receiver.getsockname()), "sent to the peer")
        equal(pairs[0].recvfrom(100), (b"early", "/playground/sender"), "a datagram of another")
        equal(pairs[0].recvfrom(100), (b"of the peer", "/playground/two"), "a datagram of the peer")
        pairs[1].send(b"hello")
        equal(pairs[0].recv(100), b"hello", "sent by the peer")
        raises(errno.EPERM, sockets[0][1].sendto, b"late", "/playground/receiver")
        equal([end.getsockname() for end in (late, *(ends[0] for ends in sockets))], names, "names")

    return mutate, check


@case
def more_datagrams_than_there_is_room_for_now():
    receiver, sender = (datagram_socket(("127.0.0.1", 0), socket.AF_INET) for _ in range(2))
    for number in range(50):
        sender.sendto(b"%d" % number, receiver.getsockname())
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    room = receiver.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)

    def mutate():
        receiver.recv(100)

    def check():
        equal([receiver.recv(100) for _ in range(50)], [b"%d" % number for number in range(50)], "datagrams")
        equal(receiver.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF), room, "room")

    return mutate, check


@case
def connections_that_were_reset():
    """Of which nobody has been told yet: it must not look like an end."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    reset = socket.create_connection(server.getsockname())
    accepted, _ = server.accept()
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    accepted.close()
    eventually(lambda: select.select([reset], [], [], 0)[0], "the reset")
    left, other = socket.socketpair()
    left.send(b"never read")
    other.send(b"farewell")
    other.close()
    silent, other = socket.socketpair()
    silent.send(b"never read")
    other.close()
    ended, other = socket.socketpair()
    other.send(b"farewell")
    other.close()

    def mutate():
        raises(errno.ECONNRESET, reset.recv, 10)
        left.recv(100)
        raises(errno.ECONNRESET, left.recv, 10)
        raises(errno.ECONNRESET, silent.recv, 10)

    def check():
        raises(errno.ECONNRESET, reset.recv, 10)
        equal(left.recv(100), b"farewell", "sent before")
        raises(errno.ECONNRESET, left.recv, 10)
        raises(errno.ECONNRESET, silent.recv, 10)
        equal([ended.recv(100) for _ in range(2)], [b"farewell", b""], "an end")

    return mutate, check


@case
def unix_connections_of_who_may_not_connect_any_more():
    """Those that wait with data are made anew by every checkpoint."""
    os.mkdir("/playground/closed", 0o700)
    server = socket.socket(socket.AF_UNIX)
    server.settimeout(20)
    server.bind("/playground/closed/server")
    server.listen()

    def connect():
        for name in ("accepted", "waiting"):
            put(name, socket.socket(socket.AF_UNIX)).connect("/playground/closed/server")
        waiting.send(b"early")
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)

    child = Child(connect)
    child.ask("waiting.fileno()")
    first, _ = server.accept()
    os.chmod("/playground/closed/server", 0o600)
    os.chmod("/playground/closed", 0)

    def mutate():
        child.ask("[accepted.close(), waiting.close()]")

    def check():
        child.ask("[end.send(b'hello') for end in (accepted, waiting)]")
        equal(first.recv(10), b"hello", "through the connection")
        second, _ = server.accept()
        equal(second.recv(10, socket.MSG_WAITALL), b"earlyhello", "through the one that waited")
        equal(os.stat("/playground/closed/server").st_mode & 0o7777, 0o600, "mode")

    return mutate, check
