"""Files, directories and pipes: offsets, flags, contents, and who shares them."""

import fcntl
import mmap
import resource


@case
def file_offset_flags_and_content():
    plain = os.open("/playground/plain", os.O_RDWR | os.O_CREAT)
    os.write(plain, b"0123456789")
    os.lseek(plain, 4, os.SEEK_SET)
    append = os.open("/playground/append", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(append, b"first\n")
    os.set_inheritable(append, True)
    readonly = os.open("/playground/plain", os.O_RDONLY | os.O_NOFOLLOW)
    before = descriptors()

    def mutate():
        os.write(plain, b"xxxxxxxxxxxxxxxxxxx")
        os.ftruncate(plain, 3)
        fcntl.fcntl(append, fcntl.F_SETFL, os.O_NONBLOCK)
        os.set_inheritable(append, False)
        os.set_inheritable(readonly, True)
        os.write(append, b"second\n")
        os.close(readonly)

    def check():
        equal(descriptors(), before, "descriptors")
        equal(os.lseek(plain, 0, os.SEEK_CUR), 4, "offset")
        equal(os.read(plain, 100), b"456789", "the rest of the file")
        equal(os.pread(readonly, 100, 0), b"0123456789", "the file")
        equal(os.lseek(readonly, 0, os.SEEK_CUR), 0, "offset of the other description")
        raises(errno.EBADF, os.write, readonly, b"x")
        equal(os.get_inheritable(append), True, "inheritable")
        os.write(append, b"third\n")
        equal(open("/playground/append").read(), "first\nthird\n", "the appended file")

    return mutate, check


@case
def file_unlinked_but_open():
    kept = os.open("/playground/gone", os.O_RDWR | os.O_CREAT)
    os.write(kept, b"still here" * 1000)
    os.unlink("/playground/gone")

    def mutate():
        os.ftruncate(kept, 0)
        os.close(kept)

    def check():
        equal(os.fstat(kept).st_nlink, 0, "links")
        equal(os.pread(kept, 20000, 0), b"still here" * 1000, "content")
        os.write(kept, b"more")
        equal(os.fstat(kept).st_size, 10004, "size after a write")
        equal(os.path.exists("/playground/gone"), False, "the name")

    return mutate, check


@case
def file_among_very_many_that_change():
    os.makedirs("/playground/many/below")
    os.chdir("/playground/many")
    names = ["%d" % i for i in range(300)] + ["below/%d" % i for i in range(100)]
    for name in names:
        with open(name, "w") as file:
            file.write(name.ljust(5000))
    os.symlink("0", "link")
    opened = {name: os.open(name, os.O_RDWR) for name in ("1", "below/1")}
    append = os.open("2", os.O_WRONLY | os.O_APPEND)
    path_only = os.open("3", os.O_PATH)
    below = os.open("below", os.O_RDONLY | os.O_DIRECTORY)
    mapped = {name: mmap.mmap(os.open(name, os.O_RDWR), 5000) for name in ("4", "5")}
    listed = sorted(os.listdir("."))

    def mutate():
        os.path.exists("new")
        for number, name in enumerate(names):
            if number % 4 == 0:
                with open(name, "w") as file:
                    file.write("changed".ljust(9000))
            elif number % 4 == 1:
                os.pwrite(opened.get(name) or os.open(name, os.O_RDWR), b"changed", 0)
            elif number % 4 == 2:
                os.unlink(name)
                os.path.exists(name)
            else:
                os.rename(name, name + "moved")
        for number in range(100):
            open("new%d" % number, "w").close()
        os.unlink("link")
        os.symlink("1", "link")
        mapped["4"][0:7] = b"changed"

    def check():
        for name, descriptor in opened.items():
            equal(os.pread(descriptor, 9000, 0), name.ljust(5000).encode(), "descriptor of " + name)
        for name, memory in mapped.items():
            equal(memory[:], name.ljust(5000).encode(), "mapping of " + name)
        equal(os.fstat(path_only).st_size, 5000, "size by a descriptor of a path")
        equal(sorted(os.listdir(".")), listed, "names")
        equal(sorted(os.listdir(below)), sorted("%d" % i for i in range(100)), "names below")
        equal(os.readlink("link"), "0", "symbolic link")
        equal(os.path.exists("new0") or os.path.exists("3moved"), False, "names that were not there")
        os.write(append, b"end")
        equal(os.stat("2").st_size, 5003, "size after an append")
        os.ftruncate(append, 5000)
        for name in names:
            with open("/playground/many/" + name) as file:
                equal(file.read(), name.ljust(5000), name)

    return mutate, check


@case
def file_whose_name_was_taken_by_another():
    kept = os.open("/playground/name", os.O_RDWR | os.O_CREAT)
    os.write(kept, b"original")

    def mutate():
        os.unlink("/playground/name")
        with open("/playground/name", "w") as other:
            other.write("impostor")
        os.pwrite(kept, b"SPOILED!", 0)

    def check():
        equal(os.fstat(kept).st_ino, os.stat("/playground/name").st_ino, "inode")
        equal(open("/playground/name").read(), "original", "by name")
        os.pwrite(kept, b"by descriptor", 0)
        equal(open("/playground/name").read(), "by descriptor", "written by descriptor")

    return mutate, check


@case
def directory_that_was_removed_and_stays_open():
    os.mkdir("/playground/removed")
    fd = os.open("/playground/removed", os.O_RDONLY | os.O_DIRECTORY)
    os.rmdir("/playground/removed")

    def mutate():
        os.close(fd)

    def check():
        equal(os.fstat(fd).st_nlink, 0, "links")
        equal(os.listdir(fd), [], "entries")
        raises(errno.ENOENT, lambda: os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd))

    return mutate, check


