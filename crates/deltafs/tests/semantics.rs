//! What a program in a sandbox sees of the filesystem's finer rules.

mod common;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt, FileExt, FileTypeExt, MetadataExt, PermissionsExt};

use common::{Mounted, fixture, fixture_with, names};
use deltafs::IdMap;
use rustix::fs::{CWD, FileType, Mode, OFlags, RenameFlags, XattrFlags};
use rustix::io::Errno;

const SHIFTED: IdMap = IdMap {
    outside_first: 1_000_000,
    count: 65_536,
};

#[test]
fn ids_are_shifted_and_ids_beyond_the_map_are_nobody() {
    let fill = |base: &std::path::Path| {
        for (name, id) in [("root", 0), ("user", 1000), ("far", 100_000)] {
            fs::write(base.join(name), "x").unwrap();
            std::os::unix::fs::chown(base.join(name), Some(id), Some(id)).unwrap();
        }
    };
    let f = fixture_with(fill, SHIFTED, Vec::new());
    let v = &f.volume;
    let owner = |v: &Mounted, name: &str| fs::metadata(v.at(name)).unwrap().uid();
    assert_eq!(
        [owner(v, "root"), owner(v, "user"), owner(v, "far")],
        [1_000_000, 1_001_000, 1_065_534]
    );
    std::os::unix::fs::chown(v.at("user"), Some(1_000_005), Some(1_000_006)).unwrap();
    assert_eq!(fs::metadata(v.at("user")).unwrap().gid(), 1_000_006);
    v.write("new", "x");
    assert_eq!(
        owner(v, "new"),
        1_000_000,
        "the host's root is the sandbox's"
    );
    let other = IdMap {
        outside_first: 2_000_000,
        ..SHIFTED
    };
    let fork = Mounted::new(v.fork(&v.checkpoint(), other).unwrap());
    assert_eq!(
        [owner(&fork, "user"), owner(&fork, "new")],
        [2_000_005, 2_000_000]
    );
}

#[test]
fn files_of_the_base_have_the_numbers_that_they_have_there() {
    let f = fixture(|base| {
        fs::create_dir(base.join("dir")).unwrap();
        fs::write(base.join("dir/file"), "x").unwrap();
        fs::hard_link(base.join("dir/file"), base.join("link")).unwrap();
    });
    let ino = |path: std::path::PathBuf| fs::symlink_metadata(path).unwrap().ino();
    let same = |path: &str| ino(f.volume.at(path)) == ino(f.base.path().join(path));
    assert!(same("dir/file") && same("link") && same("dir"));
    for entry in fs::read_dir(f.volume.at("dir")).unwrap() {
        assert_eq!(entry.unwrap().ino(), ino(f.base.path().join("dir/file")));
    }
    f.volume.write("dir/file", "changed");
    f.volume.write("new", "x");
    assert!(same("dir/file"), "a change does not make it another file");
    fs::write(f.base.path().join("new"), "x").unwrap();
    assert!(!same("new"));
    assert!(ino(f.volume.at("new")) > u64::from(u32::MAX));
}

#[test]
fn a_label_that_is_not_there_is_unsupported_and_can_be_set() {
    let f = fixture(|_| {});
    f.volume.write("file", "x");
    let file = f.volume.at("file");
    let get = |name: &str| rustix::fs::getxattr(&file, name, &mut [0; 64][..]);
    assert_eq!(get("security.selinux"), Err(Errno::NOTSUP));
    assert_eq!(get("security.other"), Err(Errno::NODATA));
    rustix::fs::setxattr(&file, "security.selinux", b"label", XattrFlags::empty()).unwrap();
    assert_eq!(get("security.selinux"), Ok(5));
}

