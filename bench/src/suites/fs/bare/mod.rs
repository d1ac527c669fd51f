//! The least that FUSE costs: a server that has every answer ready in memory.
//!
//! It is served as DeltaFS is, with the same options of the protocol and the same threads. It shows one directory of the base. Files can be made
//! and written; their data is thrown away, or kept in one file at the place that the request names.

mod image;

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use deltafs::transport::{Channel, Service};
use rustix::io::Errno;

use image::{ATTR_OUT, Content, Entry, Image};

/// The first number of files that were made, and how many bytes each has in the file that keeps them.
const MADE: u64 = 1 << 40;
const REGION: u64 = 1 << 32;

/// What is read once for all servers.
pub(super) struct Answers {
    image: Image,
    /// How files look that are made.
    model: Metadata,
}

impl Answers {
    /// Reads the directory `shown` of `base` into memory.
    pub(super) fn read(base: &Path, shown: &str) -> Result<Self> {
        let image = Image::read(base, shown).context("reading the base into memory")?;
        let model = tempfile::NamedTempFile::new_in(base)?
            .as_file()
            .metadata()?;
        Ok(Self { image, model })
    }
}

/// The server of one mount.
pub(super) struct Bare {
    answers: Arc<Answers>,
    made: Mutex<Made>,
    /// Where data is kept.
    kept: Option<File>,
}

/// The files that were made.
#[derive(Default)]
struct Made {
    names: HashMap<(u64, Vec<u8>), u64>,
    files: Vec<Entry>,
    /// Numbers of files that are gone.
    free: Vec<u64>,
}

/// What a request asks for, by its number in the protocol.
mod opcode {
    pub(super) const LOOKUP: u32 = 1;
    pub(super) const FORGET: u32 = 2;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const SETATTR: u32 = 4;
    pub(super) const READLINK: u32 = 5;
    pub(super) const MKNOD: u32 = 8;
    pub(super) const UNLINK: u32 = 10;
    pub(super) const READ: u32 = 15;
    pub(super) const WRITE: u32 = 16;
    pub(super) const GETXATTR: u32 = 22;
    pub(super) const LISTXATTR: u32 = 23;
    pub(super) const READDIR: u32 = 28;
    pub(super) const BATCH_FORGET: u32 = 42;
    pub(super) const READDIRPLUS: u32 = 44;
}

/// Bytes before the arguments of a request.
const HEADER: usize = 40;

/// A request: its header, and what comes after.
struct Request<'a>(&'a [u8]);

impl<'a> Request<'a> {
    fn number<const N: usize>(&self, at: usize) -> Result<[u8; N], Errno> {
        let bytes = self.0.get(at..at + N).ok_or(Errno::INVAL)?;
        bytes.try_into().map_err(|_| Errno::INVAL)
    }

    fn u32(&self, at: usize) -> Result<u32, Errno> {
        self.number(at).map(u32::from_ne_bytes)
    }

    fn u64(&self, at: usize) -> Result<u64, Errno> {
        self.number(at).map(u64::from_ne_bytes)
    }

    fn node(&self) -> Result<u64, Errno> {
        self.u64(16)
    }

    /// The name that begins after so many bytes of arguments.
    fn name(&self, at: usize) -> Result<&'a [u8], Errno> {
        let rest = self.0.get(HEADER + at..).ok_or(Errno::INVAL)?;
        rest.split(|byte| *byte == 0).next().ok_or(Errno::INVAL)
    }
}

/// Where an answer is put together.
#[derive(Default)]
pub(super) struct Room {
    header: [u8; 16],
    body: Vec<u8>,
}

impl Service for Bare {
    type Room = Room;

