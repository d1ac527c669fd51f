"""Limits of resources below what a process has already, and below what it is to get back."""

import mmap
import resource


def limit(kind, number):
    """The soft limit only: not everybody may raise the other again."""
    resource.setrlimit(kind, (number, resource.getrlimit(kind)[1]))


def limits(child):
    return child.ask("[resource.getrlimit(kind) for kind in range(16)]")


def limited(setup, spoil, question, answer):
    """A child that is limited by `setup`, is told to do `spoil`, and must give the same answer ever."""
    child = Child(setup)
    equal(child.ask(question), answer, "before")
    before = limits(child)

    def mutate():
        child.ask(spoil)

    def check():
        equal(limits(child), before, "limits")
        equal(child.ask(question), answer, "what it has")

    return mutate, check


@case
def no_more_processes_allowed():
    def setup():
        put("grandchild", Child())
        limit(resource.RLIMIT_NPROC, 0)

    return limited(setup, "grandchild.kill()", "grandchild.ask('5 + 6')", 11)


@case
def no_more_threads_allowed_to_another_user():
    def setup():
        put("end", threading.Event())
        put("thread", threading.Thread(target=end.wait))
        thread.start()
        os.setgroups([])
        os.setresgid(1234, 1234, 1234)
        os.setresuid(1234, 1234, 1234)
        limit(resource.RLIMIT_NPROC, 0)

    return limited(setup, "(end.set(), thread.join())", "(len(os.listdir('/proc/self/task')), end.is_set())", (2, False))


@case
def descriptors_above_the_limit():
    def setup():
        put("pipes", [os.pipe() for _ in range(20)])
        limit(resource.RLIMIT_NOFILE, 3)

    through = "[os.write(write, b'x') and os.read(read, 1) for read, write in pipes] == [b'x'] * 20"
    return limited(setup, "[os.close(read) for read, _ in pipes[5:]]", through, True)


@case
def descriptors_limited_since():
    def setup():
        put("pipes", [os.pipe() for _ in range(20)])

    through = "[os.write(write, b'x') and os.read(read, 1) for read, write in pipes] == [b'x'] * 20"
    spoil = "[os.close(read) for read, _ in pipes[5:]] and limit(resource.RLIMIT_NOFILE, 3)"
    return limited(setup, spoil, through, True)


def set_up_memory():
    put("memory", mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    memory.write(b"x" * (8 << 20))


SAMPLE = "all(memory[at] == 120 for at in range(0, len(memory), 997))"


@case
def memory_above_the_limit():
    def setup():
        set_up_memory()
        limit(resource.RLIMIT_AS, 1 << 20)
        limit(resource.RLIMIT_DATA, 1 << 20)
        limit(resource.RLIMIT_STACK, 1 << 16)

    return limited(setup, "memory.close()", SAMPLE, True)


@case
def memory_limited_since():
    def setup():
        set_up_memory()
        put("grandchild", Child())

    spoil = (
        "(memory.close(), limit(resource.RLIMIT_AS, 1 << 20), limit(resource.RLIMIT_DATA, 1 << 20),"
        " grandchild.kill())"
    )
    return limited(setup, spoil, f"({SAMPLE}, grandchild.ask('5 + 6'))", (True, 11))


@case
def locked_memory_above_the_limit():
    def setup():
        set_up_memory()
        put("address", ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory))))
        call(libc.mlock, address, ctypes.c_size_t(1 << 20))
        limit(resource.RLIMIT_MEMLOCK, 0)

    return limited(setup, "libc.munlock(address, ctypes.c_size_t(1 << 20))", "status('VmLck')", ["1024", "kB"])


@case
def queued_signals_above_the_limit():
    def setup():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
        for value in range(20):
            call(libc.sigqueue, os.getpid(), int(signal.SIGRTMIN), ctypes.c_void_p(value))
        limit(resource.RLIMIT_SIGPENDING, 2)

    child = Child(setup)
    take = "sum(1 for _ in range(30) if signal.sigtimedwait([signal.SIGRTMIN], 0))"
    child.ask("1")

    def mutate():
        equal(child.ask(take), 20, "taken")

    def check():
        equal(child.ask("resource.getrlimit(resource.RLIMIT_SIGPENDING)[0]"), 2, "limit")
        equal(child.ask(take), 20, "signals")

    return mutate, check


@case
def timers_above_the_limit_of_signals():
    def setup():
        put("timers", [Timer(1000, signal=signal.SIGUSR1) for _ in range(10)])
        limit(resource.RLIMIT_SIGPENDING, 0)

    return limited(setup, "[timer.delete() for timer in timers]", "[timer.left() > 100 for timer in timers]", [True] * 10)
