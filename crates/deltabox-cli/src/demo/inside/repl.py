"""The state that the demo's Python REPL holds: tens of MB of live objects and four threads that change them."""

import hashlib
import queue
import random
import threading

BLOCK = 16384
THREADS = 4
blocks = [bytearray(random.Random(i).randbytes(BLOCK)) for i in range(2560)]
facts = {f"fact-{i}": [i, str(i * i), {"weight": i / 7}] for i in range(20000)}
history = []
work = [queue.SimpleQueue() for _ in range(THREADS)]
done = queue.SimpleQueue()


def change(part, dice):
    """Changes one byte in each of 250 blocks of a quarter of the memory, and some facts."""
    mine = range(part, len(blocks), THREADS)
    for _ in range(250):
        block = blocks[mine[dice.randrange(len(mine))]]
        block[dice.randrange(BLOCK)] = dice.randrange(256)
    for _ in range(20):
        key = f"fact-{dice.randrange(5000) * THREADS + part}"
        facts[key] = [dice.random(), part, {"weight": dice.randrange(1000)}]


def serve(part):
    total = 0
    while True:
        seed = work[part].get()
        dice = random.Random(seed * THREADS + part)
        change(part, dice)
        total += seed
        done.put((part, total))


for part in range(THREADS):
    threading.Thread(target=serve, args=(part,), daemon=True, name=f"worker-{part}").start()


def step(seed):
    """Lets every thread change its part. The same steps from the same state give the same state."""
    for inbox in work:
        inbox.put(seed)
    totals = sorted(done.get() for _ in work)
    history.append((seed, totals))
    blocks.append(bytearray(random.Random(seed).randbytes(BLOCK)))
    return len(history)


def digest():
    """Over all objects, in the order in which they are held."""
    total = hashlib.blake2b(digest_size=16)
    for block in blocks:
        total.update(block)
    for key, value in facts.items():
        total.update(f"{key}={value!r};".encode())
    total.update(repr(history).encode())
    return f"{total.hexdigest()} threads={threading.active_count()} steps={len(history)}"
