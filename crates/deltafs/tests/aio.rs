//! Asynchronous direct writes beside reads through the page cache.

mod common;

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};

use common::fixture;

const LEN: usize = 640 << 10;

#[repr(align(4096))]
struct Buffer([u8; LEN]);

/// `struct iocb`.
#[repr(C)]
#[derive(Default)]
struct Request {
    data: u64,
    key: u32,
    flags: u32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    more_flags: u32,
    event_file: u32,
}

/// A context of `io_setup(2)`.
struct Aio(libc::c_ulong);

impl Aio {
    fn new() -> Self {
        let mut context = 0;
        // SAFETY: the kernel writes the context's number into the variable.
        let made = unsafe { libc::syscall(libc::SYS_io_setup, 4, &raw mut context) };
        assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
        Self(context)
    }

    /// Writes the buffer to the beginning of the file, and waits for it.
    fn write(&self, file: &File, buffer: &Buffer) {
        let mut request = Request {
            opcode: 1,
            file: file.as_raw_fd().cast_unsigned(),
            buffer: buffer.0.as_ptr().addr() as u64,
            len: LEN as u64,
            ..Request::default()
        };
        let mut requests = [&raw mut request];
        // SAFETY: request and buffer stay until the event has come, which is waited for.
        let sent = unsafe { libc::syscall(libc::SYS_io_submit, self.0, 1, requests.as_mut_ptr()) };
        assert_eq!(sent, 1, "{}", std::io::Error::last_os_error());
        // `struct io_event`: data, object, result, second result.
        let mut event = [0_i64; 4];
        let none = std::ptr::null::<libc::timespec>();
        // SAFETY: there is room for the one event that may come.
        let got = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.0,
                1,
                1,
                event.as_mut_ptr(),
                none,
            )
        };
        assert_eq!((got, event[2]), (1, LEN as i64));
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // SAFETY: ends the context, in which nothing is under way.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

#[test]
fn who_reads_through_the_cache_meanwhile_is_not_left_with_old_bytes() {
    let f = fixture(|_| {});
    f.volume.write("a", vec![0; LEN]);
    let direct = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(f.volume.at("a"))
        .unwrap();
    let done = AtomicBool::new(false);
    let mut old = 0;
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let reader = File::open(f.volume.at("a")).unwrap();
                let mut buf = vec![0; LEN];
                while !done.load(Ordering::Relaxed) {
                    reader.read_exact_at(&mut buf, 0).unwrap();
                }
            });
        }
        let aio = Aio::new();
        let mut buffer = Box::new(Buffer([0; LEN]));
        let check = File::open(f.volume.at("a")).unwrap();
        let mut seen = vec![0; LEN];
        for round in 1..=100 {
            buffer.0.fill(round);
            aio.write(&direct, &buffer);
            check.read_exact_at(&mut seen, 0).unwrap();
            old += u32::from(seen != buffer.0);
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(old, 0, "writes after which old bytes were read");
}
