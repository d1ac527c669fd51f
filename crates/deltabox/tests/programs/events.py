"""Counters, timers, watches, terminals, devices: descriptors that are neither files nor sockets."""

import fcntl
import pty
import subprocess
import termios
import tty


@case
def eventfd_counter():
    counter = os.eventfd(5, os.EFD_NONBLOCK)
    semaphore = os.eventfd(3, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)

    def mutate():
        os.eventfd_write(counter, 100)
        os.eventfd_read(semaphore)

    def check():
        equal(os.eventfd_read(counter), 5, "counter")
        raises(errno.EAGAIN, os.eventfd_read, counter)
        equal([os.eventfd_read(semaphore) for _ in range(3)], [1, 1, 1], "semaphore")
        raises(errno.EAGAIN, os.eventfd_read, semaphore)

    return mutate, check


@case
def epoll_registrations():
    poller = select.epoll()
    ready, writer = os.pipe()
    idle, idle_writer = os.pipe()
    poller.register(ready, select.EPOLLIN)
    poller.register(idle, select.EPOLLIN | select.EPOLLET)
    once, once_writer = os.pipe()
    poller.register(once, select.EPOLLIN | select.EPOLLONESHOT)
    os.write(writer, b"x")

    def mutate():
        poller.unregister(ready)
        poller.modify(idle, select.EPOLLOUT)
        os.write(once_writer, b"x")
        poller.poll(1)
        poller.register(writer, select.EPOLLOUT)

    def check():
        equal(poller.poll(20), [(ready, select.EPOLLIN)], "ready at first")
        os.read(ready, 1)
        equal(poller.poll(0), [], "nothing ready")
        os.write(idle_writer, b"x")
        equal(poller.poll(20), [(idle, select.EPOLLIN)], "edge")
        equal(poller.poll(0), [], "edge triggered: once")
        os.write(once_writer, b"x")
        equal(poller.poll(20), [(once, select.EPOLLIN)], "one shot")
        equal(poller.poll(0), [], "one shot: once")
        raises(errno.EEXIST, poller.register, ready, select.EPOLLIN)

    return mutate, check


@case
def epoll_edge_told_since():
    poller = select.epoll()
    reader, writer = os.pipe()
    poller.register(reader, select.EPOLLIN | select.EPOLLET)
    os.write(writer, b"x")

    def mutate():
        equal(poller.poll(20), [(reader, select.EPOLLIN)], "the edge")
        equal(poller.poll(0), [], "once")

    return mutate, mutate


@case
def epoll_of_a_descriptor_closed_since():
    poller = select.epoll()
    reader, writer = os.pipe()
    poller.register(reader, select.EPOLLIN)

    def mutate():
        os.close(reader)
        poller.close()

    def check():
        equal(poller.poll(0), [], "nothing ready")
        os.write(writer, b"x")
        equal(poller.poll(20), [(reader, select.EPOLLIN)], "ready")

    return mutate, check


@case
def epoll_nested():
    inner, outer = select.epoll(), select.epoll()
    reader, writer = os.pipe()
    inner.register(reader, select.EPOLLIN)
    outer.register(inner.fileno(), select.EPOLLIN)

    def mutate():
        outer.unregister(inner.fileno())
        inner.unregister(reader)

    def check():
        equal(outer.poll(0), [], "nothing ready")
        os.write(writer, b"x")
        equal(outer.poll(20), [(inner.fileno(), select.EPOLLIN)], "outer")
        equal(inner.poll(20), [(reader, select.EPOLLIN)], "inner")

    return mutate, check


def set_timer(descriptor, seconds, interval):
    new = struct.pack("=qqqq", int(interval), int(interval % 1 * 1e9), int(seconds), int(seconds % 1 * 1e9))
    call(libc.timerfd_settime, descriptor, 0, new, None)


def timer(descriptor):
    old = ctypes.create_string_buffer(32)
    call(libc.timerfd_gettime, descriptor, old)
    interval, interval_ns, left, left_ns = struct.unpack("=qqqq", old.raw)
    return left + left_ns / 1e9, interval + interval_ns / 1e9