    fn answer<'a>(
        &'a self,
        request: &[u8],
        _: &Channel,
        room: &'a mut Room,
    ) -> Option<[&'a [u8]; 2]> {
        let request = Request(request);
        let (opcode, unique) = (request.u32(4).ok()?, request.u64(8).ok()?);
        if matches!(opcode, opcode::FORGET | opcode::BATCH_FORGET) {
            return None;
        }
        let Room { header, body } = room;
        body.clear();
        let (error, body) = match self.body(opcode, &request, body) {
            Ok(body) => (0, body),
            Err(errno) => (-errno.raw_os_error(), &[][..]),
        };
        let len = (header.len() + body.len()) as u32;
        header[..4].copy_from_slice(&len.to_ne_bytes());
        header[4..8].copy_from_slice(&error.to_ne_bytes());
        header[8..].copy_from_slice(&unique.to_ne_bytes());
        Some([header, body])
    }
}

impl Bare {
    /// A server whose files are kept in `kept`, or nowhere.
    pub(super) fn new(answers: &Arc<Answers>, kept: Option<File>) -> Self {
        Self {
            answers: Arc::clone(answers),
            made: Mutex::default(),
            kept,
        }
    }

    fn body<'a>(
        &'a self,
        opcode: u32,
        request: &Request<'_>,
        room: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], Errno> {
        let node = request.node()?;
        let place = || Ok((request.u64(HEADER + 8)?, request.u32(HEADER + 16)? as usize));
        if let Some(known) = self.answers.image.node(node) {
            match (opcode, &known.content) {
                (opcode::LOOKUP, Content::Dir(_)) => {
                    let name = request.name(0)?;
                    if let Some(found) = self.answers.image.look_up(node, name) {
                        return Ok(&found.entry);
                    }
                    room.extend_from_slice(&self.made.lock().unwrap().look_up(node, name));
                    return Ok(room);
                }
                (opcode::READDIR, Content::Dir(dir)) => {
                    let (offset, size) = place()?;
                    return Ok(dir.plain.part(offset as usize, size));
                }
                (opcode::READDIRPLUS, Content::Dir(dir)) => {
                    let (offset, size) = place()?;
                    return Ok(dir.plus.part(offset as usize, size));
                }
                (opcode::READ, Content::Bytes(bytes)) => {
                    let (offset, size) = place()?;
                    let rest = bytes.get(offset as usize..).unwrap_or_default();
                    return Ok(&rest[..size.min(rest.len())]);
                }
                (opcode::READLINK, Content::Bytes(bytes)) => return Ok(bytes),
                (opcode::GETATTR | opcode::SETATTR, _) => return Ok(&known.entry[ATTR_OUT..]),
                _ => {}
            }
        }
        self.made_body(opcode, node, request, room)
    }

    /// What is answered about files that were made.
    fn made_body<'a>(
        &self,
        opcode: u32,
        node: u64,
        request: &Request<'_>,
        room: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], Errno> {
        /// The bit of `fuse_setattr_in.valid` that says that there is a size.
        const HAS_SIZE: u32 = 1 << 3;
        let mut made = self.made.lock().unwrap();
        match opcode {
            opcode::MKNOD => {
                let name = request.name(16)?.to_vec();
                room.extend_from_slice(made.make(node, name, &self.answers.model));
            }
            opcode::UNLINK => made.remove(node, request.name(0)?)?,
            opcode::GETATTR => room.extend_from_slice(&made.file(node)?[ATTR_OUT..]),
            opcode::SETATTR => {
                let file = made.file(node)?;
                if request.u32(HEADER)? & HAS_SIZE != 0 {
                    image::set_size(file, request.u64(HEADER + 16)?);
                }
                room.extend_from_slice(&file[ATTR_OUT..]);
            }
            opcode::WRITE => {
                let (offset, size) = (request.u64(HEADER + 8)?, request.u32(HEADER + 16)?);
                let file = made.file(node)?;
                let end = offset + u64::from(size);
                image::set_size(file, end.max(image::size(file)));
                drop(made);
                if let Some(kept) = &self.kept {
                    let data = request.0.get(HEADER + 40..).ok_or(Errno::INVAL)?;
                    let place = (node - MADE) * REGION + offset;
                    kept.write_all_at(data, place).map_err(|_| Errno::IO)?;
                }
                room.extend_from_slice(&size.to_ne_bytes());
                room.extend_from_slice(&[0; 4]);
            }
            // As DeltaFS: `ls` does not ask for labels again then.
            opcode::GETXATTR if request.name(8)? == b"security.selinux" => {
                return Err(Errno::NOTSUP);
            }
            opcode::GETXATTR => return Err(Errno::NODATA),
            // None; to whoever asks how much room they need, none as well.
            opcode::LISTXATTR if request.u32(HEADER)? > 0 => {}
            opcode::LISTXATTR => room.extend_from_slice(&[0; 8]),
            _ => return Err(Errno::NOSYS),
        }
        Ok(room)
    }
}

