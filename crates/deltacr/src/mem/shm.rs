//! Shared memory objects: `MAP_SHARED | MAP_ANONYMOUS` mappings, memfds, and segments of System V.
//!
//! To the kernel all are files of one invisible filesystem. The registry keeps a descriptor of
//! every object that the tree has or that a kept checkpoint names, so that an object outlives the
//! processes that held it, and a rollback puts its contents back in place. Segments, which have a life of their own, are
//! [kept](crate::sysv) elsewhere; the registry is shown them each time, for their contents.

mod contents;
#[cfg(test)]
mod tests;

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;
use rustix::fs::{
    Gid, MemfdFlags, Mode, SealFlags, Uid, fchmod, fchown, fcntl_add_seals, fcntl_get_seals, fstat,
    memfd_create,
};
use serde::{Deserialize, Serialize};

use crate::env::Environment;
use crate::error::{During, Result};
use crate::owners::Owners;
use crate::store::{PageMap, PageStore};
use crate::sys::pagemap::Mapping;
use contents::{differ, read, write};

/// Names a shared memory object of a tree, across its deaths and rebirths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ShmKey(pub u64);

/// Marks the key of a segment of System V, whose other bits are its id.
const SEGMENT: u64 = 1 << 63;

impl ShmKey {
    /// The key of a segment of System V.
    pub(crate) fn of_segment(id: i32) -> Self {
        Self(SEGMENT | u64::from(id.cast_unsigned()))
    }

    /// The id, if it is one of a segment of System V.
    pub(crate) fn segment(self) -> Option<i32> {
        (self.0 & SEGMENT != 0).then_some(self.0 as i32)
    }
}

/// A shared memory object at one moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ShmImage {
    /// The name that it was made with; empty for a mapping without one.
    pub name: Arc<str>,
    /// Size in bytes.
    pub size: u64,
    /// `F_SEAL_*` bits.
    pub seals: u32,
    /// `st_mode`.
    pub mode: u32,
    /// Owner: as the supervisor counts where it is captured or restored, in an image as the sandbox does.
    pub owner: (u32, u32),
    /// The contents, by offset divided by 4096; what is not held is zero. Persisted apart from the
    /// rest.
    #[serde(skip)]
    pub pages: PageMap,
    /// Keeps the object in the registry.
    #[serde(skip)]
    hold: Arc<()>,
}

impl ShmImage {
    fn seals(&self) -> SealFlags {
        SealFlags::from_bits_retain(self.seals)
    }

    /// The same with these contents. It keeps the object as `other`, another image of it, does.
    pub(crate) fn with_pages(self, pages: PageMap, other: Option<&Self>) -> Self {
        let hold = other.map_or(self.hold, |other| Arc::clone(&other.hold));
        Self {
            pages,
            hold,
            ..self
        }
    }
}

/// All shared memory objects of a tree at one moment.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SharedMemory {
    /// The objects.
    pub objects: BTreeMap<ShmKey, Arc<ShmImage>>,
}

impl SharedMemory {
    /// The same with owners as the sandbox counts, which another one may count from elsewhere.
    pub(crate) fn inside(&self, owners: &Owners) -> Self {
        self.owned_by(|owner| owners.inside(owner))
    }

    /// The opposite.
    pub(crate) fn outside(&self, owners: &Owners) -> Self {
        self.owned_by(|owner| owners.outside(owner))
    }

    fn owned_by(&self, owner: impl Fn((u32, u32)) -> (u32, u32)) -> Self {
        let objects = self.objects.iter().map(|(key, image)| {
            let mut image = ShmImage::clone(image);
            image.owner = owner(image.owner);
            (*key, Arc::new(image))
        });
        Self {
            objects: objects.collect(),
        }
    }
}

