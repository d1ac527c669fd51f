//! System V semaphores, message queues and shared memory, as the caller's thread has them: it may visit another IPC namespace.

use std::fs::File;
use std::io;

use crate::sys::pagemap::{self, Mapping};

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Who may do what with one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rights {
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
}

/// Does something as another user, by whom the calling thread acts meanwhile.
pub(crate) fn acting_as<T>(
    (uid, gid): (u32, u32),
    act: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    const KEEP: libc::uid_t = libc::uid_t::MAX;
    let become_ = |uid: libc::uid_t, gid: libc::gid_t| {
        // SAFETY: the raw calls take integers, and unlike those of the C library concern this thread only.
        let result = unsafe {
            libc::syscall(libc::SYS_setresgid, KEEP, gid, KEEP)
                | libc::syscall(libc::SYS_setresuid, KEEP, uid, KEEP)
        };
        check(result as libc::c_int).map(drop)
    };
    become_(uid, gid)?;
    let result = act();
    become_(0, 0)?;
    result
}

/// A new set of semaphores; fails if the key has one.
pub(crate) fn new_set(key: i32, len: usize, mode: u32) -> io::Result<i32> {
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | mode as libc::c_int;
    let len = libc::c_int::try_from(len).map_err(io::Error::other)?;
    // SAFETY: semget takes integers only.
    check(unsafe { libc::semget(key, len, flags) })
}

/// The values of a set, of which it has this many.
pub(crate) fn values(id: i32, len: usize) -> io::Result<Vec<u16>> {
    let mut values = vec![0_u16; len];
    // SAFETY: GETALL writes one short for each semaphore of the set. `len` is their number, which nothing changes as long as
    // the set lives, and a set of another number has another id.
    check(unsafe { libc::semctl(id, 0, GETALL, values.as_mut_ptr()) })?;
    Ok(values)
}

/// Sets all values of a set, of which it has as many.
pub(crate) fn set_values(id: i32, values: &[u16]) -> io::Result<()> {
    // SAFETY: SETALL reads one short for each semaphore of the set, whose number is that of `values`.
    check(unsafe { libc::semctl(id, 0, SETALL, values.as_ptr()) }).map(drop)
}

/// Sets who may do what with a set.
pub(crate) fn set_set_rights(id: i32, rights: Rights) -> io::Result<()> {
    // SAFETY: all zeros is a valid semid_ds, a structure of numbers.
    let mut data: libc::semid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: IPC_STAT writes one semid_ds.
    check(unsafe { libc::semctl(id, 0, libc::IPC_STAT, &raw mut data) })?;
    put(&mut data.sem_perm, rights);
    // SAFETY: IPC_SET reads one semid_ds.
    check(unsafe { libc::semctl(id, 0, libc::IPC_SET, &raw const data) }).map(drop)
}

/// Removes a set.
pub(crate) fn remove_set(id: i32) -> io::Result<()> {
    // SAFETY: IPC_RMID takes no argument.
    check(unsafe { libc::semctl(id, 0, libc::IPC_RMID) }).map(drop)
}

/// A new message queue; fails if the key has one.
pub(crate) fn new_queue(key: i32, mode: u32) -> io::Result<i32> {
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | mode as libc::c_int;
    // SAFETY: msgget takes integers only.
    check(unsafe { libc::msgget(key, flags) })
}

/// How many bytes a queue may hold.
pub(crate) fn capacity(id: i32) -> io::Result<u64> {
    Ok(queue_data(id)?.msg_qbytes)
}

/// Sets who may do what with a queue, and how many bytes it may hold.
pub(crate) fn set_queue_rights(id: i32, rights: Rights, capacity: u64) -> io::Result<()> {
    let mut data = queue_data(id)?;
    put(&mut data.msg_perm, rights);
    data.msg_qbytes = capacity;
    // SAFETY: IPC_SET reads one msqid_ds.
    check(unsafe { libc::msgctl(id, libc::IPC_SET, &raw mut data) }).map(drop)
}

fn queue_data(id: i32) -> io::Result<libc::msqid_ds> {
    // SAFETY: all zeros is a valid msqid_ds, a structure of numbers.
    let mut data: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: IPC_STAT writes one msqid_ds.
    check(unsafe { libc::msgctl(id, libc::IPC_STAT, &raw mut data) })?;
    Ok(data)
}

/// Removes a queue.
pub(crate) fn remove_queue(id: i32) -> io::Result<()> {
    // SAFETY: IPC_RMID takes no argument.
    check(unsafe { libc::msgctl(id, libc::IPC_RMID, std::ptr::null_mut()) }).map(drop)
}

