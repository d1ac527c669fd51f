//! Credentials of a thread: users, groups, capabilities.
//!
//! The kernel keeps them for each thread. The threads of nearly every process have the same ones, so that each is asked only for
//! what tells whether it is one of the others.

use std::io;

use serde::{Deserialize, Serialize};

use crate::attributes::prctl;
use crate::ids::HostPid;
use crate::remote::{Arg, Batch, CallId, DataRef, Outcome, Remote};
use crate::sys::process;

const GROUPS_MAX: usize = 256;
/// Capabilities that there are (`CAP_LAST_CAP` is 40).
const CAPABILITIES: i32 = 41;
/// `CAP_SETGID`, `CAP_SETUID` and `CAP_SETPCAP`.
const TO_BECOME_ANOTHER: u64 = 1 << 6 | 1 << 7 | 1 << 8;
/// Bytes of what `capget(2)` tells: effective, permitted, inheritable, in two words of each.
const CAPABILITY_SETS: usize = 24;

/// User and group ids, as the sandbox counts, and capabilities.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Credentials {
    /// Real, effective, saved, and that for files.
    users: [u32; 4],
    groups: [u32; 4],
    supplementary: Vec<u8>,
    /// Effective, permitted, inheritable; two words each, as `capget(2)` gives them.
    capabilities: Vec<u8>,
    /// Those that no program that is executed gets back; a bit for each, as for the next.
    bounding: u64,
    /// Those that a program keeps when it executes another.
    ambient: u64,
    securebits: u64,
    no_new_privileges: bool,
}

/// What nearly always tells credentials apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gist {
    /// Real, effective, saved.
    users: [u32; 3],
    groups: [u32; 3],
    capabilities: [u8; CAPABILITY_SETS],
}

impl Credentials {
    fn gist(&self) -> Gist {
        let three = |[a, b, c, _]: [u32; 4]| [a, b, c];
        let mut capabilities = [0; CAPABILITY_SETS];
        let known = self.capabilities.len().min(CAPABILITY_SETS);
        capabilities[..known].copy_from_slice(&self.capabilities[..known]);
        Gist {
            users: three(self.users),
            groups: three(self.groups),
            capabilities,
        }
    }

    /// Whether these are what a thread told the gist of.
    pub(crate) fn are(&self, gist: &Gist) -> bool {
        self.gist() == *gist
    }

    /// Whether a thread with these can take on those of `target` by its own means. Root may become anybody; nobody else can be sure
    /// to. `no_new_privs` never goes away.
    pub(crate) fn can_become(&self, target: &Self) -> bool {
        let root = self.users == [0; 4]
            && self.capabilities == target.capabilities
            && target.users == [0; 4];
        self == target
            || root
                && self.no_new_privileges <= target.no_new_privileges
                && target.bounding & !self.bounding == 0
    }

    /// Whether a process with these can have a child with those of `target`. The child executes a program, by which nobody but root keeps
    /// capabilities, but for ambient ones.
    pub(crate) fn can_bear(&self, target: &Self) -> bool {
        let permitted = self.permitted();
        if self == target {
            return self.users[..3].contains(&0) || permitted & !self.ambient == 0;
        }
        let needed = target.permitted() | TO_BECOME_ANOTHER;
        self.users == [0; 4]
            && permitted & needed == needed
            && self.securebits & !target.securebits == 0
            && self.no_new_privileges <= target.no_new_privileges
            && target.bounding & !self.bounding == 0
    }

    /// The permitted capabilities: a bit for each.
    fn permitted(&self) -> u64 {
        let word = |at: usize| {
            let bytes = self.capabilities.get(at..at + 4);
            bytes.map_or(0, |b| {
                u64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            })
        };
        word(4) | word(16) << 32
    }
}

/// Where in a batch the questions for the gist are.
pub(crate) struct GistQuestions {
    users: DataRef,
    groups: DataRef,
    capabilities: DataRef,
}

impl GistQuestions {
    pub(crate) fn ask(b: &mut Batch) -> Self {
        Self {
            users: three_ids(b, libc::SYS_getresuid),
            groups: three_ids(b, libc::SYS_getresgid),
            capabilities: capabilities(b),
        }
    }

