//! Layers on disk: damage is found, changed bases are refused, what is read back goes on as what was written.

mod common;

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use common::{Fixture, Mounted, fixture, names};
use deltafs::{Error, IdMap, Loader, Options, Snapshot, verify_layer};

fn loader(fixture: &Fixture) -> Loader {
    Loader::new(Options {
        base: File::open(fixture.base.path()).unwrap().into(),
        hidden: Vec::new(),
        ids: IdMap::IDENTITY,
        data_dir: fixture.data.path().to_owned(),
        threads: 2,
    })
    .unwrap()
}

/// A volume that shows what a layer holds.
fn shown(loader: Loader, snapshot: &Snapshot) -> Mounted {
    let volume = loader.mount().unwrap();
    volume.rollback(snapshot).unwrap();
    Mounted::new(volume)
}

fn base(dir: &Path) {
    fs::write(dir.join("kept"), "base").unwrap();
    fs::write(dir.join("changed"), vec![b'b'; 20_000]).unwrap();
    fs::create_dir(dir.join("dir")).unwrap();
    fs::write(dir.join("dir/inner"), "inner").unwrap();
}

/// A layer with something of everything, in a directory of its own.
fn sample(fixture: &Fixture) -> tempfile::TempDir {
    let volume = &fixture.volume;
    let file = File::options().write(true).open(volume.at("changed"));
    file.unwrap().write_all_at(b"new", 5000).unwrap();
    volume.write("new", vec![b'n'; 9000]);
    fs::remove_file(volume.at("dir/inner")).unwrap();
    std::os::unix::fs::symlink("kept", volume.at("link")).unwrap();
    let layer = tempfile::tempdir().unwrap();
    volume.checkpoint().save(layer.path(), None).unwrap();
    layer
}

fn check_sample(volume: &Mounted) {
    let mut changed = vec![b'b'; 20_000];
    changed[5000..5003].copy_from_slice(b"new");
    assert_eq!(fs::read(volume.at("changed")).unwrap(), changed);
    assert_eq!(fs::read(volume.at("new")).unwrap(), vec![b'n'; 9000]);
    assert!(names(volume.at("dir")).is_empty());
    assert_eq!(fs::read_link(volume.at("link")).unwrap(), Path::new("kept"));
    assert_eq!(volume.read("kept"), "base");
}

#[test]
fn what_was_written_after_reading_back_does_not_show_in_the_checkpoint() {
    let fixture = fixture(base);
    let layer = sample(&fixture);
    let mut loader = loader(&fixture);
    let snapshot = loader.load(layer.path(), None).unwrap();
    let volume = shown(loader, &snapshot);
    check_sample(&volume);
    volume.write("new", "overwritten");
    let file = File::options().write(true).open(volume.at("changed"));
    file.unwrap().write_all_at(&[0; 8192], 0).unwrap();
    volume.write("another", "file");
    volume.rollback(&snapshot).unwrap();
    check_sample(&volume);
    assert!(!volume.at("another").exists());
}

#[test]
fn inode_numbers_and_directory_positions_stay() {
    let fixture = fixture(|dir| {
        base(dir);
        for n in 0..50 {
            fs::write(dir.join(format!("file{n}")), "").unwrap();
        }
    });
    let volume = &fixture.volume;
    let ino = |volume: &Mounted, path: &str| fs::metadata(volume.at(path)).unwrap().ino();
    let paths = ["kept", "dir/inner", "file7", "changed"];
    let before: Vec<u64> = paths.iter().map(|path| ino(volume, path)).collect();
    let layer = sample_without_removal(&fixture);
    let order = |volume: &Mounted| -> Vec<String> {
        let entries = fs::read_dir(volume.at("")).unwrap();
        entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect()
    };
    let order_before = order(volume);
    let mut loader = loader(&fixture);
    let snapshot = loader.load(layer.path(), None).unwrap();
    let volume = shown(loader, &snapshot);
    assert_eq!(order(&volume), order_before);
    let after: Vec<u64> = paths.iter().map(|path| ino(&volume, path)).collect();
    assert_eq!(after, before);
    volume.write("later", "x");
    assert!(!before.contains(&ino(&volume, "later")));
}

