"""What Python itself is used for: event loops, pools, numbers, notebooks."""

import asyncio
import concurrent.futures
import hashlib
import multiprocessing


async def serve_sums(ready):
    state = {"token": 0}

    async def handle(reader, writer):
        total = 0
        while line := await reader.readline():
            command, _, number = line.decode().strip().partition(" ")
            if command == "add":
                total += int(number)
                answer = total
            else:
                if command == "set":
                    state["token"] = int(number)
                answer = state["token"]
            writer.write(b"%d\n" % answer)
            await writer.drain()

    server = await asyncio.start_server(handle, "127.0.0.1", 9000)
    ready.set()
    await server.serve_forever()


def asyncio_server(ready):
    asyncio.run(serve_sums(ready))


@work
class asyncio_clients:
    """A server in a process of its own, and twenty clients in one event loop of this one."""

    CLIENTS = 20

    def __init__(self):
        ready = multiprocessing.Event()
        self.server = multiprocessing.Process(target=asyncio_server, args=[ready], daemon=True)
        self.server.start()
        ready.wait()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.rounds = [0] * self.CLIENTS
        self.clients = [asyncio.run_coroutine_threadsafe(self.client(i), self.loop) for i in range(self.CLIENTS)]
        self.own = socket.create_connection(("127.0.0.1", 9000), timeout=60).makefile("rw")

    async def client(self, i):
        reader, writer = await asyncio.open_connection("127.0.0.1", 9000)
        total = 0
        while True:
            total += i
            writer.write(b"add %d\n" % i)
            answer = await asyncio.wait_for(reader.readline(), 60)
            equal(int(answer), total, "a sum of the server's")
            self.rounds[i] += 1
            await asyncio.sleep(0.002 * (i % 5))

    def ask(self, line):
        self.own.write(line + "\n")
        self.own.flush()
        return int(self.own.readline())

    def set(self, n):
        self.ask(f"set {n}")

    def get(self):
        for client in self.clients:
            if client.done():
                client.result()
        return self.ask("get")

    def go(self):
        before = list(self.rounds)
        eventually(lambda: self.get() is not None and all(r > b for r, b in zip(self.rounds, before)), "all clients go on")


def digest(n):
    block = str(n).encode() * 1000
    for _ in range(20):
        block = hashlib.sha256(block).digest()
    return n, block.hex()


@work
class pool:
    """Four processes that are given work all the time."""

    def __init__(self):
        self.manager = multiprocessing.Manager()
        self.shared = self.manager.dict(token=0)
        self.pool = multiprocessing.Pool(4)
        self.next = 0
        self.load = Load(self.step)

    def step(self):
        wanted = range(self.next, self.next + 40)
        results = list(self.pool.imap(digest, wanted, chunksize=3))
        equal(results, [digest(n) for n in wanted], "results")
        self.next += 40

    def set(self, n):
        self.shared["token"] = n

    def get(self):
        self.load.check()
        return self.shared["token"]

    def go(self):
        self.load.goes_on()


@work
class numbers:
    """Threads that compute with numpy, each of which knows its result."""

    def __init__(self):
        import numpy

        self.numpy = numpy
        self.matrix = numpy.random.default_rng(1).random((120, 120))
        self.known = self.compute()
        self.token = numpy.zeros(1 << 16, dtype=numpy.int64)
        self.loads = [Load(self.step) for _ in range(4)]

    def compute(self):
        result = self.matrix
        for _ in range(20):
            result = self.numpy.sin(result @ self.matrix)
        return result

    def step(self):
        equal(self.numpy.array_equal(self.compute(), self.known), True, "the result of a thread")

    def set(self, n):
        self.token[:] = n

    def get(self):
        for load in self.loads:
            load.check()
        equal(self.token.min(), self.token.max(), "the token all over its array")
        return int(self.token[0])

    def go(self):
        for load in self.loads:
            load.goes_on()


@work
class jupyter:
    """A kernel that is spoken to by its sockets (zmq), with a thread that counts in it."""

    def __init__(self):
        from jupyter_client.manager import start_new_kernel

        os.environ["HOME"] = "/tmp"
        self.manager, self.client = start_new_kernel(kernel_name="python3", startup_timeout=60)
        self.execute("import threading, time; ticks = token = 0")
        self.execute("def count():\n  global ticks\n  while True:\n    ticks += 1\n    time.sleep(0.001)")
        self.execute("threading.Thread(target=count, daemon=True).start()")

    def execute(self, code, **expressions):
        reply = self.client.execute_interactive(
            code, user_expressions=expressions, timeout=60, output_hook=lambda _: None, allow_stdin=False
        )
        equal(reply["content"]["status"], "ok", str(reply["content"]))
        told = reply["content"]["user_expressions"]
        return {name: value["data"]["text/plain"] for name, value in told.items()}

    def set(self, n):
        self.execute(f"token = {n}")

    def get(self):
        return self.execute("", token="token")["token"]

    def ticks(self):
        return int(self.execute("", ticks="ticks")["ticks"])

    def go(self):
        before = self.ticks()
        eventually(lambda: self.ticks() > before, "the kernel's thread counts on")
