//! What can only be read with the help of the processes, or by taking it and putting it back.

use super::model::Descriptors;
use super::{Procs, socket, tty};
use crate::env::Environment;
use crate::error::Result;
use crate::mem::SharedObjects;

/// Completes what [`capture`](super::capture) has read. The processes must be able to run batches.
///
/// # Errors
/// Something cannot be read or not be put back: a connection of which that is true is cut, and what waited in a terminal is lost.
pub fn look_inside(
    mut image: Descriptors,
    procs: &mut Procs<'_>,
    env: &dyn Environment,
    shared: &SharedObjects,
) -> Result<Descriptors> {
    socket::name_makers(&mut image, procs)?;
    tty::look_inside(&mut image, procs)?;
    socket::read_waiting(image, procs, env, shared)
}
