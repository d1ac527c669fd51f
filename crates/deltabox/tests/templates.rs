//! Forks that share their memory with a template.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::driver::{FILL, SUM, ask, change, python, sums};
use common::{Fixture, output};
use deltabox::{Host, HostConfig, Sandbox, SandboxSpec};

/// Bytes of memory that a process has in common with others.
fn shared_bytes(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let lines = text.lines().filter(|l| l.starts_with("Shared_"));
    let kib = lines.map(|l| {
        l.split_ascii_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
    });
    kib.sum::<u64>() << 10
}

#[test]
fn copies_of_one_template_write_everywhere_and_touch_neither_it_nor_each_other() {
    let f = Fixture::new();
    let source = f.sandbox();
    let id = python(&source).info().id;
    ask(&source, id, FILL);
    ask(&source, id, &format!(">{FILL}"));
    ask(&source, id, ">M.reverse()");
    let [parent, child] = [SUM.to_owned(), format!(">{SUM}")].map(|q| ask(&source, id, &q));
    let checkpoint = source.checkpoint(None).unwrap().id;
    let fork = |n| {
        f.host
            .fork(source.name(), Some(checkpoint), n, &[])
            .unwrap()
    };
    let forks = fork(3);
    let before = f.host.templates();
    assert_eq!((before.number, before.births), (1, 3));
    let shared = shared_bytes(f.host.template_processes()[0]);
    assert!(shared > 12 << 20, "only {shared} bytes are shared");
    for (n, fork) in forks.iter().enumerate() {
        for prefix in ["", ">"] {
            let line = format!("{prefix}M[:] = bytes([{n}]) * len(M)");
            assert_eq!(ask(fork, id, &line), "done");
        }
    }
    for (n, fork) in forks.iter().enumerate() {
        for prefix in ["", ">"] {
            let line = format!("{prefix}M == bytes([{n}]) * len(M)");
            assert_eq!(ask(fork, id, &line), "True", "fork {n}{prefix}");
        }
    }
    for fork in fork(2).iter().chain([&source]) {
        assert_eq!(ask(fork, id, SUM), parent);
        assert_eq!(ask(fork, id, &format!(">{SUM}")), child);
    }
    // More may have been born since, for the next forks.
    let info = f.host.templates();
    assert!(info.births >= 5 && info.hits == 2, "{info:?}");
    // And what is made of a copy goes on as usual.
    let again = forks[1].checkpoint(None).unwrap().id;
    ask(&forks[1], id, "M[5] = 99");
    forks[1].rollback(again).unwrap();
    assert_eq!(ask(&forks[1], id, "M[5]"), "1");
}

#[test]
fn a_copy_of_a_template_is_confined_and_shows_itself_like_any_process() {
    let f = Fixture::new();
    let source = f.sandbox();
    let id = python(&source).info().id;
    ask(&source, id, "1");
    let checkpoint = source.checkpoint(None).unwrap().id;
    let forks = f
        .host
        .fork(source.name(), Some(checkpoint), 2, &[])
        .unwrap();
    assert_eq!(f.host.templates().births, 2);
    let questions = [
        "os.readlink('/proc/self/exe')",
        "open('/proc/self/comm').read()",
        "open('/proc/self/cmdline').read()",
        "open('/proc/self/cgroup').read()",
        "open('/proc/self/limits').read()",
        "open('/proc/self/auxv', 'rb').read()",
        "[l for l in open('/proc/self/status') if l.startswith(('Pid', 'PPid', 'Uid', 'Gid', 'Groups', \
         'NS', 'Sig', 'Shd', 'Cap', 'NoNew', 'Seccomp', 'Umask', 'Threads', 'CoreDumping'))]",
        "(os.getsid(0), os.getpgrp(), os.getppid(), os.getcwd(), sorted(os.listdir('/proc/self/fd')))",
        "[l for l in os.listdir('/proc') if l.isdigit()]",
        "os.stat('/proc/self/mem').st_uid",
        "[l.split()[5] for l in open('/proc/self/maps') if len(l.split()) > 5 and 'memfd:deltabox' in l]",
        "os.system('exit 3') >> 8",
    ];
    for question in questions {
        for q in [question.to_owned(), format!(">{question}")] {
            assert_eq!(ask(&forks[0], id, &q), ask(&source, id, &q), "{q}");
        }
    }
    // The same namespaces as whatever else is started in there.
    let script = "cd /proc/self/ns; for n in *; do echo \"'$n': '$(readlink $n)'\"; done | sort";
    let expected = output(&forks[0], script).replace('\n', ", ");
    let ask_for =
        "{n: os.readlink('/proc/self/ns/' + n) for n in sorted(os.listdir('/proc/self/ns'))}";
    assert_eq!(ask(&forks[0], id, ask_for), format!("{{{expected}}}"));
    // What the filter denies, and what tracing inside allows.
    assert_eq!(ask(&forks[0], id, "import ctypes"), "done");
    let denied = "ctypes.CDLL(None, use_errno=True).unshare(0x10000000)";
    assert_eq!(ask(&forks[0], id, denied), "-1");
    let pid = forks[0].session(id).unwrap().info().pid;
    let look = format!("head -c 0 /proc/{pid}/mem && cat /proc/{pid}/environ | wc -c");
    assert_eq!(output(&forks[0], &look), output(&source, &look));
}

