//! Damaged files, and bases that have changed: told by name, and never shown.

use super::*;

#[test]
fn a_damaged_file_is_named_and_only_what_builds_on_it_is_lost() {
    let fixture = Fixture::new();
    let sandbox = fixture.sandbox();
    let name = sandbox.name().to_owned();
    let sh = shell(&sandbox);
    tell(&sandbox, sh, "x=1; echo 1 > /f; echo out");
    let first = durable(&sandbox);
    tell(&sandbox, sh, "x=2; echo 2 > /f; echo more");
    let second = durable(&sandbox);
    sandbox.rollback(first).unwrap();
    tell(&sandbox, sh, "x=3");
    let third = durable(&sandbox);
    drop(sandbox);
    let mut fixture = fixture;
    let files = [
        "manifest",
        "files.meta",
        "files.data",
        "processes",
        "pages.meta",
        "pages.data",
        "sessions",
    ];
    for file in files {
        let path = fixture.checkpoint_dir(&name, second).join(file);
        let good = fs::read(&path).unwrap();
        for damage in ["flipped", "torn", "missing"] {
            match damage {
                "flipped" => {
                    let mut bytes = good.clone();
                    bytes[good.len() / 2] ^= 0x20;
                    fs::write(&path, bytes).unwrap();
                }
                "torn" => fs::write(&path, &good[..good.len() - 1]).unwrap(),
                _ => fs::remove_file(&path).unwrap(),
            }
            fixture = fixture.restarted();
            let layers = fixture.host.layers(Some(&name), true).unwrap();
            let bad: Vec<_> = layers.iter().filter(|l| l.damage.is_some()).collect();
            assert_eq!(bad.len(), 1, "{file} {damage}");
            assert_eq!(bad[0].id, second);
            assert!(bad[0].damage.as_ref().unwrap().contains(file));
            let sandbox = fixture.host.get(&name).unwrap();
            let refused = sandbox.rollback(second).unwrap_err();
            assert!(matches!(refused, Error::Unusable { .. }), "{refused}");
            assert!(refused.to_string().contains(file), "{refused}");
            let shown = states(&fixture, &name);
            assert!(matches!(&shown[1], (id, CheckpointState::Failed { .. }) if *id == second));
            sandbox.rollback(third).unwrap();
            assert_eq!(tell(&sandbox, sh, "echo $x; cat /f"), "3\n1");
            drop(sandbox);
            fs::write(&path, &good).unwrap();
        }
    }
    fixture = fixture.restarted();
    let sandbox = fixture.host.get(&name).unwrap();
    sandbox.rollback(second).unwrap();
    assert_eq!(tell(&sandbox, sh, "echo $x; cat /f"), "2\n2");
    // The first one is what the others build on.
    let path = fixture.checkpoint_dir(&name, first).join("pages.data");
    drop(sandbox);
    let mut bytes = fs::read(&path).unwrap();
    bytes[0] ^= 1;
    fs::write(&path, bytes).unwrap();
    fixture = fixture.restarted();
    let sandbox = fixture.host.get(&name).unwrap();
    for id in [first, second, third] {
        let refused = sandbox.rollback(id).unwrap_err().to_string();
        assert!(refused.contains("pages.data"), "{refused}");
    }
    sandbox.delete(third).unwrap();
    fixture.host.remove(&name).unwrap();
    assert!(fixture.host.infos().is_empty());
}

#[test]
fn a_base_that_changed_is_told_of_and_one_that_matters_is_refused() {
    let fixture = Fixture::new();
    let base = base(&fixture);
    let spec = deltabox::SandboxSpec {
        base: base.clone(),
        ..Default::default()
    };
    let sandbox = fixture.host.create(spec).unwrap();
    let name = sandbox.name().to_owned();
    output(&sandbox, "cat /notes; echo more >> /partly");
    let id = durable(&sandbox);
    drop(sandbox);
    fs::write(base.join("notes"), "others").unwrap();
    let fixture = fixture.restarted();
    let sandbox = fixture.host.get(&name).unwrap();
    let report = sandbox.rollback(id).unwrap();
    assert!(
        report.notes.iter().any(|note| note.contains("/notes")),
        "{report:?}"
    );
    assert_eq!(output(&sandbox, "cat /partly"), "first\nmore");
    drop(sandbox);
    fs::write(base.join("partly"), "a first line that is another\n").unwrap();
    let fixture = fixture.restarted();
    let sandbox = fixture.host.get(&name).unwrap();
    let refused = sandbox.rollback(id).unwrap_err().to_string();
    assert!(refused.contains("/partly"), "{refused}");
}