    pub(crate) fn answers(&self, o: &Outcome) -> Gist {
        let ids = |three: DataRef| [0, 4, 8].map(|at| o.int(three.at(at, 4)) as u32);
        let mut capabilities = [0; CAPABILITY_SETS];
        capabilities.copy_from_slice(o.bytes(self.capabilities));
        Gist {
            users: ids(self.users),
            groups: ids(self.groups),
            capabilities,
        }
    }
}

/// Where in a batch the questions for all of it are.
pub(crate) struct Questions {
    users: (DataRef, CallId),
    groups: (DataRef, CallId),
    supplementary: (CallId, DataRef),
    capabilities: DataRef,
    bounding: Vec<(i32, CallId)>,
    ambient: Vec<(i32, CallId)>,
    securebits: CallId,
    no_new_privileges: CallId,
}

fn ambient(batch: &mut Batch, operation: i32, capability: i32) -> CallId {
    let option = libc::PR_CAP_AMBIENT;
    let args = [
        option.into(),
        operation.into(),
        capability.into(),
        0.into(),
        0.into(),
    ];
    batch.call(libc::SYS_prctl, &args)
}

fn three_ids(batch: &mut Batch, call: i64) -> DataRef {
    let ids = batch.output(12);
    let args = [0, 4, 8].map(|at| ids.at(at, 4).into());
    batch.call(call, &args);
    ids
}

/// Asks for three ids, and by setting none for the fourth.
fn ids(batch: &mut Batch, three: i64, fourth: i64) -> (DataRef, CallId) {
    let ids = three_ids(batch, three);
    (ids, batch.call(fourth, &[u32::MAX.into()]))
}

fn capabilities(batch: &mut Batch) -> DataRef {
    let header = batch.input(&capability_header());
    let sets = batch.output(CAPABILITY_SETS);
    batch.call(libc::SYS_capget, &[header.into(), sets.into()]);
    sets
}

fn capability_header() -> Vec<u8> {
    [process::CAPABILITY_VERSION.to_le_bytes(), [0; 4]].concat()
}

impl Questions {
    /// Adds the questions to a batch. Those for ambient capabilities only if there may be some, and of the bounding set those for
    /// what `bounding` says that may be in it.
    pub(crate) fn ask(b: &mut Batch, ambient_too: bool, bounding: u64) -> Self {
        let users = ids(b, libc::SYS_getresuid, libc::SYS_setfsuid);
        let groups = ids(b, libc::SYS_getresgid, libc::SYS_setfsgid);
        let list = b.output(4 * GROUPS_MAX);
        let count = b.call(libc::SYS_getgroups, &[GROUPS_MAX.into(), list.into()]);
        let capabilities = capabilities(b);
        let bounding = (0..CAPABILITIES)
            .filter(|capability| bounding & 1 << capability != 0)
            .map(|capability| (capability, prctl(b, libc::PR_CAPBSET_READ, capability)))
            .collect();
        let is_set = libc::PR_CAP_AMBIENT_IS_SET;
        let ambient = (0..CAPABILITIES)
            .filter(|_| ambient_too)
            .map(|capability| (capability, ambient(b, is_set, capability)))
            .collect();
        let securebits = prctl(b, libc::PR_GET_SECUREBITS, 0);
        let no_new_privileges = prctl(b, libc::PR_GET_NO_NEW_PRIVS, 0);
        Self {
            users,
            groups,
            supplementary: (count, list),
            capabilities,
            bounding,
            ambient,
            securebits,
            no_new_privileges,
        }
    }

    pub(crate) fn answers(&self, o: &Outcome) -> io::Result<Credentials> {
        let ids = |(three, fourth): (DataRef, CallId)| {
            let [a, b, c] = [0, 4, 8].map(|at| o.int(three.at(at, 4)) as u32);
            Ok::<_, io::Error>([a, b, c, o.result(fourth)? as u32])
        };
        // What the kernel does not know nobody has.
        let set = |calls: &[(i32, CallId)]| {
            calls
                .iter()
                .fold(0, |set, (bit, call)| match o.result(*call) {
                    Ok(1) => set | 1 << bit,
                    _ => set,
                })
        };
        let (count, list) = self.supplementary;
        let bytes = (o.result(count)? as usize * 4).min(list.len());
        Ok(Credentials {
            users: ids(self.users)?,
            groups: ids(self.groups)?,
            supplementary: o.bytes(list)[..bytes].to_vec(),
            capabilities: o.bytes(self.capabilities).to_vec(),
            bounding: set(&self.bounding),
            ambient: set(&self.ambient),
            securebits: o.result(self.securebits)?,
            no_new_privileges: o.result(self.no_new_privileges)? != 0,
        })
    }
}

