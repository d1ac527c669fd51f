"""Threads, their names, their locks and what is theirs alone."""


def name_thread(name):
    call(libc.prctl, 15, name.encode())  # PR_SET_NAME


class Worker:
    """A thread that evaluates what it is asked, in an order given by a condition variable."""

    def __init__(self, number):
        self.number, self.asked, self.answers = number, [], []
        self.changed = threading.Condition()
        self.local = threading.local()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        self.tid = self.ask("threading.get_native_id()")

    def run(self):
        name_thread(f"worker-{self.number}")
        self.local.secret = [self.number] * 100
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.asked)
                expression = self.asked.pop()
            if expression is None:
                return
            answer = eval(expression, globals(), {"self": self})
            with self.changed:
                self.answers.append(answer)
                self.changed.notify_all()

    def tell(self, expression):
        with self.changed:
            self.asked.append(expression)
            self.changed.notify_all()

    def ask(self, expression):
        self.tell(expression)
        with self.changed:
            if not self.changed.wait_for(lambda: self.answers, timeout=30):
                raise AssertionError(f"thread {self.number} does not answer")
            return self.answers.pop()


def threads():
    result = {}
    for tid in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{tid}/comm") as name:
            result[int(tid)] = name.read().strip()
    return result


def proper(worker):
    equal(worker.ask("threading.get_native_id()"), worker.tid, "tid")
    equal(worker.ask("self.local.secret"), [worker.number] * 100, "thread-local memory")


@case
def eight_threads_that_wait():
    workers = [Worker(number) for number in range(8)]
    before = threads()

    def mutate():
        for worker in workers:
            worker.ask("setattr(self.local, 'secret', None)")
            worker.ask("name_thread('spoiled')")

    def check():
        equal(threads(), before, "threads and their names")
        for worker in workers:
            proper(worker)

    return mutate, check


@case
def threads_ended_and_born_since():
    workers = [Worker(number) for number in range(8)]
    before = threads()

    def mutate():
        for worker in workers[::2]:
            worker.tell(None)
            worker.thread.join()
        put("born", [Worker(100 + number) for number in range(3)])

    def check():
        equal(threads(), before, "threads and their names")
        for worker in workers:
            proper(worker)
        for worker in workers:
            worker.tell(None)
            worker.thread.join(30)
            equal(worker.thread.is_alive(), False, "the thread ends")

    return mutate, check


@case
def lock_waited_for_by_threads():
    lock, order = threading.Lock(), []
    lock.acquire()

    def run(number):
        with lock:
            order.append(number)

    waiting = [threading.Thread(target=run, args=[number]) for number in range(4)]
    for thread in waiting:
        thread.start()
    time.sleep(0.05)

    def mutate():
        lock.release()
        for thread in waiting:
            thread.join()

    def check():
        equal((order, lock.locked()), ([], True), "order and lock")
        lock.release()
        for thread in waiting:
            thread.join(30)
        equal(sorted(order), [0, 1, 2, 3], "every waiter had the lock")

    return mutate, check


@case
def signal_masks_of_threads():
    workers = [Worker(number) for number in range(3)]
    workers[0].ask("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])")
    workers[1].ask("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGRTMIN])")
    read = "signal.pthread_sigmask(signal.SIG_BLOCK, [])"
    before = [worker.ask(read) for worker in workers]

    def mutate():
        for worker in workers:
            worker.ask("signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGHUP])")

    def check():
        equal([worker.ask(read) for worker in workers], before, "masks")

    return mutate, check


@case
def threads_that_compute():
    import hashlib

    state = {}

    def run(number):
        digest, count = str(number).encode(), 0
        while True:
            digest, count = hashlib.sha256(digest).digest(), count + 1
            state[number] = count, digest
            if count % 500 == 0:
                # The check goes through all of it again, beside these threads.
                time.sleep(0.01)

    for number in range(3):
        threading.Thread(target=run, args=[number], daemon=True).start()
    eventually(lambda: len(state) == 3, "the start")

    def mutate():
        state.clear()
        state.update({number: (0, b"spoiled") for number in range(3)})

    def check():
        before = dict(state)
        eventually(lambda: all(state[n][0] > before[n][0] + 100 for n in range(3)), "progress")
        for number in range(3):
            count, digest = state[number]
            wanted = str(number).encode()
            for _ in range(count):
                wanted = hashlib.sha256(wanted).digest()
            equal(digest, wanted, "the chain of digests")

    return mutate, check


@case
def a_hundred_threads():
    workers = [Worker(number) for number in range(100)]
    before = threads()

    def mutate():
        for worker in workers[10:20]:
            worker.tell(None)
            worker.thread.join()

    def check():
        equal(threads(), before, "threads and their names")
        for worker in workers:
            proper(worker)

    return mutate, check


@case
def thread_of_a_child():
    holder = []

    def setup():
        put("worker", Worker(7))

    child = Child(setup)
    holder.append(child.ask("worker.tid"))

    def mutate():
        child.kill()

    def check():
        equal(child.ask("(proper(worker), worker.tid)[1]"), holder[0], "tid")

    return mutate, check