@case
def timerfd_armed_and_expired():
    flags = os.O_NONBLOCK | os.O_CLOEXEC
    armed = call(libc.timerfd_create, time.CLOCK_MONOTONIC, flags)
    set_timer(armed, 5000, 7)
    expired = call(libc.timerfd_create, time.CLOCK_MONOTONIC, flags)
    set_timer(expired, 0.001, 0)
    idle = call(libc.timerfd_create, time.CLOCK_REALTIME, flags)
    select.select([expired], [], [])

    def mutate():
        set_timer(armed, 0, 0)
        os.read(expired, 8)
        set_timer(idle, 0.001, 0)

    def check():
        left, interval = timer(armed)
        equal(4000 < left <= 5000 and interval == 7, True, f"left {left}, interval {interval}")
        raises(errno.EAGAIN, os.read, armed, 8)
        equal(struct.unpack("=Q", os.read(expired, 8)), (1,), "expirations")
        raises(errno.EAGAIN, os.read, expired, 8)
        raises(errno.EAGAIN, os.read, idle, 8)
        set_timer(idle, 0.001, 0)
        equal(select.select([idle], [], [], 20)[0], [idle], "a new timer")

    return mutate, check


@case
def timerfd_periodic_goes_on():
    ticker = call(libc.timerfd_create, time.CLOCK_MONOTONIC, os.O_CLOEXEC)
    set_timer(ticker, 0.02, 0.02)

    def mutate():
        set_timer(ticker, 0, 0)

    def check():
        for _ in range(3):
            equal(select.select([ticker], [], [], 20)[0], [ticker], "tick")
            os.read(ticker, 8)

    return mutate, check


def signal_set(*signals):
    return struct.pack("=Q", sum(1 << (number - 1) for number in signals)) + bytes(120)


@case
def signalfd_with_a_pending_signal():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2])
    descriptor = call(libc.signalfd, -1, signal_set(signal.SIGUSR1), os.O_NONBLOCK)
    os.kill(os.getpid(), signal.SIGUSR1)

    def mutate():
        os.read(descriptor, 128)
        call(libc.signalfd, descriptor, signal_set(signal.SIGUSR2), os.O_NONBLOCK)

    def check():
        record = os.read(descriptor, 128)
        number, code, pid = struct.unpack_from("=IxxxxiI", record)
        equal((number, code, pid), (signal.SIGUSR1, 0, os.getpid()), "signal, code, sender")
        raises(errno.EAGAIN, os.read, descriptor, 128)
        os.kill(os.getpid(), signal.SIGUSR2)
        raises(errno.EAGAIN, os.read, descriptor, 128)

    return mutate, check


def watch(path):
    descriptor = call(libc.inotify_init1, os.O_NONBLOCK)
    number = call(libc.inotify_add_watch, descriptor, path.encode(), 0x100 | 0x200)  # IN_CREATE | IN_DELETE
    return descriptor, number


def events(descriptor):
    result, data, at = [], os.read(descriptor, 4096), 0
    while at < len(data):
        number, mask, _, length = struct.unpack_from("=iIII", data, at)
        result.append((number, mask, data[at + 16 : at + 16 + length].rstrip(b"\0")))
        at += 16 + length
    return result


@case
def inotify_watches():
    os.mkdir("/playground/watched")
    descriptor, number = watch("/playground/watched")

    def mutate():
        call(libc.inotify_rm_watch, descriptor, number)
        os.close(descriptor)

    def check():
        raises(errno.EAGAIN, os.read, descriptor, 4096)
        open("/playground/watched/new", "w").close()
        equal(events(descriptor), [(number, 0x100, b"new")], "events")
        os.unlink("/playground/watched/new")
        equal(events(descriptor), [(number, 0x200, b"new")], "events")

    return mutate, check