@case
def directory_that_was_removed_open_and_worked_in():
    """By two processes, all of whom have the same one."""
    os.mkdir("/playground/removed")
    os.chdir("/playground/removed")
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    os.rmdir("/playground/removed")
    child = Child()

    def mutate():
        os.chdir("/")
        child.ask("os.chdir('/')")
        os.close(fd)

    def check():
        equal(os.stat(".").st_ino, os.fstat(fd).st_ino, "worked in and open")
        equal(child.ask("os.stat('.').st_ino"), os.fstat(fd).st_ino, "the child's")
        equal(os.readlink("/proc/self/cwd"), "/playground/removed (deleted)", "its name")

    return mutate, check


@case
def file_renamed_since():
    os.mkdir("/playground/from")
    kept = os.open("/playground/from/file", os.O_RDWR | os.O_CREAT)
    os.write(kept, b"content")

    def mutate():
        os.rename("/playground/from", "/playground/to")
        os.rename("/playground/to/file", "/playground/to/other")

    def check():
        equal(os.path.exists("/playground/to"), False, "the new name")
        equal(os.stat("/playground/from/file").st_ino, os.fstat(kept).st_ino, "inode")

    return mutate, check


@case
def directory_position():
    os.mkdir("/playground/many")
    for number in range(300):
        open(f"/playground/many/{number:03}", "w").close()
    directory = os.open("/playground/many", os.O_RDONLY | os.O_DIRECTORY)

    def some(size=1024):
        buffer = ctypes.create_string_buffer(size)
        length = call(libc.syscall, 217, directory, buffer, size)
        names, at = [], 0
        while at < length:
            (record,) = struct.unpack_from("=H", buffer, at + 16)
            names.append(buffer.raw[at + 19 : at + record].split(b"\0")[0])
            at += record
        return names

    seen = some()

    def mutate():
        while some():
            pass
        os.unlink("/playground/many/299")

    def check():
        names = list(seen)
        while more := some():
            names += more
        wanted = [b".", b".."] + [b"%03d" % n for n in range(300)]
        equal(sorted(names), sorted(wanted), "all entries, once")

    return mutate, check


@case
def pipe_contents():
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 18)
    data = bytes(range(256)) * 600
    os.write(writer, data)
    os.set_blocking(reader, False)

    def mutate():
        os.read(reader, 100_000)
        os.write(writer, b"other")

    def check():
        equal(fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ), 1 << 18, "pipe size")
        got = b""
        while len(got) < len(data):
            got += os.read(reader, 1 << 20)
        equal(got, data, "contents")
        raises(errno.EAGAIN, os.read, reader, 1)
        os.write(writer, b"on")
        equal(os.read(reader, 10), b"on", "written on")

    return mutate, check


