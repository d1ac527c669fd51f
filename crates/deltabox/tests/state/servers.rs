//! Programs as people run them, checkpointed in the middle of their work, changed, rolled back and verified.

use deltabox::{CheckpointId, CommandSpec, Sandbox};

use crate::lab::{Lab, Outcome, PYTHON, Program, installed, output, text, write_file};
use crate::walk::Dice;

/// Prints what is served at a URL.
const GET: &str = "import sys, urllib.request\n\
    print(urllib.request.urlopen(sys.argv[1], timeout=30).read().decode(), end='')";

/// A program whose state other commands change and read.
struct Work<'a> {
    sandbox: &'a Sandbox,
    /// A script that changes the state; `$n` is a number.
    change: &'a str,
    /// A script that tells the state.
    read: &'a str,
}

impl Work<'_> {
    fn script(&self, script: &str, n: usize) -> String {
        output(self.sandbox, &format!("n={n}; {script}"))
    }

    fn read(&self) -> String {
        self.script(self.read, 0)
    }

    /// Grows a tree of checkpoints, jumping about in it, and verifies each state that it comes back to.
    fn search(&self, lab: &Lab, rounds: usize) -> Vec<(CheckpointId, String)> {
        let mut dice = Dice::new(4711);
        let mut nodes = vec![(self.sandbox.checkpoint(None).unwrap().id, self.read())];
        for round in 1..=rounds {
            let (id, state) = &nodes[dice.roll(nodes.len())];
            let report = self.sandbox.rollback(*id).unwrap();
            assert_eq!(report.fallback, None, "round {round}");
            assert_eq!(&self.read(), state, "round {round}");
            self.script(self.change, round);
            nodes.push((self.sandbox.checkpoint(None).unwrap().id, self.read()));
            if dice.roll(4) == 0 {
                self.sandbox.run(&["sh", "-c", "kill -9 -1"]).unwrap();
            }
        }
        let (id, state) = nodes.last().unwrap();
        let fork = &lab.fork(self.sandbox, *id, 1).unwrap()[0];
        let forked = Work {
            sandbox: fork,
            ..*self
        };
        assert_eq!(&forked.read(), state, "in a fork");
        forked.script(self.change, rounds + 1);
        assert_ne!(&forked.read(), state, "the fork works on");
        nodes
    }

    /// The same; then the host ends, and another one gives back some of the states.
    fn search_and_restart(&self, lab: Lab, rounds: usize) {
        let nodes = self.search(&lab, rounds);
        let kept = || nodes.iter().rev().step_by(3);
        for (id, _) in kept() {
            self.sandbox.persist(*id).unwrap();
        }
        let lab = lab.restarted();
        let sandbox = lab.host.get(self.sandbox.name()).unwrap();
        let again = Work {
            sandbox: &sandbox,
            ..*self
        };
        for (id, state) in kept() {
            let report = sandbox.rollback(*id).unwrap();
            assert_eq!(report.fallback, None, "after a restart");
            assert_eq!(&again.read(), state, "after a restart");
            again.script(self.change, rounds + 2);
            assert_ne!(&again.read(), state, "it works on after a restart");
        }
    }
}

/// Starts a server and waits until a script succeeds.
fn serve(sandbox: &Sandbox, argv: &[&str], up: &str) {
    let argv = argv.iter().map(|a| (*a).to_owned()).collect();
    let spec = CommandSpec {
        argv,
        ..CommandSpec::default()
    };
    sandbox.spawn(spec).unwrap();
    let script = format!("for i in $(seq 300); do {up} && exit 0; sleep 0.1; done; exit 1");
    let run = sandbox.run(&["sh", "-c", &script]).unwrap();
    assert_eq!(run.status, 0, "{up}: {}", text(&run.stderr));
}

#[test]
fn redis_keeps_its_keys() {
    if !installed("/usr/bin/redis-server") {
        return;
    }
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let argv = [
        "redis-server",
        "--save",
        "",
        "--dir",
        "/tmp",
        "--daemonize",
        "no",
    ];
    serve(&sandbox, &argv, "redis-cli ping | grep -q PONG");
    let all = "local all = redis.call('keys', '*') table.sort(all) local told = {} \
               for i, key in ipairs(all) do told[i] = key .. '=' .. redis.call('get', key) end return told";
    Work {
        sandbox: &sandbox,
        change: "redis-cli set key:$n $n >/dev/null && redis-cli incr total >/dev/null && \
                 redis-cli eval 'for i = 1, 2000 do redis.call(\"set\", \"bulk\" .. i % 50, ARGV[1] * i) end' 0 $n",
        read: &format!("redis-cli eval \"{all}\" 0"),
    }
    .search_and_restart(lab, 6);
}

