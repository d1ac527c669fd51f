"""System calls that a checkpoint or a rollback interrupts: the program must not be able to tell."""

import fcntl


class Blocked:
    """A thread inside a C function: result, errno and seconds, once it has returned."""

    def __init__(self, function, *args, first=None):
        self.result = None
        self.thread = threading.Thread(target=self.run, args=[function, args, first], daemon=True)
        self.thread.start()
        eventually(lambda: hasattr(self, "begun"), "the start")
        time.sleep(0.1)
        equal(self.result, None, "the call blocks")

    def run(self, function, args, first):
        if first:
            first()
        self.tid = threading.get_native_id()
        self.begun = time.monotonic()
        ctypes.set_errno(0)
        result = function(*args)
        self.result = result, errno.errorcode.get(ctypes.get_errno(), 0) if result == -1 else 0
        self.took = time.monotonic() - self.begun

    def returns(self, wanted):
        self.thread.join(30)
        equal(self.thread.is_alive(), False, "the call is still blocked")
        equal(self.result, (wanted, 0), "result and errno")

    def blocks(self):
        time.sleep(0.1)
        equal(self.result, None, "the call still blocks")
        equal(self.thread.is_alive(), True, "the thread lives")


def blocked_case(blocked, finish, wanted):
    """A call that blocks until `finish` is done, which also is what spoils the state."""

    def mutate():
        finish()
        blocked.returns(wanted)

    def check():
        blocked.blocks()
        finish()
        blocked.returns(wanted)

    return mutate, check


@case
def read_of_an_empty_pipe():
    reader, writer = os.pipe()
    buffer = ctypes.create_string_buffer(10)
    return blocked_case(Blocked(libc.read, reader, buffer, 10), lambda: os.write(writer, b"x"), 1)


@case
def write_to_a_full_pipe():
    reader, writer = os.pipe()
    os.write(writer, bytes(fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)))
    blocked = Blocked(libc.write, writer, b"abc", 3)
    return blocked_case(blocked, lambda: os.read(reader, 1 << 20), 3)


@case
def write_half_done_to_a_pipe():
    """A freeze may cut a write that has moved bytes already, as a signal may; it must not lose or repeat any."""
    reader, writer = os.pipe()
    size = fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)
    data = bytes(range(251)) * (3 * size // 251)
    blocked = Blocked(libc.write, writer, data, len(data))
    os.set_blocking(reader, False)

    def received():
        got = b""
        while blocked.thread.is_alive() or select.select([reader], [], [], 0)[0]:
            if select.select([reader], [], [], 0.01)[0]:
                got += os.read(reader, 1 << 20)
        return got

    def mutate():
        received()

    def check():
        got = received()
        equal(blocked.result, (len(got), 0), "result and errno")
        equal(data.startswith(got) and len(got) >= size, True, "what came through the pipe")

    return mutate, check


@case
def poll_without_a_timeout():
    reader, writer = os.pipe()
    record = ctypes.create_string_buffer(struct.pack("=ihh", reader, select.POLLIN, 0), 8)
    return blocked_case(Blocked(libc.poll, record, 1, -1), lambda: os.write(writer, b"x"), 1)


@case
def poll_with_a_long_timeout():
    reader, writer = os.pipe()
    record = ctypes.create_string_buffer(struct.pack("=ihh", reader, select.POLLIN, 0), 8)
    return blocked_case(Blocked(libc.poll, record, 1, 600_000), lambda: os.write(writer, b"x"), 1)


def expiring(function, *args, seconds=1.5):
    """A call that returns 0 by itself when its time is over."""
    blocked = Blocked(function, *args)

    def mutate():
        pass

    def check():
        blocked.returns(0)
        equal(blocked.took >= seconds - 0.01, True, f"it took {blocked.took} s, not {seconds}")

    return mutate, check


@case
def poll_whose_time_runs_out():
    return expiring(libc.poll, None, 0, 1500)


@case
def nanosleep():
    return expiring(libc.nanosleep, struct.pack("=qq", 1, 500_000_000), None)


def interruptible(function, *args):
    """A call in a thread that SIGUSR1 interrupts, and a function that does so."""
    signal.signal(signal.SIGUSR1, lambda *_: None)
    call(libc.siginterrupt, signal.SIGUSR1, 1)
    block(signal.SIGUSR1)()
    blocked = Blocked(function, *args, first=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1]))

    def interrupt():
        call(libc.syscall, 234, os.getpid(), blocked.tid, signal.SIGUSR1)
        blocked.thread.join(30)
        equal(blocked.result, (-1, "EINTR"), "result and errno")

    return blocked, interrupt


@case
def nanosleep_that_tells_what_is_left():
    """It has slept for a second, and that counts."""
    rest = ctypes.create_string_buffer(16)
    blocked, interrupt = interruptible(libc.nanosleep, struct.pack("=qq", 600, 0), rest)
    time.sleep(1)

    def check():
        blocked.blocks()
        interrupt()
        seconds, nanoseconds = struct.unpack("=qq", rest.raw)
        equal(300 < seconds < 599, True, f"{seconds} s and {nanoseconds} ns are left")

    return interrupt, check


