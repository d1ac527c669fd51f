"""Servers under load."""

import http.client
import sqlite3


class Resp:
    """A connection to redis."""

    def __init__(self):
        self.socket = socket.create_connection(("127.0.0.1", 6379), timeout=60)
        self.file = self.socket.makefile("rwb")

    def call(self, *words):
        words = [str(word).encode() for word in words]
        self.file.write(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))
        self.file.flush()
        line = self.file.readline()
        if line[:1] == b"$":
            return self.file.read(int(line[1:]) + 2)[:-2].decode()
        equal(line[:1] in (b"+", b":"), True, f"redis answers {line}")
        return line[1:].strip().decode()


@work
class redis:
    def __init__(self):
        self.server = daemon("redis-server", "--save", "", "--appendonly", "yes", "--dir", "/tmp")
        self.connection = until_it_answers(Resp)
        self.counted = 0
        self.set(0)
        benchmark = ["redis-benchmark", "-q", "-c", "10", "-n", "2000", "-t", "set,get,incr,lpush,lpop"]
        self.loads = [Load(run, *benchmark), Load(self.count)]

    def count(self):
        if self.counted == 0:
            self.counter = Resp()
        self.counted += 1
        equal(self.counter.call("incr", "mine"), str(self.counted), "a counter of one client")

    def set(self, n):
        self.connection.call("set", "token", n)

    def get(self):
        for load in self.loads:
            load.check()
        return self.connection.call("get", "token")

    def go(self):
        for load in self.loads:
            load.goes_on()


NGINX = """daemon off; worker_processes 2; pid /run/nginx.pid; error_log stderr; user root;
events {}
http { access_log /tmp/access.log; server { listen 127.0.0.1:8080; root /site; } }
"""


@work
class nginx:
    def __init__(self):
        os.mkdir("/site")
        self.large = bytes(range(256)) * 4096
        for name, content in [("token", b"0"), ("large", self.large)]:
            with open(f"/site/{name}", "wb") as file:
                file.write(content)
        with open("/nginx.conf", "w") as file:
            file.write(NGINX)
        self.server = daemon("nginx", "-c", "/nginx.conf")
        until_it_answers(socket.create_connection, ("127.0.0.1", 8080))
        self.connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=60)
        self.loads = [Load(self.fetch, http.client.HTTPConnection("127.0.0.1", 8080, timeout=60)) for _ in range(3)]

    def fetch(self, connection):
        equal(self.page(connection, "/large") == self.large, True, "a large page")
        equal(self.page(connection, "/token").isdigit(), True, "a small page")

    @staticmethod
    def page(connection, path):
        connection.request("GET", path)
        response = connection.getresponse()
        equal(response.status, 200, path)
        return response.read()

    def set(self, n):
        with open("/site/new", "w") as file:
            file.write(str(n))
        os.rename("/site/new", "/site/token")

    def get(self):
        for load in self.loads:
            load.check()
        return self.page(self.connection, "/token").decode()

    def go(self):
        for load in self.loads:
            load.goes_on()


def transfer():
    """Moves money between accounts, so that their sum stays. Of the log only the end is kept, lest it take longer and longer to check."""
    import random

    data = sqlite3.connect("/tmp/bank.db", timeout=60, isolation_level=None)
    while True:
        a, b = random.sample(range(100), 2)
        data.execute("begin immediate")
        data.execute("update account set money = money - 7 where id = ?", [a])
        data.execute("update account set money = money + 7 where id = ?", [b])
        last = data.execute("insert into log(who) values (?)", [os.getpid()]).lastrowid
        data.execute("delete from log where id <= ?", [last - 1000])
        data.execute("commit")


@work
class sqlite:
    def __init__(self):
        self.data = sqlite3.connect("/tmp/bank.db", timeout=60, isolation_level=None)
        for statement in [
            "pragma journal_mode=wal",
            "create table account(id integer primary key, money integer)",
            "create table log(id integer primary key, who integer)",
            "create table token(n integer)",
            "insert into token values (0)",
        ]:
            self.data.execute(statement)
        self.data.executemany("insert into account values (?, 1000)", [(i,) for i in range(100)])
        program = [sys.executable, *sys.argv[:1], "transfer"]
        self.writers = [subprocess.Popen(program) for _ in range(2)]

    def set(self, n):
        self.data.execute("update token set n = ?", [n])

    def get(self):
        equal([w.poll() for w in self.writers], [None, None], "the writers are alive")
        equal(self.data.execute("select sum(money) from account").fetchone(), (100_000,), "the sum of all money")
        equal(self.data.execute("pragma integrity_check").fetchone(), ("ok",), "integrity")
        return self.data.execute("select n from token").fetchone()[0]

    def transfers(self):
        return self.data.execute("select max(id) from log").fetchone()[0] or 0

    def go(self):
        before = self.transfers()
        eventually(lambda: self.transfers() > before, "transfers go on")


