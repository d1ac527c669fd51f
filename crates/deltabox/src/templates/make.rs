//! Making a template: from the stored pages, or of another one.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use deltacr::ids::HostPid;
use deltacr::mem::{Derived, FileId, FileMapping, Holding};

use super::files::BaseFiles;
use super::pool::Part;
use super::process::Process;
use super::{Near, Origin, Template, Templates};
use crate::error::{Doing, Result};
use crate::memory;

/// How often a process is tried whose own mappings are in the way.
const TRIES: usize = 4;
/// How many templates in a row are each a copy of the one before. Copying page tables takes the longer the more ancestors of a
/// process are alive: with 200 mappings 1.3 ms for up to four, 3 ms for eight, 17 ms for sixty-four.
const GENERATIONS: usize = 4;
/// One in so many pages may differ from the other template: what is written page by page is made of small pages.
const DIFFERS: u64 = 4;

const DOING: &str = "making a template";

impl Templates {
    pub(super) fn try_make(&self, origin: Origin<'_>) -> Result<Option<Template>> {
        if self.state.lock().pool.limits.number == 0 {
            return Ok(None);
        }
        if let Some(near) = self.nearest(origin)
            && near.template.parts.len() < GENERATIONS
            && near.missing * DIFFERS < origin.image.pages()?
        {
            match self.derive(origin, &near) {
                Ok(Some(derived)) => return Ok(Some(derived)),
                Ok(None) => {}
                Err(e) => tracing::debug!("a template is not made of that of {}: {e}", near.id),
            }
        }
        self.make_from_store(origin)
    }

    fn maps_from_base(&self) -> bool {
        self.from_base.load(Ordering::Relaxed)
    }

    /// Has a template map files of the base. Returns whether that is possible; if not, it is not tried again.
    fn hold_files(
        &self,
        process: &Process,
        files: &BaseFiles<'_>,
        mapped: &[FileMapping],
    ) -> io::Result<bool> {
        let held = process.hold_files(mapped, files);
        let shown = held.and_then(|()| files.show_in(HostPid(process.host()), mapped));
        let possible = match shown {
            Err(e)
                if !matches!(
                    e.raw_os_error(),
                    Some(libc::EPERM | libc::EACCES | libc::ENODEV)
                ) =>
            {
                return Err(e);
            }
            shown => shown.unwrap_or(false),
        };
        self.from_base.fetch_and(possible, Ordering::Relaxed);
        Ok(possible)
    }

    fn has_room(&self, parts: &[Part], new: u64) -> bool {
        self.state.lock().pool.could_hold(parts) && !memory::is_scarce(new)
    }

    fn made(
        &self,
        origin: Origin<'_>,
        holding: Holding,
        process: Process,
        parts: Vec<Part>,
    ) -> Template {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        Template {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            holding,
            process,
            family: origin.family,
            parts,
            made: Instant::now(),
            births: Arc::clone(&self.births),
        }
    }

    /// A copy of another template, changed.
    fn derive(&self, origin: Origin<'_>, near: &Near) -> Result<Option<Template>> {
        let other = &near.template;
        let files = BaseFiles::of(origin.files);
        let of_base = |file: &FileId| self.maps_from_base() && files.has(file);
        let process = other.process.derive().doing(DOING)?;
        let host = HostPid(process.host());
        let arranged = Derived::arrange(&other.holding, origin.image, host, &of_base)?;
        let Some(derived) = arranged else {
            return Ok(None);
        };
        let bytes = derived.bytes();
        let mut parts = other.parts.clone();
        parts.push(Part::new(bytes));
        if !self.has_room(&parts, bytes) {
            return Ok(None);
        }
        process.unmap(&derived.unmap).doing(DOING)?;
        process.hold(&derived.map).doing(DOING)?;
        if !self
            .hold_files(&process, &files, &derived.files)
            .doing(DOING)?
        {
            return Ok(None);
        }
        process.empty(&derived.empty).doing(DOING)?;
        derived.fill(host).doing(DOING)?;
        process.seal(&derived.files).doing(DOING)?;
        Ok(Some(self.made(origin, derived.holding, process, parts)))
    }

    fn make_from_store(&self, origin: Origin<'_>) -> Result<Option<Template>> {
        for _ in 0..TRIES {
            let group = self.open_group()?;
            let process = Process::start(&group)?;
            let host = HostPid(process.host());
            let files = BaseFiles::of(origin.files);
            let of_base = |file: &FileId| self.maps_from_base() && files.has(file);
            let Some(holding) = Holding::arrange(origin.image, host, &of_base)? else {
                continue;
            };
            let parts = vec![Part::new(holding.bytes())];
            if !self.has_room(&parts, holding.bytes()) {
                return Ok(None);
            }
            process.hold(&holding.ranges()).doing(DOING)?;
            let mapped = holding.files();
            if !self.hold_files(&process, &files, &mapped).doing(DOING)? {
                continue;
            }
            let large = holding.large();
            holding.touch(host, &large).doing(DOING)?;
            process.collapse(&large).doing(DOING)?;
            holding.fill(host).doing(DOING)?;
            process.seal(&mapped).doing(DOING)?;
            return Ok(Some(self.made(origin, holding, process, parts)));
        }
        Ok(None)
    }
}