@case
def memfd_shared_with_a_child():
    import mmap

    descriptor = os.memfd_create("shared", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 1 << 20)
    area = mmap.mmap(descriptor, 1 << 20)
    area[5000:5005] = b"hello"
    put("area", area)
    child = Child()
    fcntl.fcntl(descriptor, 1033, 2)  # F_ADD_SEALS, F_SEAL_SHRINK
    os.lseek(descriptor, 77, os.SEEK_SET)
    os.fchmod(descriptor, 0o640)
    os.fchown(descriptor, 7, 8)

    def mutate():
        os.fchmod(descriptor, 0o600)
        os.fchown(descriptor, 0, 0)
        area[5000:5005] = b"WRONG"
        child.ask("put('area', None)")
        os.close(descriptor)

    def check():
        equal(area[5000:5005], b"hello", "mapped")
        equal(os.pread(descriptor, 5, 5000), b"hello", "read")
        equal(os.lseek(descriptor, 0, os.SEEK_CUR), 77, "offset")
        found = os.fstat(descriptor)
        equal((oct(found.st_mode), found.st_uid, found.st_gid), ("0o100640", 7, 8), "mode and owner")
        equal(fcntl.fcntl(descriptor, 1034), 2, "seals")
        equal(child.ask("area[5000:5005]"), b"hello", "in the child")
        child.ask("area.__setitem__(slice(9000, 9005), b'there')")
        equal(area[9000:9005], b"there", "written by the child")
        os.pwrite(descriptor, b"third", 9000)
        equal(child.ask("area[9000:9005]"), b"third", "written by descriptor")

    return mutate, check


@case
def memfd_sealed_since():
    import mmap

    descriptor = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 8192)
    area = mmap.mmap(descriptor, 8192)
    area[5000:5005] = b"hello"
    put("area", area)
    child = Child()
    os.lseek(descriptor, 77, os.SEEK_SET)
    again = os.dup(descriptor)

    def mutate():
        area[5000:5005] = b"WRONG"
        fcntl.fcntl(descriptor, 1033, 1 | 2 | 4 | 16)  # F_ADD_SEALS: all but F_SEAL_WRITE, which mappings forbid

    def check():
        equal(fcntl.fcntl(descriptor, 1034), 0, "seals")
        equal(area[5000:5005], b"hello", "mapped")
        equal(child.ask("area[5000:5005]"), b"hello", "in the child")
        equal(os.lseek(again, 0, os.SEEK_CUR), 77, "offset")
        os.pwrite(again, b"third", 6000)
        equal(area[6000:6005], b"third", "written by descriptor")
        equal(child.ask("area[6000:6005]"), b"third", "in the child")
        os.ftruncate(descriptor, 4096)
        equal(os.fstat(again).st_size, 4096, "size")
        os.ftruncate(descriptor, 8192)

    return mutate, check


@case
def memfds_sealed_before():
    import mmap

    def sealed(seals):
        descriptor = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, 8192)
        os.pwrite(descriptor, b"hello", 5000)
        area = mmap.mmap(descriptor, 8192)
        if seals & 8:
            area.close()
        fcntl.fcntl(descriptor, 1033, seals)  # F_ADD_SEALS
        if seals & 8:
            area = mmap.mmap(descriptor, 8192, prot=mmap.PROT_READ)
        return descriptor, area

    growing, of_growing = sealed(1 | 2)  # F_SEAL_SEAL, F_SEAL_SHRINK
    # With F_SEAL_FUTURE_WRITE, who has it mapped for writing already may go on.
    frozen, of_frozen = sealed(1 | 2 | 4 | 16)
    put("area", of_frozen)
    child = Child()
    reader = mmap.mmap(frozen, 8192, prot=mmap.PROT_READ)
    constant, of_constant = sealed(1 | 8)  # F_SEAL_WRITE

    def mutate():
        os.ftruncate(growing, 12288)
        of_frozen[5000:5005] = b"WRONG"
        child.ask("put('area', None)")
        of_constant.close()

    def check():
        equal([fcntl.fcntl(d, 1034) for d in (growing, frozen, constant)], [3, 23, 9], "seals")
        equal(os.fstat(growing).st_size, 8192, "size")
        for area in (of_growing, of_frozen, reader, of_constant):
            equal(area[5000:5005], b"hello", "mapped")
        equal(child.ask("area[5000:5005]"), b"hello", "in the child")
        raises(errno.EPERM, os.pwrite, frozen, b"x", 6000)
        raises(errno.EPERM, mmap.mmap, frozen, 8192)
        child.ask("area.__setitem__(slice(6000, 6005), b'there')")
        equal((of_frozen[6000:6005], reader[6000:6005]), (b"there", b"there"), "written by the child")
        os.ftruncate(growing, 12288)

    return mutate, check


