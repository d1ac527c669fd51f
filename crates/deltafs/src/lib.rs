//! deltafs