@case
def pipe_of_packets():
    reader, writer = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
    for packet in (b"a", b"bb", b"ccc"):
        os.write(writer, packet)

    def mutate():
        os.read(reader, 10)
        os.write(writer, b"dddd")

    def check():
        for packet in (b"a", b"bb", b"ccc"):
            equal(os.read(reader, 10), packet, "packet")
        raises(errno.EAGAIN, os.read, reader, 1)

    return mutate, check


@case
def pipe_whose_other_end_was_closed():
    reader, end = os.pipe()
    os.write(end, b"last words")
    os.close(end)
    end, writer = os.pipe()
    os.close(end)

    def mutate():
        os.close(reader)
        os.close(writer)

    def check():
        equal(os.read(reader, 100), b"last words", "contents")
        equal(os.read(reader, 100), b"", "end of file")
        raises(errno.EPIPE, os.write, writer, b"x")

    return mutate, check


@case
def pipe_ends_closed_since():
    reader, writer = os.pipe()
    os.write(writer, b"kept")

    def mutate():
        os.close(writer)
        os.close(reader)

    def check():
        equal(os.read(reader, 100), b"kept", "contents")
        os.write(writer, b"more")
        equal(os.read(reader, 100), b"more", "written on")

    return mutate, check


@case
def pipe_between_children():
    reader, writer = os.pipe()
    put("reader", reader), put("writer", writer)
    one, two = Child(), Child()
    os.close(reader)
    os.close(writer)
    one.ask("os.write(writer, b'for two')")

    def mutate():
        equal(two.ask("os.read(reader, 100)"), b"for two")
        one.kill()
        two.kill()

    def check():
        equal(two.ask("os.read(reader, 100)"), b"for two", "contents")
        one.ask("os.write(writer, b'again')")
        equal(two.ask("os.read(reader, 100)"), b"again", "written on")
        one.ask("os.close(writer)")
        two.ask("os.close(writer)")
        equal(two.ask("os.read(reader, 100)"), b"", "end of file: nobody else holds the write end")

    return mutate, check


@case
def fifo():
    os.mkfifo("/playground/fifo")
    both = os.open("/playground/fifo", os.O_RDWR)
    reader = os.open("/playground/fifo", os.O_RDONLY | os.O_NONBLOCK)
    os.write(both, b"in the fifo")

    def mutate():
        os.read(reader, 4)
        os.close(both)
        os.close(reader)
        os.unlink("/playground/fifo")

    def check():
        equal(os.read(reader, 100), b"in the fifo", "contents")
        third = os.open("/playground/fifo", os.O_WRONLY | os.O_NONBLOCK)
        os.write(third, b"by name")
        equal(os.read(both, 100), b"by name", "through the name")
        raises(errno.EAGAIN, os.read, reader, 1)

    return mutate, check


@case
def offset_shared_by_dup_and_fork():
    first = os.open("/playground/shared", os.O_RDWR | os.O_CREAT)
    os.write(first, b"0123456789")
    os.lseek(first, 2, os.SEEK_SET)
    put("first", first)
    second = os.dup(first)
    apart = os.open("/playground/shared", os.O_RDONLY)
    child = Child()

    def mutate():
        os.close(second)
        equal(os.open("/playground/shared", os.O_RDWR), second, "the number is free")
        child.ask("os.lseek(first, 9, os.SEEK_SET)")
        child.ask("os.close(first)")
        os.dup2(first, apart)

    def check():
        equal(os.lseek(second, 0, os.SEEK_CUR), 2, "offset")
        equal(os.read(first, 1), b"2", "read by the first")
        equal(os.read(second, 1), b"3", "read by the duplicate")
        equal(child.ask("os.read(first, 1)"), b"4", "read by the child")
        equal(os.lseek(first, 0, os.SEEK_CUR), 5, "shared offset")
        equal(os.read(apart, 1), b"0", "read by an open of its own")
        fcntl.fcntl(second, fcntl.F_SETFL, os.O_APPEND)
        equal(bool(child.ask("fcntl.fcntl(first, fcntl.F_GETFL)") & os.O_APPEND), True, "shared flags")

    return mutate, check