@case
def memfd_that_is_executed():
    """The kernel executes no file that somebody could write to, but for one that was never opened by a name."""
    descriptor = os.memfd_create("program", 0)
    os.write(descriptor, b"#!/bin/true")

    def execute():
        pid = os.fork()
        if pid == 0:
            try:
                os.execve(descriptor, ["program"], {})
            except OSError as error:
                os._exit(error.errno)
        equal(os.waitpid(pid, 0)[1] >> 8, 0, "how it ends")

    execute()

    def mutate():
        os.ftruncate(descriptor, 0)

    return mutate, execute


@case
def memfd_that_is_being_executed():
    descriptor = os.memfd_create("cat")
    with open("/bin/cat", "rb") as cat:
        os.write(descriptor, cat.read())
    program = f"/proc/self/fd/{descriptor}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with_a_number = subprocess.Popen([program], pass_fds=[descriptor], **pipes)
    without = subprocess.Popen([program], close_fds=False, **pipes)
    os.close(descriptor)

    def through(cat):
        os.write(cat.stdin.fileno(), b"text\n")
        return read_line(cat.stdout.fileno())

    def links():
        return [os.readlink(f"/proc/{cat.pid}/exe") for cat in (with_a_number, without)]

    before = links()
    equal([through(cat) for cat in (with_a_number, without)], ["text"] * 2, "before")

    def mutate():
        for cat in (with_a_number, without):
            cat.kill()
            cat.wait()

    def check():
        equal([through(cat) for cat in (with_a_number, without)], ["text"] * 2, "answers")
        equal(links(), before, "programs")

    return mutate, check


@case
def pty_with_both_ends_inside():
    master, slave = pty.openpty()
    tty.setraw(slave)
    termios.tcsetwinsize(slave, (33, 99))
    attributes = termios.tcgetattr(slave)
    os.set_blocking(master, False)
    owner = os.fstat(slave).st_uid

    def mutate():
        termios.tcsetwinsize(master, (1, 2))
        changed = termios.tcgetattr(slave)
        changed[3] |= termios.ECHO | termios.ICANON
        termios.tcsetattr(slave, termios.TCSANOW, changed)
        os.close(slave)

    def check():
        equal(termios.tcgetwinsize(master), (33, 99), "window size")
        equal(termios.tcgetattr(slave), attributes, "attributes")
        equal(os.fstat(slave).st_uid, owner, "owner")
        os.close(os.open(os.ttyname(slave), os.O_RDWR | os.O_NOCTTY))
        raises(errno.EAGAIN, os.read, master, 1)
        os.write(master, b"ping")
        equal(os.read(slave, 10), b"ping", "sent on")
        os.write(slave, b"pong")
        eventually(lambda: select.select([master], [], [], 0)[0], "the answer")
        equal(os.read(master, 10), b"pong", "answered")

    return mutate, check


@case
def pty_with_a_session_on_it():
    pid, master = pty.fork()
    if pid == 0:
        os.execv("/bin/sh", ["sh"])
    answers = bytearray()

    def until(text):
        while text not in answers:
            if not select.select([master], [], [], 20)[0]:
                raise AssertionError(f"no {text!r} in {bytes(answers)!r}")
            answers.extend(os.read(master, 1000))
        answers.clear()

    os.write(master, b"PS1=; stty -echo; x=secret; echo be''gun\n")
    until(b"begun\r\n")

    def mutate():
        os.write(master, b"x=spoiled; exit\n")
        os.waitpid(pid, 0)
        os.close(master)

    def check():
        os.write(master, b"echo $$:$x:\n")
        until(f"{pid}:secret:".encode())
        os.write(master, b"sleep 1000\n")
        eventually(lambda: os.tcgetpgrp(master) != pid, "the job in the foreground")
        os.write(master, b"\x03")
        os.write(master, b"echo interrupted\n")
        until(b"interrupted\r\n")

    return mutate, check


