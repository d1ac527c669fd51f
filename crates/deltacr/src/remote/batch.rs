//! A list of system calls, composed in safe Rust, that a stopped process runs in one go.
//!
//! A batch is laid out in the target's *area*: records first, then a heap with the calls' inputs
//! and outputs. An argument may be a number, the address of heap bytes, or the result of an
//! earlier call (or an integer which an earlier call wrote to the heap).

/// Bytes of one record: nr, argument kinds, six arguments, result, flags.
pub(crate) const RECORD: usize = 80;
/// Bytes that records and heap may take together.
pub const CAPACITY: usize = 60 * 1024;

/// Names a call of the same batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallId(pub(crate) usize);

/// Names bytes in the batch's heap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataRef {
    pub(crate) offset: usize,
    pub(crate) len: usize,
}

impl DataRef {
    /// How many bytes.
    #[expect(
        clippy::len_without_is_empty,
        reason = "heap bytes are asked for, never found empty"
    )]
    pub fn len(self) -> usize {
        self.len
    }

    /// A part of these bytes. Panics if it does not lie within.
    pub fn at(self, offset: usize, len: usize) -> Self {
        assert!(offset + len <= self.len, "a part lies within the whole");
        Self {
            offset: self.offset + offset,
            len,
        }
    }
}

/// One argument of a remote call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arg {
    /// A number or an address in the target.
    Value(u64),
    /// The address of these heap bytes.
    Data(DataRef),
    /// What an earlier call returned.
    Result(CallId),
    /// The 32-bit integer (sign extended) that an earlier call will have written here.
    Int(DataRef),
}

impl From<u64> for Arg {
    fn from(v: u64) -> Self {
        Self::Value(v)
    }
}
impl From<i32> for Arg {
    fn from(v: i32) -> Self {
        Self::Value(i64::from(v) as u64)
    }
}
impl From<u32> for Arg {
    fn from(v: u32) -> Self {
        Self::Value(u64::from(v))
    }
}
impl From<usize> for Arg {
    fn from(v: usize) -> Self {
        Self::Value(v as u64)
    }
}
impl From<DataRef> for Arg {
    fn from(d: DataRef) -> Self {
        Self::Data(d)
    }
}
impl From<CallId> for Arg {
    fn from(c: CallId) -> Self {
        Self::Result(c)
    }
}

#[derive(Clone, Debug)]
struct Call {
    nr: i64,
    args: Vec<Arg>,
    must: bool,
}

/// A list of system calls for one process. See the module's description.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    calls: Vec<Call>,
    heap: Vec<u8>,
    links: Vec<(DataRef, DataRef)>,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nothing was asked.
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Whether `calls` more calls with `heap` more bytes still fit.
    pub fn fits(&self, calls: usize, heap: usize) -> bool {
        (self.calls.len() + calls) * RECORD + self.heap.len() + heap + 16 * (calls + 1) <= CAPACITY
    }

    /// Adds a call. Its failure does not keep the rest from running.
    pub fn call(&mut self, nr: i64, args: &[Arg]) -> CallId {
        self.push(nr, args, false)
    }

    /// Adds a call whose failure ends the batch there: the calls after it do not run.
    pub fn must(&mut self, nr: i64, args: &[Arg]) -> CallId {
        self.push(nr, args, true)
    }

    fn push(&mut self, nr: i64, args: &[Arg], must: bool) -> CallId {
        assert!(args.len() <= 6, "a system call has at most six arguments");
        self.calls.push(Call {
            nr,
            args: args.to_vec(),
            must,
        });
        CallId(self.calls.len() - 1)
    }

    /// Puts bytes into the heap, aligned to 8, for a call to read (or to read and write).
    pub fn input(&mut self, bytes: &[u8]) -> DataRef {
        let data = self.output(bytes.len());
        self.heap[data.offset..][..bytes.len()].copy_from_slice(bytes);
        data
    }

    /// Sets aside zeroed bytes in the heap, aligned to 8, for a call to write.
    pub fn output(&mut self, len: usize) -> DataRef {
        let offset = self.heap.len().next_multiple_of(8);
        self.heap.resize(offset + len, 0);
        DataRef { offset, len }
    }

    /// Writes into heap bytes the addresses of others, where a call takes a structure of pointers.
    /// `pointers` are (offset into `at`, what to point to).
    pub fn link(&mut self, at: DataRef, pointers: &[(usize, DataRef)]) {
        for (offset, to) in pointers {
            self.links.push((at.at(*offset, 8), *to));
        }
    }

    /// Every call of the batch, in order.
    pub(crate) fn ids(&self) -> impl Iterator<Item = CallId> + use<> {
        (0..self.calls.len()).map(CallId)
    }

    fn count(&self) -> usize {
        self.calls.len()
    }

    /// How many bytes it takes in the area.
    pub(crate) fn encoded_len(&self) -> usize {
        self.heap_offset() + self.heap.len()
    }

    fn heap_offset(&self) -> usize {
        self.calls.len() * RECORD
    }

    /// Lays it out for the target's area at `at`.
    pub(crate) fn lay(&self, at: u64) -> Laid {
        Laid {
            at,
            bytes: self.encode(at),
            calls: self.count(),
        }
    }

    fn encode(&self, area: u64) -> Vec<u8> {
        let heap = area + self.heap_offset() as u64;
        let mut out = Vec::with_capacity(self.encoded_len());
        for call in &self.calls {
            let mut kinds = [0_u8; 8];
            let mut values = [0_u64; 6];
            for (i, arg) in call.args.iter().enumerate() {
                (kinds[i], values[i]) = match *arg {
                    Arg::Value(v) => (0, v),
                    Arg::Data(d) => (0, heap + d.offset as u64),
                    Arg::Result(c) => (1, area + (c.0 * RECORD + 64) as u64),
                    Arg::Int(d) => (2, heap + d.offset as u64),
                };
            }
            out.extend_from_slice(&call.nr.to_le_bytes());
            out.extend_from_slice(&kinds);
            for v in values {
                out.extend_from_slice(&v.to_le_bytes());
            }
            // A call that did not run reads as if the kernel knew no such call.
            out.extend_from_slice(&i64::from(-libc::ENOSYS).to_le_bytes());
            out.extend_from_slice(&u64::from(call.must).to_le_bytes());
        }
        out.extend_from_slice(&self.heap);
        for (at, to) in &self.links {
            let address = heap + to.offset as u64;
            out[self.heap_offset() + at.offset..][..8].copy_from_slice(&address.to_le_bytes());
        }
        out
    }

    /// Where in its bytes there are addresses that depend on where the batch is laid out.
    fn addresses(&self) -> impl Iterator<Item = usize> {
        let arguments = self.calls.iter().enumerate().flat_map(|(index, call)| {
            let args = call.args.iter().enumerate();
            args.filter(|(_, arg)| !matches!(arg, Arg::Value(_)))
                .map(move |(i, _)| index * RECORD + 16 + 8 * i)
        });
        let links = self.links.iter();
        arguments.chain(links.map(|(at, _)| self.heap_offset() + at.offset))
    }

    pub(crate) fn outcome(&self, bytes: Vec<u8>) -> Outcome {
        Outcome {
            heap: self.heap_offset(),
            bytes,
        }
    }
}

