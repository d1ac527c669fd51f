//! How things are written that `serde` has no way for.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// General registers: in the order of `struct user_regs_struct`.
pub(crate) mod registers {
    use super::*;
    use crate::sys::ptrace::{Registers, no_registers};

    const COUNT: usize = 27;

    fn fields(regs: &mut Registers) -> [&mut u64; COUNT] {
        [
            &mut regs.r15,
            &mut regs.r14,
            &mut regs.r13,
            &mut regs.r12,
            &mut regs.rbp,
            &mut regs.rbx,
            &mut regs.r11,
            &mut regs.r10,
            &mut regs.r9,
            &mut regs.r8,
            &mut regs.rax,
            &mut regs.rcx,
            &mut regs.rdx,
            &mut regs.rsi,
            &mut regs.rdi,
            &mut regs.orig_rax,
            &mut regs.rip,
            &mut regs.cs,
            &mut regs.eflags,
            &mut regs.rsp,
            &mut regs.ss,
            &mut regs.fs_base,
            &mut regs.gs_base,
            &mut regs.ds,
            &mut regs.es,
            &mut regs.fs,
            &mut regs.gs,
        ]
    }

    pub(crate) fn serialize<S: Serializer>(regs: &Registers, to: S) -> Result<S::Ok, S::Error> {
        let mut regs = *regs;
        let values: Vec<u64> = fields(&mut regs).into_iter().map(|field| *field).collect();
        values.serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Registers, D::Error> {
        let values = Vec::<u64>::deserialize(from)?;
        if values.len() != COUNT {
            return Err(serde::de::Error::invalid_length(
                values.len(),
                &"27 registers",
            ));
        }
        let mut regs = no_registers();
        for (field, value) in fields(&mut regs).into_iter().zip(values) {
            *field = value;
        }
        Ok(regs)
    }
}

/// Queued signals: each a `siginfo_t` of 128 bytes.
pub(crate) mod signals {
    use super::*;
    use crate::sys::ptrace::RawSiginfo;

    pub(crate) fn serialize<S: Serializer>(all: &[RawSiginfo], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(all.iter().map(|info| &info[..]))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Vec<RawSiginfo>, D::Error> {
        let all = Vec::<Vec<u8>>::deserialize(from)?.into_iter();
        all.map(|info| {
            let len = info.len();
            RawSiginfo::try_from(info)
                .map_err(|_| serde::de::Error::invalid_length(len, &"a signal of 128 bytes"))
        })
        .collect()
    }
}
