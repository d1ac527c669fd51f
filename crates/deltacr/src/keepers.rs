//! Who can stay when a tree is undone in place.

use std::collections::BTreeSet;

use crate::hold::Held;
use crate::ids::InnerPid;
use crate::image::TreeImage;
use crate::procfs::Stat;

/// The processes that can be undone in place: those of the image that are still there, at their place in the family,
/// and not `stuck` with rights that they cannot take back. The rest is killed or made anew, and with a process all its descendants, for nobody can
/// be given to a new parent.
pub(crate) fn keepers(
    held: &Held,
    target: &TreeImage,
    stuck: &BTreeSet<InnerPid>,
) -> BTreeSet<InnerPid> {
    let mut keep = BTreeSet::new();
    loop {
        let before = keep.len();
        for (pid, image) in &target.processes {
            let parent = image.stat.parent;
            if keep.contains(pid)
                || stuck.contains(pid)
                || !(parent.0 <= 1 || keep.contains(&parent))
            {
                continue;
            }
            let same = held.processes.get(pid).is_some_and(|p| {
                p.birth == image.birth
                    && p.stat.parent == parent
                    && p.stat.session == image.stat.session
                    && has_terminal_of(*pid, &p.stat, &image.stat)
            });
            if same {
                keep.insert(*pid);
            }
        }
        if keep.len() == before {
            return keep;
        }
    }
}

/// Whether a process has its terminal still: only a leader can be given another.
fn has_terminal_of(pid: InnerPid, now: &Stat, image: &Stat) -> bool {
    let leads = image.session == pid;
    leads || image.tty == 0 || now.tty == image.tty
}

/// Those to keep that are in the way of others: their group or session is named after one that is to be born. The kernel gives no number
/// away as long as a group or session has it.
pub(crate) fn in_the_way(
    held: &Held,
    target: &TreeImage,
    keep: &BTreeSet<InnerPid>,
) -> BTreeSet<InnerPid> {
    let lasting = lasting_zombies(held, target, keep);
    let living = target.processes.keys().filter(|pid| !keep.contains(pid));
    let dead = target.zombies.keys().filter(|pid| !lasting.contains(pid));
    let born: BTreeSet<&InnerPid> = living.chain(dead).collect();
    let has_name_of = |pid: &&InnerPid| {
        let stat = &held.processes[pid].stat;
        let names = [stat.group, stat.session];
        names.iter().any(|name| name != *pid && born.contains(name))
    };
    keep.iter().filter(has_name_of).copied().collect()
}

/// The zombies of the image that are there, and can stay: their parents do, and nobody is to join the group or session that is named
/// after one of them, for which it would have to live.
pub(crate) fn lasting_zombies(
    held: &Held,
    target: &TreeImage,
    keep: &BTreeSet<InnerPid>,
) -> BTreeSet<InnerPid> {
    let joins: BTreeSet<InnerPid> = target
        .processes
        .iter()
        .filter(|(pid, image)| {
            let there = held.processes.get(pid).filter(|_| keep.contains(pid));
            there.is_none_or(|there| there.stat.group != image.stat.group)
        })
        .flat_map(|(_, image)| [image.stat.group, image.stat.session])
        .collect();
    let lasting = target.zombies.iter().filter(|(pid, wanted)| {
        let there = held.zombies.get(pid);
        there.is_some_and(|there| are_alike(there, wanted))
            && keep.contains(&wanted.parent)
            && !joins.contains(pid)
    });
    lasting.map(|(pid, _)| *pid).collect()
}

/// Whether nobody can tell two dead processes with the same number apart.
fn are_alike(one: &Stat, other: &Stat) -> bool {
    let told = |stat: &Stat| {
        let ids = [stat.parent, stat.group, stat.session];
        (ids, stat.exit_status, stat.exit_signal, stat.name.clone())
    };
    told(one) == told(other)
}