/// The shared memory objects of one sandbox, and whose they can be.
#[derive(Debug)]
pub struct SharedObjects {
    store: Arc<PageStore>,
    owners: OnceLock<Owners>,
    device: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last_key: u64,
    by_inode: HashMap<u64, ShmKey>,
    live: BTreeMap<ShmKey, Live>,
    /// What the segments of System V were last known to hold.
    segments: BTreeMap<ShmKey, PageMap>,
    /// What was captured since the last [`SharedObjects::take`].
    captured: BTreeMap<ShmKey, Arc<ShmImage>>,
}

impl State {
    /// Knows an object from now on by a name that none has had.
    fn insert_new(&mut self, live: Live) -> ShmKey {
        self.last_key += 1;
        let key = ShmKey(self.last_key);
        self.by_inode.insert(live.inode, key);
        self.live.insert(key, live);
        key
    }

    /// The memory of a segment would not go with the segment as long as its file is open.
    fn let_go_of_segments(&mut self) {
        let shown = self.live.split_off(&ShmKey(SEGMENT)).into_iter();
        self.segments = shown.map(|(key, live)| (key, live.pages)).collect();
    }
}

/// An object that exists.
#[derive(Debug)]
struct Live {
    /// Open for reading only, for the kernel executes nothing that somebody could write to.
    file: File,
    /// Of one that was made here, and that nobody has open yet: the file that it was made with. It alone may be open for
    /// writing while the object is executed, as it may where a program made it.
    original: Option<File>,
    inode: u64,
    name: Arc<str>,
    /// What it was last known to hold.
    pages: PageMap,
    /// Alive as long as an image of the object is.
    images: Weak<()>,
}

impl SharedObjects {
    /// An empty registry, whose contents go to `store`.
    ///
    /// # Errors
    /// The kernel makes no memfd.
    pub fn new(store: Arc<PageStore>) -> io::Result<Self> {
        let probe = memfd_create(c"probe", MemfdFlags::CLOEXEC)?;
        Ok(Self {
            store,
            owners: OnceLock::new(),
            device: fstat(&probe)?.st_dev,
            state: Mutex::default(),
        })
    }

    /// How the sandbox counts users and groups, which it does as long as it lives.
    pub(crate) fn owners(&self, env: &dyn Environment) -> Result<&Owners> {
        if let Some(owners) = self.owners.get() {
            return Ok(owners);
        }
        let read = Owners::of(env).during_tree("reading the maps of users and groups")?;
        Ok(self.owners.get_or_init(|| read))
    }

    /// `st_dev` of all shared memory objects.
    pub fn device(&self) -> u64 {
        self.device
    }

    /// The known object with this device and inode number.
    pub(crate) fn find(&self, device: u64, inode: u64) -> Option<ShmKey> {
        let state = self.state.lock();
        (device == self.device)
            .then(|| state.by_inode.get(&inode).copied())
            .flatten()
    }

    /// Knows an object from now on that a process has mapped: where it can be opened, and the name of the mapping.
    pub(crate) fn adopt_mapping(
        &self,
        path: &str,
        mapping: &Mapping,
        name: &str,
    ) -> io::Result<ShmKey> {
        if let Some(key) = self.find(mapping.device, mapping.inode) {
            return Ok(key);
        }
        self.adopt(reopen(path, libc::O_RDONLY)?, name)
    }

