//! What POSIX and Linux say of names, links, permissions and directory offsets, as on a disk's filesystem.

mod common;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use common::{Mounted, fixture};
use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, RawDir, RenameFlags, SeekFrom, StatxFlags, XattrFlags,
};
use rustix::io::Errno;

fn mode(path: impl AsRef<Path>) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

/// What the kernel has of the mode, which may be less fresh than what comes with size and times.
fn mode_alone(path: impl AsRef<Path>) -> u32 {
    let found = rustix::fs::statx(CWD, path.as_ref(), AtFlags::empty(), StatxFlags::MODE).unwrap();
    u32::from(found.stx_mode) & 0o7777
}

fn set_mode(path: impl AsRef<Path>, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Runs a shell command in the root of a volume, as somebody who is not root. Tells whether it succeeded.
fn as_user(volume: &Mounted, uid: u32, script: &str) -> bool {
    let root = File::open(volume.at(".")).unwrap();
    let mut sh = Command::new("sh");
    sh.args(["-c", &format!("cd /proc/self/fd/0/ && {script}")]);
    let status = sh.stdin(root).uid(uid).gid(uid).status();
    status.unwrap().success()
}

#[test]
fn links_that_lead_nowhere_or_round_are_refused_with_their_errno() {
    let f = fixture(|base| symlink("round", base.join("round")).unwrap());
    let v = &f.volume;
    v.write("l0", "the end");
    for n in 1..=41 {
        symlink(format!("l{}", n - 1), v.at(format!("l{n}"))).unwrap();
    }
    assert_eq!(fs::read_to_string(v.at("l35")).unwrap(), "the end");
    let open = |name: &str, flags| rustix::fs::open(v.at(name), flags, Mode::empty()).map(drop);
    assert_eq!(open("round", OFlags::RDONLY), Err(Errno::LOOP));
    assert_eq!(open("l41", OFlags::RDONLY), Err(Errno::LOOP));
    let nofollow = OFlags::RDONLY | OFlags::NOFOLLOW;
    assert_eq!(open("l1", nofollow), Err(Errno::LOOP));
    assert_eq!(open("l0/below", OFlags::RDONLY), Err(Errno::NOTDIR));
    let long = "x".repeat(4095);
    symlink(&long, v.at("long")).unwrap();
    assert_eq!(fs::read_link(v.at("long")).unwrap(), Path::new(&long));
    let longer = symlink("x".repeat(4096), v.at("longer"));
    assert_eq!(longer.unwrap_err().raw_os_error(), Some(libc::ENAMETOOLONG));
}

#[test]
fn nothing_is_linked_or_renamed_to_another_filesystem() {
    let f = fixture(|base| fs::write(base.join("a"), "x").unwrap());
    let v = &f.volume;
    let outside = f.data.path().join("outside");
    let across = |result: std::io::Result<()>| result.unwrap_err().raw_os_error();
    let link = fs::hard_link(v.at("a"), &outside);
    assert_eq!(across(link), Some(libc::EXDEV));
    assert_eq!(across(fs::rename(v.at("a"), &outside)), Some(libc::EXDEV));
    let fork = Mounted::new(v.fork(&v.checkpoint(), deltafs::IdMap::IDENTITY).unwrap());
    assert_eq!(
        across(fs::rename(v.at("a"), fork.at("b"))),
        Some(libc::EXDEV)
    );
    assert_eq!(v.read("a"), "x");
}

#[test]
fn a_rename_that_must_not_replace_does_not() {
    let f = fixture(|base| {
        fs::write(base.join("a"), "a").unwrap();
        fs::write(base.join("b"), "b").unwrap();
    });
    let v = &f.volume;
    let rename = |from: &str, to: &str| {
        let flags = RenameFlags::NOREPLACE;
        rustix::fs::renameat_with(CWD, v.at(from), CWD, v.at(to), flags)
    };
    assert_eq!(rename("a", "b"), Err(Errno::EXIST));
    assert_eq!(rename("a", "c"), Ok(()));
    assert_eq!((v.read("c"), v.read("b")), ("a".to_owned(), "b".to_owned()));
    fs::create_dir(v.at("dir")).unwrap();
    fs::create_dir(v.at("dir/sub")).unwrap();
    let below = fs::rename(v.at("dir"), v.at("dir/sub/dir")).unwrap_err();
    assert_eq!(below.raw_os_error(), Some(libc::EINVAL));
}

#[test]
fn paths_may_be_as_deep_as_one_likes() {
    let f = fixture(|_| {});
    let v = &f.volume;
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let mut dir = rustix::fs::open(v.at("."), flags, Mode::empty()).unwrap();
    let name = "n".repeat(200);
    // Some 400 KiB, far more than a path may have.
    for _ in 0..2000 {
        rustix::fs::mkdirat(&dir, &*name, Mode::RWXU).unwrap();
        dir = rustix::fs::openat(&dir, &*name, flags, Mode::empty()).unwrap();
    }
    let create = OFlags::CREATE | OFlags::WRONLY;
    let file = rustix::fs::openat(&dir, "file", create, Mode::RUSR).unwrap();
    rustix::io::write(&file, b"deep").unwrap();
    let checkpoint = v.checkpoint();
    rustix::fs::unlinkat(&dir, "file", AtFlags::empty()).unwrap();
    v.rollback(&checkpoint).unwrap();
    assert_eq!(
        rustix::fs::statat(&dir, "file", AtFlags::empty())
            .unwrap()
            .st_size,
        4
    );
    let path = v.at(vec![&*name; 30].join("/"));
    let long = fs::metadata(path).unwrap_err();
    assert_eq!(long.raw_os_error(), Some(libc::ENAMETOOLONG));
}

#[test]
fn in_a_sticky_directory_only_owners_remove() {
    let f = fixture(|_| {});
    let v = &f.volume;
    set_mode(v.at("."), 0o755);
    fs::create_dir(v.at("tmp")).unwrap();
    set_mode(v.at("tmp"), 0o1777);
    assert!(as_user(v, 1001, "echo x > tmp/mine"));
    assert!(!as_user(v, 1002, "rm -f tmp/mine 2>/dev/null"));
    assert!(!as_user(v, 1002, "mv tmp/mine tmp/yours 2>/dev/null"));
    assert!(as_user(v, 1001, "mv tmp/mine tmp/ours && rm tmp/ours"));
}

#[test]
fn writing_by_another_takes_the_set_id_bits_away() {
    let f = fixture(|base| {
        fs::write(base.join("base"), "x").unwrap();
        set_mode(base.join("base"), 0o6777);
    });
    let v = &f.volume;
    set_mode(v.at("."), 0o755);
    v.write("own", "x");
    for name in ["base", "own"] {
        let set = |bits| set_mode(v.at(name), bits);
        set(0o6777);
        assert_eq!(mode_alone(v.at(name)), 0o6777);
        assert!(as_user(v, 1001, &format!("echo more >> {name}")));
        assert_eq!(mode_alone(v.at(name)), 0o777, "{name} written");
        set(0o6777);
        assert!(as_user(v, 1001, &format!("fallocate -p -l 1 {name}")));
        assert_eq!(mode_alone(v.at(name)), 0o777, "{name} punched");
        set(0o6777);
        assert!(as_user(v, 1001, &format!(": > {name}")));
        assert_eq!(mode(v.at(name)), 0o777, "{name} cut");
        // Without group execution the bit means something else to the group.
        for (group, after) in [(1001, 0o2767), (1002, 0o767)] {
            std::os::unix::fs::chown(v.at(name), None, Some(group)).unwrap();
            set(0o2767);
            assert!(as_user(v, 1001, &format!("echo more >> {name}")));
            assert_eq!(mode_alone(v.at(name)), after, "{name} of group {group}");
        }
        // Root may keep them.
        set(0o6777);
        let mut file = OpenOptions::new().append(true).open(v.at(name)).unwrap();
        file.write_all(b"y").unwrap();
        assert_eq!(mode(v.at(name)), 0o6777, "{name} written by root");
    }
}

#[test]
fn attributes_of_all_namespaces_are_kept_apart() {
    let f = fixture(|base| fs::write(base.join("a"), "x").unwrap());
    let v = &f.volume;
    let names = ["user.one", "trusted.one", "security.one"];
    for (n, name) in names.iter().enumerate() {
        let value = vec![b'0'; n + 1];
        rustix::fs::setxattr(v.at("a"), *name, &value, XattrFlags::CREATE).unwrap();
    }
    let checkpoint = v.checkpoint();
    rustix::fs::removexattr(v.at("a"), "trusted.one").unwrap();
    let again = rustix::fs::setxattr(v.at("a"), "user.one", b"", XattrFlags::CREATE);
    assert_eq!(again, Err(Errno::EXIST));
    v.rollback(&checkpoint).unwrap();
    for (n, name) in names.iter().enumerate() {
        let mut value = [0; 16];
        let len = rustix::fs::getxattr(v.at("a"), *name, &mut value[..]).unwrap();
        assert_eq!(len, n + 1, "{name}");
    }
    // Who is not root does not see what is trusted.
    let get = |name: &str| format!("getfattr -n {name} a >/dev/null 2>&1");
    if Command::new("getfattr").arg("--version").output().is_ok() {
        set_mode(v.at("."), 0o755);
        assert!(as_user(v, 1001, &get("user.one")));
        assert!(!as_user(v, 1001, &get("trusted.one")));
    }
}

/// Reads entries until `enough` have come; their names, and the offset after the last one.
fn read_some(dir: impl AsFd, enough: usize) -> (Vec<String>, u64) {
    let mut buf = [MaybeUninit::uninit(); 1024];
    let mut raw = RawDir::new(dir, &mut buf);
    let (mut names, mut offset) = (Vec::new(), 0);
    while names.len() < enough
        && let Some(entry) = raw.next()
    {
        let entry = entry.unwrap();
        offset = entry.next_entry_cookie();
        let name = entry.file_name().to_str().unwrap().to_owned();
        if name.starts_with('f') {
            names.push(name);
        }
    }
    (names, offset)
}

#[test]
fn offsets_in_a_directory_mean_the_same_place_whatever_changes_around_them() {
    let f = fixture(|base| {
        for n in 0..300 {
            fs::write(base.join(format!("f-base-{n}")), "").unwrap();
        }
    });
    let v = &f.volume;
    for n in 0..300 {
        v.write(&format!("f-own-{n}"), "");
    }
    let dir = File::open(v.at(".")).unwrap();
    let (all, _) = read_some(&dir, usize::MAX);
    assert_eq!(all.len(), 600);
    for place in [0, 1, 250, 599] {
        rustix::fs::seek(&dir, SeekFrom::Start(0)).unwrap();
        let (before, offset) = read_some(&dir, place);
        assert!(before == all[..place]);
        // Half of what comes before and after goes, and as much comes.
        let checkpoint = v.checkpoint();
        let gone: BTreeSet<&String> = all.iter().step_by(2).collect();
        for name in &gone {
            fs::remove_file(v.at(name)).unwrap();
        }
        for n in 0..300 {
            v.write(&format!("g{n}"), "");
        }
        let other = File::open(v.at(".")).unwrap();
        // The kernel looks whether its listing is still good when one is begun.
        read_some(&other, 1);
        rustix::fs::seek(&other, SeekFrom::Start(offset)).unwrap();
        let (after, _) = read_some(&other, usize::MAX);
        let expected: Vec<&String> = all[place..].iter().filter(|n| !gone.contains(n)).collect();
        assert!(after.iter().eq(expected), "from {place}");
        v.rollback(&checkpoint).unwrap();
        rustix::fs::seek(&other, SeekFrom::Start(offset)).unwrap();
        assert!(read_some(&other, usize::MAX).0 == all[place..]);
    }
}

#[test]
fn access_times_are_those_that_were_set_for_the_volume_does_not_hear_of_reads() {
    let f = fixture(|base| fs::write(base.join("base"), "x").unwrap());
    let v = &f.volume;
    v.write("own", vec![b'x'; 4096]);
    let times = fs::FileTimes::new();
    let long_ago = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
    for name in ["base", "own"] {
        let file = OpenOptions::new().write(true).open(v.at(name)).unwrap();
        file.set_times(times.set_accessed(long_ago)).unwrap();
        fs::read(v.at(name)).unwrap();
        let accessed = fs::metadata(v.at(name)).unwrap().accessed().unwrap();
        assert_eq!(accessed, long_ago, "{name}");
    }
    // What the kernel has, it gives: also where nobody could be asked any more. So nothing can be made of it when it was read.
    v.write("own", vec![b'y'; 4096]);
    let own = File::open(v.at("own")).unwrap();
    v.shutdown();
    let mut page = [0; 4096];
    std::os::unix::fs::FileExt::read_exact_at(&own, &mut page, 0).unwrap();
    assert_eq!(page, [b'y'; 4096]);
}

#[test]
fn a_volume_can_be_made_read_only_and_writable_again() {
    use rustix::mount::{FsPickFlags, fsconfig_reconfigure, fsconfig_set_flag, fspick};
    let f = fixture(|base| fs::write(base.join("a"), "x").unwrap());
    let v = &f.volume;
    let set = |flag: &str| {
        let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
        let context = fspick(v.mount(), "", flags)?;
        fsconfig_set_flag(context.as_fd(), flag)?;
        fsconfig_reconfigure(context.as_fd())
    };
    v.write("b", "x");
    set("ro").unwrap();
    let refused = fs::write(v.at("a"), "y").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    set("rw").unwrap();
    v.write("a", "y");
    assert_eq!(v.read("a"), "y");
}
