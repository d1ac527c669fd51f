"""The frame of a self-checking program.

A case builds a state and returns two functions: `mutate` spoils that state, `check` raises unless it is exactly as
built. The driver runs them when its standard input tells it to, and answers PASS or FAIL on its standard output.
"""

import ctypes
import errno
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def equal(got, wanted, what=""):
    if got != wanted:
        raise AssertionError(f"{what}: {got!r:.300}, not {wanted!r:.300}")


def raises(number, function, *args):
    try:
        result = function(*args)
    except OSError as error:
        equal(errno.errorcode[error.errno], errno.errorcode[number])
    else:
        raise AssertionError(f"{result!r} instead of {errno.errorcode[number]}")


def call(function, *args):
    """A C function whose failure is an exception; nothing is retried, so an EINTR shows."""
    ctypes.set_errno(0)
    result = function(*args)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), getattr(function, "__name__", "call"))
    return result


def eventually(condition, what):
    """For what another process or thread does soon. Generous: a slow machine must not fail it."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"did not happen: {what}")


def waiting_thread():
    """The number of a new thread that never ends."""
    tids = []

    def wait():
        tids.append(threading.get_native_id())
        time.sleep(1e6)

    threading.Thread(target=wait, daemon=True).start()
    eventually(lambda: tids, "a thread")
    return tids[0]


def status(field, pid="self"):
    with open(f"/proc/{pid}/status") as lines:
        for text in lines:
            if text.startswith(field + ":"):
                return text.split(":", 1)[1].split()
    raise AssertionError(f"no {field} in the status of {pid}")


def stat(pid):
    """The fields of /proc/PID/stat behind the name: [0] is the state, [1] the parent, [2] the group, [3] the session."""
    with open(f"/proc/{pid}/stat") as text:
        return text.read().rsplit(")", 1)[1].split()


def descriptors():
    """Number, target and flags of every open descriptor.

    Not what differs when the kernel makes the same thing again: a pipe's inode number, O_LARGEFILE on it.
    """
    directory = os.open("/proc/self/fd", os.O_RDONLY)
    names = [n for n in os.listdir(directory) if int(n) != directory]
    result = []
    for name in names:
        try:
            target = os.readlink(name, dir_fd=directory)
            with open(f"/proc/self/fdinfo/{name}") as info:
                flags = int(next(text for text in info if text.startswith("flags")).split()[1], 8)
        except FileNotFoundError:
            continue  # the duplicate that listdir read through
        result.append((int(name), target.split("[")[0], oct(flags & ~0o100000)))
    os.close(directory)
    return sorted(result)


class Child:
    """A child process that evaluates what it is asked."""

    def __init__(self, setup=None):
        ask, self.asking = os.pipe()
        self.hearing, answer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.asking)
            os.close(self.hearing)
            try:
                if setup:
                    setup()
                self._serve(ask, answer)
            finally:
                os._exit(0)
        os.close(ask)
        os.close(answer)

    @staticmethod
    def _serve(ask, answer):
        while True:
            text = read_line(ask)
            if text is None:
                os._exit(0)
            try:
                result = repr(eval(text, globals()))
            except Exception as error:
                result = repr(f"{type(error).__name__}: {error}")
            os.write(answer, (result + "\n").encode())

    def tell(self, expression):
        os.write(self.asking, (expression + "\n").encode())

    def ask(self, expression):
        self.tell(expression)
        text = read_line(self.hearing)
        if text is None:
            raise AssertionError(f"child {self.pid} is gone, asked for {expression}")
        return eval(text)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class Timer:
    """A POSIX timer, of seconds."""

    def __init__(self, first, every=0, signal=signal.SIGALRM, thread=0, clock=time.CLOCK_MONOTONIC):
        self.id = ctypes.c_int()
        event = struct.pack("=Qiii44x", 7, signal, 4 if thread else 0, thread)  # SIGEV_THREAD_ID
        self._call(222, clock, event, ctypes.byref(self.id))
        self.set(first, every)

    @staticmethod
    def _call(*args):
        # Not by the C library, whose timers are others than the kernel's.
        return call(libc.syscall, *args)

    def set(self, first, every=0):
        times = [part for time in (every, first) for part in (int(time), int(time % 1 * 1e9))]
        self._call(223, self.id, 0, struct.pack("=qqqq", *times), None)

    def left(self):
        setting = ctypes.create_string_buffer(32)
        self._call(224, self.id, setting)
        return struct.unpack("=qqqq", setting.raw)[2]

    def delete(self):
        self._call(226, self.id)


def put(name, value):
    """Lets an expression for a Child assign."""
    globals()[name] = value
    return value


def read_line(descriptor):
    """One byte at a time: what was not asked for yet must stay in the pipe."""
    text = b""
    while not text.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            return None
        text += byte
    return text[:-1].decode()


def say(text):
    os.write(1, (text + "\n").encode())


def main():
    # /tmp begins as that of the machine below, where anything may lie.
    os.mkdir("/playground")
    os.chmod("/playground", 0o1777)
    mutate, check = CASES[sys.argv[1]]()
    say("ready")
    while (word := read_line(0)) is not None:
        try:
            answer = {"mutate": mutate, "check": check}[word]() or "PASS"
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[1:]
            lines = " < ".join(f"line {frame.lineno} {frame.name}" for frame in reversed(where))
            answer = f"FAIL {type(error).__name__}: {error} ({lines})".replace("\n", " ")
        if answer != "said":
            say(answer)