#[test]
fn a_layer_knows_what_was_looked_up_since_the_one_before_whatever_its_number() {
    let fixture = fixture(base);
    let (volume, layers) = (&fixture.volume, tempfile::tempdir().unwrap());
    let on_host = |path: &&str| fs::metadata(fixture.base.path().join(path)).unwrap().ino();
    let mut paths = ["kept", "changed", "dir"];
    paths.sort_by_key(on_host);
    let [first, second] = ["a", "b"].map(|name| layers.path().join(name));
    let mut before = None;
    for (layer, path) in [(&first, paths[2]), (&second, paths[0])] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        fs::set_permissions(volume.at(path), mode).unwrap();
        fs::create_dir(layer).unwrap();
        let snapshot = volume.checkpoint();
        let info = snapshot.save(layer, before.as_ref()).unwrap();
        assert_eq!(info.base_inodes, 1);
        before = Some(snapshot);
    }
    let mut loader = loader(&fixture);
    let snapshot = loader.load(&first, None).unwrap();
    let snapshot = loader.load(&second, Some(&snapshot)).unwrap();
    let volume = shown(loader, &snapshot);
    for path in [paths[0], paths[2]] {
        let found = fs::metadata(volume.at(path)).unwrap();
        assert_eq!((found.mode() & 0o777, found.ino()), (0o700, on_host(&path)));
    }
    // What is saved after that is what was looked up after that.
    assert_eq!(volume.read("dir/inner"), "inner");
    let third = layers.path().join("c");
    fs::create_dir(&third).unwrap();
    let info = volume.checkpoint().save(&third, Some(&snapshot)).unwrap();
    assert_eq!(info.base_inodes, if paths[1] == "dir" { 2 } else { 1 });
}

fn sample_without_removal(fixture: &Fixture) -> tempfile::TempDir {
    fixture.volume.write("new", "x");
    let layer = tempfile::tempdir().unwrap();
    fixture
        .volume
        .checkpoint()
        .save(layer.path(), None)
        .unwrap();
    layer
}

#[test]
fn a_layer_that_is_cut_or_has_a_flipped_byte_is_named_and_never_shown() {
    let fixture = fixture(base);
    let layer = sample(&fixture);
    for name in ["files.meta", "files.data"] {
        let path = layer.path().join(name);
        let good = fs::read(&path).unwrap();
        let step = if name == "files.meta" { 1 } else { 997 };
        let refused = |what: &str| {
            let loaded = loader(&fixture).load(layer.path(), None);
            let error = loaded
                .err()
                .unwrap_or_else(|| panic!("{name}: {what} was not noticed"));
            assert!(error.to_string().contains(name), "{error}");
            assert!(verify_layer(layer.path()).is_err());
        };
        for at in (0..good.len()).step_by(step) {
            let mut bytes = good.clone();
            bytes[at] ^= 0x40;
            fs::write(&path, &bytes).unwrap();
            refused(&format!("a flipped bit of byte {at}"));
            fs::write(&path, &good[..at]).unwrap();
            refused(&format!("a cut at {at}"));
        }
        fs::write(&path, [&good[..], b"x"].concat()).unwrap();
        refused("a byte more");
        fs::remove_file(&path).unwrap();
        refused("that it is missing");
        fs::write(&path, &good).unwrap();
    }
    let info = verify_layer(layer.path()).unwrap();
    assert_eq!(info.data_bytes, 4 * 4096);
    let mut loader = loader(&fixture);
    let snapshot = loader.load(layer.path(), None).unwrap();
    check_sample(&shown(loader, &snapshot));
}

