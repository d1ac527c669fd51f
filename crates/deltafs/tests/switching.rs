//! Where switching layers goes wrong: descriptors, mappings, mounts, locks and working directories that were there
//! before a checkpoint, and a rollback under them.

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};

use common::mapper::{self, Mapper};
use common::{content, fixture, names, open_rw};
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};

#[test]
fn an_old_descriptor_of_a_file_unlinked_since_works_after_rollback() {
    for in_base in [true, false] {
        let f = fixture(|base| {
            if in_base {
                fs::write(base.join("a"), "first").unwrap();
            }
        });
        let v = &f.volume;
        if !in_base {
            v.write("a", "first");
        }
        let old = open_rw(v.at("a"));
        let snapshot = v.checkpoint();
        fs::remove_file(v.at("a")).unwrap();
        old.write_all_at(b"LATER", 0).unwrap();
        v.rollback(&snapshot).unwrap();
        assert_eq!(content(&old), "first");
        assert_eq!(old.metadata().unwrap().nlink(), 1);
        old.write_all_at(b"again", 0).unwrap();
        assert_eq!(
            v.read("a"),
            "again",
            "the descriptor and the name are one file"
        );
    }
}

#[test]
fn an_old_descriptor_stays_with_its_inode_when_the_name_is_another_files() {
    let f = fixture(|_| {});
    let v = &f.volume;
    v.write("a", "first");
    let old = open_rw(v.at("a"));
    let snapshot = v.checkpoint();
    fs::remove_file(v.at("a")).unwrap();
    old.write_all_at(b"x", 0).unwrap();
    assert!(!v.at("a").exists(), "writing must not bring the name back");
    v.write("a", "second");
    old.write_all_at(b"yyyyy", 0).unwrap();
    assert_eq!(v.read("a"), "second");
    assert_eq!(content(&old), "yyyyy");
    let later = v.checkpoint();
    v.rollback(&snapshot).unwrap();
    assert_eq!(
        (v.read("a"), content(&old)),
        ("first".to_owned(), "first".to_owned())
    );
    v.rollback(&later).unwrap();
    assert_eq!(
        (v.read("a"), content(&old)),
        ("second".to_owned(), "yyyyy".to_owned())
    );
}

#[test]
fn a_read_only_descriptor_opened_before_the_copy_up_sees_later_writes() {
    let f = fixture(|base| fs::write(base.join("a"), "base").unwrap());
    let v = &f.volume;
    let reader = File::open(v.at("a")).unwrap();
    assert_eq!(content(&reader), "base");
    v.write("a", "changed");
    assert_eq!(content(&reader), "changed");
}

#[test]
fn mappings_of_a_base_file_follow_copy_up_and_rollback() {
    let f = fixture(|base| fs::write(base.join("a"), vec![b'a'; 8192]).unwrap());
    let v = &f.volume;
    let file = open_rw(v.at("a"));
    let mut mapper = Mapper::start("mapping_process");
    let shared = mapper.map(&file, 8192, true);
    let private = mapper.map(&file, 8192, false);
    assert_eq!(
        (mapper.get(shared, 0), mapper.get(private, 5000)),
        (b'a', b'a')
    );
    let snapshot = v.checkpoint();
    file.write_all_at(b"b", 5000).unwrap();
    assert_eq!(
        (mapper.get(shared, 5000), mapper.get(private, 5000)),
        (b'b', b'b')
    );
    v.rollback(&snapshot).unwrap();
    assert_eq!(
        (mapper.get(shared, 5000), mapper.get(private, 5000)),
        (b'a', b'a')
    );
    // A page that the mapping made dirty and nobody flushed must not reach the state rolled back to.
    mapper.set(shared, 100, b'z');
    v.rollback(&snapshot).unwrap();
    assert_eq!(mapper.get(shared, 100), b'a');
    let mut byte = [0];
    file.read_exact_at(&mut byte, 100).unwrap();
    assert_eq!(&byte, b"a");
    mapper.set(shared, 100, b'y');
    v.sync().unwrap();
    let dirty = v.checkpoint();
    mapper.set(shared, 100, b'x');
    v.rollback(&dirty).unwrap();
    assert_eq!(mapper.get(shared, 100), b'y');
}

#[test]
fn mapping_process() {
    mapper::serve();
}

