//! A whole tree in memory.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Everything that a tree holds, by path.
pub(crate) struct Dump(BTreeMap<PathBuf, Item>);

struct Item {
    host_ino: u64,
    mode: u32,
    /// Of all but directories.
    links: u64,
    /// The content of a file, the target of a link.
    bytes: Vec<u8>,
    xattr: Option<Vec<u8>>,
}

/// The extended attribute that the operations set.
pub(crate) const XATTR: &str = "user.model";

impl Dump {
    /// Reads a tree.
    pub(crate) fn of(root: &Path) -> Self {
        let mut items = BTreeMap::new();
        let mut todo = vec![PathBuf::new()];
        while let Some(dir) = todo.pop() {
            for entry in fs::read_dir(root.join(&dir)).unwrap() {
                let path = dir.join(entry.unwrap().file_name());
                let meta = fs::symlink_metadata(root.join(&path)).unwrap();
                if meta.is_dir() {
                    todo.push(path.clone());
                }
                let item = Item::of(&root.join(&path), &meta);
                assert!(
                    items.insert(path.clone(), item).is_none(),
                    "{} listed twice",
                    path.display()
                );
            }
        }
        Self(items)
    }

    /// A path of a file by its number.
    pub(crate) fn path_of(&self, host_ino: u64) -> Option<&Path> {
        let found = self.0.iter().find(|(_, item)| item.host_ino == host_ino);
        found.map(|(path, _)| path.as_path())
    }

    /// Makes the tree in an empty directory.
    pub(crate) fn build(&self, root: &Path) {
        let mut known: BTreeMap<u64, &Path> = BTreeMap::new();
        for (path, item) in &self.0 {
            let to = root.join(path);
            if let Some(first) = known.get(&item.host_ino) {
                fs::hard_link(root.join(first), to).unwrap();
                continue;
            }
            known.insert(item.host_ino, path);
            match item.mode & libc::S_IFMT {
                libc::S_IFDIR => fs::create_dir(&to).unwrap(),
                libc::S_IFLNK => {
                    std::os::unix::fs::symlink(os(&item.bytes), &to).unwrap();
                    continue;
                }
                _ => fs::write(&to, &item.bytes).unwrap(),
            }
            if let Some(value) = &item.xattr {
                rustix::fs::setxattr(&to, XATTR, value, rustix::fs::XattrFlags::empty()).unwrap();
            }
            fs::set_permissions(&to, fs::Permissions::from_mode(item.mode & 0o7777)).unwrap();
        }
    }

    /// Fails unless the other tree is the same.
    pub(crate) fn compare(&self, other: &Self) {
        let names = |dump: &Self| dump.0.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(self), names(other), "names");
        for ((path, a), (_, b)) in self.0.iter().zip(&other.0) {
            let path = path.display();
            assert_eq!(
                format!("{:o}", a.mode),
                format!("{:o}", b.mode),
                "mode of {path}"
            );
            assert_eq!(a.links, b.links, "links of {path}");
            assert_eq!(a.bytes.len(), b.bytes.len(), "size of {path}");
            let differs = a.bytes.iter().zip(&b.bytes).position(|(a, b)| a != b);
            assert_eq!(differs, None, "content of {path}");
            assert_eq!(a.xattr, b.xattr, "attribute of {path}");
        }
    }
}

impl Item {
    fn of(path: &Path, meta: &fs::Metadata) -> Self {
        let bytes = match meta.mode() & libc::S_IFMT {
            libc::S_IFREG => fs::read(path).unwrap(),
            libc::S_IFLNK => fs::read_link(path)
                .unwrap()
                .into_os_string()
                .into_encoded_bytes(),
            _ => Vec::new(),
        };
        let mut value = vec![0; 256];
        let xattr = rustix::fs::lgetxattr(path, XATTR, &mut value[..]).ok();
        Self {
            host_ino: meta.ino(),
            mode: meta.mode(),
            links: meta.nlink(),
            bytes,
            xattr: xattr.map(|len| value[..len].to_vec()),
        }
    }
}

/// The content of a file, from its beginning.
pub(crate) fn content(file: &File) -> Vec<u8> {
    let len = file.metadata().unwrap().len();
    let mut bytes = vec![0; usize::try_from(len).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let mut beyond = [0];
    assert_eq!(
        file.read_at(&mut beyond, len).unwrap(),
        0,
        "data beyond the end"
    );
    bytes
}

/// Opens a file of the plain directory as it was open in another state: by its name, or without one.
pub(crate) fn open_again(root: &Path, path: Option<&Path>, content: &[u8]) -> File {
    let open = |path: &Path| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .unwrap()
    };
    if let Some(path) = path {
        return open(&root.join(path));
    }
    let place = root.join("a name for a moment");
    let mut file = open(&place);
    fs::remove_file(place).unwrap();
    file.write_all(content).unwrap();
    file
}

/// The same file, without a name, opened once more.
pub(crate) fn open_twin(file: &File) -> File {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.unwrap()
}

fn os(bytes: &[u8]) -> &std::ffi::OsStr {
    std::os::unix::ffi::OsStrExt::from_bytes(bytes)
}