@case
def pty_whose_foreground_group_ended_since():
    """The group gets its number again, and signals of the terminal must reach it. Its leader does not look after the terminal."""
    master, slave = os.openpty()

    def lead():
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        put("got", [])
        put("job", Child(lambda: (os.setpgid(0, 0), signal.signal(signal.SIGINT, lambda *_: got.append(1)))))
        os.tcsetpgrp(slave, job.pid)

    leader = Child(lead)
    foreground = f"os.tcgetpgrp({slave}) == job.pid"
    equal(leader.ask(f"(job.ask('got'), {foreground})"), ([], True), "before")

    def mutate():
        leader.ask("job.kill()")

    def check():
        equal(leader.ask(f"(job.ask('got'), {foreground})"), ([], True), "the group")
        os.write(master, b"\x03")
        eventually(lambda: leader.ask("job.ask('got')") == [1], "the signal")

    return mutate, check


@case
def device_nodes():
    opened = {name: os.open(f"/dev/{name}", os.O_RDWR) for name in ("null", "zero", "full")}
    random = os.open("/dev/urandom", os.O_RDONLY)
    plain = os.open("/playground/not-random", os.O_RDWR | os.O_CREAT)
    before = descriptors()

    def mutate():
        for descriptor in opened.values():
            os.close(descriptor)
        os.dup2(plain, random)

    def check():
        equal(descriptors(), before, "descriptors")
        equal(os.read(opened["null"], 10), b"", "null")
        equal(os.read(opened["zero"], 10), bytes(10), "zero")
        raises(errno.ENOSPC, os.write, opened["full"], b"x")
        equal(len(os.read(random, 10)), 10, "urandom")

    return mutate, check


IOCTL = {"TIOCSPTLCK": 0x40045431, "TIOCGPTLCK": 0x80045439, "TIOCGPKT": 0x80045438, "TIOCGEXCL": 0x80045440}


def told(descriptor, request):
    return struct.unpack("i", fcntl.ioctl(descriptor, IOCTL[request], bytes(4)))[0]


@case
def pty_with_lines_that_nobody_has_read():
    master, slave = pty.openpty()
    os.fchown(slave, 1234, 4321)
    os.fchmod(slave, 0o640)
    # What is typed is shown, and a character for the end of the file ends a line without being in it.
    os.write(master, b"first line\rsecond\rended\4partial\177ly ty\026\003ped")
    eventually(lambda: told_bytes(slave) >= 18, "the lines")
    os.write(slave, b"out\n")
    attributes = termios.tcgetattr(slave)
    os.set_blocking(slave, False)
    shown = b"first line\r\nsecond\r\nendedpartial\b \bly ty^\b^Cpedout\r\n"
    eventually(lambda: told_bytes(master) == len(shown), "the echo")

    def mutate():
        os.read(slave, 100)
        os.write(master, b"more\r")
        os.read(master, 10)

    def check():
        equal(termios.tcgetattr(slave), attributes, "attributes")
        lines = [os.read(slave, 100) for _ in range(3)]
        equal(lines, [b"first line\n", b"second\n", b"ended"], "lines")
        raises(errno.EAGAIN, os.read, slave, 100)
        equal(os.read(master, 1000), shown, "what was shown")
        os.write(master, b"\r")
        eventually(lambda: select.select([slave], [], [], 0)[0], "the last line")
        equal(os.read(slave, 100), b"partialy ty\003ped\n", "the line that had not ended")
        owner = os.fstat(slave)
        equal((owner.st_uid, owner.st_gid, owner.st_mode & 0o777), (1234, 4321, 0o640), "owner")

    return mutate, check


def told_bytes(descriptor):
    return struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))[0]