#[test]
fn a_program_goes_on_running_from_a_file_that_is_replaced_under_it() {
    let f = fixture(|base| {
        fs::copy("/bin/sleep", base.join("sleep")).unwrap();
    });
    let v = &f.volume;
    let snapshot = v.checkpoint();
    let mut child = std::process::Command::new(v.at("sleep"))
        .arg("60")
        .spawn()
        .unwrap();
    let busy = OpenOptions::new().write(true).open(v.at("sleep"));
    assert_eq!(busy.unwrap_err().raw_os_error(), Some(libc::ETXTBSY));
    fs::write(v.at("new"), "#!/bin/sh\n").unwrap();
    fs::rename(v.at("new"), v.at("sleep")).unwrap();
    v.rollback(&snapshot).unwrap();
    assert!(
        child.try_wait().unwrap().is_none(),
        "the program was killed by the switch"
    );
    child.kill().unwrap();
    child.wait().unwrap();
    let status = std::process::Command::new(v.at("sleep"))
        .arg("0")
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn a_mount_below_survives_the_switch() {
    use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags};
    let f = fixture(|base| fs::create_dir_all(base.join("dir/mnt")).unwrap());
    let v = &f.volume;
    let place = tempfile::tempdir().unwrap();
    // A thread of its own may have a mount namespace of its own; all its mounts go with it.
    std::thread::scope(|scope| {
        let in_namespace = || {
            // SAFETY: the thread shares nothing of its file system context with others after the call, and uses no
            // descriptor table of its own.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
            let private = rustix::mount::MountPropagationFlags::PRIVATE
                | rustix::mount::MountPropagationFlags::REC;
            rustix::mount::mount_change("/", private).unwrap();
            let flags = OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_EMPTY_PATH;
            let clone = rustix::mount::open_tree(v.mount(), "", flags).unwrap();
            let cwd = rustix::fs::CWD;
            rustix::mount::move_mount(
                &clone,
                "",
                cwd,
                place.path(),
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
            )
            .unwrap();
            let below = place.path().join("dir/mnt");
            rustix::mount::mount("none", &below, "tmpfs", MountFlags::empty(), None).unwrap();
            fs::write(below.join("kept"), "kept").unwrap();
            let snapshot = v.checkpoint();
            fs::write(place.path().join("dir/other"), "x").unwrap();
            fs::write(place.path().join("top"), "x").unwrap();
            v.rollback(&snapshot).unwrap();
            assert!(!place.path().join("dir/other").exists());
            assert_eq!(fs::read_to_string(below.join("kept")).unwrap(), "kept");
        };
        scope.spawn(in_namespace).join().unwrap();
    });
}