impl Made {
    fn look_up(&self, dir: u64, name: &[u8]) -> Entry {
        let found = self.names.get(&(dir, name.to_vec()));
        found.map_or_else(image::no_entry, |ino| self.files[(ino - MADE) as usize])
    }

    fn make(&mut self, dir: u64, name: Vec<u8>, model: &Metadata) -> &Entry {
        let ino = self.free.pop().unwrap_or_else(|| {
            self.files.push([0; size_of::<Entry>()]);
            MADE + self.files.len() as u64 - 1
        });
        self.names.insert((dir, name), ino);
        let file = &mut self.files[(ino - MADE) as usize];
        *file = image::entry(ino, model);
        file
    }

    fn remove(&mut self, dir: u64, name: &[u8]) -> Result<(), Errno> {
        let ino = self.names.remove(&(dir, name.to_vec()));
        self.free.push(ino.ok_or(Errno::NOENT)?);
        Ok(())
    }

    fn file(&mut self, ino: u64) -> Result<&mut Entry, Errno> {
        let index = ino.checked_sub(MADE).ok_or(Errno::NOSYS)?;
        self.files.get_mut(index as usize).ok_or(Errno::NOENT)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::path::PathBuf;

    use deltafs::transport::Session;

    use super::*;

    #[test]
    fn it_shows_the_directory_and_takes_what_is_written() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("shown/dir");
        std::fs::create_dir_all(&dir).unwrap();
        for file in 0..500 {
            let name = format!("{file}{}", "x".repeat(file % 100));
            std::fs::write(dir.join(name), vec![7; file * 3]).unwrap();
        }
        std::os::unix::fs::symlink("dir/1", base.path().join("shown/link")).unwrap();
        let answers = Arc::new(Answers::read(base.path(), "shown").unwrap());
        let kept = tempfile::tempfile().unwrap();
        let bare = Arc::new(Bare::new(&answers, kept.try_clone().ok()));
        let session = Session::start(&bare, 2).unwrap();
        let root = PathBuf::from(format!("/proc/self/fd/{}", session.mount().as_raw_fd()));
        let file = |root: &Path| std::fs::read(root.join("shown/dir/100")).unwrap();
        assert_eq!(file(&root), file(base.path()));
        let link = |root: &Path| std::fs::read_link(root.join("shown/link")).unwrap();
        assert_eq!(link(&root), link(base.path()));
        let list = |path: PathBuf| {
            let mut names: Vec<_> = std::fs::read_dir(path)
                .unwrap()
                .map(|entry| entry.unwrap())
                .map(|entry| (entry.file_name(), entry.metadata().unwrap().len()))
                .collect();
            names.sort();
            names
        };
        assert_eq!(list(root.join("shown/dir")), list(dir));
        assert_eq!(list(root.join("shown")), list(base.path().join("shown")));
        assert!(!root.join("shown/absent").exists());

        let made = root.join("made");
        std::fs::write(&made, vec![1; 600_000]).unwrap();
        assert_eq!(made.metadata().unwrap().len(), 600_000);
        let mut bytes = vec![0; 600_000];
        kept.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 1));
        std::fs::remove_file(&made).unwrap();
        assert!(!made.exists());
    }
}
