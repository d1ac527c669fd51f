//! What a process has mapped.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustix::fs::{OFlags, fstat};

use crate::env::Environment;
use crate::error::{During, Error, Result};
use crate::files;
use crate::ids::{HostPid, InnerPid};
use crate::mem::{BASE, Backing, FileId, Memory, ShmKey, VERSIONED, Vma, overlap, unsupported};
use crate::remote::Remote;
use crate::sys::pagemap::{self, Mapping};

/// How the names of segments of System V begin.
const SEGMENT: &[u8] = b"/SYSV";

/// Reads the mappings of a stopped process, without the engine's area. `known` are those of an
/// earlier time: what is still the same is not looked into again.
pub(super) fn read(memory: &Memory<'_>, remote: &Remote, known: &[Vma]) -> Result<Vec<Vma>> {
    let (pid, host) = (remote.pid(), remote.host());
    let doing = "reading the mappings";
    let reader = Reader {
        memory,
        pid,
        host,
        maps: remote.proc_file("maps").during(pid, doing)?,
        known,
    };
    let mut vmas = Vec::with_capacity(known.len() + 16);
    let mut address = 0;
    while let Some(found) = pagemap::mapping(&reader.maps, address).during(pid, doing)? {
        for part in without(&found, &remote.area()) {
            push(&mut vmas, reader.vma(&part)?);
        }
        address = found.end;
    }
    Ok(vmas)
}

/// A mapping without the engine's area, which the kernel may have merged with it.
fn without(found: &Mapping, area: &Range<u64>) -> impl Iterator<Item = Mapping> {
    let clear = overlap(&(found.start..found.end), area).is_none();
    let (mut before, mut after) = (*found, *found);
    if !clear {
        before.end = area.start;
        after.start = area.end;
    }
    [Some(before), (!clear).then_some(after)]
        .into_iter()
        .flatten()
        .filter(|part| part.start < part.end)
}

/// Adds a mapping, as part of the last one if it only continues that.
fn push(vmas: &mut Vec<Vma>, vma: Vma) {
    if let Some(last) = vmas.last_mut()
        && last.end == vma.start
        && last.prot == vma.prot
        && !vma.is_special()
        // Each counts as an attachment.
        && vma.segment().is_none()
        && last.agrees_at(&vma, vma.start)
    {
        last.end = vma.end;
    } else {
        vmas.push(vma);
    }
}

/// Marks parts of anonymous mappings, which are mappings of their own from then on.
pub(super) fn mark(vmas: &mut Vec<Vma>, parts: &[Range<u64>], mark: impl Fn(&mut Vma)) {
    let mut marked = Vec::with_capacity(vmas.len());
    for vma in vmas.drain(..) {
        let piece = |range: Range<u64>| Vma {
            start: range.start,
            end: range.end,
            ..vma.clone()
        };
        let mut from = vma.start;
        let of_it = parts.iter().filter_map(|part| overlap(part, &vma.range()));
        for part in of_it.filter(|_| vma.is_anonymous()) {
            marked.extend((from < part.start).then(|| piece(from..part.start)));
            from = part.end;
            let mut part = piece(part);
            mark(&mut part);
            marked.push(part);
        }
        marked.extend((from < vma.end).then(|| piece(from..vma.end)));
    }
    *vmas = marked;
}

/// What is not seen of a mapping at first sight.
struct Kind {
    backing: Backing,
    grows_down: bool,
    droppable: bool,
    read_only: bool,
}

impl From<Backing> for Kind {
    fn from(backing: Backing) -> Self {
        Self {
            backing,
            grows_down: false,
            droppable: false,
            read_only: false,
        }
    }
}

struct Reader<'a> {
    memory: &'a Memory<'a>,
    pid: InnerPid,
    host: HostPid,
    maps: Arc<File>,
    known: &'a [Vma],
}

