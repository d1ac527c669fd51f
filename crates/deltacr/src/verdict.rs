//! What a seccomp filter says of a system call: its program is run as the kernel would.

use crate::sys::ptrace::Registers;

/// `AUDIT_ARCH_X86_64`.
const ARCHITECTURE: u32 = 0xc000_003e;
const INSTRUCTION: usize = size_of::<libc::sock_filter>();
/// Places of the program's own memory.
const MEMORY: usize = 16;
/// What seccomp looks at of a verdict.
const ACTION: u32 = libc::SECCOMP_RET_ACTION_FULL;

/// Whether the filter `program` (`struct sock_filter` for `struct sock_filter`) lets a thread with these registers make call `nr`. One that
/// is no program of the kernel's lets nothing pass.
pub(crate) fn lets_pass(program: &[u8], nr: u32, regs: &Registers) -> bool {
    let data = data(nr, regs);
    let verdict = run(program, &data).map(|verdict| verdict & ACTION);
    matches!(
        verdict,
        Some(libc::SECCOMP_RET_ALLOW | libc::SECCOMP_RET_LOG)
    )
}

/// `struct seccomp_data`.
fn data(nr: u32, regs: &Registers) -> Vec<u8> {
    let args = [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9];
    let mut data = Vec::with_capacity(64);
    data.extend(nr.to_ne_bytes());
    data.extend(ARCHITECTURE.to_ne_bytes());
    for long in [regs.rip].iter().chain(&args) {
        data.extend(long.to_ne_bytes());
    }
    data
}

fn run(program: &[u8], data: &[u8]) -> Option<u32> {
    let (mut a, mut x, mut memory) = (0_u32, 0_u32, [0_u32; MEMORY]);
    let mut at = 0_usize;
    loop {
        let step = program.get(at * INSTRUCTION..(at + 1) * INSTRUCTION)?;
        at += 1;
        let code = u32::from(u16::from_ne_bytes([step[0], step[1]]));
        let (if_so, if_not) = (usize::from(step[2]), usize::from(step[3]));
        let k = u32::from_ne_bytes(step[4..].try_into().ok()?);
        let operand = if code & libc::BPF_X == 0 { k } else { x };
        match code & 7 {
            libc::BPF_RET if code & libc::BPF_A != 0 => return Some(a),
            libc::BPF_RET => return Some(k),
            libc::BPF_LD => a = load(code, k, data, &memory)?,
            libc::BPF_LDX => x = load(code, k, data, &memory)?,
            libc::BPF_ST => *memory.get_mut(k as usize)? = a,
            libc::BPF_STX => *memory.get_mut(k as usize)? = x,
            libc::BPF_ALU => a = computed(code, a, operand)?,
            libc::BPF_JMP if code & 0xf0 == libc::BPF_JA => at += k as usize,
            libc::BPF_JMP => {
                at += match holds(code, a, operand)? {
                    true => if_so,
                    false => if_not,
                }
            }
            // BPF_MISC
            _ if code & libc::BPF_TXA != 0 => a = x,
            _ => x = a,
        }
    }
}

fn load(code: u32, k: u32, data: &[u8], memory: &[u32; MEMORY]) -> Option<u32> {
    match code & 0xe0 {
        libc::BPF_IMM => Some(k),
        libc::BPF_MEM => memory.get(k as usize).copied(),
        libc::BPF_LEN => u32::try_from(data.len()).ok(),
        libc::BPF_ABS => {
            let at = k as usize;
            let word = data.get(at..at.checked_add(4)?)?;
            Some(u32::from_ne_bytes(word.try_into().ok()?))
        }
        _ => None,
    }
}

fn computed(code: u32, a: u32, operand: u32) -> Option<u32> {
    match code & 0xf0 {
        libc::BPF_ADD => Some(a.wrapping_add(operand)),
        libc::BPF_SUB => Some(a.wrapping_sub(operand)),
        libc::BPF_MUL => Some(a.wrapping_mul(operand)),
        libc::BPF_DIV => a.checked_div(operand),
        libc::BPF_OR => Some(a | operand),
        libc::BPF_AND => Some(a & operand),
        libc::BPF_LSH => a.checked_shl(operand),
        libc::BPF_RSH => a.checked_shr(operand),
        libc::BPF_NEG => Some(a.wrapping_neg()),
        libc::BPF_XOR => Some(a ^ operand),
        _ => None,
    }
}

fn holds(code: u32, a: u32, operand: u32) -> Option<bool> {
    match code & 0xf0 {
        libc::BPF_JEQ => Some(a == operand),
        libc::BPF_JGT => Some(a > operand),
        libc::BPF_JGE => Some(a >= operand),
        libc::BPF_JSET => Some(a & operand != 0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(steps: &[(u32, u8, u8, u32)]) -> Vec<u8> {
        let bytes = |&(code, if_so, if_not, k): &(u32, u8, u8, u32)| {
            let mut step = (code as u16).to_ne_bytes().to_vec();
            step.extend([if_so, if_not]);
            step.extend(k.to_ne_bytes());
            step
        };
        steps.iter().flat_map(bytes).collect()
    }

    #[test]
    fn a_filter_is_asked_of_a_call_and_its_arguments() {
        const NUMBER: u32 = 0;
        const SECOND: u32 = 24;
        let load = |at| (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, at);
        let equal = |k, skip| (libc::BPF_JMP | libc::BPF_JEQ, 0, skip, k);
        let verdict = |k| (libc::BPF_RET, 0, 0, k);
        let filter = program(&[
            load(NUMBER),
            equal(219, 1),
            verdict(libc::SECCOMP_RET_KILL_PROCESS),
            load(SECOND),
            (libc::BPF_ALU | libc::BPF_AND, 0, 0, 0xff),
            (libc::BPF_ST, 0, 0, 3),
            (libc::BPF_LDX | libc::BPF_MEM, 0, 0, 3),
            (libc::BPF_MISC | libc::BPF_TXA, 0, 0, 0),
            equal(7, 1),
            verdict(libc::SECCOMP_RET_ERRNO | 1),
            verdict(libc::SECCOMP_RET_ALLOW),
        ]);
        let mut regs = crate::sys::ptrace::no_registers();
        assert!(lets_pass(&filter, 1, &regs));
        assert!(!lets_pass(&filter, 219, &regs));
        regs.rsi = 0xf07;
        assert!(!lets_pass(&filter, 1, &regs));
        assert!(!lets_pass(&filter[..16], 1, &regs), "it has no end");
    }
}