@case
def description_held_by_the_child_alone():
    first = os.open("/playground/held", os.O_RDWR | os.O_CREAT)
    os.write(first, b"0123456789")
    put("first", first)
    one = Child()
    two = Child()
    os.lseek(first, 3, os.SEEK_SET)
    os.close(first)

    def mutate():
        one.kill()
        two.ask("os.lseek(first, 0, os.SEEK_SET)")

    def check():
        equal(one.ask("os.read(first, 1)"), b"3", "read by one")
        equal(two.ask("os.read(first, 1)"), b"4", "read by two")

    return mutate, check


@case
def descriptors_redirected():
    one = os.open("/playground/one", os.O_RDWR | os.O_CREAT)
    two = os.open("/playground/two", os.O_RDWR | os.O_CREAT)
    os.dup2(one, 40)
    os.dup2(two, 41, inheritable=False)
    reader, writer = os.pipe()
    os.write(40, b"to one")
    before = descriptors()

    def mutate():
        os.dup2(41, 40)
        os.dup2(reader, 41)
        os.close(writer)
        for _ in range(20):
            os.open("/etc/hostname", os.O_RDONLY)
        socket.socketpair()[0].detach()

    def check():
        equal(descriptors(), before, "descriptors")
        os.write(40, b"!")
        equal(open("/playground/one").read(), "to one!", "through 40")
        os.write(41, b"to two")
        equal(open("/playground/two").read(), "to two", "through 41")
        os.write(writer, b"x")
        equal(os.read(reader, 10), b"x", "through the pipe")

    return mutate, check


@case
def standard_streams_redirected_since():
    before = descriptors()

    def mutate():
        say("PASS")
        null = os.open("/dev/null", os.O_RDWR)
        inputs, _ = os.pipe()
        os.dup2(inputs, 0)
        os.dup2(null, 1)
        os.dup2(null, 2)
        return "said"

    def check():
        equal(descriptors(), before, "descriptors")

    return mutate, check


@case
def many_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    for number in range(100):
        kept = os.open(f"/playground/f{number}", os.O_RDWR | os.O_CREAT)
        os.write(kept, b"%d" % number)
        os.dup2(kept, 1000 + number)
    before = descriptors()

    def mutate():
        os.closerange(1000, 1100)

    def check():
        equal(descriptors(), before, "descriptors")
        for number in range(100):
            equal(os.pread(1000 + number, 10, 0), b"%d" % number, "content")

    return mutate, check