/// A base of its own with a shell: busybox is one file.
fn base(fixture: &Fixture) -> PathBuf {
    let base = fixture.dir.path().join("base");
    for dir in ["bin", "proc", "dev", "sys", "tmp", "etc", "root"] {
        fs::create_dir_all(base.join(dir)).unwrap();
    }
    let script = "for f in /bin/sh /bin/cat /bin/echo; do echo $f; \
        ldd $f | grep -o '/[^ ]*' ; done | sort -u";
    let files = std::process::Command::new("sh")
        .args(["-c", script])
        .output()
        .unwrap();
    for file in text(&files.stdout).lines() {
        let to = base.join(file.trim_start_matches('/'));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(file, to).unwrap();
    }
    fs::write(base.join("notes"), "notes").unwrap();
    fs::write(base.join("partly"), "first\n").unwrap();
    base
}

#[test]
fn a_flipped_or_missing_byte_anywhere_in_the_files_of_a_checkpoint_is_found() {
    let fixture = Fixture::new();
    let sandbox = fixture.sandbox();
    let name = sandbox.name().to_owned();
    let sh = shell(&sandbox);
    tell(&sandbox, sh, "echo content > /f");
    let id = durable(&sandbox);
    let dir = fixture.checkpoint_dir(&name, id);
    let damage = || {
        fixture
            .host
            .layers(Some(&name), true)
            .unwrap()
            .remove(0)
            .damage
    };
    assert_eq!(damage(), None);
    for file in fs::read_dir(&dir).unwrap() {
        let path = file.unwrap().path();
        let named = path.file_name().unwrap().to_str().unwrap();
        let good = fs::read(&path).unwrap();
        // The header and the first record, the last one, and places in between.
        let (begin, end) = (
            0..48.min(good.len()),
            good.len().saturating_sub(24)..good.len(),
        );
        let between = (0..good.len()).step_by(good.len() / 40 + 1);
        for at in begin.chain(end).chain(between) {
            let mut bytes = good.clone();
            bytes[at] ^= 0x80;
            for bad in [&bytes[..], &good[..at]] {
                fs::write(&path, bad).unwrap();
                let found = damage().unwrap_or_else(|| panic!("{named}, byte {at}"));
                assert!(found.contains(named), "{found}");
            }
        }
        fs::write(&path, &good).unwrap();
    }
    assert_eq!(damage(), None);
}

/// Writes a manifest anew with a change to its JSON, all checksums right.
fn tamper(manifest: &std::path::Path, change: impl FnOnce(&mut serde_json::Value)) {
    let format = deltalog::Format {
        kind: *b"MANI",
        version: 1,
    };
    let mut log = deltalog::LogReader::open(manifest, format).unwrap();
    let record = log.next_record().unwrap().unwrap();
    let mut json = serde_json::from_slice(&record.payload).unwrap();
    change(&mut json);
    fs::remove_file(manifest).unwrap();
    let mut log = deltalog::LogWriter::create(manifest, format).unwrap();
    let json = serde_json::to_vec(&json).unwrap();
    log.append(record.tag, &json).unwrap();
    log.finish().unwrap();
}

#[test]
fn a_manifest_that_makes_no_sense_here_is_refused_with_the_reason() {
    let mut fixture = Fixture::new();
    let sandbox = fixture.sandbox();
    let name = sandbox.name().to_owned();
    let first = durable(&sandbox);
    let second = durable(&sandbox);
    drop(sandbox);
    let manifest = fixture.checkpoint_dir(&name, second).join("manifest");
    let good = fs::read(&manifest).unwrap();
    type Change = fn(&mut serde_json::Value);
    let changes: [(Change, &str); 5] = [
        (|m| m["kernel"] = "1.2.3".into(), "Linux 1.2.3"),
        (|m| m["parent"] = m["id"].clone(), "which is missing"),
        (|m| m["parent"] = "c77777".into(), "which is missing"),
        (|m| m["id"] = "c1000".into(), "holds checkpoint c1000"),
        (|m| m["origin"]["spec"]["colour"] = "red".into(), "colour"),
    ];
    for (change, expected) in changes {
        tamper(&manifest, change);
        fixture = fixture.restarted();
        let sandbox = fixture.host.get(&name).unwrap();
        let refused = sandbox.rollback(second).unwrap_err().to_string();
        assert!(refused.contains(expected), "{refused}");
        sandbox.rollback(first).unwrap();
        drop(sandbox);
        fs::write(&manifest, &good).unwrap();
    }
    fixture = fixture.restarted();
    fixture.host.get(&name).unwrap().rollback(second).unwrap();
}