/// A batch as it is to stand in the target's area.
pub(crate) struct Laid {
    /// Where it begins there.
    pub(crate) at: u64,
    pub(crate) bytes: Vec<u8>,
    /// How many calls it has.
    pub(crate) calls: usize,
}

/// A batch that is run again and again: laid out once, then only moved to where it is to run.
#[derive(Clone, Debug)]
pub(crate) struct Standing {
    batch: Batch,
    /// As for an area at address zero.
    bytes: Vec<u8>,
    /// Where in them there are addresses.
    addresses: Vec<usize>,
}

impl Standing {
    pub(crate) fn new(batch: Batch) -> Self {
        Self {
            bytes: batch.encode(0),
            addresses: batch.addresses().collect(),
            batch,
        }
    }

    pub(crate) fn encoded_len(&self) -> usize {
        self.bytes.len()
    }

    /// Lays it out for the target's area at `at`.
    pub(crate) fn lay(&self, at: u64) -> Laid {
        Laid {
            at,
            bytes: self.encode(at),
            calls: self.batch.count(),
        }
    }

    fn encode(&self, area: u64) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for at in &self.addresses {
            let field = &mut bytes[*at..*at + 8];
            let value = u64::from_le_bytes(field.try_into().expect("eight bytes"));
            field.copy_from_slice(&(value + area).to_le_bytes());
        }
        bytes
    }

    pub(crate) fn outcome(&self, bytes: Vec<u8>) -> Outcome {
        self.batch.outcome(bytes)
    }
}

/// What a batch brought: the result of each call, and the heap as the calls left it.
/// The bytes come from the target and are to be checked like any input.
#[derive(Debug)]
pub struct Outcome {
    heap: usize,
    bytes: Vec<u8>,
}

impl Outcome {
    /// What the call returned, or its errno.
    pub fn result(&self, call: CallId) -> std::io::Result<u64> {
        let at = call.0 * RECORD + 64;
        let raw = i64::from_le_bytes(self.bytes[at..at + 8].try_into().expect("eight bytes"));
        if (-4095..0).contains(&raw) {
            Err(std::io::Error::from_raw_os_error(-raw as i32))
        } else {
            Ok(raw as u64)
        }
    }

    /// The heap bytes, as the calls left them.
    pub fn bytes(&self, data: DataRef) -> &[u8] {
        &self.bytes[self.heap + data.offset..][..data.len]
    }

    /// What calls wrote to outputs of one size.
    pub(crate) fn records<const N: usize>(&self, outputs: &[DataRef]) -> Vec<[u8; N]> {
        let record = |data: &DataRef| {
            self.bytes(*data)
                .try_into()
                .expect("an output of this size")
        };
        outputs.iter().map(record).collect()
    }

    /// A 32-bit integer that a call wrote.
    pub fn int(&self, data: DataRef) -> i32 {
        i32::from_le_bytes(self.bytes(data.at(0, 4)).try_into().expect("four bytes"))
    }

    /// A 64-bit integer that a call wrote.
    pub fn long(&self, data: DataRef) -> u64 {
        u64::from_le_bytes(self.bytes(data.at(0, 8)).try_into().expect("eight bytes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standing_batch_is_laid_out_like_any_other() {
        let mut batch = Batch::new();
        let input = batch.input(b"some bytes");
        let output = batch.output(24);
        let first = batch.call(
            libc::SYS_openat,
            &[7.into(), input.into(), Arg::Int(output)],
        );
        batch.must(
            libc::SYS_read,
            &[first.into(), output.at(8, 8).into(), u64::MAX.into()],
        );
        batch.link(output, &[(16, input)]);
        for area in [0, 4096, 0x7fff_1234_5000] {
            assert_eq!(
                Standing::new(batch.clone()).encode(area),
                batch.encode(area)
            );
        }
    }
}