#[test]
fn redis_under_load_loses_no_command() {
    if !installed("/usr/bin/redis-benchmark") {
        return;
    }
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let argv = [
        "redis-server",
        "--save",
        "",
        "--dir",
        "/tmp",
        "--daemonize",
        "no",
    ];
    serve(&sandbox, &argv, "redis-cli ping | grep -q PONG");
    let load = "redis-benchmark -q -c 10 -n 30000 incr total >/dev/null; echo ended $?";
    let mut program = Program::start(&sandbox, &["sh", "-c", load]).unwrap();
    output(
        &sandbox,
        "while [ \"$(redis-cli get total)\" -lt 2000 ] 2>/dev/null; do :; done",
    );
    let (id, mark) = (sandbox.checkpoint(None).unwrap().id, program.mark());
    for _ in 0..2 {
        assert_eq!(program.hear().unwrap(), "ended 0");
        assert_eq!(output(&sandbox, "redis-cli get total"), "30000");
        sandbox.rollback(id).unwrap();
        program.went_back(mark);
    }
}

#[test]
fn sqlite_keeps_a_transaction_and_its_locks() -> Outcome {
    if !installed("/usr/bin/sqlite3") {
        return Ok(());
    }
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut writer = Program::start(&sandbox, &["sqlite3", "-batch", "/data.db"])?;
    assert_eq!(writer.ask("pragma journal_mode=wal;")?, "wal");
    writer.say("create table t(x); insert into t values (1), (2);")?;
    writer.say("begin immediate; insert into t values (3);")?;
    assert_eq!(writer.ask("select sum(x) from t;")?, "6");
    let (id, mark) = (sandbox.checkpoint(None).unwrap().id, writer.mark());
    let committed = "sqlite3 /data.db 'select sum(x) from t'";
    let locked = "sqlite3 /data.db 'begin immediate' 2>&1 || true";
    for round in 0..4 {
        assert_eq!(output(&sandbox, committed), "3", "round {round}");
        assert!(output(&sandbox, locked).contains("locked"), "round {round}");
        assert_eq!(
            writer.ask("insert into t values (10); commit; select sum(x) from t;")?,
            "16"
        );
        assert_eq!(output(&sandbox, committed), "16", "round {round}");
        if round % 2 == 0 {
            writer.kill()?;
            output(&sandbox, "rm -f /data.db /data.db-wal /data.db-shm");
        }
        sandbox.rollback(id).unwrap();
        writer.went_back(mark);
        assert_eq!(writer.ask("select sum(x) from t;")?, "6");
        sandbox.rollback(id).unwrap();
        writer.went_back(mark);
    }
    assert_eq!(
        writer.ask("rollback; pragma integrity_check; select sum(x) from t;")?,
        "ok"
    );
    assert_eq!(writer.hear()?, "3");
    Ok(())
}

#[test]
fn nginx_serves_on_with_its_workers() {
    if !installed("/usr/sbin/nginx") {
        return;
    }
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    write_file(&sandbox, "/get.py", GET.as_bytes());
    let configuration = "daemon off; worker_processes 2; pid /run/nginx.pid; error_log stderr;\n\
        events {}\nhttp { access_log /tmp/access.log; server { listen 127.0.0.1:8080; root /site; } }\n";
    write_file(&sandbox, "/nginx.conf", configuration.as_bytes());
    output(&sandbox, "mkdir -p /site && echo first > /site/page");
    let get = format!("{PYTHON} /get.py http://127.0.0.1:8080/page");
    serve(
        &sandbox,
        &["nginx", "-c", "/nginx.conf"],
        &format!("{get} >/dev/null 2>&1"),
    );
    Work {
        sandbox: &sandbox,
        change: &format!("echo page $n > /site/page; {get} >/dev/null"),
        read: &get,
    }
    .search(&lab, 6);
    Work {
        sandbox: &sandbox,
        change: &format!(
            "sed -i \"s,root .*;,root /site$n;,;\" /nginx.conf && mkdir -p /site$n && echo site $n > /site$n/page && \
             nginx -c /nginx.conf -s reload && until [ \"$({get} 2>/dev/null)\" = \"site $n\" ]; do sleep 0.1; done"
        ),
        read: &get,
    }
    .search_and_restart(lab, 4);
}

const NODE: &str = "const seen = []; require('http').createServer((q, r) => { \
    if (q.url.startsWith('/add')) seen.push({ url: q.url, pad: 'x'.repeat(5000) }); \
    r.end(JSON.stringify(seen.map(s => s.url)) + seen.length); }).listen(8080, '127.0.0.1'); \
    setInterval(() => seen.reverse() && seen.reverse(), 5);";