@case
def futex_wait_whose_time_runs_out():
    word = ctypes.c_int(7)
    blocked = Blocked(futex, ctypes.byref(word), 128, 7, struct.pack("=qq", 1, 500_000_000))

    def check():
        blocked.thread.join(30)
        equal(blocked.result, (-1, "ETIMEDOUT"), "result and errno")
        equal(blocked.took >= 1.49, True, f"it took {blocked.took} s")

    return lambda: None, check


@case
def futex_wait_until_a_time():
    """Called by its number, so that the code does not tell which call it is."""
    word = ctypes.c_int(7)
    until = time.monotonic() + 1.5
    when = struct.pack("=qq", int(until), int(until % 1 * 1e9))
    blocked = Blocked(libc.syscall, 202, ctypes.byref(word), 9 | 128, 7, when, None, ctypes.c_uint(0xFFFFFFFF))

    def check():
        blocked.thread.join(30)
        equal(blocked.result, (-1, "ETIMEDOUT"), "result and errno")

    return lambda: None, check


@case
def sigtimedwait_whose_time_runs_out():
    block(signal.SIGUSR1)()
    mask = struct.pack("=Q", 1 << (signal.SIGUSR1 - 1)) + bytes(120)
    blocked = Blocked(libc.sigtimedwait, mask, None, struct.pack("=qq", 1, 500_000_000))

    def check():
        blocked.thread.join(30)
        equal(blocked.result, (-1, "EAGAIN"), "result and errno")
        equal(blocked.took >= 1.49, True, f"it took {blocked.took} s")

    return lambda: None, check


@case
def clock_nanosleep_until_a_time():
    until = time.monotonic() + 1.5
    when = struct.pack("=qq", int(until), int(until % 1 * 1e9))
    return expiring(libc.clock_nanosleep, time.CLOCK_MONOTONIC, 1, when, None, seconds=1.3)


@case
def nanosleep_that_goes_on():
    blocked = Blocked(libc.nanosleep, struct.pack("=qq", 5000, 0), None)

    def check():
        blocked.blocks()

    return lambda: None, check


@case
def select_with_a_timeout():
    reader, writer = os.pipe()
    wanted = 1 << reader
    readers = ctypes.create_string_buffer(struct.pack("=Q", wanted) + bytes(120), 128)
    timeout = ctypes.create_string_buffer(struct.pack("=qq", 600, 0), 16)
    blocked = Blocked(libc.select, reader + 1, readers, None, None, timeout)
    return blocked_case(blocked, lambda: os.write(writer, b"x"), 1)


@case
def select_whose_time_runs_out():
    timeout = ctypes.create_string_buffer(struct.pack("=qq", 1, 500_000), 16)
    return expiring(libc.select, 0, None, None, None, timeout)


@case
def epoll_wait_with_a_timeout():
    reader, writer = os.pipe()
    poller = put("poller", select.epoll())
    poller.register(reader, select.EPOLLIN)
    events = ctypes.create_string_buffer(120)
    blocked = Blocked(libc.epoll_wait, poller.fileno(), events, 10, 600_000)
    return blocked_case(blocked, lambda: os.write(writer, b"x"), 1)


@case
def epoll_wait_without_a_timeout():
    reader, writer = os.pipe()
    poller = put("poller", select.epoll())
    poller.register(reader, select.EPOLLIN)
    events = ctypes.create_string_buffer(120)
    blocked = Blocked(libc.epoll_wait, poller.fileno(), events, 10, -1)
    return blocked_case(blocked, lambda: os.write(writer, b"x"), 1)


@case
def epoll_wait_whose_time_runs_out():
    poller = put("poller", select.epoll())
    return expiring(libc.epoll_wait, poller.fileno(), ctypes.create_string_buffer(12), 1, 1500)


def futex(word, operation, value, timeout=None):
    return libc.syscall(202, word, operation, value, timeout, None, 0)


@case
def futex_wait():
    word = ctypes.c_int(7)
    blocked = Blocked(futex, ctypes.byref(word), 0, 7)

    def wake():
        # A call that is begun again is not in the queue for a moment.
        eventually(lambda: futex(ctypes.byref(word), 1, 1) == 1, "a waiter is woken")

    return blocked_case(blocked, wake, 0)


@case
def futex_wait_with_a_timeout():
    word = ctypes.c_int(7)
    blocked = Blocked(futex, ctypes.byref(word), 128, 7, struct.pack("=qq", 600, 0))

    def wake():
        eventually(lambda: futex(ctypes.byref(word), 129, 1) == 1, "a waiter is woken")

    return blocked_case(blocked, wake, 0)


