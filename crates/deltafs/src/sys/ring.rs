//! A ring of `io_uring(7)` with a queue of a FUSE connection: requests come as completions, and answers go with the next
//! submission.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const SETUP_SQE128: u32 = 1 << 10;
const SETUP_SINGLE_ISSUER: u32 = 1 << 12;
const SETUP_DEFER_TASKRUN: u32 = 1 << 13;
/// Linux 6.6, which is older than FUSE over `io_uring`.
const SETUP_NO_SQARRAY: u32 = 1 << 16;
const ENTER_GETEVENTS: libc::c_uint = 1;
const OP_POLL_ADD: u8 = 6;
const OP_URING_CMD: u8 = 46;
const OFFSET_SUBMISSIONS: i64 = 0x1000_0000;

/// `FUSE_IO_URING_CMD_REGISTER` and `FUSE_IO_URING_CMD_COMMIT_AND_FETCH`.
const REGISTER: u64 = 1;
const COMMIT_AND_FETCH: u64 = 2;

/// Submissions that are made at a time.
const ENTRIES: u32 = 32;
/// What tells that the descriptor that is waited for is ready, instead of the index of a place.
const READY: u64 = u64::MAX;

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Debug, Default)]
struct Parameters {
    submissions: u32,
    completions: u32,
    flags: u32,
    unused: [u32; 7],
    submitted: Offsets,
    completed: Offsets,
}

/// What `struct io_sqring_offsets` and `struct io_cqring_offsets` have in common; `first` is of use in the second.
#[repr(C)]
#[derive(Debug, Default)]
struct Offsets {
    head: u32,
    tail: u32,
    unused: [u32; 3],
    first: u32,
    rest: [u32; 4],
}

/// `struct io_uring_sqe` of 128 bytes.
#[repr(C)]
struct Submission {
    opcode: u8,
    flags: [u8; 3],
    fd: i32,
    command: u64,
    address: u64,
    len: u32,
    events: u32,
    user_data: u64,
    unused: u64,
    argument: [u64; 10],
}

/// `struct io_uring_cqe`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Completion {
    user_data: u64,
    result: i32,
    _flags: u32,
}

/// Memory that is shared with the kernel.
#[derive(Debug)]
struct Map {
    start: NonNull<u8>,
    len: usize,
}

impl Map {
    fn new(fd: &OwnedFd, len: usize, offset: i64) -> io::Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        let anywhere = std::ptr::null_mut();
        // SAFETY: a new mapping; nothing that exists is touched.
        let start = unsafe { libc::mmap(anywhere, len, access, flags, fd.as_raw_fd(), offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { start, len })
    }

    fn word(&self, offset: u32) -> &AtomicU32 {
        assert!(offset as usize + 4 <= self.len && offset.is_multiple_of(4));
        // SAFETY: within the mapping, which lives as long as the borrow, and aligned; the kernel uses it atomically too.
        unsafe { self.start.add(offset as usize).cast().as_ref() }
    }

