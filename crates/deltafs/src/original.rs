//! The base's own files, beside what volumes show of them: for who has a use for the host's file itself, such as to map it without
//! a mount in between. Only files that have the same number in both are told of, and none is ever open for writing.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;

use rustix::io::Errno;

use crate::base::{Base, BaseInode};
use crate::node::{Ino, Name, ROOT};
use crate::view::View;
use crate::volume::{Snapshot, Volume};

impl Base {
    /// The base inode with this number, if that is its number on the host. One that was not looked up yet is looked for at `path`.
    fn original(&self, ino: Ino, path: &[u8]) -> Result<Arc<BaseInode>, Errno> {
        let inode = match self.inode(ino) {
            Some(inode) => inode,
            None => self.walk(path)?,
        };
        let same = inode.ino() == ino && inode.host_ino() == ino;
        same.then_some(inode).ok_or(Errno::STALE)
    }

    fn walk(&self, path: &[u8]) -> Result<Arc<BaseInode>, Errno> {
        let root = self.inode(ROOT).ok_or(Errno::STALE)?;
        let mut names = path.split(|byte| *byte == b'/').filter(|n| !n.is_empty());
        names.try_fold(root, |dir, name| {
            dir.child(&Name::from(name))?.ok_or(Errno::NOENT)
        })
    }
}

impl View {
    /// Whether it shows an inode just as the base has it: what is in it, what is said of it, and where it is.
    fn shows_original(&self, ino: Ino) -> bool {
        let changed = |ino| self.nodes().contains_key(&ino);
        let Some(mut inode) = self.tree().base.inode(ino).filter(|_| !changed(ino)) else {
            return false;
        };
        while let Some((dir, name)) = inode.place() {
            if changed(dir.ino()) && self.lookup(dir.ino(), name) != Ok(Some(inode.ino())) {
                return false;
            }
            inode = Arc::clone(dir);
        }
        true
    }
}

impl Snapshot {
    /// Whether an inode is shown just as the base has it: content, attributes and path.
    pub fn shows_original(&self, ino: u64) -> bool {
        self.view().shows_original(ino)
    }

    /// As [`Volume::open_original`].
    ///
    /// # Errors
    /// The same.
    pub fn open_original(&self, ino: u64, path: &[u8]) -> io::Result<Arc<File>> {
        let base = &self.view().tree().base;
        Ok(base.original(ino, path)?.file()?)
    }
}

impl Volume {
    /// Whether an inode is shown just as the base has it: content, attributes and path.
    pub fn shows_original(&self, ino: u64) -> bool {
        self.view(|view| view.shows_original(ino))
    }

    /// The path, in the base, of a file of the host; none if it is not one of the base that has the same number here, and that was
    /// looked up before.
    pub fn original_path(&self, device: u64, ino: u64) -> Option<Vec<u8>> {
        let inode = self.view(|view| view.tree().base.inode(ino))?;
        inode
            .is_on_host((device, ino))
            .then(|| inode.path().into_os_string().into_vec())
    }

    /// The base's own file with this number, which is at `path`, open for reading; whatever is shown of it.
    ///
    /// # Errors
    /// The base has none that has this number on the host, or it cannot be opened.
    pub fn open_original(&self, ino: u64, path: &[u8]) -> io::Result<Arc<File>> {
        let base = self.view(|view| Arc::clone(&view.tree().base));
        Ok(base.original(ino, path)?.file()?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::os::unix::fs::MetadataExt;
    use std::path::PathBuf;

    use super::*;
    use crate::data::DataStore;
    use crate::tree::Tree;
    use crate::view::{Caller, NewNode, RenameMode};

    const ROOT_USER: Caller = Caller { uid: 0, gid: 0 };

    struct Place {
        _dir: tempfile::TempDir,
        base: PathBuf,
        view: View,
    }

    fn place() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        fs::create_dir_all(base.join("lib/deep")).unwrap();
        fs::write(base.join("lib/deep/file"), "the base's").unwrap();
        fs::create_dir(dir.path().join("data")).unwrap();
        let opened = Base::new(File::open(&base).unwrap().into(), &[]).unwrap();
        let data = DataStore::create(&dir.path().join("data")).unwrap();
        Place {
            view: View::new(Arc::new(Tree::new(opened, data))),
            base,
            _dir: dir,
        }
    }

    impl Place {
        fn number(&self, path: &str) -> Ino {
            fs::metadata(self.base.join(path)).unwrap().ino()
        }

        fn look_up(&self, path: &str) -> Ino {
            let names = path.split('/');
            let step = |dir, name: &str| {
                let found = self.view.lookup(dir, &Name::from(name.as_bytes()));
                found.unwrap().unwrap()
            };
            names.fold(ROOT, step)
        }
    }

    #[test]
    fn a_file_is_found_by_its_number_or_by_its_path() {
        let place = place();
        let ino = place.number("lib/deep/file");
        let base = Arc::clone(&place.view.tree().base);
        assert_eq!(base.original(ino, b"/lib/none").unwrap_err(), Errno::NOENT);
        assert_eq!(base.original(ino, b"/lib").unwrap_err(), Errno::STALE);
        let found = base.original(ino, b"/lib/deep/file").unwrap();
        let mut text = String::new();
        (&*found.file().unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "the base's");
        assert_eq!(base.original(ino, b"").unwrap().ino(), ino);
        assert_eq!(found.path().to_str(), Some("/lib/deep/file"));
    }

    #[test]
    fn only_what_is_unchanged_and_where_it_was_is_shown_as_in_the_base() {
        let place = place();
        let ino = place.look_up("lib/deep/file");
        assert!(place.view.shows_original(ino));
        let mut written = place.view.branch();
        written.write(ino, 0, b"x", None).unwrap();
        assert!(!written.shows_original(ino));
        let name = |name: &str| Name::from(name.as_bytes());
        let lib = place.look_up("lib");
        let mut beside = place.view.branch();
        let new = NewNode {
            mode: 0o100_644,
            umask: 0,
            rdev: 0,
            target: None,
        };
        beside.create(lib, &name("new"), new, ROOT_USER).unwrap();
        assert!(beside.shows_original(ino), "only its directory has changed");
        let mut moved = place.view.branch();
        let (deep, elsewhere) = (name("deep"), name("elsewhere"));
        let renamed = moved.rename(
            (lib, &deep),
            (ROOT, &elsewhere),
            RenameMode::Replace,
            ROOT_USER,
        );
        renamed.unwrap();
        assert!(!moved.shows_original(ino), "its path is another");
    }
}
