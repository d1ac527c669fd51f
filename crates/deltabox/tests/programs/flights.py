"""Descriptors in flight: sent over a unix socket (SCM_RIGHTS) and not received yet."""


def open_file():
    file = os.open("/playground/sent", os.O_RDWR | os.O_CREAT)
    os.write(file, b"content")
    return file


def receive(end, size=100):
    data, files, flags, _ = socket.recv_fds(end, size, 10)
    equal(flags & socket.MSG_CTRUNC, 0, "descriptors were cut off")
    return data, files


def is_a_pipe(reads, writes, content):
    equal(os.read(reads, 100), content, "in the pipe")
    os.write(writes, b"more")
    equal(os.read(reads, 100), b"more", "through the pipe")


@case
def in_a_stream():
    one, two = socket.socketpair()
    reads, writes = os.pipe()
    os.write(writes, b"in the pipe")
    file = open_file()
    one.send(b"plain ")
    socket.send_fds(one, [b"with two"], [reads, file])
    one.send(b" plain again ")
    socket.send_fds(one, [b"with one"], [file])
    os.close(reads)
    os.close(file)

    def mutate():
        for _ in range(2):
            for file in receive(two)[1]:
                os.read(file, 5)
                os.close(file)

    def check():
        two.settimeout(20)
        equal(receive(two, 6), (b"plain ", []), "before the descriptors")
        data, (pipe, first) = receive(two)
        equal(data, b"with two", "what they came with")
        equal(two.recv(13), b" plain again ", "between")
        data, (second,) = receive(two)
        equal(data, b"with one", "what the last one came with")
        is_a_pipe(pipe, writes, b"in the pipe")
        equal(os.lseek(first, 0, os.SEEK_CUR), 7, "offset")
        os.lseek(first, 2, os.SEEK_SET)
        equal(os.read(second, 10), b"ntent", "the offset that both share")
        two.setblocking(False)
        raises(errno.EAGAIN, two.recv, 1)
        one.send(b"on")
        equal(two.recv(10), b"on", "sent on")

    return mutate, check


def in_messages(kind):
    one, two = socket.socketpair(socket.AF_UNIX, kind)
    reads, writes = os.pipe()
    os.write(writes, b"in the pipe")
    one.send(b"plain")
    socket.send_fds(one, [b"with two"], [reads, writes])
    one.send(b"last")
    os.close(reads)

    def mutate():
        two.recv(100)
        receive(two)
        socket.send_fds(one, [b"late"], [writes])

    def check():
        two.settimeout(20)
        equal(receive(two), (b"plain", []), "the first message")
        data, (pipe, other) = receive(two)
        equal(data, b"with two", "the second")
        is_a_pipe(pipe, other, b"in the pipe")
        equal(receive(two), (b"last", []), "the third")
        two.setblocking(False)
        raises(errno.EAGAIN, two.recv, 1)

    return mutate, check


@case
def in_datagrams():
    return in_messages(socket.SOCK_DGRAM)


@case
def in_packets():
    return in_messages(socket.SOCK_SEQPACKET)


@case
def in_datagrams_to_a_name():
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind("/playground/receiver")
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    reads, writes = os.pipe()
    os.write(writes, b"in the pipe")
    sender.connect("/playground/receiver")
    socket.send_fds(sender, [b"with one"], [reads])
    os.close(reads)

    def mutate():
        receive(receiver)
        sender.close()

    def check():
        receiver.settimeout(20)
        data, (pipe,) = receive(receiver)
        equal(data, b"with one", "the message")
        is_a_pipe(pipe, writes, b"in the pipe")

    return mutate, check


@case
def whose_sender_has_closed_its_end():
    one, two = socket.socketpair()
    counter = os.eventfd(41)
    socket.send_fds(one, [b"farewell"], [counter])
    os.close(counter)
    one.close()

    def mutate():
        receive(two)

    def check():
        data, (counter,) = receive(two)
        equal(data, b"farewell", "what it came with")
        equal(os.eventfd_read(counter), 41, "count")
        equal(two.recv(10), b"", "end of file")

    return mutate, check


