//! Content and space: holes, direct I/O, full disks, shared blocks, and what differs between two states.

mod common;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::time::{Duration, Instant};

use common::{Mounted, fixture};
use deltafs::{Change, ChangeKind, IdMap, diff};

/// Long enough for a busy machine; only what never comes takes this long.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn holes_are_found_over_the_base_and_punched() {
    let f = fixture(|base| {
        let file = File::create(base.join("sparse")).unwrap();
        file.write_all_at(&[1; 4096], 1 << 20).unwrap();
        fs::write(base.join("full"), vec![1; 64 * 1024]).unwrap();
    });
    let v = &f.volume;
    let open = |name: &str| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(v.at(name))
            .unwrap()
    };
    let seek = |file: &File, to| rustix::fs::seek(file, to).unwrap();
    use rustix::fs::SeekFrom::{Data, Hole};
    let sparse = open("sparse");
    assert_eq!(seek(&sparse, Data(0)), 1 << 20);
    sparse.write_all_at(b"x", 8192).unwrap();
    assert_eq!(
        (seek(&sparse, Data(0)), seek(&sparse, Hole(8192))),
        (8192, 12_288)
    );
    let full = open("full");
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&full, flags, 8192, 8192).unwrap();
    assert_eq!(
        (seek(&full, Hole(0)), seek(&full, Data(8192))),
        (8192, 16_384)
    );
    let mut bytes = vec![9; 12_288];
    full.read_exact_at(&mut bytes, 6144).unwrap();
    assert!(
        bytes[..2048].iter().all(|byte| *byte == 1)
            && bytes[2048..10_240].iter().all(|byte| *byte == 0)
    );
    assert_eq!(
        full.metadata().unwrap().blocks(),
        112,
        "a punched hole takes no space"
    );
}

#[test]
fn direct_io_sees_what_buffered_io_wrote_and_the_other_way_round() {
    #[repr(align(4096))]
    struct Aligned([u8; 4096]);
    let f = fixture(|base| fs::write(base.join("a"), vec![b'a'; 8192]).unwrap());
    let v = &f.volume;
    let direct = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(v.at("a"))
        .unwrap();
    let buffered = OpenOptions::new()
        .read(true)
        .write(true)
        .open(v.at("a"))
        .unwrap();
    let mut page = Box::new(Aligned([0; 4096]));
    buffered.write_all_at(b"b", 0).unwrap();
    direct.read_exact_at(&mut page.0, 0).unwrap();
    assert_eq!((page.0[0], page.0[1]), (b'b', b'a'));
    page.0.fill(b'd');
    direct.write_all_at(&page.0, 4096).unwrap();
    let mut byte = [0];
    buffered.read_exact_at(&mut byte, 5000).unwrap();
    assert_eq!(&byte, b"d");
}

/// A volume whose data is on a disk of one MiB of its own, and its base.
fn on_a_small_disk() -> (Mounted, tempfile::TempDir) {
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
        fsopen,
    };
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    let fd = std::os::fd::AsFd::as_fd(&context);
    fsconfig_set_string(fd, "size", "1m").unwrap();
    fsconfig_create(fd).unwrap();
    let small = fsmount(fd, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap();
    let base = tempfile::tempdir().unwrap();
    let options = deltafs::Options {
        base: File::open(base.path()).unwrap().into(),
        hidden: Vec::new(),
        ids: IdMap::IDENTITY,
        data_dir: format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&small)).into(),
        threads: 1,
    };
    (
        Mounted::new(deltafs::Volume::create(options).unwrap()),
        base,
    )
}

