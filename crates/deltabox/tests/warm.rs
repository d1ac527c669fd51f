//! Sandboxes that are kept ready for forks.

mod common;

use std::time::Instant;

use common::{PATIENCE, output};
use deltabox::{Host, HostConfig, SandboxSpec, WarmInfo};

struct Fixture {
    host: Host,
    _dir: tempfile::TempDir,
}

fn host(warm: usize) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let host = Host::open(HostConfig {
        state_dir: dir.path().join("state"),
        warm,
        ..HostConfig::default()
    });
    Fixture {
        host: host.unwrap(),
        _dir: dir,
    }
}

/// Waits until the pool is in a state.
fn await_pool(host: &Host, wanted: impl Fn(&WarmInfo) -> bool) -> WarmInfo {
    let begun = Instant::now();
    loop {
        let info = host.warm();
        if wanted(&info) {
            return info;
        }
        assert!(begun.elapsed() < PATIENCE, "{info:?}");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn a_sandbox_made_ready_for_one_checkpoint_shows_the_files_of_another() {
    let f = host(2);
    let source = f.host.create(SandboxSpec::default()).unwrap();
    output(&source, "mkdir /w; echo one > /w/a; echo gone > /w/b");
    let first = source.checkpoint(None).unwrap().id;
    f.host.expect_forks(source.name(), first, 2).unwrap();
    await_pool(&f.host, |info| info.ready == 2);
    output(
        &source,
        "echo three > /w/a; rm /w/b; mkdir -p /w/c/d; echo new > /w/c/d/e; ln -s /w/a /w/l",
    );
    let second = source.checkpoint(None).unwrap().id;
    let list = "cd /w; find . | sort; cat a; cat l b c/d/e 2>/dev/null; echo x >> a; cat a";
    let forks = f.host.fork(source.name(), Some(second), 2, &[]).unwrap();
    assert_eq!(f.host.warm().hits, 2);
    for fork in &forks {
        let expected = ".\n./a\n./c\n./c/d\n./c/d/e\n./l\nthree\nthree\nnew\nthree\nx";
        assert_eq!(output(fork, list), expected);
    }
    let forks = f.host.fork(source.name(), Some(first), 1, &[]).unwrap();
    assert_eq!(output(&forks[0], list), ".\n./a\n./b\none\ngone\none\nx");
    assert_eq!(output(&source, "cat /w/a"), "three");
}

#[test]
fn no_more_are_kept_than_allowed_and_none_for_a_source_that_is_gone() {
    let f = host(3);
    let sources = ["one", "two"].map(|name| {
        let name = Some(name.to_owned());
        let spec = SandboxSpec {
            name,
            ..SandboxSpec::default()
        };
        f.host.create(spec).unwrap()
    });
    let ids = sources.each_ref().map(|s| s.checkpoint(None).unwrap().id);
    f.host.expect_forks("one", ids[0], 100).unwrap();
    await_pool(&f.host, |info| info.ready == 3);
    // The latest expectation comes first.
    f.host.expect_forks("two", ids[1], 2).unwrap();
    let info = await_pool(&f.host, |info| info.made == 5);
    assert_eq!((info.dropped, info.ready), (2, 3));
    assert_eq!(f.host.list().len(), 2, "what is kept ready is not listed");
    f.host.remove("two").unwrap();
    await_pool(&f.host, |info| info.made == 7 && info.ready == 3);
    f.host.remove("one").unwrap();
    assert_eq!(f.host.warm().ready, 0);
}

#[test]
fn nothing_is_kept_ready_if_that_is_switched_off() {
    let f = host(0);
    let source = f.host.create(SandboxSpec::default()).unwrap();
    let forks = f.host.fork(source.name(), None, 2, &[]).unwrap();
    assert_eq!(output(&forks[1], "echo works"), "works");
    let info = f.host.warm();
    assert_eq!((info.made, info.ready, info.misses), (0, 0, 2));
}