#[test]
fn fifos_and_sockets_go_on_working() {
    let f = fixture(|_| {});
    let v = &f.volume;
    rustix::fs::mknodat(
        rustix::fs::CWD,
        v.at("fifo"),
        rustix::fs::FileType::Fifo,
        Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let mut fifo = open_rw(v.at("fifo"));
    let listener = UnixListener::bind(v.at("socket")).unwrap();
    let snapshot = v.checkpoint();
    fs::remove_file(v.at("fifo")).unwrap();
    fs::remove_file(v.at("socket")).unwrap();
    v.rollback(&snapshot).unwrap();
    assert!(
        fs::symlink_metadata(v.at("fifo"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
    fifo.write_all(b"hi").unwrap();
    let mut other = open_rw(v.at("fifo"));
    let mut two = [0; 2];
    other.read_exact(&mut two).unwrap();
    assert_eq!(&two, b"hi", "both descriptors are of one fifo");
    let mut client = UnixStream::connect(v.at("socket")).unwrap();
    client.write_all(b"yo").unwrap();
    let (mut served, _) = listener.accept().unwrap();
    served.read_exact(&mut two).unwrap();
    assert_eq!(&two, b"yo");
}

#[test]
fn locks_are_kept_over_a_rollback() {
    let f = fixture(|base| fs::write(base.join("a"), "base").unwrap());
    let v = &f.volume;
    let holder = open_rw(v.at("a"));
    rustix::fs::flock(&holder, FlockOperation::LockExclusive).unwrap();
    let snapshot = v.checkpoint();
    v.write("a", "changed");
    v.rollback(&snapshot).unwrap();
    let other = open_rw(v.at("a"));
    let taken = rustix::fs::flock(&other, FlockOperation::NonBlockingLockExclusive);
    assert_eq!(taken.unwrap_err(), rustix::io::Errno::WOULDBLOCK);
    // Not by closing it: a child that another test has just forked holds it for a moment.
    rustix::fs::flock(&holder, FlockOperation::Unlock).unwrap();
    rustix::fs::flock(&other, FlockOperation::NonBlockingLockExclusive).unwrap();
}

#[test]
fn directory_handles_follow_their_directory() {
    let f = fixture(|base| {
        fs::create_dir_all(base.join("work/sub")).unwrap();
        fs::write(base.join("work/sub/file"), "deep").unwrap();
    });
    let v = &f.volume;
    let handle = File::open(v.at("work/sub")).unwrap();
    let here = |name: &str| format!("/proc/self/fd/{}/{name}", handle.as_raw_fd());
    let snapshot = v.checkpoint();
    fs::write(here("new"), "new").unwrap();
    fs::rename(v.at("work/sub"), v.at("moved")).unwrap();
    assert_eq!(names(here("")), ["file", "new"]);
    v.rollback(&snapshot).unwrap();
    assert_eq!(names(here("")), ["file"]);
    let path = fs::read_link(format!("/proc/self/fd/{}", handle.as_raw_fd())).unwrap();
    assert!(
        path.ends_with("work/sub"),
        "a shell standing here would see {}",
        path.display()
    );
    fs::write(here("later"), "later").unwrap();
    assert_eq!(v.read("work/sub/later"), "later");
}

#[test]
fn directories_that_changed_places_find_back_with_handles_on_both() {
    let f = fixture(|base| fs::create_dir_all(base.join("a/b/c")).unwrap());
    let v = &f.volume;
    let handles = ["a", "a/b", "a/b/c"].map(|name| File::open(v.at(name)).unwrap());
    let upright = v.checkpoint();
    fs::rename(v.at("a/b/c"), v.at("c")).unwrap();
    fs::rename(v.at("a/b"), v.at("c/b")).unwrap();
    fs::rename(v.at("a"), v.at("c/b/a")).unwrap();
    let inverted = v.checkpoint();
    for _ in 0..3 {
        for (snapshot, paths) in [
            (&upright, ["a", "a/b", "a/b/c"]),
            (&inverted, ["c/b/a", "c/b", "c"]),
        ] {
            v.rollback(snapshot).unwrap();
            for (handle, path) in handles.iter().zip(paths) {
                let link = format!("/proc/self/fd/{}", handle.as_raw_fd());
                let found = fs::read_link(link).unwrap();
                assert_eq!(found, std::path::Path::new("/").join(path));
            }
        }
    }
}

#[test]
fn a_directory_removed_under_a_handle_is_reported_as_reborn() {
    let f = fixture(|_| {});
    let v = &f.volume;
    fs::create_dir(v.at("dir")).unwrap();
    v.write("dir/file", "kept");
    let handle = File::open(v.at("dir")).unwrap();
    let ino = handle.metadata().unwrap().ino();
    let snapshot = v.checkpoint();
    fs::remove_dir_all(v.at("dir")).unwrap();
    fs::create_dir(v.at("dir")).unwrap();
    let stats = v.rollback(&snapshot).unwrap();
    assert_eq!(stats.reborn, [ino]);
    let again = File::from(
        v.open_inode(ino, libc::O_RDONLY | libc::O_DIRECTORY)
            .unwrap(),
    );
    assert_eq!(again.metadata().unwrap().ino(), ino);
    assert_eq!(names(v.at("dir")), ["file"]);
    let file = rustix::fs::openat(
        again.as_fd(),
        "new",
        OFlags::CREATE | OFlags::WRONLY,
        Mode::RUSR,
    )
    .unwrap();
    drop(file);
    assert_eq!(names(v.at("dir")), ["file", "new"]);
    assert!(v.rollback(&snapshot).unwrap().reborn.is_empty());
}

#[test]
fn a_file_without_a_name_returns_with_its_checkpoint() {
    let f = fixture(|_| {});
    let v = &f.volume;
    v.write("a", "unlinked");
    let open = open_rw(v.at("a"));
    fs::remove_file(v.at("a")).unwrap();
    let tmp = rustix::fs::open(
        v.at(""),
        OFlags::TMPFILE | OFlags::RDWR,
        Mode::RUSR | Mode::WUSR,
    )
    .unwrap();
    rustix::io::write(&tmp, b"never named").unwrap();
    let inos = [
        open.metadata().unwrap().ino(),
        rustix::fs::fstat(&tmp).unwrap().st_ino,
    ];
    let snapshot = v.checkpoint();
    drop((open, tmp));
    v.rollback(&snapshot).unwrap();
    for (ino, text) in inos.into_iter().zip(["unlinked", "never named"]) {
        let again = File::from(v.open_inode(ino, libc::O_RDWR).unwrap());
        assert_eq!(content(&again), text);
        assert_eq!(again.metadata().unwrap().nlink(), 0);
    }
    let fork = v.fork(&snapshot, deltafs::IdMap::IDENTITY).unwrap();
    let again = File::from(fork.open_inode(inos[1], libc::O_RDONLY).unwrap());
    assert_eq!(content(&again), "never named");
}

#[test]
fn files_without_a_name_are_freed_when_nobody_has_them_open() {
    let f = fixture(|_| {});
    let v = &f.volume;
    let before = v.stats();
    for _ in 0..10 {
        v.write("a", vec![1; 1 << 20]);
        fs::remove_file(v.at("a")).unwrap();
    }
    // The kernel forgets in the background; a request after that comes later.
    for _ in 0..1000 {
        if v.stats().data_bytes == before.data_bytes {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    panic!("{} bytes are still held", v.stats().data_bytes);
}

#[test]
fn appending_after_a_rollback_goes_to_the_end_of_the_state_rolled_back_to() {
    let f = fixture(|base| fs::write(base.join("log"), "start\n").unwrap());
    let v = &f.volume;
    let mut log = OpenOptions::new().append(true).open(v.at("log")).unwrap();
    let snapshot = v.checkpoint();
    log.write_all(&vec![b'x'; 10_000]).unwrap();
    let later = v.checkpoint();
    v.rollback(&snapshot).unwrap();
    log.write_all(b"end\n").unwrap();
    assert_eq!(v.read("log"), "start\nend\n");
    v.rollback(&later).unwrap();
    log.write_all(b"end\n").unwrap();
    let text = v.read("log");
    assert_eq!(text.len(), 10_010);
    assert!(text.ends_with("xend\n"));
}

#[test]
fn inotify_watches_survive_and_report() {
    use rustix::fs::inotify;
    let f = fixture(|base| fs::create_dir(base.join("dir")).unwrap());
    let v = &f.volume;
    let watcher =
        inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).unwrap();
    inotify::add_watch(&watcher, v.at("dir"), inotify::WatchFlags::CREATE).unwrap();
    let snapshot = v.checkpoint();
    v.write("dir/a", "1");
    v.rollback(&snapshot).unwrap();
    v.write("dir/b", "2");
    let mut buf = [std::mem::MaybeUninit::uninit(); 1024];
    let mut reader = inotify::Reader::new(&watcher, &mut buf);
    for expected in ["a", "b"] {
        let event = reader.next().unwrap();
        assert_eq!(event.file_name().unwrap().to_str().unwrap(), expected);
    }
}

#[test]
fn a_handle_opened_by_number_tells_the_name_of_the_file() {
    let f = fixture(|base| {
        fs::create_dir(base.join("dir")).unwrap();
        fs::write(base.join("dir/a"), "x").unwrap();
    });
    let v = &f.volume;
    let ino = fs::metadata(v.at("dir/a")).unwrap().ino();
    fs::rename(v.at("dir/a"), v.at("dir/b")).unwrap();
    let file = v.open_inode_in(v.mount(), ino, libc::O_RDONLY).unwrap();
    let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    assert!(path.ends_with("dir/b"), "{}", path.display());
    let missing = v.open_inode(999_999, libc::O_RDONLY).unwrap_err();
    assert_eq!(missing.raw_os_error(), Some(libc::ESTALE));
    let stat = rustix::fs::statat(v.mount(), "dir/b", AtFlags::empty()).unwrap();
    assert_eq!(stat.st_ino, ino);
}
