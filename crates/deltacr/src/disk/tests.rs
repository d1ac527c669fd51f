use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::records::Whose;
use super::*;
use crate::image::TreeImage;
use crate::mem::{SharedObjects, ShmKey};
use crate::store::{PageMap, PageStore};

/// A tree of no process but with one memfd.
struct Tree {
    objects: SharedObjects,
    file: File,
    key: Option<ShmKey>,
}

impl Tree {
    fn new(store: &Arc<PageStore>) -> Self {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        Self {
            objects: SharedObjects::new(store.clone()).unwrap(),
            file: rustix::fs::memfd_create(c"memory", flags).unwrap().into(),
            key: None,
        }
    }

    fn write(&self, page: u64, byte: u8) {
        self.file.write_all_at(&[byte; 4096], page * 4096).unwrap();
    }

    fn image(&mut self) -> TreeImage {
        self.key = Some(self.objects.capture_fd(self.file.as_fd()).unwrap());
        let mut image = TreeImage::empty();
        image.shared = Arc::new(self.objects.take());
        image
    }

    fn pages<'a>(&self, image: &'a TreeImage) -> &'a PageMap {
        image.pages_of(Whose::Shared(self.key.unwrap())).unwrap()
    }
}

fn in_dir(dir: &Path, name: &str) -> std::path::PathBuf {
    let dir = dir.join(name);
    fs::create_dir(&dir).unwrap();
    dir
}

#[test]
fn memory_comes_back_and_only_what_changed_is_written() {
    let store = PageStore::new();
    let mut tree = Tree::new(&store);
    for (page, byte) in [(3, 1), (4, 2), (5000, 3)] {
        tree.write(page, byte);
    }
    let first = tree.image();
    for (page, byte) in [(3, 0), (4, 9), (7, 7)] {
        tree.write(page, byte);
    }
    let second = tree.image();
    let root = tempfile::tempdir().unwrap();
    let (a, b) = (in_dir(root.path(), "a"), in_dir(root.path(), "b"));
    assert_eq!(first.save(&a, None).unwrap().page_bytes, 3 * 4096);
    assert_eq!(second.save(&b, Some(&first)).unwrap().page_bytes, 2 * 4096);
    let new = PageStore::new();
    let loaded = TreeImage::load(&a, None, &new).unwrap();
    let later = TreeImage::load(&b, Some(&loaded), &new).unwrap();
    assert_eq!(tree.pages(&loaded), tree.pages(&first));
    assert_eq!(tree.pages(&later), tree.pages(&second));
    assert_ne!(tree.pages(&later), tree.pages(&loaded));
    assert_eq!(new.pages(), 5, "what both hold is stored once");
    assert!(TreeImage::load(&b, None, &new).is_err());
    assert_eq!(verify_image(&b).unwrap().page_bytes, 2 * 4096);
}

#[test]
fn damage_is_named_and_never_shown() {
    let store = PageStore::new();
    let mut tree = Tree::new(&store);
    tree.write(3, 1);
    tree.write(4, 2);
    let root = tempfile::tempdir().unwrap();
    let dir = in_dir(root.path(), "a");
    tree.image().save(&dir, None).unwrap();
    for name in [PROCESSES, MAPS, PAGES] {
        let path = dir.join(name);
        let bytes = fs::read(&path).unwrap();
        let step = if name == PAGES { 61 } else { 1 };
        for at in (0..bytes.len()).step_by(step) {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            for content in [&bad[..], &bytes[..at]] {
                fs::write(&path, content).unwrap();
                let error = TreeImage::load(&dir, None, &store).err();
                let error = error.unwrap_or_else(|| panic!("{name}, byte {at}"));
                assert!(error.to_string().contains(name), "{error}");
                assert!(verify_image(&dir).is_err());
            }
        }
        fs::write(&path, &bytes).unwrap();
    }
    TreeImage::load(&dir, None, &store).unwrap();
}
