//! The system calls that a sandbox's processes may not make.
//!
//! Denied is what cannot be carried through a checkpoint and what reaches out of the sandbox. Each gets the error that
//! makes programs fall back: `ENOSYS` for interfaces that a program tries and does without, `EPERM` for privileged
//! ones. The filter is a list of what is denied, so that unknown new calls work; the user namespace without
//! capabilities outside is what actually contains a process, this only narrows it.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

/// Interfaces that programs try and do without.
const ABSENT: &[i64] = &[
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_userfaultfd,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_fanotify_init,
    libc::SYS_memfd_secret,
    libc::SYS_uselib,
    libc::SYS_nfsservctl,
    libc::SYS__sysctl,
    libc::SYS_lookup_dcookie,
    // Its flags are behind a pointer; libc falls back to clone, whose flags are not.
    libc::SYS_clone3,
    // Memory of other processes, behind the back of dirty tracking.
    libc::SYS_process_madvise,
    libc::SYS_process_mrelease,
    libc::SYS_mseal,
    // Who takes a message out of a queue to look at it wakes whoever waits for room.
    libc::SYS_mq_open,
    // Nobody can ask for the rules that a process is under.
    libc::SYS_landlock_create_ruleset,
    libc::SYS_io_setup,
];

/// Privileged calls.
const FORBIDDEN: &[i64] = &[
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    libc::SYS_open_by_handle_at,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_reboot,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_vhangup,
    libc::SYS_syslog,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_kcmp,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
];

/// Namespaces, which clone and unshare would make.
const NAMESPACES: [i32; 8] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWTIME,
];

/// `personality(2)` as programs may call it: ask, plain Linux, and without address randomization.
const PERSONALITIES: [u64; 3] = [0xffff_ffff, 0, 0x0004_0000];

/// Options of `prctl(2)` that later kernels have: nothing could be made in a process that may have no new code
/// (`PR_SET_MDWE`), or whose system calls are all dispatched to itself (`PR_SET_SYSCALL_USER_DISPATCH`).
const UNKNOWN_OPTIONS: [i32; 2] = [libc::PR_SET_MDWE, PR_SET_SYSCALL_USER_DISPATCH];
const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;

/// Sockets of several paths (MPTCP), which nobody can put back. Go's servers ask for them first, and take TCP instead.
const UNKNOWN_PROTOCOL: u64 = libc::IPPROTO_MPTCP as u64;

/// How many programs [`filters`] gives.
pub(crate) const FILTERS: usize = 4;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// The programs, as `struct sock_filter` arrays, for every process of a sandbox to install in this order.
///
/// # Errors
/// On machines that are no x86-64.
pub(crate) fn filters() -> io::Result<Vec<Vec<u8>>> {
    let build = || -> Result<_, Box<dyn std::error::Error + Send + Sync>> {
        let absent: Rules = ABSENT.iter().map(|&nr| (nr, vec![])).collect();
        let mut forbidden: Rules = FORBIDDEN.iter().map(|&nr| (nr, vec![])).collect();
        let namespaces = NAMESPACES
            .into_iter()
            .map(|flag| {
                let flag = flag as u64;
                rule(Op::MaskedEq(flag), flag)
            })
            .collect::<Result<Vec<_>, _>>()?;
        // CLONE_NEWTIME is in the part of clone's flags that holds the exit signal: not a flag there.
        forbidden.insert(libc::SYS_clone, namespaces[..7].to_vec());
        forbidden.insert(libc::SYS_unshare, namespaces);
        forbidden.insert(libc::SYS_personality, vec![personality()?]);
        let options = UNKNOWN_OPTIONS
            .into_iter()
            .map(|option| rule(Op::Eq, option as u64))
            .collect::<Result<_, _>>()?;
        let protocol = SeccompCondition::new(2, Len::Dword, Op::Eq, UNKNOWN_PROTOCOL)?;
        let protocol = SeccompRule::new(vec![protocol])?;
        let unknown = Rules::from([
            (libc::SYS_prctl, options),
            (libc::SYS_socket, vec![protocol]),
        ]);
        Ok([
            foreign_numbers(),
            compile(unknown, libc::EINVAL)?,
            compile(absent, libc::ENOSYS)?,
            compile(forbidden, libc::EPERM)?,
        ])
    };
    let programs: [BpfProgram; FILTERS] = build().map_err(io::Error::other)?;
    Ok(programs.iter().map(bytes).collect())
}

fn rule(op: Op, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(0, Len::Dword, op, value)?])
}

fn personality() -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(
        PERSONALITIES
            .into_iter()
            .map(|p| SeccompCondition::new(0, Len::Dword, Op::Ne, p))
            .collect::<Result<_, _>>()?,
    )
}

fn compile(rules: Rules, errno: i32) -> Result<BpfProgram, seccompiler::BackendError> {
    let deny = SeccompAction::Errno(errno as u32);
    SeccompFilter::new(rules, SeccompAction::Allow, deny, TargetArch::x86_64)?.try_into()
}

/// Answers `ENOSYS` to the x32 interface, whose calls carry other numbers under the same architecture. (The 32-bit one
/// is another architecture, for which the programs that seccompiler makes end the process.)
fn foreign_numbers() -> BpfProgram {
    const X32_BIT: u32 = 0x4000_0000;
    let step = |code, jf, k| seccompiler::sock_filter { code, jt: 0, jf, k };
    let deny = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    vec![
        step((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0, 0), // seccomp_data.nr
        step(
            (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16,
            1,
            X32_BIT,
        ),
        step((libc::BPF_RET | libc::BPF_K) as u16, 0, deny),
        step(
            (libc::BPF_RET | libc::BPF_K) as u16,
            0,
            libc::SECCOMP_RET_ALLOW,
        ),
    ]
}

fn bytes(program: &BpfProgram) -> Vec<u8> {
    program
        .iter()
        .flat_map(|i| {
            let mut b = [0; 8];
            b[..2].copy_from_slice(&i.code.to_le_bytes());
            b[2] = i.jt;
            b[3] = i.jf;
            b[4..].copy_from_slice(&i.k.to_le_bytes());
            b
        })
        .collect()
}