/// A message of at most this many bytes, with its type: the one at this place, of which a copy is made and which stays, or
/// else the first, which is taken out. `None` if there is none.
pub(crate) fn message(
    id: i32,
    place: Option<usize>,
    room: usize,
) -> io::Result<Option<(i64, Vec<u8>)>> {
    const MSG_COPY: libc::c_int = 0o40000;
    let mut buffer = vec![0_u64; 1 + room.div_ceil(8)];
    let (which, flags) = match place {
        Some(place) => (place as libc::c_long, libc::IPC_NOWAIT | MSG_COPY),
        None => (0, libc::IPC_NOWAIT | libc::MSG_NOERROR),
    };
    // SAFETY: msgrcv writes the type, eight bytes, and at most `room` bytes behind it, to `buffer`, which has room for both.
    let len = unsafe { libc::msgrcv(id, buffer.as_mut_ptr().cast(), room, which, flags) };
    let Ok(len) = usize::try_from(len) else {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ENOMSG) => Ok(None),
            _ => Err(error),
        };
    };
    let kind = buffer[0].cast_signed();
    let mut bytes: Vec<u8> = buffer[1..].iter().flat_map(|w| w.to_ne_bytes()).collect();
    bytes.truncate(len);
    Ok(Some((kind, bytes)))
}

/// Appends a message.
pub(crate) fn send(id: i32, kind: i64, bytes: &[u8]) -> io::Result<()> {
    let mut buffer = vec![0_u64; 1 + bytes.len().div_ceil(8)];
    buffer[0] = kind.cast_unsigned();
    for (word, part) in buffer[1..].iter_mut().zip(bytes.chunks(8)) {
        let mut whole = [0; 8];
        whole[..part.len()].copy_from_slice(part);
        *word = u64::from_ne_bytes(whole);
    }
    // SAFETY: msgsnd reads the type, eight bytes, and the bytes behind it, which `buffer` has.
    check(unsafe { libc::msgsnd(id, buffer.as_ptr().cast(), bytes.len(), libc::IPC_NOWAIT) })
        .map(drop)
}

/// A new segment of shared memory; fails if the key has one.
pub(crate) fn new_segment(key: i32, size: usize, mode: u32) -> io::Result<i32> {
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | mode as libc::c_int;
    // SAFETY: shmget takes integers only.
    check(unsafe { libc::shmget(key, size, flags) })
}

/// Sets who may do what with a segment.
pub(crate) fn set_segment_rights(id: i32, rights: Rights) -> io::Result<()> {
    // SAFETY: all zeros is a valid shmid_ds, a structure of numbers.
    let mut data: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: IPC_STAT writes one shmid_ds.
    check(unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut data) })?;
    put(&mut data.shm_perm, rights);
    // SAFETY: IPC_SET reads one shmid_ds.
    check(unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut data) }).map(drop)
}

/// Keeps a segment from being swapped out, or no longer.
pub(crate) fn lock_segment(id: i32, locked: bool) -> io::Result<()> {
    let command = if locked {
        libc::SHM_LOCK
    } else {
        libc::SHM_UNLOCK
    };
    // SAFETY: SHM_LOCK and SHM_UNLOCK take no argument.
    check(unsafe { libc::shmctl(id, command, std::ptr::null_mut()) }).map(drop)
}

/// Removes a segment: at once, or when nobody has it attached any more.
pub(crate) fn remove_segment(id: i32) -> io::Result<()> {
    // SAFETY: IPC_RMID takes no argument.
    check(unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) }).map(drop)
}

/// The memory of a segment, as a file that is open for reading.
pub(crate) fn segment_file(id: i32) -> io::Result<File> {
    // SAFETY: at an address of the kernel's choice the segment replaces nothing, and nothing refers to its memory.
    let at = unsafe { libc::shmat(id, std::ptr::null(), libc::SHM_RDONLY) };
    if at.addr() == usize::MAX {
        return Err(io::Error::last_os_error());
    }
    let file = mapped_file(at.addr() as u64);
    // SAFETY: this is where it was attached just now, and nothing refers to its memory.
    check(unsafe { libc::shmdt(at) })?;
    file
}

/// The file that is mapped at an address of this process.
fn mapped_file(at: u64) -> io::Result<File> {
    let found = pagemap::mapping(&File::open("/proc/self/maps")?, at)?;
    let Mapping { start, end, .. } = found.ok_or(io::ErrorKind::NotFound)?;
    File::open(format!("/proc/self/map_files/{start:x}-{end:x}"))
}

fn put(to: &mut libc::ipc_perm, rights: Rights) {
    to.mode = rights.mode as _;
    (to.uid, to.gid) = rights.owner;
}

const GETALL: libc::c_int = 13;
const SETALL: libc::c_int = 17;