WORKS["transfer"] = transfer


@work
class postgres:
    """Under pgbench, whose accounts, tellers and branches must have the same sums."""

    def __init__(self):
        os.mkdir("/pg")
        os.chown("/pg", *self.user())
        tools = "/usr/lib/postgresql"
        self.tools = f"{tools}/{sorted(os.listdir(tools))[-1]}/bin"
        run(f"{self.tools}/initdb", "-D", "/pg/data", "-A", "trust", "--no-sync", **self.as_user())
        settings = ["shared_memory_type=sysv", "unix_socket_directories=/pg", "shared_buffers=16MB", "max_connections=20"]
        options = [word for setting in settings for word in ("-c", setting)]
        self.server = daemon(f"{self.tools}/postgres", "-D", "/pg/data", *options, **self.as_user())
        eventually(lambda: os.path.exists("/pg/.s.PGSQL.5432"), "the server's socket")
        eventually(lambda: self.answers(), "an answer")
        self.query("create table token(n integer); insert into token values (0)")
        run(f"{self.tools}/pgbench", "-h", "/pg", "-i", "-q", "postgres", **self.as_user())
        bench = ["-h", "/pg", "-n", "-c", "4", "-j", "2", "-t", "50", "postgres"]
        self.load = Load(lambda: run(f"{self.tools}/pgbench", *bench, **self.as_user()))

    @staticmethod
    def user():
        import pwd

        entry = pwd.getpwnam("postgres")
        return entry.pw_uid, entry.pw_gid

    def as_user(self):
        uid, gid = self.user()
        return {"user": uid, "group": gid, "extra_groups": [], "cwd": "/pg"}

    def answers(self):
        try:
            return self.query("select 1")
        except AssertionError:
            return None

    def query(self, text):
        command = [f"{self.tools}/psql", "-h", "/pg", "-qAtX", "-v", "ON_ERROR_STOP=1", "-c", text, "postgres"]
        return run(*command, **self.as_user()).strip()

    def set(self, n):
        self.query(f"update token set n = {n}")

    def get(self):
        self.load.check()
        sums = self.query(
            "select (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers), "
            "(select sum(bbalance) from pgbench_branches), (select coalesce(sum(delta), 0) from pgbench_history)"
        )
        equal(len(set(sums.split("|"))), 1, f"the sums {sums} are the same")
        return self.query("select n from token")

    def go(self):
        self.load.goes_on()


def pattern(name):
    return bytes((name + i * i) % 251 for i in range(251)) * 4000


def stream(name, port):
    """Sends the same bytes for ever, in pieces of all sizes."""
    data = pattern(name)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        at = 0
        while True:
            at = (at + connection.send(data[at : at + 300_000])) % len(data)


@work
class streams:
    """Four processes that send as fast as they can; every byte must come, once, in order."""

    def __init__(self):
        import multiprocessing

        listener = socket.create_server(("127.0.0.1", 0))
        self.loads, self.senders = [], []
        for name in range(4):
            sender = multiprocessing.Process(target=stream, args=[name, listener.getsockname()[1]], daemon=True)
            sender.start()
            self.senders.append(sender)
            connection, _ = listener.accept()
            connection.settimeout(60)
            state = {"at": 0, "connection": connection, "data": pattern(name) * 2}
            self.loads.append(Load(self.receive, state))
        self.token = 0

    @staticmethod
    def receive(state):
        got = state["connection"].recv(400_000)
        data, at = state["data"], state["at"]
        equal(len(got) > 0, True, "there are bytes")
        equal(data.startswith(got, at), True, f"the bytes at {at} are right")
        state["at"] = (at + len(got)) % (len(data) // 2)

    def set(self, n):
        self.token = n

    def get(self):
        for load in self.loads:
            load.check()
        return self.token

    def go(self):
        for load in self.loads:
            load.goes_on()
