//! Forks that have files mapped from their base, with the pages that were written there shared with a template.

mod common;

use std::os::unix::fs::MetadataExt;

use common::driver::{ask, python};
use common::{Fixture, output};
use deltabox::{CheckpointId, Host, HostConfig, Sandbox, SessionId};

/// A file of the base below `/usr`, of more than a few pages.
const FILE: &str = "os.__file__";

/// `P` is a private mapping of it of which the first page is written to, `Q` one that is only read.
fn map(sandbox: &Sandbox, id: SessionId) {
    let lines = [
        "import mmap".to_owned(),
        format!("F = os.open({FILE}, os.O_RDONLY)"),
        "B = os.pread(F, 32768, 0)".to_owned(),
        "private = lambda prot: mmap.mmap(F, 32768, flags=mmap.MAP_PRIVATE, prot=prot)".to_owned(),
        "P = private(mmap.PROT_READ | mmap.PROT_WRITE)".to_owned(),
        "Q = private(mmap.PROT_READ)".to_owned(),
        "P[:4] = b'0000'".to_owned(),
    ];
    for line in lines {
        assert_eq!(ask(sandbox, id, &line), "done", "{line}");
    }
}

/// What a process sees of its file mappings, page by page, for the kernel keeps some neighbours apart and some not; the device
/// aside: a fork's is another anyway.
const MAPPED: &str = "hashlib.sha256(repr([(at, p, int(o, 16) + at - first, i, f) \
     for a, p, o, d, i, f in (l.split(maxsplit=5) for l in open('/proc/self/maps') if '/usr/' in l) \
     for first, end in [[int(n, 16) for n in a.split('-')]] \
     for at in range(first, end, 4096)]).encode()).hexdigest()";

/// The devices of mappings, all but those that are shared.
const DEVICES: &str = "sorted({l.split()[3] for l in open('/proc/self/maps') if '/usr/' in l and \
                       'r--s' not in l})";

const PATTERN: &str = "bytes(P[:4]), P[4:] == B[4:], Q[:] == B";

fn holds(sandbox: &Sandbox, id: SessionId, first: &str) {
    let expected = format!("(b'{first}', True, True)");
    assert_eq!(ask(sandbox, id, PATTERN), expected);
}

fn write(sandbox: &Sandbox, id: SessionId, first: &str) {
    assert_eq!(ask(sandbox, id, &format!("P[:4] = b'{first}'")), "done");
}

fn fork(host: &Host, of: &Sandbox, at: CheckpointId, n: usize) -> Vec<std::sync::Arc<Sandbox>> {
    host.fork(of.name(), Some(at), n, &[]).unwrap()
}

fn kill(sandbox: &Sandbox, id: SessionId) {
    let pid = sandbox.session(id).unwrap().info().pid;
    output(sandbox, &format!("kill -9 {pid}"));
}

/// The device of the base's files as `/proc/PID/maps` shows it.
fn base_device() -> String {
    let device = std::fs::metadata("/usr").unwrap().dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    format!("['{major:02x}:{minor:02x}']")
}

/// Bytes that a process outside has to itself of the private mappings of files below `/usr`, and that it shares.
fn dirty(pid: i32) -> (u64, u64) {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut counts, mut own, mut shared) = (false, 0, 0);
    for line in text.lines() {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        let bytes = || words[1].parse::<u64>().unwrap() << 10;
        match words[0] {
            "Private_Dirty:" if counts => own += bytes(),
            "Shared_Dirty:" if counts => shared += bytes(),
            first if !first.ends_with(':') => {
                counts = line.contains("/usr/") && words[1].ends_with('p');
            }
            _ => {}
        }
    }
    (own, shared)
}

/// The number of a sandbox's Python as the host counts.
fn outside(sandbox: &Sandbox, id: SessionId) -> i32 {
    let inner = sandbox.session(id).unwrap().info().pid;
    let namespace = ask(sandbox, id, "os.readlink('/proc/self/ns/pid')");
    let namespace = namespace.trim_matches('\'');
    let all = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid = entry.ok()?.file_name().to_str()?.parse::<i32>().ok()?;
        let link = std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok()?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let number = status.lines().find(|l| l.starts_with("NSpid:"))?;
        let number = number.split_ascii_whitespace().next_back()?;
        (link.to_str() == Some(namespace) && number == inner.to_string()).then_some(pid)
    });
    all.last().expect("it lives")
}