@case
def threads_of_a_process_that_gave_up_its_rights():
    groups = [5, 7]

    def setup():
        put("workers", [Worker(number) for number in range(3)])
        os.setgroups(groups)
        os.setresgid(8, 8, 8)
        os.setresuid(9, 9, 9)

    child = Child(setup)
    equal(child.ask("os.getuid()"), 9)

    def mutate():
        child.ask("[worker.tell(None) or worker.thread.join() for worker in workers[1:]]")

    def check():
        tids = os.listdir(f"/proc/{child.pid}/task")
        equal(len(tids), 4, "threads")
        for tid in tids:
            of = f"{child.pid}/task/{tid}"
            equal((status("Uid", of), status("Gid", of)), (["9"] * 4, ["8"] * 4), "ids of a thread")
            equal(status("Groups", of), ["5", "7"], "its groups")
            for kind in ("CapPrm", "CapEff", "CapInh"):
                equal(int(status(kind, of)[0], 16), 0, kind)

    return mutate, check


@case
def threads_of_different_users():
    """The kernel keeps credentials for each thread; only the C library makes them the same."""
    workers = [Worker(number) for number in range(2)]
    securebits = 0b110101  # SECBIT_KEEP_CAPS, SECBIT_NO_SETUID_FIXUP and its lock, SECBIT_NOROOT
    acts = [f"libc.prctl(28, {securebits & ~2}, 0, 0, 0)", "libc.syscall(119, 700, 701, 702)",
            "libc.syscall(117, 500, 501, 502)"]
    equal([workers[0].ask(act) for act in acts], [0, 0, 0], "becoming another")
    fields = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd")
    tids = [os.getpid()] + [worker.tid for worker in workers]
    before = [[status(field, tid) for field in fields] for tid in tids]
    bits = workers[0].ask("libc.prctl(27, 0, 0, 0, 0)")

    def mutate():
        workers[1].ask("libc.syscall(117, 600, 600, 600)")

    def check():
        equal([[status(field, tid) for field in fields] for tid in tids], before, "credentials")
        equal([worker.ask("libc.prctl(27, 0, 0, 0, 0)") for worker in workers], [bits, 0], "securebits")
        equal(workers[0].ask("os.getresuid()"), (500, 501, 502), "as it sees itself")
        equal((workers[1].ask("os.getresuid()"), os.getresuid()), ((0, 0, 0), (0, 0, 0)), "as the others do")

    return mutate, check


class Spawned:
    """A thread of the C library's, which runs what it is asked and then ends."""

    def __init__(self, begin, end):
        self.begin, self.end, self.go, self.done = begin, end, threading.Event(), []
        self.function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(self.run)
        self.handle = ctypes.c_ulong()
        call(libc.pthread_create, ctypes.byref(self.handle), None, self.function, None)
        eventually(lambda: self.done, "the beginning")

    def run(self, _):
        self.tid = threading.get_native_id()
        self.done.append(self.begin())
        self.go.wait()
        self.done.append(self.end())
        return 77

    def join(self):
        self.go.set()
        result = ctypes.c_void_p()
        equal(libc.pthread_join(self.handle, ctypes.byref(result)), 0, "joining")
        equal(result.value, 77, "its result")


@case
def threads_with_signals_and_priorities_of_their_own():
    def begin():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        call(libc.syscall, 234, os.getpid(), threading.get_native_id(), signal.SIGUSR2)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 17)
        os.sched_setaffinity(threading.get_native_id(), [first])

    def end():
        return signal.sigpending(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    first = min(os.sched_getaffinity(0))
    thread = Spawned(begin, end)

    def mutate():
        thread.join()

    def check():
        equal(status("SigPnd", f"self/task/{thread.tid}")[0], f"{1 << signal.SIGUSR2 - 1:016x}", "its own signal")
        equal(status("SigPnd")[0], "0" * 16, "another's")
        equal(os.sched_getaffinity(thread.tid), {first}, "where it may run")
        # The kernel tells who waits for the end at the address that the thread was born with.
        thread.join()
        equal(thread.done[1], ({signal.SIGUSR2}, 17), "pending signals and niceness")

    return mutate, check


@case
def mutex_whose_owner_ends():
    """The kernel finds it by the list that the thread has told it."""
    mutex, kind = ctypes.create_string_buffer(64), ctypes.create_string_buffer(16)
    libc.pthread_mutexattr_init(kind)
    libc.pthread_mutexattr_setrobust(kind, 1)
    libc.pthread_mutex_init(mutex, kind)
    thread = Spawned(lambda: libc.pthread_mutex_lock(mutex), lambda: None)

    def mutate():
        thread.join()
        equal(libc.pthread_mutex_lock(mutex), errno.EOWNERDEAD, "the owner is dead")
        libc.pthread_mutex_consistent(mutex)
        libc.pthread_mutex_unlock(mutex)

    def check():
        equal(libc.pthread_mutex_trylock(mutex), errno.EBUSY, "it is locked")
        thread.join()
        equal(libc.pthread_mutex_lock(mutex), errno.EOWNERDEAD, "the owner is dead")

    return mutate, check
