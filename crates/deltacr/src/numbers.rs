//! The numbers of processes and threads that are made again.

use std::io;
use std::time::{Duration, Instant};

use crate::env::Environment;
use crate::ids::InnerPid;

/// How long who is dead may keep its number.
const FREED: Duration = Duration::from_secs(2);
/// Between two tries.
const PAUSE: Duration = Duration::from_micros(200);

/// Makes something that gets the next number, which is to be this one.
pub(crate) fn born_as<T>(
    env: &dyn Environment,
    number: InnerPid,
    mut make: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    once_free(|| {
        env.set_next_pid(number)?;
        make()
    })
}

/// Makes something that is to have a certain number; `make` is asked again as long as that is taken
/// ([`io::ErrorKind::AlreadyExists`]). Who had it may be gone from `/proc`, and still be on its way out of the kernel with its
/// number.
pub(crate) fn once_free<T>(mut make: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let begun = Instant::now();
    loop {
        match make() {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && begun.elapsed() < FREED => {
                std::thread::sleep(PAUSE);
            }
            made => return made,
        }
    }
}

/// What it means to have got another number than the one wanted.
pub(crate) fn taken(wanted: InnerPid, got: InnerPid) -> io::Error {
    let what = format!("the number {wanted} is taken, {got} was given");
    io::Error::new(io::ErrorKind::AlreadyExists, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_becomes_free_is_waited_for() {
        let mut left = 3;
        let made = once_free(|| {
            left -= 1;
            match left {
                0 => Ok("made"),
                _ => Err(taken(InnerPid(7), InnerPid(8))),
            }
        });
        assert_eq!(made.unwrap(), "made");
        let mut calls = 0;
        let failed: io::Result<()> = once_free(|| {
            calls += 1;
            Err(io::ErrorKind::NotFound.into())
        });
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(calls, 1);
    }
}
