//! Mappings of a volume's files, in a process of their own.
//!
//! A page fault holds the address space's lock while the volume's threads serve it, and those need the same
//! lock to allocate memory. So the process that serves a volume must not map its files.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use rustix::mm::{MapFlags, ProtFlags};

const VARIABLE: &str = "DELTAFS_TEST_MAPPER";

/// The other process: this test's program once more. It ends when this is dropped.
pub(crate) struct Mapper {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Mapper {
    /// Starts it. `helper` is the path of the test that calls [`serve`].
    pub(crate) fn start(helper: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", helper, "--nocapture", "--test-threads=1"])
            .env(VARIABLE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            input: child.stdin.take().unwrap(),
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// Maps the first `len` bytes of a file; gives the number of the mapping.
    pub(crate) fn map(&mut self, file: &File, len: usize, shared: bool) -> usize {
        let (pid, fd) = (std::process::id(), file.as_raw_fd());
        self.ask(&format!("map /proc/{pid}/fd/{fd} {len} {shared}"))
    }

    /// Reads a byte.
    pub(crate) fn get(&mut self, mapping: usize, at: usize) -> u8 {
        u8::try_from(self.ask(&format!("get {mapping} {at}"))).unwrap()
    }

    /// Writes a byte.
    pub(crate) fn set(&mut self, mapping: usize, at: usize, value: u8) {
        self.ask(&format!("set {mapping} {at} {value}"));
    }

    /// Undoes a mapping.
    pub(crate) fn unmap(&mut self, mapping: usize) {
        self.ask(&format!("unmap {mapping}"));
    }

    fn ask(&mut self, question: &str) -> usize {
        writeln!(self.input, "{question}").unwrap();
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(
                self.output.read_line(&mut line).unwrap(),
                0,
                "the mapper died"
            );
            // The test program says other things too.
            if let Some((_, answer)) = line.split_once("mapper says ") {
                return answer.trim().parse().unwrap();
            }
        }
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The other side: does nothing in the test itself, and serves a [`Mapper`] in its process.
pub(crate) fn serve() {
    if std::env::var_os(VARIABLE).is_none() {
        return;
    }
    let mut mappings: Vec<Option<Mapping>> = Vec::new();
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| words[at].parse::<usize>().unwrap();
        let answer = match words[0] {
            "map" => {
                mappings.push(Some(Mapping::new(words[1], number(2), words[3] == "true")));
                mappings.len() - 1
            }
            "get" => mappings[number(1)].as_ref().unwrap().get(number(2)).into(),
            "set" => {
                let value = u8::try_from(number(3)).unwrap();
                mappings[number(1)].as_ref().unwrap().set(number(2), value);
                0
            }
            "unmap" => {
                mappings[number(1)] = None;
                0
            }
            _ => panic!("{line}"),
        };
        println!("mapper says {answer}");
    }
}

/// A mapping that is undone when it is dropped.
struct Mapping {
    start: *mut u8,
    len: usize,
}

impl Mapping {
    fn new(path: &str, len: usize, shared: bool) -> Self {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = if shared {
            MapFlags::SHARED
        } else {
            MapFlags::PRIVATE
        };
        // SAFETY: the kernel chooses the address, so no memory in use is replaced.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, file, 0) };
        Self {
            start: start.unwrap().cast(),
            len,
        }
    }

    fn get(&self, at: usize) -> u8 {
        assert!(at < self.len);
        // SAFETY: the mapping is that long and lives as long as `self`.
        unsafe { self.start.add(at).read_volatile() }
    }

    fn set(&self, at: usize, value: u8) {
        assert!(at < self.len);
        // SAFETY: as for `get`; nobody has a reference into the mapping.
        unsafe { self.start.add(at).write_volatile(value) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and is not used after this.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.len) };
    }
}