@case
def pty_with_bytes_that_nobody_has_read():
    master, slave = pty.openpty()
    tty.setraw(slave)
    control = termios.tcgetattr(slave)
    control[6][termios.VMIN] = 200
    termios.tcsetattr(slave, termios.TCSANOW, control)
    os.set_blocking(slave, False)
    data = bytes(range(256))[:190] + b"\0\n\r\4\177"
    os.write(master, data)
    eventually(lambda: told_bytes(slave) == len(data), "the bytes")
    os.write(slave, b"answer" * 400)
    eventually(lambda: told_bytes(master) == 2400, "the answer")
    fcntl.ioctl(master, termios.TIOCPKT, struct.pack("i", 1))
    fcntl.ioctl(slave, termios.TIOCEXCL)
    fcntl.ioctl(master, IOCTL["TIOCSPTLCK"], struct.pack("i", 1))

    def mutate():
        fcntl.ioctl(master, termios.TIOCPKT, struct.pack("i", 0))
        fcntl.ioctl(slave, termios.TIOCNXCL)
        fcntl.ioctl(master, IOCTL["TIOCSPTLCK"], struct.pack("i", 0))
        termios.tcflush(slave, termios.TCIFLUSH)
        os.read(master, 100)

    def check():
        modes = told(master, "TIOCGPKT"), told(slave, "TIOCGEXCL"), told(master, "TIOCGPTLCK")
        equal(modes, (1, 1, 1), "packets, exclusive, locked")
        equal(termios.tcgetattr(slave), control, "attributes")
        equal(told_bytes(slave), len(data), "as many bytes")
        os.write(master, b"12345")
        got = b""
        while len(got) < len(data) + 5:
            got += os.read(slave, 300)
        equal(got, data + b"12345", "the bytes")
        answer = b""
        while len(answer) < 2400:
            packet = os.read(master, 4000)
            equal(packet[0], 0, "a packet of data")
            answer += packet[1:]
        equal(answer, b"answer" * 400, "the answer")

    return mutate, check


@case
def pty_whose_master_is_closed():
    master, slave = pty.openpty()
    another = os.dup(slave)
    os.close(master)
    before = descriptors()

    def mutate():
        os.close(slave)

    def check():
        equal(descriptors(), before, "descriptors")
        for end in (slave, another):
            equal(os.read(end, 10), b"", "the end")
            raises(errno.EIO, os.write, end, b"x")

    return mutate, check


@case
def signals_of_a_file_for_another_user():
    reader, writer = os.pipe()
    heard = []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    os.setresuid(1000, 1001, 0)
    fcntl.fcntl(reader, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(reader, fcntl.F_SETSIG, signal.SIGUSR1)
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC)
    os.setresuid(0, 0, 0)
    os.setresuid(1000, 1000, 1000)
    users = fcntl.fcntl(reader, 17, bytes(8))  # F_GETOWNER_UIDS

    def mutate():
        os.write(writer, b"x")
        eventually(lambda: heard, "an early signal")

    def check():
        equal(fcntl.fcntl(reader, 17, bytes(8)), users, "who has asked for signals")
        os.write(writer, b"x")
        eventually(lambda: heard, "the signal")

    return mutate, check


@case
def signals_of_a_file_for_one_thread():
    tid = waiting_thread()
    reading, writing = os.pipe()
    told = []
    signal.signal(signal.SIGUSR1, lambda *_: told.append("SIGUSR1"))
    fcntl.fcntl(reading, 10, signal.SIGUSR1)  # F_SETSIG
    fcntl.fcntl(reading, 15, struct.pack("ii", 0, tid))  # F_SETOWN_EX of F_OWNER_TID
    fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC)

    def mutate():
        os.close(reading)

    def check():
        owner = fcntl.fcntl(reading, 16, bytes(8))  # F_GETOWN_EX
        equal(struct.unpack("ii", owner), (0, tid), "owner")
        os.write(writing, b"x")
        eventually(lambda: told, "the signal")

    return mutate, check


@case
def inotify_of_a_removed_directory():
    os.mkdir("/playground/gone")
    directory = os.open("/playground/gone", os.O_RDONLY)
    watching, number = watch("/playground/gone")
    os.rmdir("/playground/gone")

    def mutate():
        os.close(watching)

    def check():
        equal(os.listdir(directory), [], "the directory")
        with open(f"/proc/self/fdinfo/{watching}") as info:
            equal(info.read().count(f"inotify wd:{number} "), 1, "watches")

    return mutate, check


