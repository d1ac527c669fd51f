//! The contents of sparse files: read and written as page maps, as far as they differ.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};

use super::ShmImage;
use crate::mem::PAGE;
use crate::store::{PageMap, PageStore, is_zero};

/// Bytes that are read at a time.
const BUFFER: usize = 1 << 20;

/// Reads a sparse file. Pages that are as they were share their storage with `before`.
pub(super) fn read(
    file: &File,
    size: u64,
    before: &PageMap,
    store: &PageStore,
) -> io::Result<PageMap> {
    let mut pages = before.clone();
    let mut buffer = vec![0; BUFFER];
    let mut at = 0;
    while let Some(data) = next_data(file, at)? {
        pages.remove(at / PAGE..data / PAGE);
        let hole = seek(file, SeekFrom::Hole(data))?.min(size);
        at = data;
        while at < hole {
            let len = (hole - at).min(BUFFER as u64) as usize;
            let part = &mut buffer[..len.next_multiple_of(PAGE as usize)];
            part[len..].fill(0);
            file.read_exact_at(&mut part[..len], at)?;
            sort(&mut pages, at / PAGE, part, store)?;
            at += part.len() as u64;
        }
    }
    pages.remove(at / PAGE..u64::MAX);
    Ok(pages)
}

fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(Some(data)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Holds these pages, which begin with number `first`, from now on; only those that differ are stored.
fn sort(pages: &mut PageMap, first: u64, bytes: &[u8], store: &PageStore) -> io::Result<()> {
    let mut new = Vec::new();
    for (page, bytes) in (first..).zip(bytes.as_chunks::<{ PAGE as usize }>().0) {
        if is_zero(bytes) {
            pages.remove(page..page + 1);
        } else if pages.get(page) != Some(bytes) {
            new.push((page, bytes));
        }
    }
    let mut fresh = store.allocate(new.len())?;
    for (index, (page, bytes)) in new.into_iter().enumerate() {
        *fresh.page_mut(index) = *bytes;
        pages.put(page, &mut fresh, index);
    }
    Ok(())
}

/// Whether a file that holds `now` holds something else than the image.
pub(super) fn differ(now: &PageMap, image: &ShmImage) -> bool {
    let mut differ = false;
    now.diff(&image.pages, 0..image.size.div_ceil(PAGE), |_| {
        differ = true;
    });
    differ
}

/// Writes what differs between `now`, which the file holds, and the image.
pub(super) fn write(file: &File, now: &PageMap, image: &ShmImage) -> io::Result<()> {
    let mut runs = Vec::new();
    now.diff(&image.pages, 0..image.size.div_ceil(PAGE), |run| {
        runs.push(run)
    });
    for page in runs.into_iter().flatten() {
        let at = page * PAGE;
        match image.pages.get(page) {
            Some(bytes) => {
                let len = (image.size - at).min(PAGE) as usize;
                file.write_all_at(&bytes[..len], at)?;
            }
            None => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(file.as_fd(), flags, at, PAGE)?;
            }
        }
    }
    Ok(())
}
