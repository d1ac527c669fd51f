//! How much memory the machine has left.

/// What must be left after something was made in advance.
const RESERVE: u64 = 512 << 20;

/// Whether taking so many bytes would leave too few for what is asked for.
pub(crate) fn is_scarce(bytes: u64) -> bool {
    available().is_some_and(|available| available < bytes.saturating_add(RESERVE))
}

/// Bytes that can be had without swapping.
fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}
