//! Deletions: space comes back, and what builds on the deleted stays whole.

use super::*;

#[test]
fn a_checkpoint_in_the_middle_can_be_deleted_and_all_others_stay_whole() {
    let fixture = Fixture::new();
    let sandbox = fixture.sandbox();
    let name = sandbox.name().to_owned();
    let sh = shell(&sandbox);
    let mut ids = Vec::new();
    for n in 1..=5 {
        tell(
            &sandbox,
            sh,
            &format!(
                "x{n}={n}; echo {n} > /f{n}; rm -f /f{}; echo line {n}",
                n - 2
            ),
        );
        ids.push(durable(&sandbox));
    }
    sandbox.rollback(ids[1]).unwrap();
    tell(&sandbox, sh, "x9=9; echo 9 > /f9");
    ids.push(durable(&sandbox));
    sandbox.delete(ids[1]).unwrap();
    assert!(!fixture.checkpoint_dir(&name, ids[1]).exists());
    drop(sandbox);
    let fixture = fixture.restarted();
    // From disk, too: the first goes, on which all others build.
    let sandbox = fixture.host.get(&name).unwrap();
    sandbox.delete(ids[0]).unwrap();
    sandbox.delete(ids[3]).unwrap();
    compacted(&fixture);
    drop(sandbox);
    let fixture = fixture.restarted();
    // The second is what two others share, and complete by now.
    let expected = [
        (ids[1], None, true),
        (ids[2], Some(ids[1]), false),
        (ids[4], Some(ids[2]), false),
        (ids[5], Some(ids[1]), false),
    ];
    assert_eq!(on_disk(&fixture), expected);
    let sandbox = fixture.host.get(&name).unwrap();
    let check = "echo $x1$x2$x3$x4$x5$x9; echo /f[0-9]*";
    for (id, expected) in [
        (2, "123\n/f2 /f3"),
        (4, "12345\n/f4 /f5"),
        (5, "129\n/f1 /f2 /f9"),
    ] {
        sandbox.rollback(ids[id]).unwrap();
        assert_eq!(
            tell(&sandbox, sh, check),
            expected,
            "checkpoint {}",
            ids[id]
        );
    }
    assert!(matches!(
        sandbox.rollback(ids[0]),
        Err(Error::NoCheckpoint { .. })
    ));
    // Only one is left that builds on the second.
    sandbox.delete(ids[5]).unwrap();
    compacted(&fixture);
    let expected = [(ids[2], None, false), (ids[4], Some(ids[2]), false)];
    assert_eq!(on_disk(&fixture), expected);
    assert_eq!(states(&fixture, &name).len(), 2);
    drop(sandbox);
    let fixture = fixture.restarted();
    let sandbox = fixture.host.get(&name).unwrap();
    sandbox.rollback(ids[4]).unwrap();
    assert_eq!(tell(&sandbox, sh, check), "12345\n/f4 /f5");
}

#[test]
fn a_deleted_checkpoint_that_is_damaged_is_named_by_what_builds_on_it() {
    let fixture = Fixture::new();
    let sandbox = fixture.sandbox();
    let name = sandbox.name().to_owned();
    let shared = durable(&sandbox);
    let branches = [1, 2].map(|_| {
        sandbox.rollback(shared).unwrap();
        durable(&sandbox)
    });
    sandbox.delete(shared).unwrap();
    compacted(&fixture);
    drop(sandbox);
    let deleted = fixture
        .checkpoint_dir(&name, shared)
        .with_extension("deleted");
    for cut in [0, 1, 24, 25, 200] {
        let path = deleted.join("files.meta");
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 1 - cut.min(whole.len() - 1)]).unwrap();
        let layers = fixture.host.layers(Some(&name), true).unwrap();
        let damage = layers.iter().find(|l| l.id == shared && l.deleted);
        let damage = damage.unwrap().damage.clone().unwrap();
        assert!(damage.contains("files.meta"), "{damage}");
        fs::write(&path, &whole).unwrap();
    }
    let path = deleted.join("files.meta");
    fs::write(&path, &fs::read(&path).unwrap()[..100]).unwrap();
    let fixture = fixture.restarted();
    let sandbox = fixture.host.get(&name).unwrap();
    for branch in branches {
        let refused = sandbox.rollback(branch).unwrap_err().to_string();
        assert!(
            refused.contains("files.meta") && refused.contains(&shared.to_string()),
            "{refused}"
        );
    }
    // It stays for as long as there is one that needs it.
    sandbox.delete(branches[0]).unwrap();
    compacted(&fixture);
    assert!(deleted.exists());
    sandbox.delete(branches[1]).unwrap();
    compacted(&fixture);
    assert!(!deleted.exists());
}

#[test]
fn what_is_removed_frees_its_space_and_stays_away() {
    let fixture = Fixture::new();
    let (kept, gone) = (fixture.sandbox(), fixture.sandbox());
    durable(&kept);
    let ids = [durable(&gone), durable(&gone)];
    let names = [kept.name().to_owned(), gone.name().to_owned()];
    gone.delete(ids[1]).unwrap();
    assert!(!fixture.checkpoint_dir(&names[1], ids[1]).exists());
    fixture.host.remove(&names[1]).unwrap();
    let checkpoints = fixture.state_dir().join("checkpoints");
    assert_eq!(fs::read_dir(&checkpoints).unwrap().count(), 1);
    drop((kept, gone));
    let fixture = fixture.restarted();
    assert_eq!(fixture.host.infos().len(), 1);
    // One that is on disk only.
    fixture.host.remove(&names[0]).unwrap();
    assert_eq!(fs::read_dir(&checkpoints).unwrap().count(), 0);
    assert!(fixture.host.infos().is_empty());
    fixture
        .host
        .create(deltabox::SandboxSpec {
            name: Some(names[0].clone()),
            ..Default::default()
        })
        .unwrap();
    assert!(fixture.restarted().host.infos().is_empty());
}
