//! Forks for which mounts run out: an error, and nothing is left of them. Alone in this program, which starts itself in a mount
//! namespace of its own, for that is to be full.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{Fixture, output};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive, unmount};

/// Says that this is the process in the new namespace.
const INSIDE: &str = "DELTABOX_TEST_INSIDE";

/// Mounts that are copied at once.
const MANY: usize = 1000;

/// Fills this namespace up with mounts below `dir`.
fn fill(dir: &Path) {
    let most = fs::read_to_string("/proc/sys/fs/mount-max").unwrap();
    let most: usize = most.trim().parse().unwrap();
    mount("none", dir, "tmpfs", MountFlags::empty(), None).unwrap();
    let [seed, many] = ["seed", "many"].map(|name| dir.join(name));
    fs::create_dir(&seed).unwrap();
    fs::create_dir(&many).unwrap();
    mount("none", &many, "tmpfs", MountFlags::empty(), None).unwrap();
    let below = |dir: &Path, n: usize| {
        let at = dir.join(n.to_string());
        fs::create_dir(&at).unwrap();
        at
    };
    for n in 1..MANY {
        mount_bind(&seed, below(&many, n)).unwrap();
    }
    // Too many are refused whole.
    let copies =
        (0..=most / MANY).take_while(|n| mount_bind_recursive(&many, below(dir, *n)).is_ok());
    let copies = copies.count();
    assert!(copies < most / MANY, "mounts never run out");
    let rest = (0..=MANY).take_while(|n| mount_bind(&seed, below(&seed, *n)).is_ok());
    assert!(rest.count() < MANY, "mounts never run out");
}

#[test]
fn forks_for_which_mounts_run_out_fail_whole_and_later_ones_work() {
    if std::env::var_os(INSIDE).is_none() {
        let inside = Command::new("unshare")
            .args(["--mount", "--propagation", "private"])
            .arg(std::env::current_exe().unwrap())
            .args(["--test-threads=1", "--nocapture"])
            .env(INSIDE, "1")
            .output()
            .unwrap();
        assert!(inside.status.success(), "{inside:?}");
        return;
    }
    let f = Fixture::new();
    let source = f.sandbox();
    output(&source, "echo kept > /file");
    let checkpoint = source.checkpoint(None).unwrap().id;
    let fork = || f.host.fork(source.name(), Some(checkpoint), 2, &[]);
    let full = f.dir.path().join("full");
    fs::create_dir(&full).unwrap();
    fill(&full);
    let refused = fork().map(|forks| forks.len()).unwrap_err().to_string();
    assert!(refused.contains("attaching the root"), "{refused}");
    assert_eq!(f.host.list().len(), 1);
    assert_eq!(output(&source, "cat /file"), "kept");
    unmount(&full, UnmountFlags::DETACH).unwrap();
    for fork in fork().unwrap() {
        assert_eq!(output(&fork, "cat /file"), "kept");
    }
    source.rollback(checkpoint).unwrap();
}
