"""Signals: handlers, masks, what is pending; timers that send them."""

SYS_RT_SIGACTION, SYS_RT_SIGTIMEDWAIT = 13, 128


def disposition(number):
    """Handler, flags and mask as the kernel has them."""
    buffer = ctypes.create_string_buffer(32)
    call(libc.syscall, SYS_RT_SIGACTION, int(number), None, buffer, 8)
    return struct.unpack("=QQQQ", buffer.raw)


def take(number):
    """Takes one pending signal from the queue: sender's pid, code and value."""
    info = ctypes.create_string_buffer(128)
    mask = struct.pack("=Q", 1 << (number - 1))
    call(libc.syscall, SYS_RT_SIGTIMEDWAIT, mask, info, struct.pack("=qq", 0, 0), 8)  # the library's hides the code
    _, _, code, _, pid, _, value = struct.unpack_from("=iiiiiiq", info)
    return pid, code, value


@case
def handlers():
    seen = []
    signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    before = [disposition(number) for number in range(1, 32)]

    def mutate():
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, lambda *_: None)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def check():
        equal([disposition(number) for number in range(1, 32)], before, "dispositions")
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR1)
        equal(seen, [signal.SIGUSR1], "handled")

    return mutate, check


@case
def mask_and_pending_signals():
    seen = []
    signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    blocked = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    os.kill(os.getpid(), signal.SIGUSR1)

    def mutate():
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        equal(seen, [signal.SIGUSR1])
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        os.kill(os.getpid(), signal.SIGTERM)

    def check():
        equal(signal.pthread_sigmask(signal.SIG_BLOCK, []), set(blocked), "mask")
        equal((signal.sigpending(), seen), ({signal.SIGUSR1}, []), "pending")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        equal((signal.sigpending(), seen), (set(), [signal.SIGUSR1]), "delivered")

    return mutate, check


@case
def queued_signals_with_values():
    number = signal.SIGRTMIN + 3
    signal.pthread_sigmask(signal.SIG_BLOCK, [number, signal.SIGUSR1])
    libc.sigqueue.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    for value in (11, 22, 33):
        call(libc.sigqueue, os.getpid(), number, value)
    call(libc.syscall, 234, os.getpid(), os.getpid(), int(signal.SIGUSR1))  # tgkill: pending for the thread alone

    def mutate():
        take(number)
        take(signal.SIGUSR1)
        call(libc.sigqueue, os.getpid(), number, 44)

    def check():
        equal(int(status("SigPnd")[0], 16), 1 << (signal.SIGUSR1 - 1), "pending for the thread")
        for value in (11, 22, 33):
            equal(take(number), (os.getpid(), -1, value), "sender, code, value")
        raises(errno.EAGAIN, take, number)
        equal(take(signal.SIGUSR1)[:2], (os.getpid(), -6), "sender and code")

    return mutate, check


@case
def interval_timers():
    signal.setitimer(signal.ITIMER_REAL, 5000, 9)
    signal.setitimer(signal.ITIMER_VIRTUAL, 4000, 8)

    def mutate():
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 100, 1)
        signal.setitimer(signal.ITIMER_PROF, 100, 1)

    def check():
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        equal(4000 < left <= 5000 and interval == 9, True, f"real: {left} {interval}")
        left, interval = signal.getitimer(signal.ITIMER_VIRTUAL)
        equal(3900 < left <= 4000.1 and interval == 8, True, f"virtual: {left} {interval}")
        equal(signal.getitimer(signal.ITIMER_PROF), (0, 0), "prof")

    return mutate, check


@case
def interval_timer_that_ticks():
    ticks = []
    signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)

    def mutate():
        signal.setitimer(signal.ITIMER_REAL, 0)
        ticks.clear()

    def check():
        had = len(ticks)
        eventually(lambda: len(ticks) > had + 3, "ticks")
        signal.setitimer(signal.ITIMER_REAL, 0)

    return mutate, check


@case
def posix_timers():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
    event = struct.pack("=qii", 77, signal.SIGRTMIN, 0) + bytes(48)
    identity = ctypes.c_void_p()
    call(libc.timer_create, time.CLOCK_MONOTONIC, event, ctypes.byref(identity))
    call(libc.timer_settime, identity, 0, struct.pack("=qqqq", 6, 0, 5000, 0), None)

    def mutate():
        call(libc.timer_delete, identity)

    def check():
        value = ctypes.create_string_buffer(32)
        call(libc.timer_gettime, identity, value)
        interval, _, left, _ = struct.unpack("=qqqq", value.raw)
        equal(4000 < left <= 5000 and interval == 6, True, f"left {left}, interval {interval}")
        call(libc.timer_settime, identity, 0, struct.pack("=qqqq", 0, 0, 0, 1000), None)
        info = ctypes.create_string_buffer(128)
        mask = struct.pack("=Q", 1 << (signal.SIGRTMIN - 1)) + bytes(120)
        call(libc.sigtimedwait, mask, info, struct.pack("=qq", 20, 0))
        equal(struct.unpack_from("=iiiiiiq", info)[6], 77, "value")

    return mutate, check


@case
def timers_of_threads_that_have_ended():
    """One that signals such a thread, and one of its processor time."""
    def setup():
        def begin():
            clock = time.pthread_getcpuclockid(threading.get_ident())
            put("timers", [Timer(5000, thread=threading.get_native_id()), Timer(5000, clock=clock), Timer(5000)])

        thread = threading.Thread(target=begin)
        thread.start()
        thread.join()

    child = Child(setup)
    question = "[timer.left() > 4000 for timer in timers[::2]]"
    equal(child.ask(question), [True, True], "before")

    def mutate():
        child.ask("[timer.delete() for timer in timers]")

    def check():
        equal(child.ask(question), [True, True], "times left")
        child.ask("timers[1].left()")

    return mutate, check


@case
def timers_whose_signals_wait():
    """Ticks that were not taken yet, of timers that go on for long."""
    numbers = {signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    long = Timer(0.001, 5000, signal.SIGUSR1)
    Timer(0.001, 0, signal.SIGUSR2)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 5000)
    eventually(lambda: numbers <= signal.sigpending(), "the ticks")

    def mutate():
        signal.sigtimedwait([signal.SIGUSR1], 0)
        signal.sigtimedwait([signal.SIGALRM], 0)

    def check():
        for number in numbers:
            equal(signal.sigtimedwait([number], 0) is None, False, f"{number} waits")
            equal(signal.sigtimedwait([number], 0) is None, True, f"{number} waits once")
        equal(long.left() > 4000, True, "the timer goes on")
        equal(signal.getitimer(signal.ITIMER_REAL)[0] > 4000, True, "the interval timer goes on")

    return mutate, check


@case
def alternate_signal_stack():
    memory = ctypes.create_string_buffer(1 << 16)
    libc.sigaltstack.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    wanted = struct.pack("=QiiQ", ctypes.addressof(memory), 0, 0, 1 << 16)
    call(libc.sigaltstack, wanted, None)

    def mutate():
        call(libc.sigaltstack, struct.pack("=QiiQ", 0, 2, 0, 0), None)  # SS_DISABLE

    def check():
        got = ctypes.create_string_buffer(24)
        call(libc.sigaltstack, None, got)
        equal(got.raw, wanted, "stack")
        equal(len(memory), 1 << 16, "its memory is held")

    return mutate, check
