"""Tools that agents run: shells, builds, version control, terminals, a browser."""

import json


@work
class bash:
    """Background jobs, a coprocess, a trap, and a variable.

    A trap that comes while bash expands `$(…)` makes bash 5.2 fail by itself, so the shell that is asked has none.
    """

    SCRIPT = r"""
    set -m
    token=0 ticks=0
    trap 'let ticks+=1' USR1
    beat() { while kill -USR1 $1; do sleep 0.01; done; }
    count() { n=0; while :; do n=$((n + 1)); echo $n > /tmp/count.$1.new; mv /tmp/count.$1.new /tmp/count.$1; sleep 0.005; done; }
    echo 0 > /tmp/count.one; echo 0 > /tmp/count.two
    count one & count two & beat $$ &
    coproc sed -u 's/^/told /'
    echo ready
    while :; do
        read -r command argument || { test $? -gt 128 && continue; break; }
        case $command in
            set) token=$argument; echo done;;
            get) echo $token >&${COPROC[1]}; read -r word told <&${COPROC[0]}
                jobs -r > /tmp/jobs; mapfile -t running < /tmp/jobs; echo "$told ${#running[@]}";;
            ticks) echo $ticks;;
        esac
    done
    """

    def __init__(self):
        self.shell = subprocess.Popen(["bash", "-c", self.SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        equal(self.shell.stdout.readline(), "ready\n", "the shell")

    def ask(self, line):
        self.shell.stdin.write(line + "\n")
        self.shell.stdin.flush()
        return self.shell.stdout.readline().strip()

    def set(self, n):
        equal(self.ask(f"set {n}"), "done", "the shell")

    def get(self):
        token, jobs = self.ask("get").split()
        equal(jobs, "4", "running jobs")
        return token

    @staticmethod
    def count(name):
        with open(f"/tmp/count.{name}") as file:
            return int(file.read())

    def go(self):
        before = self.count("one"), self.count("two"), int(self.ask("ticks"))
        now = lambda: (self.count("one"), self.count("two"), int(self.ask("ticks")))
        eventually(lambda: all(n > b for n, b in zip(now(), before)), "the jobs count on")


def remove(top):
    """`rm -r` is wary: it ends where a directory has another device number than before, as it has in a fork."""
    for directory, directories, files in os.walk(top, topdown=False):
        for name in files:
            os.unlink(f"{directory}/{name}")
        for name in directories:
            os.rmdir(f"{directory}/{name}")
    if os.path.isdir(top):
        os.rmdir(top)


@work
class git:
    """Commits, clones and collects garbage; each clone must be whole."""

    def __init__(self):
        identity = {f"GIT_{who}_{what}": "a" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        self.env = {**os.environ, **identity, "HOME": "/tmp", "GIT_CONFIG_NOSYSTEM": "1"}
        self.git("init", "-q", "/repo")
        self.commits = 0
        self.lock = threading.Lock()
        self.set(0)
        self.load = Load(self.step)

    def git(self, *args):
        return run("git", *args, env=self.env)

    def step(self):
        with self.lock:
            for _ in range(3):
                self.commits += 1
                with open(f"/repo/file{self.commits % 20}", "w") as file:
                    file.write(str(self.commits) * 1000)
                self.commit(str(self.commits))
            if self.commits % 9 == 0:
                self.git("-C", "/repo", "gc", "-q")
        remove("/clone")
        self.git("clone", "-q", "file:///repo", "/clone")
        self.git("-C", "/clone", "fsck", "--strict")

    def commit(self, message):
        self.git("-C", "/repo", "add", ".")
        self.git("-C", "/repo", "commit", "-qm", message)

    def set(self, n):
        with self.lock:
            with open("/repo/token", "w") as file:
                file.write(f"{n}\n")
            self.git("-C", "/repo", "add", ".")
            self.git("-C", "/repo", "commit", "-qm", f"token {n}", "--allow-empty")

    def get(self):
        self.load.check()
        with self.lock:
            log = self.git("-C", "/repo", "log", "--format=%s").split("\n")
            equal(sum(line.isdigit() for line in log), self.commits, "commits")
            return self.git("-C", "/repo", "show", "HEAD:token").strip()

    def go(self):
        self.load.goes_on()


@work
class make:
    """Builds a program of six files, two at a time, over and over."""

    def __init__(self):
        os.mkdir("/build")
        names = [f"part{i}" for i in range(6)]
        for i, name in enumerate(names):
            self.write(f"{name}.c", f'#include "token.h"\n#include <stdio.h>\nint {name}(void) {{ return {i} + TOKEN; }}\n')
        declared = "".join(f"int {name}(void);\n" for name in names)
        called = "".join(f"sum += {name}();\n" for name in names)
        body = f"{declared}#include <stdio.h>\nint main(void) {{ int sum = 0; {called} printf(\"%d\\n\", sum); return 0; }}\n"
        self.write("main.c", body)
        objects = " ".join(f"{name}.o" for name in [*names, "main"])
        self.write("Makefile", f"program: {objects}\n\tcc -o $@ {objects}\n%.o: %.c token.h\n\tcc -O1 -c -o $@ $<\n")
        self.lock = threading.Lock()
        self.set(0)
        self.load = Load(self.build)

    @staticmethod
    def write(name, text):
        with open(f"/build/{name}", "w") as file:
            file.write(text)

    def build(self):
        with self.lock:
            for name in os.listdir("/build"):
                if name.endswith(".o"):
                    os.unlink(f"/build/{name}")
            run("make", "-s", "-j2", "-C", "/build", "program")
            equal(int(run("/build/program")), 15 + 6 * self.token, "what the program tells")

    def set(self, n):
        # Between two builds, so that it waits for one.
        with self.lock:
            self.token = n
            self.write("token.h", f"#define TOKEN {n}\n")

    def get(self):
        self.load.check()
        with open("/build/token.h") as file:
            equal(int(file.read().split()[2]), self.token, "the token in the file")
        return self.token

    def go(self):
        self.load.goes_on()


@work
class tmux:
    """A server with two windows, one of which prints all the time."""

    def __init__(self):
        self.tmux("new-session", "-d", "-x", "80", "-y", "24", "-s", "work", "sh")
        self.tmux("new-window", "-d", "-t", "work:1", "i=0; while :; do i=$((i + 1)); echo line $i; sleep 0.01; done")
        self.token = 0
        self.set(0)

    @staticmethod
    def tmux(*args):
        return run("tmux", "-f", "/dev/null", "-S", "/tmp/tmux.socket", *args)

    def screen(self, window):
        return self.tmux("capture-pane", "-p", "-t", f"work:{window}").split()

    def set(self, n):
        self.tmux("send-keys", "-t", "work:0", f"clear; token={n}", "Enter")
        self.token = n
        self.get()

    def get(self):
        """Asks the shell in the window, through the keyboard and the screen."""
        self.tmux("send-keys", "-t", "work:0", "clear; echo [$token]", "Enter")
        shown = lambda: [word[1:-1] for word in self.screen(0) if word[:1] == "[" and word[1:2].isdigit()]
        return eventually(lambda: shown()[-1:], "the answer on the screen")[0]

    def last_line(self):
        return int([word for word in self.screen(1) if word.isdigit()][-1])

    def go(self):
        before = self.last_line()
        eventually(lambda: self.last_line() > before, "the other window prints on")


@work
class chromium:
    """Without a window, spoken to through two pipes."""

    PAGE = "data:text/html,<p id=p>0</p><script>let n = 0; setInterval(() => n++, 5)</script>"
    SWITCHES = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--user-data-dir=/tmp/chromium"]

    def __init__(self):
        there, self.out = os.pipe()
        self.into, back = os.pipe()

        def place():
            # Above what is overwritten.
            ends = [os.dup2(there, 20), os.dup2(back, 21)]
            for at, end in zip((3, 4), ends):
                os.dup2(end, at)

        command = ["chromium", *self.SWITCHES, "--disable-dev-shm-usage", "about:blank"]
        log = open("/tmp/chromium.log", "wb")
        self.browser = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, close_fds=False, preexec_fn=place)
        os.close(there)
        os.close(back)
        self.number, self.rest, self.session = 0, b"", None
        target = self.call("Target.createTarget", url=self.PAGE)["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        eventually(lambda: self.evaluate("document.readyState") == "complete", "the page")

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                part = os.read(self.into, 1 << 16)
                equal(part != b"", True, "the browser answers")
                self.rest += part
            text, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(text)
            if answer.get("id") == self.number:
                equal("error" in answer, False, str(answer))
                return answer["result"]

    def evaluate(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def set(self, n):
        self.evaluate(f"document.getElementById('p').textContent = '{n}'")

    def get(self):
        return self.evaluate("document.getElementById('p').textContent")

    def go(self):
        before = self.evaluate("n")
        eventually(lambda: self.evaluate("n") > before, "the page's timer ticks")