/// The credentials of one thread.
pub(crate) fn read(remote: &mut Remote, thread: HostPid) -> io::Result<Credentials> {
    let mut batch = Batch::new();
    let questions = Questions::ask(&mut batch, true, u64::MAX);
    questions.answers(&remote.run_in(thread, &batch)?)
}

/// Makes the credentials of a thread that has `have` be `want`. Comes last, for it may take rights away.
///
/// # Errors
/// What was refused, and why.
pub(crate) fn restore(
    remote: &mut Remote,
    thread: HostPid,
    have: &Credentials,
    want: &Credentials,
) -> std::result::Result<(), (&'static str, io::Error)> {
    let mut b = Batch::new();
    let calls = changes(&mut b, have, want);
    let outcome = remote
        .run_in(thread, &b)
        .map_err(|e| ("the credentials", e))?;
    calls
        .into_iter()
        .try_for_each(|(what, call)| outcome.result(call).map(drop).map_err(|e| (what, e)))
}

fn changes(b: &mut Batch, have: &Credentials, want: &Credentials) -> Vec<(&'static str, CallId)> {
    let mut calls = Vec::new();
    let header = b.input(&capability_header());
    // All that is permitted is in effect until the end, and what is inheritable is set while nothing bounds it.
    let mut all = have.capabilities.clone();
    for word in [0, 12] {
        all.copy_within(word + 4..word + 8, word);
        all[word + 8..word + 12].copy_from_slice(&want.capabilities[word + 8..word + 12]);
    }
    let all = b.input(&all);
    b.call(libc::SYS_capset, &[header.into(), all.into()]);
    if have.supplementary != want.supplementary {
        let list = b.input(&want.supplementary);
        let args = [(want.supplementary.len() / 4).into(), list.into()];
        calls.push((
            "the supplementary groups",
            b.call(libc::SYS_setgroups, &args),
        ));
    }
    for capability in 0..CAPABILITIES {
        if have.bounding & !want.bounding & 1 << capability != 0 {
            let drop = prctl(b, libc::PR_CAPBSET_DROP, capability);
            calls.push(("the bounding set", drop));
        }
    }
    let ids = |[a, b, c, _]: [u32; 4]| [a, b, c].map(Arg::from);
    calls.push((
        "the group ids",
        b.call(libc::SYS_setresgid, &ids(want.groups)),
    ));
    // The calls for the fourth ids give the old one and no errors.
    b.call(libc::SYS_setfsgid, &[want.groups[3].into()]);
    // Capabilities survive the change of user only so.
    prctl(b, libc::PR_SET_KEEPCAPS, 1);
    calls.push((
        "the user ids",
        b.call(libc::SYS_setresuid, &ids(want.users)),
    ));
    b.call(libc::SYS_capset, &[header.into(), all.into()]);
    if !want.users[..3].contains(&want.users[3]) {
        b.call(libc::SYS_setfsuid, &[want.users[3].into()]);
    }
    prctl(b, libc::PR_SET_KEEPCAPS, 0);
    for capability in (0..CAPABILITIES).filter(|c| want.ambient & 1 << c != 0) {
        let raise = ambient(b, libc::PR_CAP_AMBIENT_RAISE, capability);
        calls.push(("the ambient capabilities", raise));
    }
    if have.securebits != want.securebits {
        let set = prctl(b, libc::PR_SET_SECUREBITS, want.securebits);
        calls.push(("the securebits", set));
    }
    let sets = b.input(&want.capabilities);
    let set = b.call(libc::SYS_capset, &[header.into(), sets.into()]);
    calls.push(("the capabilities", set));
    if want.no_new_privileges && !have.no_new_privileges {
        calls.push(("no_new_privs", prctl(b, libc::PR_SET_NO_NEW_PRIVS, 1)));
    }
    calls
}
