//! Builds the sandbox's init as a static program, for the library to carry inside itself.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let var = |name: &str| env::var(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    let manifest = Path::new(&var("CARGO_MANIFEST_DIR")).join("../deltabox-init/Cargo.toml");
    let out = PathBuf::from(var("OUT_DIR"));
    let target = var("TARGET");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=../deltabox-init/src");
    println!("cargo::rerun-if-changed=../deltabox-init/Cargo.toml");

    // Its own target directory: the outer cargo holds the lock of the usual one.
    let target_dir = out.join("init");
    let status = Command::new(var("CARGO"))
        .args([
            "build",
            "--quiet",
            "--bin",
            "deltabox-init",
            "--profile",
            "init",
        ])
        .arg("--manifest-path")
        .arg(&manifest)
        .arg("--target-dir")
        .arg(&target_dir)
        .args(["--target", &target])
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static")
        // Under `cargo clippy` and `cargo test`, these belong to the outer build.
        .env_remove("RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("CARGO_BUILD_TARGET")
        .status()
        .unwrap_or_else(|e| panic!("starting cargo to build deltabox-init: {e}"));
    assert!(
        status.success(),
        "building deltabox-init failed ({status}); see above"
    );

    let binary = target_dir.join(&target).join("init/deltabox-init");
    println!("cargo::rustc-env=DELTABOX_INIT={}", binary.display());
}