@case
def dev_tty_in_another_session():
    """Opened by who leads a session, and kept only by a child that has a session of its own."""
    master, slave = pty.openpty()

    def lead():
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        put("tty", os.open("/dev/tty", os.O_RDWR))

    leader = Child(lead)
    leader.ask("put('other', Child(os.setsid)).pid")
    leader.ask("os.close(tty)")

    def mutate():
        leader.ask("other.ask('os.close(tty)')")

    def check():
        equal(leader.ask("other.ask('os.write(tty, b\"hello\")')"), 5, "written")
        equal(os.read(master, 10), b"hello", "read")

    return mutate, check


@case
def dev_tty_hung_up_since():
    master, slave = pty.openpty()

    def lead():
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        put("tty", os.open("/dev/tty", os.O_RDWR))
        os.close(slave)
        os.close(master)

    leader = Child(lead)
    leader.ask("tty")
    os.close(slave)

    def mutate():
        os.close(master)
        equal("OSError" in str(leader.ask("os.write(tty, b'x')")), True, "hung up")

    def check():
        equal(leader.ask("os.write(tty, b'hello')"), 5, "written")
        equal(os.read(master, 10), b"hello", "read")

    return mutate, check


@case
def terminal_of_all_in_a_session():
    """Only who leads a session can be given a terminal; the others have it from their birth on, or not at all."""
    master, slave = pty.openpty()

    def lead():
        os.setsid()
        put("before", Child())
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        os.close(master)
        os.close(slave)
        put("after", Child())
        after.ask("put('below', Child()).pid")
        # In the foreground is another group than the leader's.
        os.setpgid(after.pid, after.pid)
        tty = os.open("/dev/tty", os.O_RDWR)
        os.tcsetpgrp(tty, after.pid)
        os.close(tty)

    leader = Child(lead)
    os.close(slave)
    writes = "os.write(os.open('/dev/tty', os.O_RDWR), b'hello')"
    expressions = "before.pid", "after.pid", "after.ask('below.pid')"
    before = [stat(pid)[2:6] for pid in [leader.pid, *(leader.ask(expression) for expression in expressions)]]
    equal([number for _, _, number, _ in before][1], "0", "the terminal of who was born before")

    def mutate():
        leader.ask("after.kill()")
        leader.ask("before.kill()")

    def check():
        pids = [leader.pid, *(leader.ask(expression) for expression in expressions)]
        equal([stat(pid)[2:6] for pid in pids], before, "groups, sessions, terminals and foreground groups")
        equal(leader.ask(f'after.ask("below.ask(\\"{writes}\\")")'), 5, "written")
        equal(os.read(master, 10), b"hello", "read")
        equal("OSError" in str(leader.ask(f'before.ask("{writes}")')), True, "without a terminal")

    return mutate, check


@case
def terminal_given_up_since():
    master, slave = pty.openpty()

    def lead():
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        put("member", Child())

    leader = Child(lead)
    before = stat(leader.ask("member.pid"))[4]

    def mutate():
        leader.ask(f"member.ask('__import__(\"fcntl\").ioctl({slave}, {termios.TIOCNOTTY}, 0)')")
        equal(stat(leader.ask("member.pid"))[4], "0", "the terminal")

    def check():
        equal(stat(leader.ask("member.pid"))[4], before, "the terminal")

    return mutate, check


@case
def pty_whose_slave_side_is_closed():
    """The master tells so, when all is read; and not before anybody has opened the other side."""
    left, slave = pty.openpty()
    name = os.ttyname(slave)
    os.close(slave)
    talked, slave = pty.openpty()
    os.write(slave, b"farewell")
    os.close(slave)
    new = os.open("/dev/ptmx", os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY)
    for master in (left, talked):
        os.set_blocking(master, False)

    def mutate():
        for master in (left, talked, new):
            os.close(master)

    def check():
        raises(errno.EIO, os.read, left, 10)
        equal(os.read(talked, 20), b"farewell", "output")
        raises(errno.EIO, os.read, talked, 10)
        raises(errno.EAGAIN, os.read, new, 10)
        again = os.open(name, os.O_RDWR | os.O_NOCTTY)
        os.write(again, b"hello")
        equal(os.read(left, 20), b"hello", "output of who has opened it again")

    return mutate, check
