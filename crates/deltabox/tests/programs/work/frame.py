"""The frame of a program at work, which is spoken to line by line while its work goes on.

A work has two methods: `set(n)` puts a number deep into what works, `get()` fetches it from there, and raises if anything
of the work is not as it must be. Answers are `done`, the number, or `BAD` and why.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback

WORKS = {}


def work(kind):
    WORKS[kind.__name__] = kind
    return kind


def equal(got, wanted, what):
    if got != wanted:
        raise AssertionError(f"{what}: {got!r:.300}, not {wanted!r:.300}")


def eventually(condition, what):
    """For what another process does soon. Generous: a slow machine must not fail it."""
    for _ in range(3000):
        result = condition()
        if result:
            return result
        time.sleep(0.01)
    raise AssertionError(f"did not happen: {what}")


def until_it_answers(function, *args):
    def attempt():
        try:
            return function(*args) or True
        except OSError:
            return None

    return eventually(attempt, "an answer")


def run(*argv, **options):
    """Output of a command, which must succeed."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    done = subprocess.run(argv, **options)
    if done.returncode != 0:
        raise AssertionError(f"{argv}: status {done.returncode}: {done.stdout[-500:]!r}")
    return done.stdout.decode()


def daemon(*argv, **options):
    log = open("/tmp/daemon.log", "ab")
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options)


class Load:
    """Does something over and over in a thread, and keeps the first failure."""

    def __init__(self, step, *args):
        self.done, self.failure = 0, None
        self.thread = threading.Thread(target=self._repeat, args=[step, args], daemon=True)
        self.thread.start()

    def _repeat(self, step, args):
        try:
            while True:
                step(*args)
                self.done += 1
        except BaseException:
            self.failure = traceback.format_exc()

    def check(self):
        if self.failure:
            raise AssertionError(self.failure)
        equal(self.thread.is_alive(), True, "the load's thread is alive")

    def goes_on(self):
        """Waits until a step that begins from now on is done."""
        target = self.done + 2
        eventually(lambda: self.check() or self.done >= target, "the work goes on")


def answer(subject, line):
    command, _, number = line.partition(" ")
    if command == "set":
        subject.set(int(number))
        return "done"
    if command == "get":
        return str(subject.get())
    # That the work has got further by itself.
    equal(command, "go", "a command")
    subject.go()
    return "done"


def main():
    subject = WORKS[sys.argv[1]]()
    print("ready", flush=True)
    while True:
        line = sys.stdin.readline()
        if not line:
            return
        try:
            print(answer(subject, line.strip()), flush=True)
        except BaseException:
            print("BAD", traceback.format_exc().replace("\n", " | "), flush=True)
