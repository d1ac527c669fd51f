//! The least that a checkpoint or rollback of these processes can cost on this kernel: stop all threads, find the pages
//! that were written, copy them out or back, let go. No descriptors, no registers, no files, no bookkeeping.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::processes::Programs;
use crate::rows::Samples;
use crate::sys::{self, Pages};

/// What freezing may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Samples of the parts, and of the two operations that consist of them.
#[derive(Default)]
pub(crate) struct Floor {
    pub(crate) stop: Samples,
    pub(crate) scan: Samples,
    pub(crate) copy_out: Samples,
    pub(crate) copy_back: Samples,
    pub(crate) pages: Samples,
    /// Stop, scan, copy out, let go.
    pub(crate) checkpoint: Samples,
    /// Stop, scan, copy back, let go.
    pub(crate) rollback: Samples,
}

/// What the two operations took once.
pub(crate) struct Times {
    checkpoint: Duration,
    pub(crate) rollback: Duration,
}

impl Floor {
    /// Measures once. The record of written pages is emptied, so that the sandbox cannot be checkpointed any more.
    pub(crate) fn measure(&mut self, programs: &Programs) -> Result<Times> {
        let (pids, pagemaps): (Vec<i32>, Vec<File>) = pagemaps(programs)?.into_iter().unzip();

        let begun = Instant::now();
        let stopped = Stopped::stop(&programs.cgroup, &pids)?;
        let stop = begun.elapsed();

        let begun = Instant::now();
        let written = pagemaps.iter().map(sys::take_written);
        let written = written.collect::<Result<Vec<Pages>, _>>()?;
        let scan = begun.elapsed();

        let mut copies: Vec<_> = written.iter().map(|w| vec![0; w.bytes()]).collect();
        let begun = Instant::now();
        for ((pid, pages), copy) in pids.iter().zip(&written).zip(&mut copies) {
            sys::read_pages(*pid, pages, copy)?;
        }
        let copy_out = begun.elapsed();

        let begun = Instant::now();
        for ((pid, pages), copy) in pids.iter().zip(&written).zip(&copies) {
            sys::write_pages(*pid, pages, copy)?;
        }
        let copy_back = begun.elapsed();
        // Written back is written: without this, the next measurement would find these pages too.
        for pagemap in &pagemaps {
            sys::take_written(pagemap)?;
        }

        let begun = Instant::now();
        stopped.release()?;
        let release = begun.elapsed();

        self.stop.time(stop);
        self.scan.time(scan);
        self.copy_out.time(copy_out);
        self.copy_back.time(copy_back);
        self.pages
            .count(written.iter().map(|w| w.bytes() as u64 / 4096).sum());
        let times = Times {
            checkpoint: stop + scan + copy_out + release,
            rollback: stop + scan + copy_back + release,
        };
        self.checkpoint.time(times.checkpoint);
        self.rollback.time(times.rollback);
        Ok(times)
    }
}

/// Empties the record of what the programs have written so far, and of what they have read of their programs.
pub(crate) fn forget_written(programs: &Programs) -> Result<()> {
    for (_, pagemap) in pagemaps(programs)? {
        sys::take_written(&pagemap)?;
    }
    Ok(())
}

/// The page maps of the processes, but for those that have ended since they were found.
fn pagemaps(programs: &Programs) -> Result<Vec<(i32, File)>> {
    let mut all = Vec::with_capacity(programs.pids.len());
    for &pid in &programs.pids {
        let path = format!("/proc/{pid}/pagemap");
        match File::open(&path) {
            Ok(file) => all.push((pid, file)),
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) || e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| format!("opening {path}")),
        }
    }
    Ok(all)
}

/// Threads that we trace and that stand still. Let go when dropped, so that they can end.
struct Stopped(Vec<i32>);

impl Stopped {
    /// Freezes the group so that no thread is born meanwhile, seizes all threads, thaws.
    fn stop(cgroup: &Path, pids: &[i32]) -> Result<Self> {
        let freeze = cgroup.join("cgroup.freeze");
        fs::write(&freeze, "1").with_context(|| format!("writing to {freeze:?}"))?;
        let seized = await_frozen(cgroup).and_then(|()| seize(pids));
        fs::write(&freeze, "0").with_context(|| format!("writing to {freeze:?}"))?;
        let stopped = Self(seized?);
        for tid in &stopped.0 {
            sys::await_stop(*tid).with_context(|| format!("waiting for thread {tid}"))?;
        }
        Ok(stopped)
    }

    fn release(mut self) -> Result<()> {
        while let Some(tid) = self.0.pop() {
            sys::detach(tid).with_context(|| format!("letting thread {tid} go"))?;
        }
        Ok(())
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for tid in &self.0 {
            let _ = sys::detach(*tid);
        }
    }
}

fn await_frozen(cgroup: &Path) -> Result<()> {
    let events = cgroup.join("cgroup.events");
    let until = Instant::now() + PATIENCE;
    while !fs::read_to_string(&events)?.contains("frozen 1") {
        if Instant::now() > until {
            bail!("the sandbox does not freeze in {PATIENCE:?}");
        }
        std::thread::yield_now();
    }
    Ok(())
}

fn seize(pids: &[i32]) -> Result<Vec<i32>> {
    let mut seized = Vec::new();
    for pid in pids {
        for tid in Programs::threads(*pid)? {
            sys::seize(tid).with_context(|| format!("seizing thread {tid}"))?;
            seized.push(tid);
        }
    }
    Ok(seized)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Options;
    use crate::stage::Stage;
    use crate::workload::ALL;

    #[test]
    fn every_workload_goes_on_after_the_floor_was_measured() {
        let options = Options {
            quick: true,
            case: None,
            state_dir: None,
        };
        for workload in &ALL {
            let stage = Stage::open(&options).unwrap();
            let running = workload.start(&stage).unwrap();
            let mut floor = Floor::default();
            for step in 1..4 {
                running.step(step).unwrap();
                floor.measure(&Programs::find().unwrap()).unwrap();
                running.expect(step).unwrap();
            }
            let programs = Programs::find().unwrap();
            if workload.name == "16 processes" {
                assert_eq!(programs.pids.len(), 16, "{:?}", programs.pids);
            }
            running.change_files(3, 7).unwrap();
        }
    }
}
