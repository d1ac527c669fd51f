//! Starting a program from a large, multi-threaded process without copying its page tables.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// libc's own constant does not fit its type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Bytes of stack for the few calls between clone and exec.
const STACK: usize = 64 * 1024;

/// What the child needs; it reads this in the parent's memory.
struct Plan {
    program: c_int,
    control: c_int,
    name: *const libc::c_char,
}

/// Starts the program in the file `program`, born in the cgroup v2 directory `cgroup`, as a child of this process.
/// It is called `name`, has no environment, and holds the standard streams and `control`, at number 3. Returns its pid.
///
/// Like `posix_spawn(3)` it shares the caller's memory until it executes, so that the cost does not depend on the
/// size of this process (`clone3(2)` with `CLONE_VM | CLONE_VFORK | CLONE_INTO_CGROUP`).
pub(crate) fn start_program(
    program: BorrowedFd<'_>,
    name: &std::ffi::CStr,
    control: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
) -> io::Result<i32> {
    // Above 3, so that moving the one to its place cannot close another.
    let program = rustix::io::fcntl_dupfd_cloexec(program, 10)?;
    let control = rustix::io::fcntl_dupfd_cloexec(control, 10)?;
    let plan = Plan {
        program: program.as_raw_fd(),
        control: control.as_raw_fd(),
        name: name.as_ptr(),
    };
    let mut stack = vec![0_u128; STACK / 16];
    // SAFETY: an all-zero clone_args is the default of every field.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = libc::CLONE_VM as u64 | libc::CLONE_VFORK as u64 | CLONE_INTO_CGROUP;
    args.exit_signal = libc::SIGCHLD as u64;
    args.stack = stack.as_mut_ptr() as u64;
    args.stack_size = STACK as u64;
    args.cgroup = cgroup.as_raw_fd() as u64;
    // No handler of this process may run in the child: it would see memory that is not its own.
    // SAFETY: both sets are initialized by the calls before they are read.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut old: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut old);
        let result = clone_and_run(&args, &plan);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const old, std::ptr::null_mut());
        match result {
            pid @ 1.. => Ok(pid as i32),
            errno => Err(io::Error::from_raw_os_error(-errno as i32)),
        }
    }
}

/// Runs [`child`] in a new process on the stack that `args` names; returns its pid or a negative error number.
///
/// # Safety
/// `args` must have `CLONE_VM | CLONE_VFORK` and a 16-byte aligned stack; signals must be blocked.
unsafe fn clone_and_run(args: &libc::clone_args, plan: &Plan) -> i64 {
    let result: i64;
    // SAFETY: the parent is suspended until the child has executed or exited (CLONE_VFORK), so that args, plan and the
    // stack outlive the child's use of them. The child never returns from the call: it starts at the top of its own
    // stack and ends in exec or exit.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") std::ptr::from_ref(args),
            in("rsi") std::mem::size_of::<libc::clone_args>(),
            in("r12") std::ptr::from_ref(plan).cast::<c_void>(),
            in("r13") child as *const c_void,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

/// The child: only system calls, no allocation. libc's error number is the suspended parent thread's, which is free.
unsafe extern "C" fn child(plan: *const Plan) -> ! {
    // SAFETY: plan is the parent's, which is suspended; argv and envp end with null pointers; the calls have no other
    // memory effects.
    unsafe {
        let plan = &*plan;
        let argv = [plan.name, std::ptr::null()];
        let envp: [*const libc::c_char; 1] = [std::ptr::null()];
        if libc::dup2(plan.control, 3) == 3
            && libc::syscall(
                libc::SYS_close_range,
                4_u32,
                u32::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            ) == 0
        {
            libc::syscall(
                libc::SYS_execveat,
                plan.program,
                c"".as_ptr(),
                argv.as_ptr(),
                envp.as_ptr(),
                libc::AT_EMPTY_PATH,
            );
        }
        libc::_exit(127)
    }
}
