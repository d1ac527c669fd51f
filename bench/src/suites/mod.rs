//! One module a suite.

pub(crate) mod cr;
pub(crate) mod durable;
pub(crate) mod fork;
pub(crate) mod fs;
pub(crate) mod large;
pub(crate) mod many;
pub(crate) mod scale;