@case
def wait4_for_a_child():
    child = Child()
    state = ctypes.c_int()
    blocked = Blocked(libc.wait4, child.pid, ctypes.byref(state), 0, None)

    def finish():
        child.tell("os._exit(9)")

    return blocked_case(blocked, finish, child.pid)


@case
def waitid_for_a_child():
    child = Child()
    blocked = Blocked(libc.waitid, 1, child.pid, ctypes.create_string_buffer(128), 4)
    return blocked_case(blocked, lambda: child.tell("os._exit(9)"), 0)


def block(*signals):
    return lambda: signal.pthread_sigmask(signal.SIG_BLOCK, signals)


@case
def sigtimedwait_with_a_timeout():
    block(signal.SIGUSR1)()
    mask = struct.pack("=Q", 1 << (signal.SIGUSR1 - 1)) + bytes(120)
    blocked = Blocked(libc.sigtimedwait, mask, None, struct.pack("=qq", 600, 0))
    return blocked_case(blocked, lambda: os.kill(os.getpid(), signal.SIGUSR1), signal.SIGUSR1)


@case
def sigwaitinfo_without_a_timeout():
    block(signal.SIGUSR1)()
    mask = struct.pack("=Q", 1 << (signal.SIGUSR1 - 1)) + bytes(120)
    blocked = Blocked(libc.sigwaitinfo, mask, None)
    return blocked_case(blocked, lambda: os.kill(os.getpid(), signal.SIGUSR1), signal.SIGUSR1)


@case
def accept_of_a_unix_connection():
    server = socket.socket(socket.AF_UNIX)
    server.bind("/playground/accept")
    server.listen()
    blocked = Blocked(lambda: min(libc.accept4(server.fileno(), None, None, 0), 0))
    client = socket.socket(socket.AF_UNIX)
    return blocked_case(blocked, lambda: client.connect("/playground/accept"), 0)


@case
def accept_of_a_tcp_connection():
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    blocked = Blocked(lambda: min(libc.accept4(server.fileno(), None, None, 0), 0))
    client = socket.socket()
    return blocked_case(blocked, lambda: client.connect(server.getsockname()), 0)


@case
def recv_with_a_timeout():
    one, two = socket.socketpair()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("=qq", 600, 0))
    buffer = ctypes.create_string_buffer(10)
    return blocked_case(Blocked(lambda: libc.recv(one.fileno(), buffer, 10, 0)), lambda: two.send(b"xyz"), 3)


@case
def recv_without_a_timeout():
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    buffer = ctypes.create_string_buffer(10)
    return blocked_case(Blocked(lambda: libc.recv(one.fileno(), buffer, 10, 0)), lambda: two.send(b"xyz"), 3)


@case
def lock_waited_for():
    holder = os.open("/playground/lock", os.O_RDWR | os.O_CREAT)
    waiter = os.open("/playground/lock", os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)
    blocked = Blocked(libc.flock, waiter, fcntl.LOCK_EX)
    return blocked_case(blocked, lambda: fcntl.flock(holder, fcntl.LOCK_UN), 0)


@case
def open_of_a_fifo():
    os.mkfifo("/playground/fifo")
    blocked = Blocked(lambda: min(libc.open(b"/playground/fifo", os.O_RDONLY), 0))
    return blocked_case(blocked, lambda: os.open("/playground/fifo", os.O_WRONLY), 0)


@case
def read_of_an_eventfd():
    counter = os.eventfd(0)
    buffer = ctypes.create_string_buffer(8)
    return blocked_case(Blocked(libc.read, counter, buffer, 8), lambda: os.eventfd_write(counter, 3), 8)


@case
def read_of_an_inotify():
    os.mkdir("/playground/watched")
    descriptor = call(libc.inotify_init1, 0)
    call(libc.inotify_add_watch, descriptor, b"/playground/watched", 0x100)
    buffer = ctypes.create_string_buffer(4096)
    blocked = Blocked(libc.read, descriptor, buffer, 4096)
    return blocked_case(blocked, lambda: open("/playground/watched/new", "w").close(), 32)


@case
def pause_in_a_child():
    child = Child()
    child.tell("signal.pause()")
    eventually(lambda: stat(child.pid)[0] == "S", "the sleep")

    def check():
        time.sleep(0.1)
        equal(select.select([child.hearing], [], [], 0)[0], [], "the call still blocks")
        os.kill(child.pid, signal.SIGKILL)
        equal(os.waitpid(child.pid, 0), (child.pid, signal.SIGKILL), "its end")

    return child.kill, check


@case
def read_interrupted_by_a_handler_as_ever():
    """The program's own signals still interrupt: exactly once, when they come."""
    reader, writer = os.pipe()
    buffer = ctypes.create_string_buffer(10)
    blocked, interrupt = interruptible(libc.read, reader, buffer, 10)

    def check():
        blocked.blocks()
        interrupt()

    return interrupt, check