#[test]
fn a_node_server_keeps_what_it_has_seen() {
    if !installed("/usr/bin/node") {
        return;
    }
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    write_file(&sandbox, "/get.py", GET.as_bytes());
    let get = format!("{PYTHON} /get.py http://127.0.0.1:8080");
    serve(
        &sandbox,
        &["node", "-e", NODE],
        &format!("{get}/ >/dev/null 2>&1"),
    );
    Work {
        sandbox: &sandbox,
        change: &format!("for i in 1 2 3; do {get}/add/$n/$i >/dev/null; done"),
        read: &format!("{get}/"),
    }
    .search_and_restart(lab, 6);
}

/// A server and two clients with open connections in one event loop each; the clients count the server's answers.
const ASYNCIO: &str = "
import asyncio, os, sys
async def handle(reader, writer):
    while line := await reader.readline():
        state['total'] += int(line)
        writer.write(b'%d\\n' % state['total'])
        await writer.drain()
state = {'total': 0}
async def server():
    await (await asyncio.start_server(handle, '127.0.0.1', 9000)).serve_forever()
async def client():
    while True:
        try:
            reader, writer = await asyncio.open_connection('127.0.0.1', 9000)
            break
        except OSError:
            await asyncio.sleep(0.05)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    print('ready', flush=True)
    while line := await lines.readline():
        writer.write(line)
        print((await asyncio.wait_for(reader.readline(), 30)).decode().strip(), flush=True)
if os.fork() == 0:
    asyncio.run(server())
asyncio.run(client())
";

#[test]
fn an_asyncio_server_and_its_client_stay_connected() -> Outcome {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut client = Program::start(&sandbox, &[PYTHON, "-c", ASYNCIO])?;
    assert_eq!(client.hear()?, "ready");
    assert_eq!(client.ask("5")?, "5");
    let (id, mark) = (sandbox.checkpoint(None).unwrap().id, client.mark());
    for round in 0..6 {
        assert_eq!(client.ask("10")?, "15", "round {round}");
        assert_eq!(client.ask("1")?, "16", "round {round}");
        if round % 3 == 1 {
            client.kill()?;
        }
        sandbox.rollback(id).unwrap();
        client.went_back(mark);
    }
    let fork = &lab.fork(&sandbox, id, 1)?[0];
    assert_eq!(client.in_fork(fork, mark)?.ask("100")?, "105");
    assert_eq!(client.ask("7")?, "12");
    Ok(())
}

#[test]
fn git_in_the_middle_of_its_work_ends_with_a_whole_repository() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let work = "set -e; export HOME=/ GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@a GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@a; \
        git init -q /repo; cd /repo; echo begun; for i in $(seq 40); do echo $i > file$i; git add .; \
        git commit -qm $i; done; git gc -q; git clone -q /repo /clone; echo ended";
    let mut program = Program::start(&sandbox, &["sh", "-c", work]).unwrap();
    assert_eq!(program.hear().unwrap(), "begun");
    let look = "cd /clone && git -c safe.directory='*' fsck --strict 2>&1 && git log --format=%s%T && cat file* | md5sum";
    let mut nodes = Vec::new();
    for _ in 0..4 {
        std::thread::sleep(std::time::Duration::from_millis(150));
        nodes.push((sandbox.checkpoint(None).unwrap().id, program.mark()));
    }
    assert_eq!(program.hear().unwrap(), "ended");
    let whole = output(&sandbox, look);
    for (id, mark) in nodes.into_iter().rev() {
        sandbox.rollback(id).unwrap();
        program.went_back(mark);
        assert_eq!(program.hear().unwrap(), "ended");
        assert_eq!(output(&sandbox, look), whole);
    }
}

#[test]
fn a_pipeline_of_commands_gives_the_same_result_under_many_checkpoints() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let work = "echo begun; seq 1 400000 | sed 's/7/x/g' | tee >(gzip -c | gunzip | md5sum > /sums) | sort -r | md5sum; \
        wait; while [ ! -s /sums ]; do sleep 0.01; done; cat /sums; echo ended";
    let start = || {
        let mut program = Program::start(&sandbox, &["bash", "-c", work]).unwrap();
        assert_eq!(program.hear().unwrap(), "begun");
        program
    };
    let hear = |program: &mut Program| -> Vec<String> {
        (0..3).map(|_| program.hear().unwrap()).collect()
    };
    let alone = hear(&mut start());
    output(&sandbox, "rm /sums");
    let mut program = start();
    let mut nodes = Vec::new();
    while program.session.info().exit.is_none() && nodes.len() < 25 {
        nodes.push((sandbox.checkpoint(None).unwrap().id, program.mark()));
    }
    assert_eq!(hear(&mut program), alone, "checkpointed on and on");
    for number in [nodes.len() / 2, 0, nodes.len() - 1] {
        let (id, mark) = nodes[number];
        sandbox.rollback(id).unwrap();
        program.went_back(mark);
        assert_eq!(
            hear(&mut program),
            alone,
            "rolled back to checkpoint {number}"
        );
    }
}