#[test]
fn what_was_written_to_file_mappings_is_shared_and_each_forks_own() {
    let f = Fixture::new();
    let source = f.sandbox();
    let id = python(&source).info().id;
    map(&source, id);
    let mapped = ask(&source, id, MAPPED);
    let at = source.checkpoint(None).unwrap().id;
    let forks = fork(&f.host, &source, at, 3);
    for fork in &forks {
        assert_eq!(ask(fork, id, DEVICES), base_device());
        assert_eq!(ask(fork, id, MAPPED), mapped);
        let (own, shared) = dirty(outside(fork, id));
        assert!(shared > 512 << 10, "only {shared} bytes are shared");
        assert!(own < shared, "{own} of {shared} bytes are its own");
        holds(fork, id, "0000");
    }
    for (n, fork) in forks.iter().enumerate() {
        write(fork, id, &format!("{n}{n}{n}{n}"));
    }
    for (n, fork) in forks.iter().enumerate() {
        holds(fork, id, &format!("{n}{n}{n}{n}"));
    }
    for fork in fork(&f.host, &source, at, 2).iter().chain([&source]) {
        holds(fork, id, "0000");
    }
    // Nobody inside gets at the base's files by that.
    let area = "next('-'.join(f'{int(a, 16):x}' for a in l.split()[0].split('-')) \
                for l in open('/proc/self/maps') if '/usr/' in l)";
    let pid = forks[0].session(id).unwrap().info().pid;
    let area = ask(&forks[0], id, area);
    let link = format!("/proc/{pid}/map_files/{}", area.trim_matches('\''));
    let refused = output(&forks[0], &format!("cat {link} 2>&1 | tail -1"));
    assert!(refused.contains("not permitted"), "{refused}");
}

#[test]
fn forks_with_files_of_the_base_go_back_come_again_and_are_forked() {
    let f = Fixture::new();
    let source = f.sandbox();
    let id = python(&source).info().id;
    map(&source, id);
    let mapped = ask(&source, id, MAPPED);
    let at = source.checkpoint(None).unwrap().id;
    let forks = fork(&f.host, &source, at, 2);
    let one = &forks[1];
    write(one, id, "1111");
    let first = one.checkpoint(None).unwrap().id;
    write(one, id, "2222");
    ask(one, id, "P[8192:8196] = b'2222'");
    let second = one.checkpoint(None).unwrap().id;
    one.rollback(first).unwrap();
    holds(one, id, "1111");
    assert_eq!(ask(one, id, MAPPED), mapped);
    kill(one, id);
    let report = one.rollback(first).unwrap();
    assert!(report.rebuilt > 0, "{report:?}");
    holds(one, id, "1111");
    assert_eq!(ask(one, id, MAPPED), mapped);
    // Without a template it still has the base's files mapped, for that is what it had.
    assert_eq!(ask(one, id, DEVICES), base_device());
    one.rollback(second).unwrap();
    assert_eq!(ask(one, id, "bytes(P[8192:8196])"), "b'2222'");
    for n in [1, 3] {
        for again in fork(&f.host, one, first, n) {
            holds(&again, id, "1111");
            assert_eq!(ask(&again, id, MAPPED), mapped);
            let third = again.checkpoint(None).unwrap().id;
            write(&again, id, "3333");
            again.rollback(third).unwrap();
            holds(&again, id, "1111");
        }
    }
    // The source's own processes are made again of the template, too.
    write(&source, id, "4444");
    kill(&source, id);
    source.rollback(at).unwrap();
    holds(&source, id, "0000");
    source.rollback(at).unwrap();
    holds(&source, id, "0000");
    assert_eq!(ask(&source, id, MAPPED), mapped);
}

