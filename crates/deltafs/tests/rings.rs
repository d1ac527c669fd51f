//! FUSE over `io_uring`. These run in either case, but over rings only where the kernel offers them (`fuse.enable_uring`).

mod common;

use std::fs;
use std::os::unix::fs::FileExt;

use common::{Random, fixture, open_rw};

/// Whether the kernel offers requests over rings.
fn are_offered() -> bool {
    let state = fs::read_to_string("/sys/module/fuse/parameters/enable_uring");
    let offered = state.is_ok_and(|state| state.starts_with('Y'));
    if !offered {
        eprintln!("over /dev/fuse alone: fuse.enable_uring is off");
    }
    offered
}

/// How many rings this process has.
fn rings() -> usize {
    let fds = fs::read_dir("/proc/self/fd").unwrap();
    let targets = fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    let is_ring = |target: &std::path::PathBuf| target.to_string_lossy().contains("io_uring");
    targets.filter(is_ring).count()
}

#[test]
fn data_and_names_of_all_lengths_pass() {
    let f = fixture(|base| fs::write(base.join("base"), vec![5; 3 << 20]).unwrap());
    let v = &f.volume;
    assert_eq!(rings() > 0, are_offered());
    assert_eq!(fs::read(v.at("base")).unwrap(), vec![5; 3 << 20]);
    let mut random = Random(1);
    let mut expected = vec![0; 2 << 20];
    v.write("file", &expected);
    let file = open_rw(v.at("file"));
    for round in 0..200 {
        let start = random.below(1 << 20) as usize;
        let most = 1 << random.below(21);
        let len = random.below(most) as usize;
        expected[start..start + len].fill(round);
        file.write_all_at(&expected[start..start + len], start as u64)
            .unwrap();
    }
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    assert!(fs::read(v.at("file")).unwrap() == expected);
    for len in 1..=255 {
        let name = "n".repeat(len);
        v.write(&name, &name);
        assert_eq!(v.read(&name), name);
    }
    assert!(fs::write(v.at("n".repeat(256)), "").is_err());
}

#[test]
fn more_callers_wait_for_a_rollback_than_a_queue_has_places() {
    const DIRS: usize = 100;
    let f = fixture(|base| {
        for dir in 0..DIRS {
            fs::create_dir(base.join(dir.to_string())).unwrap();
        }
    });
    let v = &f.volume;
    let write = |text: &str| {
        for dir in 0..DIRS {
            (0..20).for_each(|file| v.write(&format!("{dir}/{file}"), text));
        }
    };
    write("first");
    let first = v.checkpoint();
    write("second, and longer");
    let second = v.checkpoint();
    for (state, text) in [(&first, "first"), (&second, "second, and longer")].repeat(3) {
        v.rollback_sparing(state, 0, deltafs::InUse::default)
            .unwrap();
        std::thread::scope(|scope| {
            for dir in 0..DIRS {
                scope.spawn(move || {
                    for file in 0..20 {
                        assert_eq!(v.read(&format!("{dir}/{file}")), text);
                    }
                });
            }
        });
    }
}