#[test]
fn what_was_removed_is_free_space_to_who_asks_writes_or_reserves() {
    let (v, _base) = on_a_small_disk();
    let free = || rustix::fs::statvfs(v.at("")).unwrap().f_bavail;
    let all = free();
    let size = all * 4096;
    for reserved in [false, true, false] {
        if reserved {
            let file = File::create(v.at("most")).unwrap();
            let flags = rustix::fs::FallocateFlags::empty();
            rustix::fs::fallocate(&file, flags, 0, size).unwrap();
        } else {
            v.write("most", vec![1; size as usize]);
        }
        assert_eq!(free(), 0);
        fs::remove_file(v.at("most")).unwrap();
        // The kernel tells of the last use of a file some time later.
        let begun = Instant::now();
        while free() < all {
            assert!(begun.elapsed() < PATIENCE, "{} of {all}", free());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn a_full_disk_is_told_to_the_writer_and_snapshots_stay_good() {
    let (v, _base) = on_a_small_disk();
    v.write("good", vec![1; 300_000]);
    let snapshot = v.checkpoint();
    let full = fs::write(v.at("big"), vec![2; 2_000_000]).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    let big = File::create(v.at("big")).unwrap();
    let flags = rustix::fs::FallocateFlags::empty();
    let full = rustix::fs::fallocate(&big, flags, 0, 1 << 50).unwrap_err();
    assert_eq!(full, rustix::io::Errno::NOSPC);
    fs::remove_file(v.at("big")).unwrap();
    v.rollback(&snapshot).unwrap();
    assert_eq!(fs::read(v.at("good")).unwrap(), vec![1; 300_000]);
    v.write("again", vec![3; 300_000]);
    assert_eq!(fs::read(v.at("again")).unwrap(), vec![3; 300_000]);
}

#[test]
fn diff_names_what_came_went_changed_and_moved() {
    let f = fixture(|base| {
        fs::create_dir_all(base.join("tree/sub")).unwrap();
        fs::create_dir_all(base.join("moving/sub")).unwrap();
        for name in [
            "tree/sub/x",
            "tree/y",
            "moving/sub/z",
            "edited",
            "touched",
            "replaced",
            "same",
        ] {
            fs::write(base.join(name), name).unwrap();
        }
    });
    let v = &f.volume;
    let a = v.checkpoint();
    v.write("edited", "other");
    fs::set_permissions(v.at("touched"), fs::Permissions::from_mode(0o600)).unwrap();
    v.write("replaced.tmp", "as editors save");
    fs::rename(v.at("replaced.tmp"), v.at("replaced")).unwrap();
    fs::rename(v.at("moving"), v.at("moved")).unwrap();
    v.write("moved/sub/z", "edited in its new place");
    fs::rename(v.at("tree/y"), v.at("y")).unwrap();
    fs::remove_dir_all(v.at("tree")).unwrap();
    fs::create_dir(v.at("new")).unwrap();
    v.write("new/file", "x");
    v.write("passing", "x");
    fs::remove_file(v.at("passing")).unwrap();
    let b = v.checkpoint();
    let change = |path: &str, kind| Change {
        path: path.into(),
        kind,
    };
    let renamed = |from: &str| ChangeKind::Renamed { from: from.into() };
    assert_eq!(
        diff(&a, &b),
        [
            change("/edited", ChangeKind::Modified),
            change("/moved", renamed("/moving")),
            change("/moved/sub/z", ChangeKind::Modified),
            change("/new", ChangeKind::Added),
            change("/new/file", ChangeKind::Added),
            change("/replaced", ChangeKind::Modified),
            change("/touched", ChangeKind::Modified),
            change("/tree", ChangeKind::Deleted),
            change("/tree/sub", ChangeKind::Deleted),
            change("/tree/sub/x", ChangeKind::Deleted),
            change("/y", renamed("/tree/y")),
        ]
    );
    assert_eq!(diff(&b, &a).len(), 11);
    assert!(diff(&b, &b).is_empty());
}

#[test]
fn rollback_of_ten_thousand_changed_files_restores_each() {
    const FILES: usize = 10_000;
    let f = fixture(|base| {
        fs::create_dir(base.join("dir")).unwrap();
        fs::write(base.join("dir/kept"), "kept").unwrap();
    });
    let v = &f.volume;
    for index in 0..FILES {
        fs::write(v.at(format!("dir/{index}")), "before").unwrap();
    }
    let before = v.checkpoint();
    for index in 0..FILES {
        match index % 3 {
            0 => fs::write(v.at(format!("dir/{index}")), "after, longer").unwrap(),
            1 => fs::remove_file(v.at(format!("dir/{index}"))).unwrap(),
            _ => fs::rename(
                v.at(format!("dir/{index}")),
                v.at(format!("dir/moved{index}")),
            )
            .unwrap(),
        }
    }
    v.rollback(&before).unwrap();
    assert_eq!(fs::read_dir(v.at("dir")).unwrap().count(), FILES + 1);
    for index in 0..FILES {
        assert_eq!(v.read(&format!("dir/{index}")), "before");
    }
    assert_eq!(v.read("dir/kept"), "kept");
}

#[test]
fn space_of_dropped_snapshots_is_given_back() {
    let f = fixture(|_| {});
    let v = &f.volume;
    v.write("a", vec![1; 4 << 20]);
    let snapshot = v.checkpoint();
    v.write("a", vec![2; 4 << 20]);
    assert_eq!(v.stats().data_bytes, 8 << 20);
    drop(snapshot);
    assert_eq!(v.stats().data_bytes, 4 << 20);
    let kept = v.checkpoint();
    v.rollback(&kept).unwrap();
    assert_eq!(fs::read(v.at("a")).unwrap(), vec![2; 4 << 20]);
}

#[test]
fn a_copied_file_shares_its_blocks_until_one_of_the_two_changes() {
    let f = fixture(|base| fs::write(base.join("base"), vec![b'b'; 1 << 20]).unwrap());
    let v = &f.volume;
    let own: Vec<u8> = (0..1 << 20).map(|i| (i / 4096 % 251) as u8).collect();
    v.write("own", &own);
    let before = v.stats().data_bytes;
    for (from, to) in [("own", "copy"), ("base", "copy of base")] {
        let copied = fs::copy(v.at(from), v.at(to)).unwrap();
        assert_eq!(copied, 1 << 20);
        assert!(fs::read(v.at(from)).unwrap() == fs::read(v.at(to)).unwrap());
    }
    assert_eq!(v.stats().data_bytes, before, "no data was copied");
    let edit = |name: &str, byte: &[u8]| {
        let file = OpenOptions::new().write(true).open(v.at(name)).unwrap();
        file.write_all_at(byte, 5000).unwrap();
    };
    edit("own", b"O");
    edit("copy", b"C");
    edit("copy of base", b"B");
    // Three new blocks; the one that the first two shared is nobody's now.
    assert_eq!(v.stats().data_bytes, before + 2 * 4096);
    let byte = |name: &str| fs::read(v.at(name)).unwrap()[5000];
    let found = ["own", "copy", "base", "copy of base"].map(byte);
    assert_eq!(found, *b"OCbB");
}

#[test]
fn what_cannot_be_done_by_reference_is_refused_as_documented() {
    let f = fixture(|_| {});
    let v = &f.volume;
    v.write("a", vec![1; 16384]);
    v.write("b", "");
    let (a, b) = (
        File::open(v.at("a")).unwrap(),
        File::create(v.at("b")).unwrap(),
    );
    // FICLONE ends in the kernel: it does not pass the request on.
    let clone = rustix::fs::ioctl_ficlone(&b, &a).unwrap_err();
    assert_eq!(clone, rustix::io::Errno::OPNOTSUPP);
    let whole = OpenOptions::new()
        .read(true)
        .write(true)
        .open(v.at("a"))
        .unwrap();
    for mode in [libc::FALLOC_FL_COLLAPSE_RANGE, libc::FALLOC_FL_INSERT_RANGE] {
        let mode = rustix::fs::FallocateFlags::from_bits_retain(mode.cast_unsigned());
        let refused = rustix::fs::fallocate(&whole, mode, 4096, 4096).unwrap_err();
        assert_eq!(refused, rustix::io::Errno::OPNOTSUPP);
    }
    assert_eq!(whole.metadata().unwrap().len(), 16384);
}