#[test]
fn a_file_that_a_fork_changes_is_as_it_was_for_who_had_it_mapped() {
    let f = Fixture::new();
    let source = f.sandbox();
    let id = python(&source).info().id;
    map(&source, id);
    let at = source.checkpoint(None).unwrap().id;
    let forks = fork(&f.host, &source, at, 2);
    let one = &forks[0];
    let spoil = "open(os.__file__, 'r+b').write(b'!!!!')";
    assert_eq!(ask(one, id, spoil), "4");
    let read = "open(os.__file__, 'rb').read(4)";
    assert_eq!(ask(one, id, read), "b'!!!!'");
    holds(one, id, "0000");
    let changed = one.checkpoint(None).unwrap().id;
    kill(one, id);
    one.rollback(changed).unwrap();
    for sandbox in fork(&f.host, one, changed, 2).iter().chain([one]) {
        assert_eq!(ask(sandbox, id, read), "b'!!!!'");
        holds(sandbox, id, "0000");
        // What is mapped from now on shows it.
        let fresh = "bytes(mmap.mmap(os.open(os.__file__, os.O_RDONLY), 32768, \
                     flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)[:4])";
        assert_eq!(ask(sandbox, id, fresh), "b'!!!!'");
    }
    // No host file was written to.
    assert_eq!(ask(&forks[1], id, &format!("{read} == B[:4]")), "True");
    // The source has its own file mapped, which shows the change, and so it is in all that is made of that.
    assert_eq!(ask(&source, id, spoil), "4");
    let shown = ask(&source, id, "bytes(Q[:4])");
    assert_eq!(shown, "b'!!!!'");
    let later = source.checkpoint(None).unwrap().id;
    for n in [1, 2] {
        for sandbox in fork(&f.host, &source, later, n) {
            assert_eq!(ask(&sandbox, id, "bytes(Q[:4])"), shown);
            assert_eq!(ask(&sandbox, id, "bytes(P[:4])"), "b'0000'");
            assert_eq!(ask(&sandbox, id, read), shown);
        }
    }
    kill(&source, id);
    source.rollback(at).unwrap();
    holds(&source, id, "0000");
    assert_eq!(ask(&source, id, &format!("{read} == B[:4]")), "True");
}

#[test]
fn a_durable_checkpoint_of_a_fork_knows_the_files_of_the_base_again() {
    let f = Fixture::new();
    let source = f.sandbox();
    let id = python(&source).info().id;
    map(&source, id);
    let mapped = ask(&source, id, MAPPED);
    let at = source.checkpoint(None).unwrap().id;
    let forks = fork(&f.host, &source, at, 2);
    write(&forks[0], id, "1111");
    let durable = forks[0].checkpoint_durable(None).unwrap().id;
    let name = forks[0].name().to_owned();
    drop((forks, source));
    let Fixture { host, dir } = f;
    drop(host);
    let config = HostConfig {
        state_dir: dir.path().join("state"),
        ..HostConfig::default()
    };
    let host = Host::open(config).unwrap();
    let back = host.get(&name).unwrap();
    back.rollback(durable).unwrap();
    holds(&back, id, "1111");
    assert_eq!(ask(&back, id, MAPPED), mapped);
    assert_eq!(ask(&back, id, DEVICES), base_device());
    let next = back.checkpoint(None).unwrap().id;
    for fork in fork(&host, &back, next, 2) {
        holds(&fork, id, "1111");
    }
}

#[test]
fn what_has_taken_the_path_of_a_mapped_file_is_not_taken_for_it() {
    let f = Fixture::new();
    let source = f.sandbox();
    let id = python(&source).info().id;
    map(&source, id);
    output(
        &source,
        "for n in fifo link other; do seq 2000 > /root/$n; done",
    );
    let lines = [
        "open_all = lambda: [mmap.mmap(os.open('/root/' + n, os.O_RDONLY), 4096, prot=mmap.PROT_READ, \
         flags=mmap.MAP_PRIVATE) for n in ('fifo', 'link', 'other')]",
        "D = open_all()",
    ];
    for line in lines {
        assert_eq!(ask(&source, id, line), "done");
    }
    // Whoever opens it would wait, come elsewhere, or find something else.
    let replace = "cd /root; for n in fifo link other; do mv $n was-$n; done; \
                   mkfifo fifo; ln -s /proc/self/mem link; echo other > other";
    output(&source, replace);
    let at = source.checkpoint(None).unwrap().id;
    let shown = "[bytes(d[:4]) for d in D], len(os.listdir('/proc/self/fd'))";
    let expected = ask(&source, id, shown);
    assert!(
        expected.starts_with("([b'1\\n2\\n', b'1\\n2\\n', b'1\\n2\\n'], "),
        "{expected}"
    );
    for fork in fork(&f.host, &source, at, 2) {
        assert_eq!(ask(&fork, id, shown), expected);
        holds(&fork, id, "0000");
    }
}
