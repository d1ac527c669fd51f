"""Memory of every kind."""

import hashlib
import mmap

PAGE = 4096
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.sbrk.restype = ctypes.c_void_p
libc.sbrk.argtypes = [ctypes.c_long]
READ, WRITE, EXEC, NONE = 1, 2, 4, 0
SHARED, PRIVATE, FIXED, ANONYMOUS, NORESERVE = 1, 2, 0x10, 0x20, 0x4000


def mapping(length, protection=READ | WRITE, flags=PRIVATE | ANONYMOUS, descriptor=-1, offset=0, at=None):
    address = libc.mmap(at, length, protection, flags, descriptor, offset)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    return address


def pattern(seed, length):
    block = hashlib.sha512(str(seed).encode()).digest()
    return (block * (length // len(block) + 1))[:length]


def fill(address, seed, length):
    ctypes.memmove(address, pattern(seed, length), length)


def holds(address, seed, length, what):
    if ctypes.string_at(address, length) != pattern(seed, length):
        raise AssertionError(f"{what}: {length} bytes at {address:#x} are not what they were")


def areas(first, last):
    """Range and protection of what is mapped between two addresses; whether the kernel merges neighbours is its own."""
    result = []
    for text in open("/proc/self/maps"):
        span, protection, *_ = text.split()
        low, high = (int(bound, 16) for bound in span.split("-"))
        if low >= last or high <= first:
            continue
        low, high = max(low, first), min(high, last)
        if result and result[-1][1:] == (low, protection):
            low = result.pop()[0]
        result.append((low, high, protection))
    return result


def crashes(action):
    """Whether the action ends a process by SIGSEGV."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        action()
        os._exit(0)
    return os.waitpid(pid, 0)[1] & 127 == signal.SIGSEGV


@case
def heap_of_many_objects():
    tree = {number: [str(number)] * 3 for number in range(50_000)}
    blocks = [bytearray(pattern(number, 100_000)) for number in range(100)]

    def digest():
        sums = hashlib.sha256(repr(sorted(tree.items())).encode())
        for block in blocks:
            sums.update(block)
        return sums.hexdigest()

    before = digest()

    def mutate():
        for number in range(0, 50_000, 7):
            tree[number] = "spoiled"
            tree.pop(number + 1, None)
        for block in blocks[::3]:
            block[500:600] = b"x" * 100
        del blocks[50:]
        blocks.extend(bytearray(200_000) for _ in range(60))

    def check():
        equal(digest(), before, "digest")

    return mutate, check


@case
def private_anonymous_memory():
    length = 4 << 20
    address = mapping(length)
    fill(address, "a", length)

    def mutate():
        for page in range(0, length, 3 * PAGE):
            ctypes.memset(address + page, 0, PAGE)

    def check():
        holds(address, "a", length, "memory")

    return mutate, check


@case
def pages_never_touched_stay_zero():
    length = 1 << 20
    address = mapping(length)
    fill(address, "a", PAGE)

    def mutate():
        fill(address, "b", length)

    def check():
        holds(address, "a", PAGE, "the touched page")
        equal(ctypes.string_at(address + PAGE, length - PAGE), bytes(length - PAGE), "the rest")

    return mutate, check


@case
def pages_dropped_since():
    length = 1 << 20
    address = mapping(length)
    fill(address, "a", length)

    def mutate():
        call(libc.madvise, address, length // 2, mmap.MADV_DONTNEED)

    def check():
        holds(address, "a", length, "memory")

    return mutate, check


@case
def sparse_gigabyte():
    address = mapping(1 << 30, flags=PRIVATE | ANONYMOUS | NORESERVE)
    for number in range(0, 1024, 16):
        fill(address + (number << 20), number, PAGE)

    def mutate():
        for number in range(0, 1024, 32):
            fill(address + (number << 20) + PAGE, "x", PAGE)
            fill(address + (number << 20), "y", PAGE)

    def check():
        for number in range(0, 1024, 16):
            holds(address + (number << 20), number, PAGE, "a touched page")
            equal(ctypes.string_at(address + (number << 20) + PAGE, PAGE), bytes(PAGE), "the next page")

    return mutate, check


@case
def huge_pages():
    length = 8 << 20
    address = mapping(length)
    call(libc.madvise, address, length, mmap.MADV_HUGEPAGE)
    fill(address, "a", length)

    def mutate():
        fill(address + PAGE, "b", 3 << 20)
        call(libc.madvise, address + (4 << 20), 2 << 20, mmap.MADV_DONTNEED)

    def check():
        holds(address, "a", length, "memory")

    return mutate, check


@case
def memory_unmapped_since():
    length = 1 << 20
    address = mapping(length)
    fill(address, "a", length)

    def mutate():
        call(libc.munmap, address + length // 4, length // 2)

    def check():
        holds(address, "a", length, "memory")
        equal(areas(address, address + length), [(address, address + length, "rw-p")], "areas")

    return mutate, check


@case
def memory_replaced_since():
    length = 1 << 20
    address = mapping(length)
    fill(address, "a", length)
    with open("/playground/replacement", "wb") as replacement:
        replacement.write(pattern("b", length))

    def mutate():
        descriptor = os.open("/playground/replacement", os.O_RDWR)
        mapping(length // 2, READ, PRIVATE | FIXED, descriptor, 0, address)
        mapping(length // 4, READ | WRITE, SHARED | FIXED | ANONYMOUS, at=address + length // 2)

    def check():
        holds(address, "a", length, "memory")
        equal(areas(address, address + length), [(address, address + length, "rw-p")], "areas")
        fill(address, "c", length)
        equal(open("/playground/replacement", "rb").read(), pattern("b", length), "the file")

    return mutate, check


@case
def memory_mapped_since_is_gone():
    length = 1 << 20
    address = mapping(3 * length, at=0x10_0000_0000)  # far from where the kernel puts what others map
    fill(address, "a", 3 * length)
    call(libc.munmap, address + length, length)

    def mutate():
        mapping(length, at=address + length, flags=PRIVATE | ANONYMOUS | FIXED)
        fill(address + length, "b", length)

    def check():
        equal(areas(address + length, address + 2 * length), [], "areas in the hole")
        equal(crashes(lambda: ctypes.string_at(address + length, 1)), True, "the hole faults")
        holds(address, "a", length, "below")

    return mutate, check


@case
def memory_moved_since():
    length = 1 << 20
    address = mapping(length)
    target = mapping(4 * length, NONE)
    fill(address, "a", length)

    def mutate():
        libc.mremap(address, length, 2 * length, 3, target + length)  # MREMAP_MAYMOVE | MREMAP_FIXED
        fill(target + length, "b", 2 * length)

    def check():
        holds(address, "a", length, "memory")
        equal(areas(target, target + 4 * length), [(target, target + 4 * length, "---p")], "where it was moved to")

    return mutate, check


@case
def memory_grown_and_shrunk_since():
    length = 1 << 20
    area = mmap.mmap(-1, length, flags=PRIVATE | ANONYMOUS)
    other = mmap.mmap(-1, length, flags=PRIVATE | ANONYMOUS)
    area[:], other[:] = pattern("a", length), pattern("b", length)

    def mutate():
        area.resize(3 * length)
        area[:] = bytes(3 * length)
        other.resize(PAGE)

    def check():
        equal((len(area), len(other)), (length, length), "lengths")
        equal(area[:] == pattern("a", length), True, "the grown one")
        equal(other[:] == pattern("b", length), True, "the shrunk one")

    return mutate, check


@case
def protections():
    address = mapping(8 * PAGE)
    fill(address, "a", 8 * PAGE)
    call(libc.mprotect, address, 2 * PAGE, READ)
    call(libc.mprotect, address + 4 * PAGE, PAGE, NONE)
    before = areas(address, address + 8 * PAGE)

    def mutate():
        call(libc.mprotect, address, 8 * PAGE, READ | WRITE)
        fill(address, "b", 8 * PAGE)
        call(libc.mprotect, address + 6 * PAGE, PAGE, READ)

    def check():
        equal(areas(address, address + 8 * PAGE), before, "areas")
        equal(crashes(lambda: fill(address, "x", 1)), True, "a write to the read-only part faults")
        equal(crashes(lambda: ctypes.string_at(address + 4 * PAGE, 1)), True, "a read of the inaccessible part faults")
        equal(crashes(lambda: fill(address + 6 * PAGE, "x", 1)), False, "the writable part")
        call(libc.mprotect, address + 4 * PAGE, PAGE, READ)
        holds(address, "a", 8 * PAGE, "memory, that below PROT_NONE included")

    return mutate, check


@case
def machine_code_made_at_run_time():
    address = mapping(PAGE, READ | WRITE | EXEC)
    code = bytes.fromhex("b82a000000c3")  # mov eax, 42; ret
    ctypes.memmove(address, code, len(code))
    function = ctypes.CFUNCTYPE(ctypes.c_int)(address)

    def mutate():
        ctypes.memset(address + 1, 43, 1)
        equal(function(), 43)

    def check():
        equal(areas(address, address + PAGE)[0][2], "rwxp", "protection")
        equal(function(), 42, "result")

    return mutate, check


@case
def file_mapped_private_with_written_pages():
    with open("/playground/private", "wb") as file:
        file.write(pattern("file", 10 * PAGE))
    descriptor = os.open("/playground/private", os.O_RDONLY)
    address = mapping(10 * PAGE, READ | WRITE, PRIVATE, descriptor)
    os.close(descriptor)
    fill(address + 3 * PAGE, "mine", PAGE)

    def mutate():
        fill(address + 3 * PAGE, "x", PAGE)
        fill(address + 5 * PAGE, "x", PAGE)
        call(libc.munmap, address + 8 * PAGE, 2 * PAGE)

    def check():
        whole = bytearray(pattern("file", 10 * PAGE))
        whole[3 * PAGE : 4 * PAGE] = pattern("mine", PAGE)
        equal(ctypes.string_at(address, 10 * PAGE) == whole, True, "memory")
        equal(open("/playground/private", "rb").read() == pattern("file", 10 * PAGE), True, "the file")

    return mutate, check


@case
def file_mapped_shared():
    with open("/playground/shared", "wb") as file:
        file.write(pattern("file", 10 * PAGE))
    descriptor = os.open("/playground/shared", os.O_RDWR)
    area = mmap.mmap(descriptor, 10 * PAGE)
    area[2 * PAGE : 2 * PAGE + 5] = b"early"

    def mutate():
        area[2 * PAGE : 2 * PAGE + 5] = b"WRONG"
        area[7 * PAGE : 7 * PAGE + 5] = b"WRONG"
        area.close()
        os.ftruncate(descriptor, PAGE)

    def check():
        equal(area[2 * PAGE : 2 * PAGE + 5], b"early", "mapped")
        equal(os.pread(descriptor, 5, 2 * PAGE), b"early", "read")
        equal(os.pread(descriptor, PAGE, 7 * PAGE) == pattern("file", 10 * PAGE)[7 * PAGE : 8 * PAGE], True, "another page")
        area[0:4] = b"late"
        equal(os.pread(descriptor, 4, 0), b"late", "written through memory")
        os.pwrite(descriptor, b"LATE", 0)
        equal(area[0:4], b"LATE", "written by descriptor")

    return mutate, check


@case
def file_mapped_and_unlinked():
    descriptor = os.open("/playground/mapped", os.O_RDWR | os.O_CREAT)
    os.write(descriptor, pattern("file", 4 * PAGE))
    area = mmap.mmap(descriptor, 4 * PAGE)
    os.unlink("/playground/mapped")
    os.close(descriptor)

    def mutate():
        area[0:4] = b"WRNG"
        area.close()

    def check():
        equal(area[:] == pattern("file", 4 * PAGE), True, "memory")
        area[0:4] = b"late"

    return mutate, check


@case
def anonymous_memory_shared_with_children():
    area = put("area", mmap.mmap(-1, 64 * PAGE))
    area[:] = pattern("a", 64 * PAGE)
    one, two = Child(), Child()
    one.ask("area.__setitem__(slice(0, 4), b'one!')")

    def mutate():
        two.ask("area.__setitem__(slice(0, 40000), bytes(40000))")
        one.kill()

    def check():
        equal(area[0:4], b"one!", "written by the child")
        equal(area[4:] == pattern("a", 64 * PAGE)[4:], True, "the rest")
        equal(one.ask("area[0:4]"), b"one!", "in one")
        two.ask("area.__setitem__(slice(0, 4), b'two!')")
        equal((area[0:4], one.ask("area[0:4]")), (b"two!", b"two!"), "still shared by all three")

    return mutate, check


@case
def memory_copied_on_write_between_processes():
    length = 4 << 20
    address = put("address", mapping(length))
    fill(address, "a", length)
    child = Child()
    fill(address, "parent", PAGE)
    child.ask("fill(address + PAGE, 'child', PAGE)")
    globals().update(fill=fill, holds=holds, PAGE=PAGE)

    def mutate():
        fill(address, "x", length)
        child.ask("fill(address, 'y', PAGE * 100)")

    def check():
        holds(address, "parent", PAGE, "written by the parent")
        equal(ctypes.string_at(address + PAGE, length - PAGE) == pattern("a", length)[: length - PAGE], True, "the parent's rest")
        equal(child.ask("holds(address, 'a', PAGE, '')"), None, "the child's first page")
        equal(child.ask("holds(address + PAGE, 'child', PAGE, '')"), None, "written by the child")

    return mutate, check


@case
def program_break():
    call(libc.mallopt, -1, 1 << 30)  # M_TRIM_THRESHOLD: malloc does not give back what this case works with
    base = libc.sbrk(8 << 20)
    fill(base, "a", 8 << 20)
    end = base + (8 << 20)

    def mutate():
        fill(base, "x", 1 << 20)
        if libc.sbrk(0) == end:
            libc.sbrk(-(4 << 20))
        libc.sbrk(16 << 20)

    def check():
        holds(base, "a", 8 << 20, "memory")
        grown = libc.sbrk(0)
        equal(end <= grown < end + (8 << 20), True, f"the break is {grown:#x}, was {end:#x}")
        fill(libc.sbrk(1 << 20), "b", 1 << 20)

    return mutate, check


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@case
def stack_grown_since():
    sys.setrecursionlimit(10_000)
    deep = nested(5000)
    wanted = "[" * 5001 + "]" * 5001

    def mutate():
        equal(repr(deep) == wanted, True, "before")

    def check():
        equal(repr(deep) == wanted, True, "the stack grows again")

    return mutate, check


libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
libc.shmdt.argtypes = [ctypes.c_void_p]
libc.shmget.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
IPC_RMID, SHM_LOCK, SHM_RDONLY, SHM_REMAP = 0, 11, 0o10000, 0o40000


def segment(length, key=0, rights=0o600):
    return call(libc.shmget, key, length, rights | 0o3000)


def remove_segment(identifier):
    call(libc.shmctl, identifier, IPC_RMID, None)


def attach(identifier, flags=0, at=None):
    address = libc.shmat(identifier, at, flags)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "shmat")
    return address


def segments():
    """By id: key, rights with flags, size, attachments, owner and creator."""
    with open("/proc/sysvipc/shm") as lines:
        found = [text.split() for text in lines][1:]
    return {int(f[1]): (int(f[0]), f[2], int(f[3]), int(f[6]), f[7:11]) for f in found}


@case
def segments_of_system_v():
    large, key = 40 * PAGE + 100, 0x5E6
    named = segment(large, key, 0o640)
    removed = segment(3 * PAGE)
    lonely = segment(2 * PAGE)
    locked = segment(PAGE)
    parts = segment(8 * PAGE)
    at = attach(named)
    fill(at, "named", large)
    fill(alone := attach(lonely), "lonely", 2 * PAGE)
    call(libc.shmdt, alone)
    call(libc.shmctl, locked, SHM_LOCK, None)
    fill(gone := attach(removed), "removed", 3 * PAGE)
    remove_segment(removed)
    room = mapping(16 * PAGE, NONE)
    attach(parts, SHM_REMAP, room)
    fill(room, "parts", 8 * PAGE)
    call(libc.munmap, room, PAGE)
    call(libc.munmap, room + 3 * PAGE, 2 * PAGE)
    call(libc.mprotect, room + 6 * PAGE, PAGE, READ)
    layout = areas(room, room + 16 * PAGE)

    def become_another():
        call(libc.shmdt, gone)
        call(libc.shmdt, room)
        put("readable", attach(named, SHM_RDONLY))
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)

    child = Child(become_another)
    equal(child.ask("os.getuid()"), 1000)
    was = segments()
    equal(was[named], (key, "640", large, 3, ["0"] * 4), "the segment with a name")
    equal(was[removed][:2], (0, "1600"), "the removed one")
    equal(was[locked][1], "2600", "the locked one")

    def mutate():
        fill(at, "spoiled", large)
        fill(gone, "spoiled", 3 * PAGE)
        child.ask("call(libc.shmdt, readable)")
        call(libc.shmdt, gone)
        remove_segment(named)
        remove_segment(lonely)
        fill(attach(locked), "spoiled", PAGE)
        call(libc.munmap, room, 8 * PAGE)
        attach(segment(PAGE))
        equal(segment(PAGE, key) != named, True, "the key is free")

    def check():
        equal(segments(), was, "the segments")
        equal(call(libc.shmget, key, 0, 0), named, "the segment of the key")
        holds(at, "named", large, "named")
        holds(gone, "removed", 3 * PAGE, "removed")
        holds(extra := attach(lonely), "lonely", 2 * PAGE, "without a process")
        call(libc.shmdt, extra)
        equal(areas(room, room + 16 * PAGE), layout, "the parts")
        for first, pages in ((1, 2), (5, 3)):
            text = ctypes.string_at(room + first * PAGE, pages * PAGE)
            equal(text == pattern("parts", 8 * PAGE)[first * PAGE :][: pages * PAGE], True, "what the parts hold")
        ctypes.memset(at + PAGE, 7, 1)
        equal(child.ask("ctypes.string_at(readable + PAGE, 1)"), b"\7", "what the child sees")
        equal("PermissionError" in child.ask("call(libc.mprotect, readable, PAGE, READ | WRITE)"), True, "read only")
        equal(child.ask("call(libc.shmdt, readable)"), 0, "the child lets go")
        call(libc.shmdt, room)
        call(libc.shmdt, gone)
        equal(removed in segments(), False, "the removed one goes with its last attachment")
        equal(segments()[parts][3], 0, "attachments of the parts")

    return mutate, check


libc.mlock.argtypes = libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mlock2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
GROWSDOWN, ADVICE = 0x100, {"lo", "lf", "dc", "wf", "dd", "hg", "nh", "mg", "gd", "dp"}


def asked():
    """What was asked for mappings, by their first addresses."""
    result = {}
    with open("/proc/self/smaps") as lines:
        for text in lines:
            if text.startswith("VmFlags:"):
                result[first] = ADVICE & set(text.split()[1:])
            elif "-" in text.split()[0]:
                first = int(text.split("-")[0], 16)
    return result


@case
def advice_and_locks():
    areas = []

    def area(wanted, ask, flags=0):
        at = mapping(6 * PAGE, flags=PRIVATE | ANONYMOUS | flags)
        # Nothing beside it is like it, so that the kernel makes one of no two.
        call(libc.mprotect, at, PAGE, NONE)
        call(libc.mprotect, at + 5 * PAGE, PAGE, NONE)
        fill(at + PAGE, at + PAGE, 4 * PAGE)
        if ask:
            ask(at + PAGE)
        areas.append((at + PAGE, wanted))
        return at + PAGE

    def advise(value):
        return lambda at: call(libc.madvise, at, 4 * PAGE, value)

    area({"dc"}, advise(10))
    area({"wf"}, advise(18))
    area({"dd"}, advise(16))
    area({"hg"}, advise(14))
    area({"nh"}, advise(15))
    locked = area({"lo"}, lambda at: call(libc.mlock, at, 4 * PAGE))
    area({"lo", "lf"}, lambda at: call(libc.mlock2, at, 4 * PAGE, 1))
    both = area({"dc", "dd"}, lambda at: (advise(10)(at), advise(16)(at)))
    plain = area(set(), None)
    part = area(set(), lambda at: call(libc.madvise, at + PAGE, PAGE, 16))
    areas.append((part + PAGE, {"dd"}))
    room = mapping(600 * PAGE, NONE)
    grows = mapping(4 * PAGE, flags=PRIVATE | ANONYMOUS | FIXED | GROWSDOWN, at=room + 500 * PAGE)
    fill(grows, "grows", 4 * PAGE)
    # Nothing is mapped so near below what grows, and what is not accessible does not keep it from growing.
    call(libc.munmap, room + 450 * PAGE, 50 * PAGE)
    areas.append((grows, {"gd"}))

    def mutate():
        call(libc.madvise, both, 4 * PAGE, 11)
        call(libc.madvise, plain, 4 * PAGE, 16)
        call(libc.munlock, locked, 4 * PAGE)
        for at, _ in areas[:4]:
            call(libc.munmap, at, 4 * PAGE)

    def check():
        now = asked()
        equal([(at, now.get(at)) for at, _ in areas], areas, "what was asked")
        for at, wanted in areas[:10]:
            if at != part + PAGE:
                holds(at, at, 4 * PAGE, f"memory with {wanted}")
        ctypes.memset(grows - 40 * PAGE, 7, 1)
        equal(ctypes.string_at(grows, 4 * PAGE), pattern("grows", 4 * PAGE), "what has grown")

    return mutate, check


@case
def mappings_that_grow_beside_others():
    """One that does not grow between two that do: to the eye, one mapping."""
    room = mapping(700 * PAGE, NONE)
    base = room + 600 * PAGE
    call(libc.munmap, room + 550 * PAGE, 70 * PAGE)

    def place(page, flags):
        at = mapping(PAGE, flags=PRIVATE | ANONYMOUS | FIXED | flags, at=base + page * PAGE)
        fill(at, page, PAGE)
        return at

    upper = place(5, GROWSDOWN)
    ctypes.memset(upper - 1, 7, 1)
    between = place(3, 0)
    lower = place(2, GROWSDOWN)

    def mutate():
        call(libc.munmap, lower, 4 * PAGE)

    def check():
        now = asked()
        equal([now.get(at) for at in (lower, between, upper - PAGE)], [{"gd"}, set(), {"gd"}], "what grows")
        for page in (2, 3, 5):
            holds(base + page * PAGE, page, PAGE, f"page {page}")
        equal(ctypes.string_at(upper - 1, 1), b"\7", "what had grown")
        ctypes.memset(lower - 40 * PAGE, 7, 1)

    return mutate, check


@case
def memory_that_may_be_dropped():
    """Nobody finds there anything but what was there, or nothing; and a child never finds anything."""
    size = 2 * PAGE
    try:
        at = mapping(size, flags=0x8 | ANONYMOUS)  # MAP_DROPPABLE
    except OSError:  # a kernel before 6.11
        return (lambda: None,) * 2
    fill(at, "state", size)

    def mutate():
        call(libc.munmap, at, size)

    def check():
        equal("dp" in asked()[at], True, "it may be dropped")
        equal(ctypes.string_at(at, size) in (pattern("state", size), bytes(size)), True, "what is there")
        fill(at, "other", size)
        put("at", at)
        equal(Child().ask(f"ctypes.string_at(at, {size})"), bytes(size), "what a child has")
        holds(at, "other", size, "what was written")

    return mutate, check


@case
def guard_pages():
    """Put into mappings without parting them (`MADV_GUARD_INSTALL`)."""
    at = mapping(8 * PAGE)
    fill(at, "guarded", 8 * PAGE)
    return guards_in(at, made_since=True)


@case
def guard_pages_in_a_private_mapping_of_a_file():
    # The kernel does not come back from making some where writes are tracked.
    return guards_in(mapping(8 * PAGE, flags=PRIVATE, descriptor=guarded_file()), made_since=False)


@case
def guard_pages_in_a_shared_mapping_of_a_file():
    return guards_in(mapping(8 * PAGE, flags=SHARED, descriptor=guarded_file()), made_since=True)


def guarded_file():
    open("/playground/guarded", "wb").write(pattern("guarded", 8 * PAGE))
    return os.open("/playground/guarded", os.O_RDWR)


def guards_in(at, made_since):
    """Into eight pages of the pattern."""
    try:
        call(libc.madvise, at + 2 * PAGE, PAGE, 102)
    except OSError:  # a kernel before 6.13, before 6.15 for mappings of files
        return (lambda: None,) * 2

    def mutate():
        call(libc.madvise, at + 2 * PAGE, PAGE, 103)
        if made_since:
            call(libc.madvise, at + 5 * PAGE, PAGE, 102)

    def dies_of(page):
        pid = os.fork()
        if pid == 0:
            ctypes.memmove(at + page * PAGE, pattern("guarded", PAGE), PAGE)
            os._exit(0)
        return os.waitpid(pid, 0)[1]

    def check():
        equal([dies_of(page) for page in (1, 2, 3, 5)], [0, signal.SIGSEGV, 0, 0], "touched pages")
        for page in (0, 1, 3, 4, 5, 6, 7):
            equal(ctypes.string_at(at + page * PAGE, PAGE), pattern("guarded", PAGE), f"page {page}")

    return mutate, check