    /// Captures the object behind a descriptor (a memfd), if that was not done in this round.
    ///
    /// # Errors
    /// It is no shared memory object, or could not be read.
    pub fn capture_fd(&self, file: BorrowedFd<'_>) -> io::Result<ShmKey> {
        let stat = fstat(file)?;
        if stat.st_dev != self.device {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let key = match self.find(stat.st_dev, stat.st_ino) {
            Some(key) => key,
            None => {
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                let name = fs::read_link(&path)?;
                self.adopt(reopen(&path, libc::O_RDONLY)?, &name.to_string_lossy())?
            }
        };
        self.capture(key)?;
        Ok(key)
    }

    fn adopt(&self, file: File, name: &str) -> io::Result<ShmKey> {
        let inode = file.metadata()?.ino();
        let name = name.strip_suffix(" (deleted)").unwrap_or(name);
        let name = name.strip_prefix("/memfd:").unwrap_or_default();
        let mut state = self.state.lock();
        if let Some(key) = state.by_inode.get(&inode) {
            return Ok(*key);
        }
        Ok(state.insert_new(Live {
            file,
            original: None,
            inode,
            name: Arc::from(name),
            pages: PageMap::new(),
            images: Weak::new(),
        }))
    }

    /// Shows the memory of a segment of System V, open for reading, which is to be captured or restored then.
    pub(crate) fn show_segment(&self, id: i32, file: File) -> io::Result<ShmKey> {
        let stat = fstat(&file)?;
        if stat.st_dev != self.device {
            return Err(io::Error::other(
                "it is made of huge pages, which are not carried",
            ));
        }
        let key = ShmKey::of_segment(id);
        let mut state = self.state.lock();
        let live = Live {
            file,
            original: None,
            inode: stat.st_ino,
            name: Arc::default(),
            // It may be another one by now that has the same id: what is known of it is compared, not trusted.
            pages: state.segments.remove(&key).unwrap_or_default(),
            images: Weak::new(),
        };
        state.live.insert(key, live);
        Ok(key)
    }

    /// Ends the use of the segments that were shown.
    pub(crate) fn let_go_of_segments(&self) {
        self.state.lock().let_go_of_segments();
    }

    /// How many bytes an object has.
    pub(crate) fn size(&self, key: ShmKey) -> io::Result<u64> {
        let state = self.state.lock();
        let live = state.live.get(&key).ok_or(io::ErrorKind::NotFound)?;
        Ok(live.file.metadata()?.len())
    }

    /// Captures an object, if that was not done in this round.
    pub(crate) fn capture(&self, key: ShmKey) -> io::Result<()> {
        let state = &mut *self.state.lock();
        if state.captured.contains_key(&key) {
            return Ok(());
        }
        let live = state.live.get_mut(&key).ok_or(io::ErrorKind::NotFound)?;
        let image = live.capture(&self.store)?;
        state.captured.insert(key, Arc::new(image));
        Ok(())
    }

    /// Ends a round of captures: gives all objects captured in it, and lets go of those that neither the
    /// tree nor any kept image needs.
    pub fn take(&self) -> SharedMemory {
        let state = &mut *self.state.lock();
        let objects = std::mem::take(&mut state.captured);
        state.let_go_of_segments();
        state.live.retain(|_, live| live.images.strong_count() > 0);
        state
            .live
            .values_mut()
            .for_each(|live| live.original = None);
        let live = &state.live;
        state.by_inode.retain(|_, key| live.contains_key(key));
        SharedMemory { objects }
    }

    /// Parts with all objects, which no process has any more: those that are wanted are made anew, with a file for their
    /// holder that can be executed like the one it had.
    pub(crate) fn part_with_all(&self) {
        let state = &mut *self.state.lock();
        state.live.retain(|key, _| key.segment().is_some());
        state.by_inode.clear();
    }

    /// Takes the objects whose seals forbid what is to be done to them for others from now on, because a seal cannot be broken:
    /// those of `target` are made anew then, and what holds the sealed ones is found to hold something else. `mapped` tells
    /// whether an object is to be mapped for writing. To be called before anybody looks at what a tree holds that is to be restored.
    ///
    /// # Errors
    /// The seals cannot be read.
    pub(crate) fn part_with_sealed(
        &self,
        target: &SharedMemory,
        mapped: impl Fn(ShmKey) -> bool,
    ) -> io::Result<()> {
        let state = &mut *self.state.lock();
        for (key, image) in &target.objects {
            let Some(live) = state.live.get(key) else {
                continue;
            };
            let can_be_mapped = !spares_mappings(fcntl_get_seals(&live.file)?) || !mapped(*key);
            if !(can_be_mapped && live.can_become(image, &self.store)?)
                && let Some(live) = state.live.remove(key)
            {
                state.insert_new(Live {
                    images: Weak::new(),
                    ..live
                });
            }
        }
        Ok(())
    }

    /// Gives all objects the contents that they have in `target`, in place where the object exists and its seals allow it.
    /// To be called while the tree stands still, before any memory that maps them is restored.
    ///
    /// # Errors
    /// There is no memory, or a segment of System V is missing.
    pub fn restore(&self, target: &SharedMemory) -> io::Result<()> {
        let state = &mut *self.state.lock();
        state.captured.clear();
        for (key, image) in &target.objects {
            let live = match state.live.remove(key) {
                Some(live) if key.segment().is_some() || live.can_become(image, &self.store)? => {
                    live
                }
                Some(sealed) => {
                    state.by_inode.remove(&sealed.inode);
                    Live::create(image)?
                }
                None if key.segment().is_some() => return Err(io::ErrorKind::NotFound.into()),
                None => Live::create(image)?,
            };
            if key.segment().is_some() {
                state.live.insert(*key, live.restore(&self.store, image)?);
                continue;
            }
            state.by_inode.remove(&live.inode);
            let live = live.restore(&self.store, image)?;
            state.by_inode.insert(live.inode, *key);
            state.live.insert(*key, live);
            state.last_key = state.last_key.max(key.0);
        }
        Ok(())
    }

    /// Adds the seals that only mappings which are there before may break. To be called when all memory that maps the objects is
    /// restored.
    ///
    /// # Errors
    /// There is no such object, or it cannot be sealed.
    pub(crate) fn seal(&self, target: &SharedMemory) -> io::Result<()> {
        let state = self.state.lock();
        for (key, image) in &target.objects {
            if spares_mappings(image.seals()) {
                let live = state.live.get(key).ok_or(io::ErrorKind::NotFound)?;
                live.seal(image)?;
            }
        }
        Ok(())
    }

    /// A file of an object, for the caller to map.
    ///
    /// # Errors
    /// There is no such object, or its seals or mode forbid it.
    pub fn open(&self, key: ShmKey, flags: i32) -> io::Result<OwnedFd> {
        let state = self.state.lock();
        let live = state.live.get(&key).ok_or(io::ErrorKind::NotFound)?;
        match &live.original {
            Some(original) if is_for_both(flags) => Ok(original.try_clone()?.into()),
            _ => live.open(flags),
        }
    }

    /// A file of an object, for the caller to give to a process as a descriptor: no other has the same position.
    ///
    /// # Errors
    /// There is no such object, or its seals or mode forbid it.
    pub fn open_descriptor(&self, key: ShmKey, flags: i32) -> io::Result<OwnedFd> {
        let mut state = self.state.lock();
        let live = state.live.get_mut(&key).ok_or(io::ErrorKind::NotFound)?;
        match live.original.take_if(|_| is_for_both(flags)) {
            Some(original) => Ok(original.into()),
            None => live.open(flags),
        }
    }
}

/// Whether nobody may write but those who have mapped it for writing already.
fn spares_mappings(seals: SealFlags) -> bool {
    seals.contains(SealFlags::FUTURE_WRITE) && !seals.contains(SealFlags::WRITE)
}

/// Whether a file is opened for reading and writing.
fn is_for_both(flags: i32) -> bool {
    flags & libc::O_ACCMODE == libc::O_RDWR
}

fn reopen(path: &str, flags: i32) -> io::Result<File> {
    let access = flags & libc::O_ACCMODE;
    File::options()
        .read(access != libc::O_WRONLY)
        .write(access != libc::O_RDONLY)
        .custom_flags(flags & !libc::O_ACCMODE)
        .open(path)
}

impl Live {
    /// Makes the object anew, still empty and unsealed.
    fn create(image: &ShmImage) -> io::Result<Self> {
        let name = CString::new(&*image.name)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create(name.as_c_str(), flags)?);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        Ok(Self {
            inode: file.metadata()?.ino(),
            file: reopen(&path, libc::O_RDONLY)?,
            original: Some(file),
            name: Arc::clone(&image.name),
            pages: PageMap::new(),
            images: Weak::new(),
        })
    }