@case
def sockets_that_carry_others():
    one, two = socket.socketpair()
    inner, kept = socket.socketpair()
    counter = os.eventfd(41)
    socket.send_fds(kept, [b"inside"], [counter])
    os.close(counter)
    socket.send_fds(one, [b"outside"], [inner.fileno()])
    inner.close()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("/playground/listener")
    listener.listen(3)
    socket.send_fds(one, [b"listener"], [listener.fileno()])
    listener.close()

    def mutate():
        for _ in range(2):
            receive(two)
        kept.close()

    def check():
        data, (number,) = receive(two)
        equal(data, b"outside", "what the socket came with")
        inner = socket.socket(fileno=number)
        data, (counter,) = receive(inner)
        equal(data, b"inside", "what the counter came with")
        equal(os.eventfd_read(counter), 41, "count")
        kept.send(b"ping")
        equal(inner.recv(10), b"ping", "through the pair")
        data, (number,) = receive(two)
        equal(data, b"listener", "what the listener came with")
        listener = socket.socket(fileno=number)
        client = socket.socket(socket.AF_UNIX)
        client.connect("/playground/listener")
        accepted, _ = listener.accept()
        client.send(b"hello")
        equal(accepted.recv(10), b"hello", "through a new connection")

    return mutate, check


@case
def an_epoll_and_what_it_watches():
    one, two = socket.socketpair()
    kept = select.epoll()
    sent = select.epoll()
    reads, writes = os.pipe()
    other, its_input = os.pipe()
    kept.register(reads, select.EPOLLIN)
    sent.register(other, select.EPOLLIN)
    numbers = reads, other
    socket.send_fds(one, [b"both"], [reads, sent.fileno()])
    os.close(reads)
    sent.close()

    def mutate():
        receive(two)
        kept.close()

    def check():
        equal(kept.poll(0), [], "events before")
        os.write(writes, b"x")
        os.write(its_input, b"x")
        equal(kept.poll(20), [(numbers[0], select.EPOLLIN)], "an event of what is in flight")
        data, (pipe, number) = receive(two)
        equal(data, b"both", "what they came with")
        equal(select.epoll.fromfd(number).poll(20), [(numbers[1], select.EPOLLIN)], "an event")
        equal(os.read(pipe, 1), b"x", "through the pipe")
        equal(kept.poll(0), [], "events after")
        one.close()

    return mutate, check


@case
def received_since():
    one, two = socket.socketpair()
    inner, kept = socket.socketpair()
    inner.send(b"to the one that is kept")
    socket.send_fds(one, [b"x"], [inner.fileno()])
    inner.close()

    def mutate():
        put("received", receive(two)[1])
        kept.recv(5)

    def check():
        data, (number,) = receive(two)
        equal(data, b"x", "what it came with")
        equal(kept.recv(100), b"to the one that is kept", "queue")
        equal(socket.socket(fileno=number).send(b"ping"), 4, "sent")
        equal(kept.recv(100), b"ping", "through the pair")

    return mutate, check


@case
def kept_in_a_table_and_sent_since():
    one, two = socket.socketpair()
    inner, kept = socket.socketpair()
    number = inner.fileno()

    def mutate():
        socket.send_fds(one, [b"x"], [number])
        inner.close()

    def check():
        two.setblocking(False)
        raises(errno.EAGAIN, two.recv, 1)
        kept.send(b"ping")
        equal(inner.recv(100), b"ping", "through the pair")
        equal(inner.fileno(), number, "number")

    return mutate, check


@case
def between_processes():
    one, two = socket.socketpair()
    child = Child()
    file = open_file()
    socket.send_fds(one, [b"for the child"], [file])
    os.close(file)
    number = two.fileno()

    def mutate():
        child.kill()
        receive(two)

    def check():
        answer = child.ask(f"socket.recv_fds(put('two', socket.socket(fileno={number})), 100, 10)[:2]")
        equal(answer[0], b"for the child", "what it came with")
        equal(child.ask(f"os.pread({answer[1][0]}, 10, 0)"), b"content", "the file")
        two.setblocking(False)
        raises(errno.EAGAIN, two.recv, 1)

    return mutate, check