#[test]
fn a_template_that_dies_costs_time_and_nothing_else() {
    let f = Fixture::new();
    let source = f.sandbox();
    let id = python(&source).info().id;
    ask(&source, id, FILL);
    let sum = ask(&source, id, SUM);
    let checkpoint = source.checkpoint(None).unwrap().id;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut pause = 0;
            while !stop.load(Ordering::Relaxed) {
                for pid in f.host.template_processes() {
                    let pid = rustix::process::Pid::from_raw(pid).unwrap();
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
                pause = (pause + 7) % 50;
                std::thread::sleep(std::time::Duration::from_millis(pause));
            }
        });
        for _ in 0..8 {
            let forks = f.host.fork(source.name(), Some(checkpoint), 3, &[]);
            for fork in forks.unwrap() {
                assert_eq!(ask(&fork, id, SUM), sum);
                f.host.remove(fork.name()).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let forks = f
        .host
        .fork(source.name(), Some(checkpoint), 2, &[])
        .unwrap();
    assert_eq!(ask(&forks[1], id, SUM), sum);
}

#[test]
fn tight_limits_of_a_sandbox_hold_for_copies_and_do_not_keep_them_from_being_made() {
    let f = Fixture::new();
    let spec = SandboxSpec {
        pids: Some(2),
        memory: Some(256 << 20),
        ..SandboxSpec::default()
    };
    let source = f.host.create(spec).unwrap();
    let id = python(&source).info().id;
    ask(&source, id, FILL);
    let sum = ask(&source, id, SUM);
    let checkpoint = source.checkpoint(None).unwrap().id;
    let forks = f
        .host
        .fork(source.name(), Some(checkpoint), 2, &[])
        .unwrap();
    for fork in &forks {
        assert_eq!(ask(fork, id, SUM), sum);
        assert!(fork.run(&["true"]).is_err(), "a third process was allowed");
    }
}

#[test]
fn a_template_goes_with_its_checkpoint_its_sandbox_and_the_switch() {
    let f = Fixture::new();
    let source = f.sandbox();
    let id = python(&source).info().id;
    ask(&source, id, "1");
    let [first, second] = [0; 2].map(|_| source.checkpoint(None).unwrap().id);
    for checkpoint in [first, second] {
        f.host
            .fork(source.name(), Some(checkpoint), 2, &[])
            .unwrap();
    }
    assert_eq!(f.host.templates().number, 2);
    source.delete(first).unwrap();
    assert_eq!(f.host.templates().number, 1);
    f.host.remove(source.name()).unwrap();
    assert_eq!(
        (f.host.templates().number, f.host.templates().bytes),
        (0, 0)
    );

    let dir = tempfile::tempdir().unwrap();
    let off = Host::open(HostConfig {
        state_dir: dir.path().join("state"),
        templates: 0,
        ..HostConfig::default()
    });
    let off = off.unwrap();
    let source = off.create(SandboxSpec::default()).unwrap();
    let id = python(&source).info().id;
    ask(&source, id, FILL);
    let forks = off.fork(source.name(), None, 2, &[]).unwrap();
    assert_eq!(ask(&forks[1], id, SUM), ask(&source, id, SUM));
    assert_eq!((off.templates().births, off.templates().made), (0, 0));
}

#[test]
fn templates_of_later_checkpoints_are_copies_of_earlier_ones_with_what_differs() {
    let f = Fixture::new();
    let source = f.sandbox();
    let id = python(&source).info().id;
    for line in [FILL, "N = []"] {
        ask(&source, id, line);
        ask(&source, id, &format!(">{line}"));
    }
    let mut states = Vec::new();
    for n in 0..7 {
        let checkpoint = source.checkpoint(None).unwrap().id;
        states.push((checkpoint, sums(&source, id)));
        let forks = f
            .host
            .fork(source.name(), Some(checkpoint), 2, &[])
            .unwrap();
        for fork in &forks {
            assert_eq!(sums(fork, id), states[n].1, "{n}");
            change(fork, id, 100 + n);
        }
        change(&source, id, n + 1);
    }
    let info = f.host.templates();
    assert_eq!((info.number, info.made, info.misses), (7, 7, 14));
    // Every fifth begins anew, for a row of copies makes forks slow.
    assert_eq!(info.derived, 5, "{info:?}");
    // Seven times 16 MiB would be 112.
    assert!(info.bytes < 54 << 20, "{info:?}");
    // Ancestors may go, and die.
    source.delete(states[0].0).unwrap();
    for pid in f.host.template_processes().into_iter().step_by(2) {
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
    for (checkpoint, expected) in &states[1..] {
        let forks = f
            .host
            .fork(source.name(), Some(*checkpoint), 2, &[])
            .unwrap();
        for fork in &forks {
            assert_eq!(&sums(fork, id), expected, "{checkpoint}");
        }
    }
}

#[test]
fn a_fork_of_what_has_no_template_is_made_of_the_next_best() {
    let f = Fixture::new();
    let source = f.sandbox();
    let id = python(&source).info().id;
    for line in [FILL, "N = []"] {
        ask(&source, id, line);
        ask(&source, id, &format!(">{line}"));
    }
    let first = source.checkpoint(None).unwrap().id;
    let forks = f.host.fork(source.name(), Some(first), 2, &[]).unwrap();
    change(&source, id, 3);
    assert_eq!(
        ask(
            &source,
            id,
            "P = __import__('subprocess').Popen(['sleep', '1000'])"
        ),
        "done"
    );
    let second = source.checkpoint(None).unwrap().id;
    let expected = sums(&source, id);
    let births = f.host.templates().births;
    let fork = &f.host.fork(source.name(), Some(second), 1, &[]).unwrap()[0];
    let info = f.host.templates();
    assert_eq!((info.number, info.relatives), (1, 1), "{info:?}");
    assert_eq!(info.births, births + 1);
    assert_eq!(sums(fork, id), expected);
    assert_eq!(ask(fork, id, "P.poll()"), "None");
    // A fork's own checkpoints are of the family, a stranger's are not.
    change(&forks[1], id, 4);
    let third = forks[1].checkpoint(None).unwrap().id;
    let expected = sums(&forks[1], id);
    let again = &f.host.fork(forks[1].name(), Some(third), 1, &[]).unwrap()[0];
    assert_eq!(f.host.templates().relatives, 2);
    assert_eq!(sums(again, id), expected);
    let stranger = f.sandbox();
    python(&stranger);
    f.host.fork(stranger.name(), None, 1, &[]).unwrap();
    assert_eq!(f.host.templates().relatives, 2);
    // What was stopped comes back the same way.
    source.stop().unwrap();
    source.rollback(second).unwrap();
    assert_eq!(f.host.templates().relatives, 3);
    assert_eq!(sums(&source, id)[0], sums(fork, id)[0]);
}

#[test]
fn a_pinned_template_is_there_before_a_fork_and_stays_for_others() {
    let dir = tempfile::tempdir().unwrap();
    let host = Host::open(HostConfig {
        state_dir: dir.path().join("state"),
        templates: 2,
        ..HostConfig::default()
    });
    let host = host.unwrap();
    let source = host.create(SandboxSpec::default()).unwrap();
    let id = python(&source).info().id;
    ask(&source, id, FILL);
    let ids = [0; 4].map(|_| source.checkpoint(None).unwrap().id);
    assert!(host.pin_template(source.name(), ids[0], true).unwrap());
    for at in &ids[1..] {
        host.fork(source.name(), Some(*at), 2, &[]).unwrap();
    }
    let info = host.templates();
    assert_eq!(
        (info.number, info.pinned, info.evicted),
        (2, 1, 2),
        "{info:?}"
    );
    host.fork(source.name(), Some(ids[0]), 1, &[]).unwrap();
    assert_eq!(host.templates().hits, 1);
    assert!(host.pin_template(source.name(), ids[0], false).unwrap());
    assert_eq!(host.templates().pinned, 0);
    assert!(
        host.pin_template(source.name(), deltabox::CheckpointId(99), true)
            .is_err()
    );
    source.delete(ids[0]).unwrap();
    assert_eq!(host.templates().number, 1);
}

#[test]
fn a_template_of_which_forks_are_expected_stays_while_one_that_was_used_oftener_goes() {
    let dir = tempfile::tempdir().unwrap();
    let host = Host::open(HostConfig {
        state_dir: dir.path().join("state"),
        templates: 2,
        warm: 0,
        ..HostConfig::default()
    });
    let host = host.unwrap();
    // Strangers, so that none is a copy of another.
    let [rare, common, last] = [(); 3].map(|()| {
        let source = host.create(SandboxSpec::default()).unwrap();
        let id = python(&source).info().id;
        ask(&source, id, FILL);
        let checkpoint = source.checkpoint(None).unwrap().id;
        (source, checkpoint)
    });
    let fork = |(source, at): &(Arc<Sandbox>, _), n| {
        host.fork(source.name(), Some(*at), n, &[]).unwrap();
    };
    fork(&rare, 2);
    fork(&common, 8);
    host.expect_forks(rare.0.name(), rare.1, 10_000).unwrap();
    fork(&last, 2);
    let there = [&rare, &common, &last].map(|(_, at)| host.has_template(*at));
    assert_eq!(there, [true, false, true]);
}

#[test]
fn forks_that_share_their_random_numbers_can_be_told_apart() {
    let f = Fixture::new();
    let source = f.sandbox();
    let id = python(&source).info().id;
    ask(&source, id, "import random; random.seed(1)");
    let forks = f.host.fork_as(source.name(), None, 3, &[], true).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for (n, fork) in forks.iter().enumerate() {
        let told = ask(fork, id, "open('/run/deltabox/generation').read()");
        assert_eq!(
            told.len(),
            "'1 0123456789abcdef0123456789abcdef\\n'".len(),
            "{told}"
        );
        let line = output(fork, "echo $DELTABOX_FORK $DELTABOX_GENERATION");
        assert_eq!(format!("'{line}\\n'"), told);
        assert!(line.starts_with(&format!("{} ", n + 1)), "{line}");
        assert_eq!(output(fork, "stat -c %u%g /run/deltabox/generation"), "00");
        assert!(seen.insert(line));
    }
    // What the sandbox has put there is not followed.
    output(&source, "rm -rf /run/deltabox; ln -s /tmp /run/deltabox");
    let refused = f.host.fork_as(source.name(), None, 1, &[], true);
    assert!(
        refused
            .err()
            .unwrap()
            .to_string()
            .contains("/run/deltabox/generation")
    );
    assert_eq!(
        output(&source, "ls -A /tmp | grep -c generation || true"),
        "0"
    );
}