impl Reader<'_> {
    fn vma(&self, found: &Mapping) -> Result<Vma> {
        let Kind {
            backing,
            grows_down,
            droppable,
            read_only,
        } = match self.known(found) {
            Some(vma) => Kind {
                backing: vma.backing.clone(),
                grows_down: vma.grows_down,
                droppable: vma.droppable,
                read_only: vma.read_only,
            },
            None => self.identify(found)?,
        };
        let with_offset = matches!(backing, Backing::File(_) | Backing::Shm(_));
        Ok(Vma {
            start: found.start,
            end: found.end,
            prot: found.prot,
            shared: found.shared,
            offset: if with_offset { found.offset } else { 0 },
            backing,
            grows_down,
            droppable,
            read_only,
        })
    }

    /// The mapping of the earlier time that this one is a part of.
    fn known(&self, found: &Mapping) -> Option<&Vma> {
        let at = self.known.partition_point(|v| v.end <= found.start);
        let vma = self.known.get(at)?;
        let fileless = found.inode == 0 && found.device == 0;
        let same = match &vma.backing {
            Backing::Anonymous => fileless,
            // The kernel neither splits nor resizes these.
            Backing::Special(_) => fileless && vma.range() == (found.start..found.end),
            Backing::File(file) => {
                (file.device, file.inode) == (self.device_of(found), found.inode)
                    && vma.offset_at(found.start) == found.offset
            }
            Backing::Shm(key) => {
                self.shared_object(found) == Some(*key)
                    && vma.offset_at(found.start) == found.offset
            }
        };
        let begins = vma.start <= found.start || (vma.grows_down && vma.end == found.end);
        let within = begins && found.end <= vma.end;
        (same && within && vma.shared == found.shared).then_some(vma)
    }

    /// A segment of System V has its id as its inode number, which another object may have, too.
    fn shared_object(&self, found: &Mapping) -> Option<ShmKey> {
        let shared = self.memory.shared;
        if found.device != shared.device() {
            return None;
        }
        let name = pagemap::mapping_name(&self.maps, found.start).ok()?;
        match name.starts_with(SEGMENT) {
            true => Some(ShmKey::of_segment(found.inode as i32)),
            false => shared.find(found.device, found.inode),
        }
    }

    fn identify(&self, found: &Mapping) -> Result<Kind> {
        let doing = "reading the mappings";
        let name = pagemap::mapping_name(&self.maps, found.start).during(self.pid, doing)?;
        let shared = self.memory.shared;
        if found.device == shared.device() && name.starts_with(SEGMENT) {
            let file = fs::symlink_metadata(self.file_of(found)).during(self.pid, doing)?;
            return Ok(Kind {
                read_only: file.mode() & libc::S_IWUSR == 0,
                ..Backing::Shm(ShmKey::of_segment(found.inode as i32)).into()
            });
        }
        let name = String::from_utf8_lossy(&name);
        if found.inode == 0 && found.device == 0 {
            self.identify_fileless(&name, found)
        } else if found.device == shared.device() {
            let key = shared
                .adopt_mapping(&self.file_of(found), found, &name)
                .during(self.pid, "opening the shared memory")?;
            Ok(Backing::Shm(key).into())
        } else {
            Ok(Backing::File(self.identify_file(&name, found)?).into())
        }
    }

    fn file_of(&self, found: &Mapping) -> String {
        mapped_file(self.host, &(found.start..found.end))
    }

    fn device_of(&self, found: &Mapping) -> u64 {
        let env = self.memory.env;
        if found.device == env.fs_device() {
            VERSIONED
        } else if !found.shared && env.path_in_base(found.device, found.inode).is_some() {
            BASE
        } else {
            found.device
        }
    }

    fn identify_fileless(&self, name: &str, found: &Mapping) -> Result<Kind> {
        match name {
            "[vdso]" | "[vvar]" | "[vvar_vclock]" => Ok(Backing::Special(name.into()).into()),
            "[stack]" => Ok(Kind {
                grows_down: true,
                ..Backing::Anonymous.into()
            }),
            "" | "[heap]" => Ok(Backing::Anonymous.into()),
            _ if name.starts_with("[anon:") => Ok(Backing::Anonymous.into()),
            _ => Err(self.refuse(found, name, "this kind of mapping is not carried")),
        }
    }

    fn identify_file(&self, name: &str, found: &Mapping) -> Result<FileId> {
        let mut file = FileId {
            device: self.device_of(found),
            inode: found.inode,
            path: Arc::from(name),
        };
        // A number may have been that of another file before.
        let in_base = || self.memory.env.path_in_base(found.device, found.inode);
        if file.device == BASE && in_base().as_deref() != Some(name.as_bytes()) {
            file.device = found.device;
        }
        if ![VERSIONED, BASE].contains(&file.device)
            && let Err(e) = reopen(self.memory.env, &file, libc::O_RDONLY)
        {
            let why = match self.is_hugetlb(found) {
                true => "hugetlb pages are not carried (transparent huge pages are)".to_owned(),
                false => format!(
                    "it is no file of the sandbox's filesystem and cannot be opened again by its path ({e})"
                ),
            };
            return Err(self.refuse(found, name, &why));
        }
        Ok(file)
    }

    fn is_hugetlb(&self, found: &Mapping) -> bool {
        let told = rustix::fs::statfs(self.file_of(found));
        told.is_ok_and(|told| told.f_type == libc::HUGETLBFS_MAGIC)
    }

    fn refuse(&self, found: &Mapping, name: &str, why: &str) -> Error {
        let (start, end) = (found.start, found.end);
        unsupported(
            self.pid,
            format!("it has {name:?} mapped at {start:#x}-{end:#x}: {why}"),
        )
    }
}

/// Where `/proc` has the file of a mapping of a process.
pub(crate) fn mapped_file(host: HostPid, range: &Range<u64>) -> String {
    format!("/proc/{host}/map_files/{:x}-{:x}", range.start, range.end)
}

/// Opens a mapped file again.
pub(crate) fn reopen(env: &dyn Environment, file: &FileId, flags: i32) -> io::Result<OwnedFd> {
    let flags = OFlags::from_bits_retain(flags as u32) | OFlags::NONBLOCK;
    let path = file.path.trim_end_matches(" (deleted)").as_bytes();
    match file.device {
        VERSIONED => return files::open(env, path, Some(file.inode), flags),
        BASE => return env.open_base(file.inode, path),
        _ => {}
    }
    let opened = files::open(env, path, None, flags)?;
    let stat = fstat(opened.as_fd())?;
    if (stat.st_dev, stat.st_ino) == (file.device, file.inode) {
        Ok(opened)
    } else {
        Err(io::Error::new(
            io::ErrorKind::NotFound,
            "another file has its path now",
        ))
    }
}
