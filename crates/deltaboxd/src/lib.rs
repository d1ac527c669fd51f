//! deltaboxd