    /// The place of one of several values.
    fn slot<T>(&self, offset: usize, index: u32) -> NonNull<T> {
        let at = offset + index as usize * size_of::<T>();
        assert!(at + size_of::<T>() <= self.len && at.is_multiple_of(align_of::<T>()));
        // SAFETY: within the mapping.
        unsafe { self.start.add(at) }.cast()
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing borrows of it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Where one request at a time is put, and its answer.
#[derive(Debug)]
struct Place {
    /// Header and payload; not touched while they are the kernel's.
    header: Box<[u8]>,
    data: Box<[u8]>,
    buffers: Box<[libc::iovec; 2]>,
    /// Whether there is a request that was not answered.
    taken: bool,
}

/// `struct fuse_uring_req_header`: how long it is, where the arguments are, the number of the request, and the length of the payload.
const HEADER: usize = 288;
const ARGUMENTS: usize = 128;
const COMMIT: usize = 264;
const PAYLOAD: usize = 272;
/// Bytes of `struct fuse_in_header` and `struct fuse_out_header`.
const IN: usize = 40;
const OUT: usize = 16;
/// Room before the payload, so that a request can be shown in one piece.
const FRONT: usize = 256;

impl Place {
    fn new(size: usize) -> Self {
        let mut header = vec![0; HEADER].into_boxed_slice();
        let mut data = vec![0; FRONT + size].into_boxed_slice();
        let buffer = |bytes: &mut [u8]| libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        let buffers = Box::new([buffer(&mut header), buffer(&mut data[FRONT..])]);
        Self {
            header,
            data,
            buffers,
            taken: false,
        }
    }

    fn word(&self, at: usize) -> usize {
        u32::from_ne_bytes(std::array::from_fn(|n| self.header[at + n])) as usize
    }

    fn number(&self) -> u64 {
        u64::from_ne_bytes(std::array::from_fn(|n| self.header[COMMIT + n]))
    }

    /// The request as `/dev/fuse` would give it: the kernel puts the header and the arguments of fixed size elsewhere than what follows.
    fn request(&mut self) -> Option<&[u8]> {
        let (len, payload) = (self.word(0), self.word(PAYLOAD));
        let arguments = len.checked_sub(IN)?.checked_sub(payload)?;
        let start = FRONT.checked_sub(arguments)?.checked_sub(IN)?;
        let (header, rest) = self.header.split_at(ARGUMENTS);
        self.data[start..start + IN].copy_from_slice(&header[..IN]);
        self.data[start + IN..FRONT].copy_from_slice(rest.get(..arguments)?);
        self.data.get(start..start + len)
    }

    /// Puts an answer there. One that is too long becomes an error.
    fn fill(&mut self, message: [&[u8]; 2]) {
        let [head, rest] = message;
        let (header, body) = head.split_at(OUT);
        self.header[..OUT].copy_from_slice(header);
        let len = body.len() + rest.len();
        let fits = self.data.len() - FRONT >= len;
        let len = if fits { len } else { 0 };
        if fits {
            self.data[FRONT..FRONT + body.len()].copy_from_slice(body);
            self.data[FRONT + body.len()..FRONT + len].copy_from_slice(rest);
        } else {
            self.header[4..8].copy_from_slice(&(-libc::EIO).to_ne_bytes());
        }
        let words = [(0, OUT + len), (PAYLOAD, len)];
        for (at, value) in words {
            let value = u32::try_from(value).unwrap_or(u32::MAX);
            self.header[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
    }
}

/// What has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A request, at this place.
    Request(usize),
    /// The descriptor that was waited for is ready.
    Ready,
    /// There will be no more requests at this place; the kernel's answer.
    Refused(i32),
}

/// A ring for one queue of a connection.
#[derive(Debug)]
pub(crate) struct Ring {
    // The first to go.
    fd: OwnedFd,
    device: Arc<OwnedFd>,
    queue: u16,
    parameters: Parameters,
    indices: Map,
    submissions: Map,
    /// Submissions that the kernel was not told of.
    pending: u32,
    places: Vec<Place>,
}

impl Ring {
    /// Makes one that only the calling thread may use.
    pub(crate) fn new(device: &Arc<OwnedFd>, queue: u16) -> io::Result<Self> {
        let mut parameters = Parameters {
            flags: SETUP_SQE128 | SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN | SETUP_NO_SQARRAY,
            ..Parameters::default()
        };
        // SAFETY: the kernel reads and writes the parameters, which are laid out as it defines.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, ENTRIES, &raw mut parameters) };
        let fd = i32::try_from(fd).unwrap_or(-1);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given us this descriptor; nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let completions = parameters.completions as usize * size_of::<Completion>();
        let len = parameters.completed.first as usize + completions;
        let indices = Map::new(&fd, len, 0)?;
        let len = parameters.submissions as usize * size_of::<Submission>();
        let submissions = Map::new(&fd, len, OFFSET_SUBMISSIONS)?;
        Ok(Self {
            fd,
            device: Arc::clone(device),
            queue,
            parameters,
            indices,
            submissions,
            pending: 0,
            places: Vec::new(),
        })
    }

    /// Makes one more place for requests with a payload of up to `size` bytes, and waits for one there.
    pub(crate) fn add_place(&mut self, size: usize) -> io::Result<()> {
        self.places.push(Place::new(size));
        self.command(REGISTER, self.places.len() - 1, 2)
    }

    /// Gives the answer to the request at a place, and waits for the next one there. `message` is its header and what follows,
    /// in two pieces.
    pub(crate) fn answer(&mut self, place: usize, message: [&[u8]; 2]) -> io::Result<()> {
        let there = &mut self.places[place];
        assert!(there.taken, "only what was asked is answered");
        there.fill(message);
        there.taken = false;
        self.command(COMMIT_AND_FETCH, place, 0)
    }

    /// The request at a place.
    pub(crate) fn request(&mut self, place: usize) -> Option<&[u8]> {
        let place = self.places.get_mut(place).filter(|place| place.taken);
        place.and_then(Place::request)
    }

    /// Waits for a descriptor to become readable, once.
    pub(crate) fn await_ready(&mut self, fd: &OwnedFd) -> io::Result<()> {
        self.push(Submission {
            opcode: OP_POLL_ADD,
            flags: [0; 3],
            fd: fd.as_raw_fd(),
            command: 0,
            address: 0,
            len: 0,
            events: libc::POLLIN.cast_unsigned().into(),
            user_data: READY,
            unused: 0,
            argument: [0; 10],
        })
    }

    /// Submits what is pending and waits until something has come.
    pub(crate) fn enter(&mut self) -> io::Result<()> {
        loop {
            match self.submit(1) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return done,
            }
        }
    }

    /// The next of what has come.
    pub(crate) fn next(&mut self) -> Option<Event> {
        let head = self.indices.word(self.parameters.completed.head);
        let at = head.load(Ordering::Relaxed);
        let tail = self.indices.word(self.parameters.completed.tail);
        if at == tail.load(Ordering::Acquire) {
            return None;
        }
        let index = at & (self.parameters.completions - 1);
        let first = self.parameters.completed.first as usize;
        let slot = self.indices.slot::<Completion>(first, index);
        // SAFETY: within the mapping and aligned; the kernel wrote it before the tail, and leaves it alone until the head is past it.
        let completion = unsafe { slot.read() };
        head.store(at.wrapping_add(1), Ordering::Release);
        if completion.user_data == READY {
            return Some(Event::Ready);
        }
        if completion.result < 0 {
            return Some(Event::Refused(-completion.result));
        }
        let place = usize::try_from(completion.user_data).unwrap_or(usize::MAX);
        self.places.get_mut(place)?.taken = true;
        Some(Event::Request(place))
    }

    /// Submits a command about a place; the first takes its buffers.
    fn command(&mut self, command: u64, place: usize, buffers: u32) -> io::Result<()> {
        let there = &self.places[place];
        let mut argument = [0; 10];
        argument[1] = there.number();
        argument[2] = u64::from(self.queue.to_le());
        self.push(Submission {
            opcode: OP_URING_CMD,
            flags: [0; 3],
            fd: self.device.as_raw_fd(),
            command,
            // They live as long as the ring. Only this thread has the kernel copy to and from them, when it enters.
            address: match buffers {
                0 => 0,
                _ => there.buffers.as_ptr() as u64,
            },
            len: buffers,
            events: 0,
            user_data: place as u64,
            unused: 0,
            argument,
        })
    }

    fn push(&mut self, submission: Submission) -> io::Result<()> {
        while self.pending == self.parameters.submissions {
            self.submit(0)?;
        }
        let tail = self.indices.word(self.parameters.submitted.tail);
        let at = tail.load(Ordering::Relaxed);
        let index = at & (self.parameters.submissions - 1);
        let slot = self.submissions.slot::<Submission>(0, index);
        // SAFETY: within the mapping and aligned; the kernel looks at it after the tail has passed it, and as there are fewer pending
        // than slots it is done with what was there.
        unsafe { slot.write(submission) };
        tail.store(at.wrapping_add(1), Ordering::Release);
        self.pending += 1;
        Ok(())
    }

    fn submit(&mut self, await_events: u32) -> io::Result<()> {
        let no_mask = std::ptr::null::<libc::sigset_t>();
        // SAFETY: takes integers and no signal mask. What the submissions name lives as long as the ring.
        let submitted = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                self.fd.as_raw_fd(),
                self.pending,
                await_events,
                ENTER_GETEVENTS,
                no_mask,
                0,
            )
        };
        match u32::try_from(submitted) {
            Ok(count) => {
                self.pending = self.pending.saturating_sub(count);
                Ok(())
            }
            Err(_) => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A place with a request as the kernel puts it there, of so many bytes of arguments.
    fn asked(arguments: &[u8], payload: &[u8]) -> Place {
        let mut place = Place::new(64);
        let len = IN + arguments.len() + payload.len();
        place.header[..4].copy_from_slice(&u32::try_from(len).unwrap().to_ne_bytes());
        place.header[4..IN].fill(7);
        place.header[ARGUMENTS..ARGUMENTS + arguments.len()].copy_from_slice(arguments);
        let size = u32::try_from(payload.len()).unwrap();
        place.header[PAYLOAD..PAYLOAD + 4].copy_from_slice(&size.to_ne_bytes());
        place.data[FRONT..FRONT + payload.len()].copy_from_slice(payload);
        place
    }

    #[test]
    fn a_request_is_shown_in_one_piece() {
        let mut place = asked(b"arguments", b"a name");
        let request = place.request().unwrap();
        assert_eq!(request.len(), IN + 15);
        assert_eq!(&request[4..IN], [7; IN - 4]);
        assert_eq!(&request[IN..], b"argumentsa name");
        let mut bare = asked(b"", b"");
        assert_eq!(bare.request().unwrap().len(), IN);
    }

    #[test]
    fn lengths_that_cannot_be_are_no_request() {
        let mut place = asked(b"arguments", b"a name");
        for (at, len) in [(0, 20_u32), (0, 5000), (PAYLOAD, 5000), (0, u32::MAX)] {
            let before = place.header.clone();
            place.header[at..at + 4].copy_from_slice(&len.to_ne_bytes());
            assert!(place.request().is_none(), "{at} {len}");
            place.header = before;
        }
        assert!(place.request().is_some());
    }

    #[test]
    fn an_answer_is_put_behind_its_header_and_one_too_long_is_an_error() {
        let mut place = Place::new(8);
        let mut head = [9; OUT + 3];
        head[4..8].fill(0);
        place.fill([&head, b"more"]);
        assert_eq!(&place.data[FRONT..FRONT + 7], b"\x09\x09\x09more");
        assert_eq!((place.word(0), place.word(PAYLOAD)), (OUT + 7, 7));
        assert_eq!(place.word(4), 0);
        place.fill([&head, b"too much"]);
        assert_eq!((place.word(0), place.word(PAYLOAD)), (OUT, 0));
        assert_eq!(&place.header[4..8], (-libc::EIO).to_ne_bytes());
    }

    #[test]
    fn a_ring_tells_of_a_descriptor_and_of_what_is_refused() {
        let file = Arc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
        let mut ring = match Ring::new(&file, 0) {
            Ok(ring) => ring,
            Err(error) => return eprintln!("skipped: no io_uring here: {error}"),
        };
        let (event, mut other) = std::os::unix::net::UnixStream::pair().unwrap();
        let event = OwnedFd::from(event);
        // More than are submitted at a time.
        for _ in 0..ENTRIES + 5 {
            ring.await_ready(&event).unwrap();
        }
        std::io::Write::write_all(&mut other, b"x").unwrap();
        for _ in 0..ENTRIES + 5 {
            let next = loop {
                match ring.next() {
                    Some(event) => break event,
                    None => ring.enter().unwrap(),
                }
            };
            assert_eq!(next, Event::Ready);
        }
        ring.add_place(4096).unwrap();
        ring.enter().unwrap();
        assert!(matches!(ring.next(), Some(Event::Refused(_))));
        assert!(ring.request(0).is_none() && ring.next().is_none());
    }
}
