//! Rollbacks that tell the kernel of most files only when the sandbox runs again: nobody may see the difference.

mod common;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};

use common::mapper::{self, Mapper};
use common::{content, fixture, in_use, names, open_rw};
use rustix::fs::{Mode, OFlags};

/// Rolls back as if very many files differed, with nothing in use but `held`.
fn roll_back_sparing(v: &common::Mounted, to: &deltafs::Snapshot, held: &[&File]) -> bool {
    let held = held.iter().map(|file| file.metadata().unwrap().ino());
    let held = in_use(held);
    v.rollback_sparing(to, 0, || held).unwrap().sparing
}

#[test]
fn mapping_process() {
    mapper::serve();
}

#[test]
fn a_name_known_to_be_absent_is_there_in_the_state_that_has_it() {
    let f = fixture(|base| fs::write(base.join("base"), "base").unwrap());
    let v = &f.volume;
    v.write("own", "own");
    let with = v.checkpoint();
    for name in ["base", "own"] {
        fs::remove_file(v.at(name)).unwrap();
        assert!(!v.at(name).exists());
    }
    let without = v.checkpoint();
    for _ in 0..2 {
        roll_back_sparing(v, &with, &[]);
        assert_eq!(
            (v.read("base"), v.read("own")),
            ("base".into(), "own".into())
        );
        roll_back_sparing(v, &without, &[]);
        assert!(!v.at("base").exists() && !v.at("own").exists());
    }
}

#[test]
fn nobody_sees_what_the_kernel_has_yet_to_drop() {
    const FILES: u64 = 2_000;
    let f = fixture(|base| fs::create_dir(base.join("dir")).unwrap());
    let v = &f.volume;
    let write = |text: &str| (0..FILES).for_each(|i| v.write(&format!("dir/{i}"), text));
    write("first");
    let handle = File::open(v.at("dir")).unwrap();
    let first = v.checkpoint();
    write("other");
    let other = v.checkpoint();
    write("other, and longer");
    fs::remove_file(v.at("dir/7")).unwrap();
    v.write("dir/more", "more");
    for (state, text) in [(&first, "first"), (&other, "other"), (&first, "first")] {
        assert!(roll_back_sparing(v, state, &[&handle]));
        // At once, by path and from a directory that was open, by many threads.
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let handle = &handle;
                scope.spawn(move || {
                    for i in (0..FILES).skip(thread).step_by(4) {
                        let name = i.to_string();
                        let flags = OFlags::RDONLY;
                        let found = rustix::fs::openat(handle, &name, flags, Mode::empty());
                        assert_eq!(content(&File::from(found.unwrap())), text, "{name}");
                        assert_eq!(v.read(&format!("dir/{name}")), text, "{name}");
                    }
                    assert!(!v.at("dir/more").exists());
                });
            }
            scope.spawn(|| assert_eq!(names(v.at("dir")).len() as u64, FILES));
        });
    }
}

#[test]
fn who_stands_below_a_renamed_directory_knows_where_at_once() {
    let f = fixture(|base| fs::create_dir_all(base.join("top/a/b")).unwrap());
    let v = &f.volume;
    let handle = File::open(v.at("top/a/b")).unwrap();
    let place = || fs::read_link(format!("/proc/self/fd/{}", handle.as_raw_fd())).unwrap();
    let first = v.checkpoint();
    fs::create_dir(v.at("other")).unwrap();
    fs::rename(v.at("top/a"), v.at("other/c")).unwrap();
    (0..500).for_each(|i| v.write(&format!("other/c/b/{i}"), "x"));
    assert!(!v.at("top/a").exists());
    let second = v.checkpoint();
    for _ in 0..3 {
        assert!(roll_back_sparing(v, &first, &[&handle]));
        assert!(place().ends_with("top/a/b"), "{}", place().display());
        assert!(names(v.at("top/a/b")).is_empty() && !v.at("other").exists());
        assert!(roll_back_sparing(v, &second, &[&handle]));
        assert!(place().ends_with("other/c/b"), "{}", place().display());
        let found = rustix::fs::openat(&handle, "499", OFlags::RDONLY, Mode::empty());
        assert_eq!(content(&File::from(found.unwrap())), "x");
        assert!(!v.at("top/a").exists());
    }
}