@case
def locks_held():
    one = os.open("/playground/flock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(one, fcntl.LOCK_EX)
    two = os.open("/playground/range", os.O_RDWR | os.O_CREAT)
    fcntl.lockf(two, fcntl.LOCK_EX, 10, 5)

    def mutate():
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.lockf(two, fcntl.LOCK_UN)

    def check():
        other = os.open("/playground/flock", os.O_RDWR)
        raises(errno.EAGAIN, fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child = Child()
        put_range = "os.open('/playground/range', os.O_RDWR)"
        attempt = f"fcntl.lockf({put_range}, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, "
        equal("BlockingIOError" in child.ask(attempt + "7)"), True, "the locked range")
        equal(child.ask(attempt + "20)"), None, "beyond the locked range")
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

    return mutate, check


@case
def locks_for_reading_and_of_descriptions():
    """A lock of a description is that of all who share it, and goes with the last."""
    path, child = "/playground/locked", Child()
    mine, shared = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))

    def lock(descriptor, command, kind, start, length):
        record = struct.pack("=hhxxxxqqixxxx", kind, 0, start, length, 0)
        fcntl.fcntl(descriptor, command, record)

    lock(shared, 37, fcntl.F_WRLCK, 20, 10)  # F_OFD_SETLK
    again = os.dup(shared)
    os.close(shared)
    # Who closes any descriptor of a file gives up the locks that the process has for itself.
    lock(mine, fcntl.F_SETLK, fcntl.F_RDLCK, 0, 10)
    reading = os.open(path, os.O_RDONLY)
    fcntl.flock(reading, fcntl.LOCK_SH)

    def may(kind, start):
        record = f"struct.pack('=hhxxxxqqixxxx', {kind}, 0, {start}, 1, 0)"
        attempt = f"__import__('fcntl').fcntl(os.open('{path}', os.O_RDWR), {fcntl.F_SETLK}, {record})"
        return "Error" not in str(child.ask(attempt))

    def mutate():
        lock(mine, fcntl.F_SETLK, fcntl.F_UNLCK, 0, 0)
        os.close(again)
        fcntl.flock(reading, fcntl.LOCK_EX)

    def check():
        equal([may(fcntl.F_WRLCK, 5), may(fcntl.F_RDLCK, 5)], [False, True], "where it is locked for reading")
        equal([may(fcntl.F_RDLCK, 25), may(fcntl.F_WRLCK, 15)], [False, True], "where a description has a lock")
        other = os.open(path, os.O_RDONLY)
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        raises(errno.EAGAIN, fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(again)
        equal(may(fcntl.F_WRLCK, 25), True, "when the description has gone")

    return mutate, check


@case
def files_of_sysfs():
    mtu = os.open("/sys/class/net/lo/mtu", os.O_RDONLY)
    first = os.read(mtu, 2)

    def mutate():
        os.close(mtu)

    def check():
        rest = os.read(mtu, 10)
        equal((first + rest).strip(), open("/sys/class/net/lo/mtu", "rb").read().strip(), "content and position")

    return mutate, check


@case
def leases():
    path, other = "/playground/leased", "/playground/broken"
    for name in (path, other):
        with open(name, "w") as file:
            file.write("content")
    held = os.open(path, os.O_RDONLY)
    fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    told = []
    signal.signal(signal.SIGIO, lambda *_: told.append("SIGIO"))
    signal.signal(signal.SIGUSR1, lambda *_: told.append("SIGUSR1"))
    fcntl.fcntl(held, 10, signal.SIGUSR1)  # F_SETSIG
    broken = os.open(other, os.O_RDONLY)
    fcntl.fcntl(broken, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    raises(errno.EAGAIN, os.open, other, os.O_RDONLY | os.O_NONBLOCK)
    eventually(lambda: told == ["SIGIO"], "the signal of the lease that is broken")

    def mutate():
        fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.close(broken)

    def check():
        equal(told, ["SIGIO"], "signals so far")
        equal(fcntl.fcntl(held, fcntl.F_GETLEASE), fcntl.F_RDLCK, "lease")
        equal(fcntl.fcntl(broken, fcntl.F_GETLEASE), fcntl.F_RDLCK, "what is left of the other")
        raises(errno.EAGAIN, os.open, path, os.O_WRONLY | os.O_NONBLOCK)
        eventually(lambda: told == ["SIGIO", "SIGUSR1"], "the signal that was asked for")
        fcntl.fcntl(broken, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        os.close(os.open(other, os.O_RDONLY))

    return mutate, check


@case
def path_descriptor_and_proc_file():
    path = os.open("/playground", os.O_PATH | os.O_DIRECTORY)
    process = os.open("/proc/self/status", os.O_RDONLY)
    os.read(process, 10)
    before = descriptors()

    def mutate():
        os.close(path)
        os.close(process)

    def check():
        equal(descriptors(), before, "descriptors")
        open(f"/proc/self/fd/{path}/through", "w").close()
        equal(os.path.exists("/playground/through"), True, "through O_PATH")
        equal(os.pread(process, 5, 0), b"Name:", "the status")
        equal(os.lseek(process, 0, os.SEEK_CUR), 10, "position")

    return mutate, check


@case
def what_proc_has_of_threads_that_live_and_that_have_ended():
    go_on, may_end, tids = threading.Event(), threading.Event(), []

    def note(until):
        tids.append(threading.get_native_id())
        until.wait()

    threads = [threading.Thread(target=note, args=(until,), daemon=True) for until in (go_on, may_end)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(tids) == 2, "two threads")
    child = Child(lambda: threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start())
    eventually(lambda: len(os.listdir(f"/proc/{child.pid}/task")) == 2, "two threads of the child")
    childs = max(int(tid) for tid in os.listdir(f"/proc/{child.pid}/task"))
    other = Child(lambda: threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start())
    eventually(lambda: len(os.listdir(f"/proc/{other.pid}/task")) == 2, "two threads of the other child")
    lasting = max(int(tid) for tid in os.listdir(f"/proc/{other.pid}/task"))
    own = os.open(f"/proc/self/task/{tids[0]}/status", os.O_RDONLY)
    of_other = os.open(f"/proc/{other.pid}/task/{lasting}/comm", os.O_RDWR)
    directory = os.open(f"/proc/{other.pid}/task/{lasting}", os.O_RDONLY | os.O_DIRECTORY)
    by_number = os.open(f"/proc/{lasting}/status", os.O_RDONLY)
    info = os.open(f"/proc/self/fdinfo/{own}", os.O_RDONLY)
    dead = [
        os.open(f"/proc/self/task/{tids[1]}/status", os.O_RDONLY),
        os.open(f"/proc/self/task/{tids[1]}", os.O_RDONLY | os.O_DIRECTORY),
        os.open(f"/proc/{child.pid}/task/{childs}/status", os.O_RDONLY),
        os.open(f"/proc/{child.pid}/task/{child.pid}/status", os.O_RDONLY),
        os.open(f"/proc/{child.pid}/fdinfo/0", os.O_RDONLY),
    ]
    may_end.set()
    child.kill()
    eventually(lambda: str(tids[1]) not in os.listdir("/proc/self/task"), "the end of the thread")
    before = descriptors()

    def mutate():
        for descriptor in [own, of_other, directory, by_number, info, dead[0], dead[2]]:
            os.close(descriptor)
        other.kill()
        go_on.set()

    def check():
        after = descriptors()
        # Of a descriptor that a process had which has ended nothing can be found again.
        equal([d for d in after if d[0] != dead[4]], [d for d in before if d[0] != dead[4]], "descriptors")
        equal(f"Pid:\t{tids[0]}\n" in os.pread(own, 4096, 0).decode(), True, "the thread's status")
        equal(os.pread(of_other, 20, 0), open(f"/proc/{lasting}/comm", "rb").read(), "the thread's name")
        equal("comm" in os.listdir(directory), True, "the thread's directory")
        equal(f"Pid:\t{lasting}\n" in os.pread(by_number, 4096, 0).decode(), True, "the status by its number")
        equal(os.pread(info, 100, 0).startswith(b"pos:\t0\n"), True, "what is told of a descriptor")
        for descriptor in (dead[0], dead[2], dead[3]):
            raises(errno.ESRCH, os.pread, descriptor, 10, 0)
        for thread in (tids[1], childs):
            equal(os.path.exists(f"/proc/{thread}"), False, "an ended thread")

    return mutate, check


@case
def what_proc_has_of_one_that_ends_later():
    child = Child()
    status_of_child = os.open(f"/proc/{child.pid}/status", os.O_RDONLY)

    def mutate():
        child.kill()
        raises(errno.ESRCH, os.read, status_of_child, 10)

    def check():
        equal(os.pread(status_of_child, 5, 0), b"Name:", "the status")

    return mutate, check


@case
def namespaces_and_what_proc_has_of_the_dead():
    child = Child()
    own = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in ("net", "mnt", "user", "uts")]
    names = [os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in own]
    equal(names[0][:5], "net:[", "a namespace")
    status_of_dead = os.open(f"/proc/{child.pid}/status", os.O_RDONLY)
    directory_of_dead = os.open(f"/proc/{child.pid}", os.O_RDONLY)
    child.kill()

    def mutate():
        for descriptor in own:
            os.close(descriptor)
        os.close(status_of_dead)
        os.close(directory_of_dead)

    def check():
        spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("net", "mnt", "user", "uts")]
        equal([os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in own], spaces, "namespaces")
        raises(errno.ESRCH, os.read, status_of_dead, 10)
        equal(os.path.exists(f"/proc/{child.pid}"), False, "the process")
        equal(os.readlink(f"/proc/self/fd/{directory_of_dead}").split(" ")[0], f"/proc/{child.pid}", "its directory")

    return mutate, check


@case
def what_proc_has_of_a_zombie():
    """Most of it cannot be opened once it is one."""
    child = Child(signal.pause)
    about = f"/proc/{child.pid}"
    names = ("status", "maps", "mem", "environ", "auxv", "mountinfo", "net/dev", "fdinfo/0", f"task/{child.pid}/smaps")
    files = [os.open(f"{about}/{name}", os.O_RDONLY) for name in names]
    directories = [os.open(f"{about}/{name}", os.O_RDONLY | os.O_DIRECTORY) for name in ("fd", "ns", "map_files")]
    os.read(files[1], 10)
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

    def mutate():
        for descriptor in files + directories:
            os.close(descriptor)

    def check():
        equal(os.pread(files[0], 5, 0), b"Name:", "the status")
        equal(stat(child.pid)[0], "Z", "state")
        for descriptor in files[1:] + directories:
            equal(os.readlink(f"/proc/self/fd/{descriptor}").split("/")[1], "proc", "what it is")
        equal(os.waitpid(child.pid, 0)[0], child.pid, "the zombie")

    return mutate, check


@case
def what_proc_has_of_a_process_that_runs_another_program_since():
    child = Child()
    maps, memory, state = (os.open(f"/proc/{child.pid}/{name}", os.O_RDONLY) for name in ("maps", "mem", "status"))

    def mutate():
        child.tell("os.execv('/bin/sleep', ['sleep', '1000'])")
        eventually(lambda: open(f"/proc/{child.pid}/comm").read() == "sleep\n", "another program")

    def check():
        first = os.pread(maps, 4096, 0).split(b"\n")[0]
        equal(b"python" in first, True, "its program")
        equal(os.pread(memory, 4, int(first.split(b"-")[0], 16)), b"\x7fELF", "its memory")
        equal(os.pread(state, 5, 0), b"Name:", "its status")

    return mutate, check


@case
def what_proc_has_of_one_that_has_lost_its_parent_since():
    child = Child()
    other = child.ask("put('other', Child(signal.pause)).pid")
    state = os.open(f"/proc/{other}/status", os.O_RDONLY)
    os.chdir(f"/proc/{other}")

    def mutate():
        child.kill()
        equal(os.pread(state, 5, 0), b"Name:", "the status still")

    def check():
        equal(os.pread(state, 5, 0), b"Name:", "the status")
        equal(open("comm").read(), open(f"/proc/{other}/comm").read(), "its name")

    return mutate, check


@case
def what_proc_has_of_the_dead_read_in_part():
    child = Child()
    state = os.open(f"/proc/{child.pid}/status", os.O_RDONLY)
    os.read(state, 10)
    child.kill()

    def mutate():
        os.lseek(state, 0, os.SEEK_SET)

    def check():
        raises(errno.ESRCH, os.pread, state, 10, 0)

    return mutate, check


@case
def working_directory_in_what_proc_has_of_a_thread():
    tid = waiting_thread()
    os.chdir(f"/proc/self/task/{tid}")

    def mutate():
        os.chdir("/")

    def check():
        equal(os.getcwd(), f"/proc/{os.getpid()}/task/{tid}", "where it is")
        equal(f"Pid:\t{tid}\n" in open("status").read(), True, "the thread's status")

    return mutate, check


@case
def what_the_kernel_shows_to_those_inside():
    """Some of it is about the namespaces of who has opened it, some tells more to the machine's root."""
    queues = os.open("/proc/sysvipc/msg", os.O_RDONLY)
    symbols = os.open("/proc/kallsyms", os.O_RDONLY)
    pages = os.open("/proc/self/pagemap", os.O_RDONLY)
    page = ctypes.create_string_buffer(b"content", 8192)
    for key in (0x4321, 0x4322):
        call(libc.msgget, key, 0o1600)

    def shown():
        at = ctypes.addressof(page) // 4096 * 8
        (entry,) = struct.unpack("Q", os.pread(pages, 8, at))
        lines = os.pread(queues, 4096, 0).split(b"\n")
        return [line.split()[0] for line in lines if line], os.pread(symbols, 16, 0), entry & (1 << 55) - 1

    before = shown()

    def mutate():
        for descriptor in (queues, symbols, pages):
            os.close(descriptor)

    def check():
        equal(shown(), before, "what is shown")

    return mutate, check


@case
def standard_streams_opened_once_more():
    ways = (0, os.O_RDONLY | os.O_NONBLOCK), (1, os.O_WRONLY | os.O_APPEND), (0, os.O_RDWR), (1, os.O_RDWR), (2, os.O_RDONLY)
    again = [os.open(f"/proc/self/fd/{stream}", flags) for stream, flags in ways]
    name = os.open("/proc/self/ns/net", os.O_PATH)
    before = descriptors()

    def mutate():
        for descriptor in again:
            os.close(descriptor)
        os.close(name)

    def check():
        equal(descriptors(), before, "descriptors")
        raises(errno.EAGAIN, os.read, again[0], 10)

    return mutate, check