#[test]
fn walking_a_known_path_asks_nothing_of_the_volume() {
    let fill = |base: &std::path::Path| {
        fs::set_permissions(base, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(base.join("file"), "x").unwrap();
    };
    // The root belongs to somebody else than whoever walks, so that its access list matters.
    let f = fixture_with(fill, SHIFTED, Vec::new());
    let file = f.volume.at("file");
    let before = fs::metadata(&file).unwrap();
    f.volume.shutdown();
    assert_eq!(fs::metadata(&file).unwrap().ino(), before.ino());
}

#[test]
fn hidden_paths_do_not_show_and_their_names_are_free() {
    let fill = |base: &std::path::Path| {
        fs::create_dir_all(base.join("var/lib/state/secret")).unwrap();
        fs::write(base.join("var/lib/other"), "x").unwrap();
    };
    let f = fixture_with(
        fill,
        IdMap::IDENTITY,
        vec!["/var/lib/state".into(), "/not/there".into()],
    );
    let v = &f.volume;
    assert!(!v.at("var/lib/state").exists());
    assert_eq!(names(v.at("var/lib")), ["other"]);
    fs::create_dir(v.at("var/lib/state")).unwrap();
    assert_eq!(names(v.at("var/lib/state")), [""; 0]);
    fs::remove_dir(v.at("var/lib/state")).unwrap();
    fs::remove_file(v.at("var/lib/other")).unwrap();
    fs::remove_dir(v.at("var/lib")).unwrap();
    assert!(f.base.path().join("var/lib/state/secret").exists());
}

#[test]
fn symbolic_links_of_the_base_do_not_lead_out_of_it() {
    let f = fixture(|base| {
        std::os::unix::fs::symlink("/etc", base.join("absolute")).unwrap();
        std::os::unix::fs::symlink("../../../../../../etc", base.join("up")).unwrap();
    });
    let root = rustix::fs::openat(
        f.volume.mount(),
        ".",
        OFlags::RDONLY | OFlags::DIRECTORY,
        Mode::empty(),
    )
    .unwrap();
    for name in ["absolute/passwd", "up/passwd"] {
        let resolve = rustix::fs::ResolveFlags::IN_ROOT;
        let found = rustix::fs::openat2(&root, name, OFlags::RDONLY, Mode::empty(), resolve);
        assert_eq!(found.unwrap_err(), Errno::NOENT, "{name}");
    }
}

#[test]
fn names_may_be_any_255_bytes() {
    let f = fixture(|_| {});
    let v = &f.volume;
    let odd = OsStr::from_bytes(b"\xff\x01 \n\\");
    let long = "n".repeat(255);
    for name in [odd, OsStr::new(&long)] {
        fs::write(v.at(name), "x").unwrap();
        assert_eq!(fs::read(v.at(name)).unwrap(), b"x");
    }
    let too_long = fs::write(v.at("n".repeat(256)), "x").unwrap_err();
    assert_eq!(too_long.raw_os_error(), Some(libc::ENAMETOOLONG));
    let listed: Vec<_> = fs::read_dir(v.at(""))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(listed.contains(&odd.to_owned()) && listed.len() == 2);
}

#[test]
fn a_large_directory_is_listed_whole_while_it_changes() {
    let f = fixture(|base| {
        for index in 0..1000 {
            fs::write(base.join(format!("base{index}")), "").unwrap();
        }
    });
    let v = &f.volume;
    for index in 0..1000 {
        fs::write(v.at(format!("own{index}")), "").unwrap();
    }
    let mut seen = std::collections::HashSet::new();
    for (index, entry) in fs::read_dir(v.at("")).unwrap().enumerate() {
        assert!(
            seen.insert(entry.unwrap().file_name()),
            "an entry was listed twice"
        );
        if index % 10 == 0 {
            fs::write(v.at(format!("later{index}")), "").unwrap();
            let _ = fs::remove_file(v.at(format!("later{}", index.saturating_sub(50))));
        }
    }
    for index in 0..1000 {
        for kind in ["base", "own"] {
            assert!(
                seen.contains(OsStr::new(&format!("{kind}{index}"))),
                "{kind}{index} was skipped"
            );
        }
    }
}

#[test]
fn special_files_and_whiteouts_are_kept() {
    let f = fixture(|base| {
        rustix::fs::mknodat(CWD, base.join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    });
    let v = &f.volume;
    assert!(
        fs::symlink_metadata(v.at("fifo"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
    rustix::fs::mknodat(
        CWD,
        v.at("whiteout"),
        FileType::CharacterDevice,
        Mode::empty(),
        0,
    )
    .unwrap();
    v.write("a", "a");
    rustix::fs::renameat_with(CWD, v.at("a"), CWD, v.at("b"), RenameFlags::WHITEOUT).unwrap();
    for name in ["whiteout", "a"] {
        let meta = fs::symlink_metadata(v.at(name)).unwrap();
        assert!(
            meta.file_type().is_char_device() && meta.rdev() == 0,
            "{name}"
        );
    }
    assert_eq!(v.read("b"), "a");
}

#[test]
fn a_file_made_without_a_name_can_get_one() {
    let f = fixture(|_| {});
    let v = &f.volume;
    let flags = OFlags::TMPFILE | OFlags::RDWR;
    let file = File::from(rustix::fs::open(v.at(""), flags, Mode::RUSR | Mode::WUSR).unwrap());
    file.write_all_at(b"x", 0).unwrap();
    let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    rustix::fs::linkat(
        CWD,
        link,
        CWD,
        v.at("name"),
        rustix::fs::AtFlags::SYMLINK_FOLLOW,
    )
    .unwrap();
    assert_eq!(
        (v.read("name"), file.metadata().unwrap().nlink()),
        ("x".into(), 1)
    );
    let snapshot = v.checkpoint();
    drop(file);
    fs::remove_file(v.at("name")).unwrap();
    v.rollback(&snapshot).unwrap();
    assert_eq!(v.read("name"), "x");
}

#[test]
fn exchange_swaps_a_directory_and_a_file() {
    let f = fixture(|base| {
        fs::create_dir_all(base.join("x/dir")).unwrap();
        fs::create_dir(base.join("y")).unwrap();
        fs::write(base.join("x/dir/inner"), "inner").unwrap();
        fs::write(base.join("y/file"), "file").unwrap();
    });
    let v = &f.volume;
    rustix::fs::renameat_with(
        CWD,
        v.at("x/dir"),
        CWD,
        v.at("y/file"),
        RenameFlags::EXCHANGE,
    )
    .unwrap();
    assert_eq!(
        (v.read("x/dir"), v.read("y/file/inner")),
        ("file".into(), "inner".into())
    );
    let links = |name: &str| fs::metadata(v.at(name)).unwrap().nlink();
    assert_eq!([links("x"), links("y")], [2, 3]);
    let into_itself = fs::rename(v.at("y"), v.at("y/file/y")).unwrap_err();
    assert_eq!(into_itself.raw_os_error(), Some(libc::EINVAL));
}

#[test]
fn group_and_mode_are_inherited_in_set_group_id_directories() {
    let f = fixture(|_| {});
    let v = &f.volume;
    fs::create_dir(v.at("dir")).unwrap();
    std::os::unix::fs::chown(v.at("dir"), None, Some(77)).unwrap();
    fs::set_permissions(v.at("dir"), fs::Permissions::from_mode(0o2775)).unwrap();
    v.write("dir/file", "x");
    fs::create_dir(v.at("dir/sub")).unwrap();
    assert_eq!(fs::metadata(v.at("dir/file")).unwrap().gid(), 77);
    let sub = fs::metadata(v.at("dir/sub")).unwrap();
    assert_eq!((sub.gid(), sub.mode() & 0o2000), (77, 0o2000));
}

#[test]
fn changing_the_owner_clears_set_user_id_and_capabilities() {
    let f = fixture(|_| {});
    let v = &f.volume;
    v.write("program", "x");
    fs::set_permissions(v.at("program"), fs::Permissions::from_mode(0o6755)).unwrap();
    let capability =
        b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    let name = "security.capability";
    rustix::fs::setxattr(v.at("program"), name, capability, XattrFlags::empty()).unwrap();
    std::os::unix::fs::chown(v.at("program"), Some(5), None).unwrap();
    assert_eq!(
        fs::metadata(v.at("program")).unwrap().mode() & 0o7777,
        0o755
    );
    let gone = rustix::fs::getxattr(v.at("program"), name, &mut [0; 64][..]);
    assert_eq!(gone.unwrap_err(), Errno::NODATA);
}

/// The value of an attribute with an access list of these lines: tag, permissions, id.
fn access_list(lines: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in lines {
        list.extend(tag.to_le_bytes());
        list.extend(permissions.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    list
}

#[test]
fn access_lists_are_enforced_by_the_kernel_and_inherited() {
    let none = u32::MAX;
    let list = access_list(&[
        (1, 7, none),
        (2, 7, 1_000_005),
        (4, 0, none),
        (16, 7, none),
        (32, 0, none),
    ]);
    let f = fixture_with(|_| {}, SHIFTED, Vec::new());
    let v = &f.volume;
    fs::create_dir(v.at("dir")).unwrap();
    rustix::fs::setxattr(
        v.at("dir"),
        "system.posix_acl_default",
        &list,
        XattrFlags::empty(),
    )
    .unwrap();
    v.write("dir/file", "x");
    let mut found = [0; 256];
    let len =
        rustix::fs::getxattr(v.at("dir/file"), "system.posix_acl_access", &mut found[..]).unwrap();
    assert_eq!(
        found[12..20],
        list[12..20],
        "the user's line, with the id shifted back"
    );
    assert_eq!(len, list.len());
    assert_eq!(
        fs::metadata(v.at("dir/file")).unwrap().mode() & 0o777,
        0o660
    );
    fs::set_permissions(v.at("dir/file"), fs::Permissions::from_mode(0o600)).unwrap();
    rustix::fs::getxattr(v.at("dir/file"), "system.posix_acl_access", &mut found[..]).unwrap();
    assert_eq!(found[30], 0, "chmod sets the mask");
}

#[test]
fn an_access_list_that_has_no_room_leaves_the_mode() {
    let f = fixture(|base| fs::write(base.join("a"), "x").unwrap());
    let path = f.volume.at("a");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    let none = u32::MAX;
    let list = access_list(&[
        (1, 7, none),
        (2, 4, 5),
        (4, 0, none),
        (16, 4, none),
        (32, 0, none),
    ]);
    let set =
        |name: &str, value: &[u8]| rustix::fs::setxattr(&path, name, value, XattrFlags::empty());
    // As much as fits, down to attributes that are smaller than the list.
    let mut count = 0;
    for len in [16 << 10, 1 << 10, 16] {
        let full = loop {
            count += 1;
            match set(&format!("user.{count}"), &vec![b'x'; len]) {
                Ok(()) => {}
                Err(errno) => break errno,
            }
        };
        assert_eq!(full, Errno::NOSPC);
    }
    let list_set = set("system.posix_acl_access", &list);
    assert_eq!(list_set, Err(Errno::NOSPC));
    let mode = || fs::metadata(&path).unwrap().mode() & 0o777;
    assert_eq!(mode(), 0o700);
    rustix::fs::removexattr(&path, "user.1").unwrap();
    set("system.posix_acl_access", &list).unwrap();
    assert_eq!(mode(), 0o740);
}

#[test]
fn record_locks_conflict_between_open_files() {
    let f = fixture(|base| fs::write(base.join("a"), "x").unwrap());
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(f.volume.at("a"))
            .unwrap()
    };
    let (one, two) = (open(), open());
    one.lock().unwrap();
    assert!(two.try_lock().is_err());
    one.unlock().unwrap();
    two.try_lock().unwrap();
}

#[test]
fn what_still_uses_a_volume_that_ended_gets_an_error_and_does_not_hang() {
    let f = fixture(|base| fs::write(base.join("a"), "x").unwrap());
    let file = File::open(f.volume.at("a")).unwrap();
    f.volume.shutdown();
    let ended = file.read_at(&mut [0], 0).unwrap_err();
    assert_eq!(ended.raw_os_error(), Some(libc::ENOTCONN));
    let ended = fs::metadata(f.volume.at("never looked up")).unwrap_err();
    assert_eq!(ended.raw_os_error(), Some(libc::ENOTCONN));
}