#[test]
fn files_in_use_are_right_before_anything_is_dropped_later() {
    let f = fixture(|base| fs::write(base.join("base"), vec![b'a'; 8192]).unwrap());
    let v = &f.volume;
    fs::create_dir(v.at("dir")).unwrap();
    v.write("dir/own", "first");
    fs::hard_link(v.at("dir/own"), v.at("linked")).unwrap();
    let (base, own) = (open_rw(v.at("base")), open_rw(v.at("dir/own")));
    let mut mapper = Mapper::start("mapping_process");
    let mapping = mapper.map(&base, 8192, true);
    assert_eq!(mapper.get(mapping, 5000), b'a');
    let snapshot = v.checkpoint();
    for _ in 0..3 {
        base.write_all_at(b"b", 5000).unwrap();
        base.set_len(6000).unwrap();
        v.write("dir/own", "longer than before");
        fs::remove_file(v.at("linked")).unwrap();
        fs::rename(v.at("dir/own"), v.at("elsewhere")).unwrap();
        (0..100).for_each(|i| v.write(&format!("dir/{i}"), "x"));
        assert!(roll_back_sparing(v, &snapshot, &[&base, &own]));
        assert_eq!(mapper.get(mapping, 5000), b'a');
        assert_eq!(mapper.get(mapping, 8000), b'a');
        assert_eq!(content(&own), "first");
        assert_eq!(own.metadata().unwrap().nlink(), 2);
        assert_eq!(
            (v.read("dir/own"), v.read("linked")),
            ("first".into(), "first".into())
        );
        assert!(!v.at("elsewhere").exists());
        assert_eq!(names(v.at("dir")), ["own"]);
    }
}

#[test]
fn a_file_that_stays_in_the_kernel_without_being_told_of_is_right_in_the_end() {
    let f = fixture(|_| {});
    let v = &f.volume;
    v.write("a", "first");
    let snapshot = v.checkpoint();
    let old = open_rw(v.at("a"));
    v.write("a", "longer than before");
    assert!(roll_back_sparing(v, &snapshot, &[]));
    assert_eq!(v.read("a"), "first");
    assert_eq!(content(&old), "first");
    old.write_all_at(b"F", 0).unwrap();
    assert_eq!(v.read("a"), "First");
}

#[test]
fn a_checkpoint_and_a_rollback_may_follow_at_once() {
    let f = fixture(|_| {});
    let v = &f.volume;
    let write = |text: &str| (0..500).for_each(|i| v.write(&i.to_string(), text));
    write("first");
    let first = v.checkpoint();
    write("second");
    let second = v.checkpoint();
    for _ in 0..5 {
        roll_back_sparing(v, &first, &[]);
        let again = v.checkpoint();
        roll_back_sparing(v, &second, &[]);
        roll_back_sparing(v, &again, &[]);
        assert_eq!(v.read("499"), "first");
        roll_back_sparing(v, &second, &[]);
        let ino = fs::metadata(v.at("3")).unwrap().ino();
        roll_back_sparing(v, &first, &[]);
        let by_number = File::from(v.open_inode(ino, libc::O_RDONLY).unwrap());
        assert_eq!(content(&by_number), "first");
    }
    roll_back_sparing(v, &second, &[]);
}

#[test]
fn a_socket_that_is_bound_to_a_name_does_not_keep_it() {
    let f = fixture(|_| {});
    let v = &f.volume;
    let kept = UnixListener::bind(v.at("kept")).unwrap();
    let snapshot = v.checkpoint();
    let new = UnixListener::bind(v.at("new")).unwrap();
    fs::rename(v.at("kept"), v.at("moved")).unwrap();
    roll_back_sparing(v, &snapshot, &[]);
    drop(new);
    for name in ["new", "moved"] {
        let gone = fs::symlink_metadata(v.at(name)).unwrap_err();
        assert_eq!(gone.kind(), std::io::ErrorKind::NotFound, "{name}");
    }
    let _client = UnixStream::connect(v.at("kept")).unwrap();
    kept.accept().unwrap();
}