#[test]
fn a_layer_holds_only_what_changed_since_the_one_before() {
    let fixture = fixture(base);
    let volume = &fixture.volume;
    volume.write("big", vec![1; 4 << 20]);
    for n in 0..500 {
        volume.write(&format!("dir/{n}"), "x");
    }
    let first = volume.checkpoint();
    let big = File::options()
        .read(true)
        .write(true)
        .open(volume.at("big"))
        .unwrap();
    big.write_all_at(&[2; 100], 2 << 20).unwrap();
    volume.write("dir/new", "");
    fs::remove_file(volume.at("dir/7")).unwrap();
    let second = volume.checkpoint();
    let dirs = tempfile::tempdir().unwrap();
    let dir = |name: &str| {
        let dir = dirs.path().join(name);
        fs::create_dir_all(&dir).unwrap();
        dir
    };
    let unsaved = second.save(&dir("c"), Some(&first));
    assert!(matches!(unsaved, Err(Error::ForeignSnapshot)));
    first.save(&dir("a"), None).unwrap();
    let info = second.save(&dir("b"), Some(&first)).unwrap();
    assert_eq!(info.data_bytes, 4096);
    // The file, the directory and the new file; and the removed one, which is gone once the kernel has let go of it.
    assert_eq!(info.inodes + info.gone, 4);
    let size = fs::metadata(dir("b").join("files.meta")).unwrap().len();
    assert!(size < 2000, "{size}");
    let mut loader = loader(&fixture);
    let first = loader.load(&dir("a"), None).unwrap();
    let second = loader.load(&dir("b"), Some(&first)).unwrap();
    let volume = shown(loader, &second);
    let mut expected = vec![1; 4 << 20];
    expected[2 << 20..(2 << 20) + 100].fill(2);
    assert!(fs::read(volume.at("big")).unwrap() == expected);
    assert!(!volume.at("dir/7").exists() && volume.at("dir/new").exists());
    volume.rollback(&first).unwrap();
    assert!(fs::read(volume.at("big")).unwrap() == vec![1; 4 << 20]);
    assert!(volume.at("dir/7").exists() && !volume.at("dir/new").exists());
}

#[test]
fn a_base_file_that_changed_under_a_layer_is_refused_and_others_are_reported() {
    let fixture = fixture(base);
    assert_eq!(fixture.volume.read("kept"), "base");
    let layer = sample(&fixture);
    fs::write(fixture.base.path().join("kept"), "another").unwrap();
    let mut with_report = loader(&fixture);
    with_report.load(layer.path(), None).unwrap();
    let changed: Vec<_> = with_report.changed_base().values().collect();
    assert_eq!(changed, [Path::new("/kept")]);

    let path = fixture.base.path().join("changed");
    let mut bytes = fs::read(&path).unwrap();
    bytes[19_000] = b'x';
    fs::write(&path, &bytes).unwrap();
    let refused = loader(&fixture).load(layer.path(), None).unwrap_err();
    assert!(matches!(refused, Error::BaseChanged { .. }));
    assert!(refused.to_string().contains("/changed"), "{refused}");
}

#[test]
fn another_base_is_refused() {
    let (one, other) = (fixture(base), fixture(base));
    let layer = sample(&one);
    let refused = loader(&other).load(layer.path(), None).unwrap_err();
    assert!(matches!(refused, Error::BaseChanged { .. }));
}

#[test]
fn a_file_without_a_name_comes_back() {
    let fixture = fixture(base);
    let volume = &fixture.volume;
    volume.write("doomed", "still here");
    let file = File::open(volume.at("doomed")).unwrap();
    let ino = file.metadata().unwrap().ino();
    fs::remove_file(volume.at("doomed")).unwrap();
    let layer = tempfile::tempdir().unwrap();
    volume.checkpoint().save(layer.path(), None).unwrap();
    let mut loader = loader(&fixture);
    let snapshot = loader.load(layer.path(), None).unwrap();
    let volume = shown(loader, &snapshot);
    let mut again = File::from(volume.open_inode(ino, libc::O_RDONLY).unwrap());
    again.seek(SeekFrom::Start(6)).unwrap();
    assert_eq!(std::io::read_to_string(&mut again).unwrap(), "here");
    assert_eq!(again.metadata().unwrap().nlink(), 0);
}
