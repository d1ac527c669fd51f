//! How much the machine has left.

/// What must be left after something was made in advance.
const RESERVE: u64 = 512 << 20;

/// Whether taking so many bytes would leave too few for what is asked for.
pub(crate) fn is_scarce(bytes: u64) -> bool {
    available().is_some_and(|available| available < bytes.saturating_add(RESERVE))
}

/// In how much of the last ten seconds, in percent, somebody waited for a processor. 0 where the kernel does not tell.
pub(crate) fn cpu_pressure() -> f64 {
    let text = std::fs::read_to_string("/proc/pressure/cpu").unwrap_or_default();
    let some = text
        .lines()
        .find_map(|line| line.strip_prefix("some avg10="));
    let share = some.and_then(|rest| rest.split(' ').next()?.parse().ok());
    share.unwrap_or(0.0)
}

/// Bytes that can be had without swapping.
fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}
