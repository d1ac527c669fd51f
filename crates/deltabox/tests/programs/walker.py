"""A process that changes at random: its files, memory, descriptors and children; and that tells a digest of them all.

Lines: `step SEED` changes, `digest` tells. The same seed on the same state gives the same state.
"""

import hashlib
import os
import random
import signal
import sys

ROOT = "/walk"


class Walker:
    def __init__(self, depth):
        self.depth = depth
        self.memory = [bytearray(4096 * 3) for _ in range(40)]
        self.objects = {}
        self.files = {}
        self.children = {}
        self.born = 0

    def step(self, seed):
        rng = random.Random(seed)
        for _ in range(rng.randint(1, 4)):
            rng.choice([self.touch_memory, self.touch_objects, self.touch_file, self.touch_file, self.touch_tree,
                        self.touch_descriptor, self.touch_child])(rng)

    def touch_memory(self, rng):
        for _ in range(rng.randint(1, 60)):
            block = rng.choice(self.memory)
            at = rng.randrange(len(block))
            block[at : at + 64] = rng.randbytes(min(64, len(block) - at))
        if rng.random() < 0.2:
            self.memory.append(bytearray(rng.randbytes(rng.randrange(1, 400_000))))
        if rng.random() < 0.2 and len(self.memory) > 20:
            self.memory.pop(rng.randrange(len(self.memory)))

    def touch_objects(self, rng):
        for _ in range(rng.randint(1, 500)):
            self.objects[rng.randrange(3000)] = [rng.random(), str(rng.random())]
        for key in rng.sample(sorted(self.objects), len(self.objects) // 10):
            del self.objects[key]

    def path(self, rng):
        return f"{ROOT}/{self.depth}.{rng.randrange(3)}/{rng.randrange(12)}"

    def touch_file(self, rng):
        path = self.path(rng)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.isdir(path) and not os.path.islink(path):
            os.rmdir(path)
        if os.path.islink(path):
            os.unlink(path)
        with open(path, rng.choice(["w", "a", "a"])) as file:
            file.write(str(rng.random()) * rng.randrange(3000))
        with open(path, "r+b") as file:
            size = os.path.getsize(path)
            file.seek(rng.randrange(size + 9000))
            file.write(rng.randbytes(rng.randrange(5000)))
            if rng.random() < 0.3:
                file.truncate(rng.randrange(size + 1))

    def touch_tree(self, rng):
        one, two = self.path(rng), self.path(rng)
        os.makedirs(os.path.dirname(two), exist_ok=True)
        action = rng.choice(["unlink", "rename", "link", "symlink", "mkdir", "chmod", "rename-directory"])
        try:
            if action == "rename-directory":
                os.rename(os.path.dirname(one), os.path.dirname(two) + ".moved")
            elif action == "unlink":
                os.unlink(one)
            elif action in ("rename", "link", "symlink"):
                getattr(os, action)(one, two)
            elif action == "mkdir":
                os.mkdir(two)
            else:
                os.chmod(one, rng.choice([0o600, 0o644, 0o755, 0o4711]))
        except OSError:
            pass  # it depends on the tree alone, so it fails on every walk through the same state

    def touch_descriptor(self, rng):
        slot = rng.randrange(6)
        if slot in self.files and rng.random() < 0.3:
            os.close(self.files.pop(slot))
        elif slot in self.files:
            os.lseek(self.files[slot], rng.randrange(10_000), os.SEEK_SET)
            os.write(self.files[slot], rng.randbytes(rng.randrange(300)))
            if rng.random() < 0.3:
                os.ftruncate(self.files[slot], 500)
        else:
            os.makedirs(ROOT, exist_ok=True)
            name = f"{ROOT}/{self.depth}.open.{slot}"
            self.files[slot] = os.open(name, os.O_RDWR | os.O_CREAT | rng.choice([0, os.O_APPEND]), 0o600)
            if rng.random() < 0.4:
                os.unlink(name)

    def touch_child(self, rng):
        if self.depth >= 2:
            return
        if len(self.children) < 3 and rng.random() < 0.6:
            self.born += 1
            self.children[self.born] = Child(self.depth + 1)
        elif self.children:
            key = rng.choice(sorted(self.children))
            child = self.children[key]
            if rng.random() < 0.4:
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
                child.close()
                del self.children[key]
            else:
                child.ask(f"step {rng.randrange(1 << 30)}")

    def digest(self):
        sums = hashlib.sha256()
        for block in self.memory:
            sums.update(block)
        sums.update(repr(sorted(self.objects.items())).encode())
        for slot, descriptor in sorted(self.files.items()):
            about = os.fstat(descriptor)
            sums.update(repr((slot, about.st_size, about.st_mode, about.st_nlink)).encode())
            sums.update(repr(os.lseek(descriptor, 0, os.SEEK_CUR)).encode())
            sums.update(os.pread(descriptor, about.st_size, 0))
        for key, child in sorted(self.children.items()):
            sums.update(f"{key} {child.ask('digest')}".encode())
        return sums.hexdigest()

    def serve(self, lines, answer):
        while words := next_line(lines).split():
            result = self.digest() if words[0] == "digest" else self.step(int(words[1])) or "done"
            os.write(answer, f"{result}\n".encode())


class Child:
    def __init__(self, depth):
        ask, self.asking = os.pipe()
        self.hearing, answer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                Walker(depth).serve(ask, answer)
            finally:
                os._exit(0)
        os.close(ask)
        os.close(answer)

    def ask(self, line):
        os.write(self.asking, f"{line}\n".encode())
        answer = next_line(self.hearing)
        if not answer:
            raise AssertionError(f"child {self.pid} is gone")
        return answer

    def close(self):
        os.close(self.asking)
        os.close(self.hearing)


def next_line(descriptor):
    text = b""
    while not text.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            return ""
        text += byte
    return text.decode().strip()


Walker(0).serve(0, 1)