    fn open(&self, flags: i32) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(reopen(&path, flags)?.into())
    }

    fn capture(&mut self, store: &PageStore) -> io::Result<ShmImage> {
        let meta = self.file.metadata()?;
        let pages = read(&self.file, meta.len(), &self.pages, store)?;
        self.pages = pages.clone();
        let hold = self.images.upgrade().unwrap_or_default();
        self.images = Arc::downgrade(&hold);
        Ok(ShmImage {
            name: Arc::clone(&self.name),
            size: meta.len(),
            seals: fcntl_get_seals(&self.file)?.bits(),
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            pages,
            hold,
        })
    }

    /// Whether it can be made what an image tells: its seals can be added to but not taken away, and what they forbid cannot be
    /// done.
    fn can_become(&self, image: &ShmImage, store: &PageStore) -> io::Result<bool> {
        let seals = fcntl_get_seals(&self.file)?;
        let size = self.file.metadata()?.len();
        let resizing = match image.size.cmp(&size) {
            Ordering::Less => SealFlags::SHRINK,
            Ordering::Equal => SealFlags::empty(),
            Ordering::Greater => SealFlags::GROW,
        };
        if !image.seals().contains(seals) || seals.intersects(resizing) {
            return Ok(false);
        }
        if !spares_mappings(seals) {
            return Ok(true);
        }
        let now = read(&self.file, size, &self.pages, store)?;
        let mut same = true;
        now.diff(&image.pages, 0..u64::MAX, |_| same = false);
        Ok(same)
    }

    fn restore(mut self, store: &PageStore, image: &ShmImage) -> io::Result<Self> {
        let size = self.file.metadata()?.len();
        let now = read(&self.file, size, &self.pages, store)?;
        // One that is executed cannot be opened for writing; nor was it written to.
        if size != image.size || differ(&now, image) {
            let writable = File::from(self.open(libc::O_RDWR)?);
            writable.set_len(image.size)?;
            write(&writable, &now, image)?;
        }
        own(&self.file, image)?;
        if !spares_mappings(image.seals()) {
            self.seal(image)?;
        }
        self.pages = image.pages.clone();
        self.images = Arc::downgrade(&image.hold);
        Ok(self)
    }

    /// Adds an image's seals.
    fn seal(&self, image: &ShmImage) -> io::Result<()> {
        if fcntl_get_seals(&self.file)? != image.seals() {
            fcntl_add_seals(self.open(libc::O_RDWR)?, image.seals())?;
        }
        Ok(())
    }
}

/// A file that holds what an object held, and may be executed.
pub(crate) fn copy_of(image: &ShmImage) -> io::Result<OwnedFd> {
    let name = CString::new(image.name.as_bytes())?;
    let file = File::from(memfd_create(&name, MemfdFlags::CLOEXEC)?);
    file.set_len(image.size)?;
    write(&file, &PageMap::new(), image)?;
    fchmod(&file, Mode::RWXU | Mode::RWXG | Mode::RWXO)?;
    Ok(file.into())
}

/// Gives a file its mode and owner.
fn own(file: &File, image: &ShmImage) -> io::Result<()> {
    let meta = file.metadata()?;
    if (meta.uid(), meta.gid()) != image.owner {
        let (uid, gid) = image.owner;
        fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    }
    if meta.mode() != image.mode {
        fchmod(file, Mode::from_raw_mode(image.mode))?;
    }
    Ok(())
}
