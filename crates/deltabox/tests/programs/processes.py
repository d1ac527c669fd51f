"""Processes: what they are, whose they are, how they ended; their births and deaths."""

import resource
import shutil
import subprocess


@case
def working_directory_umask_and_name():
    os.makedirs("/playground/deep/er")
    os.chdir("/playground/deep/er")
    os.umask(0o027)
    call(libc.prctl, 15, b"renamed")

    def mutate():
        os.chdir("/usr")
        os.rmdir("/playground/deep/er")
        os.umask(0)
        call(libc.prctl, 15, b"spoiled")

    def check():
        equal(os.getcwd(), "/playground/deep/er", "working directory")
        open("here", "w").close()
        equal(os.stat("/playground/deep/er/here").st_mode & 0o777, 0o640, "mode made with the umask")
        equal(status("Name"), ["renamed"], "name")

    return mutate, check


@case
def working_directories_in_proc():
    other = Child()

    def of_a_thread():
        thread = threading.Thread(target=time.sleep, args=[100000], daemon=True)
        thread.start()
        os.chdir(f"/proc/self/task/{thread.native_id}")

    children = [Child(of_a_thread), Child(lambda: os.chdir(f"/proc/{other.pid}")), Child(lambda: os.chdir("/proc/self/fd"))]
    before = [child.ask("os.getcwd()") for child in children]

    def mutate():
        other.kill()
        for child in children[1:]:
            child.ask("os.chdir('/')")
        children[0].kill()

    def check():
        equal([child.ask("os.getcwd()") for child in children], before, "directories")
        equal([child.ask("len(os.listdir('.')) > 0") for child in children], [True] * 3, "what is in there")

    return mutate, check


@case
def resource_limits():
    before = {}
    for kind, soft in ((resource.RLIMIT_NOFILE, 500), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_STACK, 4 << 20)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (soft, hard))
        before[kind] = soft, hard

    def mutate():
        for kind, (soft, hard) in before.items():
            resource.setrlimit(kind, (soft // 2, hard))

    def check():
        equal({kind: resource.getrlimit(kind) for kind in before}, before, "limits")

    return mutate, check


@case
def processes_that_may_have_no_more_descriptors():
    """One gave up the right to any, as OpenSSH does before it speaks to strangers; one has as many as it may have."""

    def none():
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))

    def all_taken():
        resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
        try:
            while True:
                os.dup(0)
        except OSError as error:
            equal(error.errno, errno.EMFILE)

    children = [Child(none), Child(all_taken)]
    for child in children:
        child.ask("put('told', bytearray(b'hello') * 100000)[:1]")
    limits = [resource.prlimit(child.pid, resource.RLIMIT_NOFILE) for child in children]
    numbers = lambda: [sorted(os.listdir(f"/proc/{child.pid}/fd")) for child in children]
    before = numbers()

    def mutate():
        for child in children:
            child.ask("told.__setitem__(slice(5, 300000), b'wrong' * 59999)")

    def check():
        equal([resource.prlimit(child.pid, resource.RLIMIT_NOFILE) for child in children], limits, "limits")
        equal(numbers(), before, "descriptors")
        for child in children:
            equal(child.ask("told == b'hello' * 100000"), True, "memory")
            equal(child.ask("os.open('/', 0)")[:19], "OSError: [Errno 24]", "one more")

    return mutate, check


@case
def credentials_of_another_user():
    def setup():
        os.setgroups([2000, 3000])
        os.setresgid(1001, 1002, 1001)
        os.setresuid(1000, 1001, 1002)

    child = Child(setup)
    child.ask("1")
    fields = ("Uid", "Gid", "Groups", "CapEff", "CapPrm", "CapInh", "CapBnd", "NoNewPrivs", "Seccomp")
    before = [status(field, child.pid) for field in fields]

    def mutate():
        child.ask("os.setresuid(1002, 1002, 1002)")

    def check():
        equal([status(field, child.pid) for field in fields], before, "credentials")
        equal(child.ask("(os.getresuid(), os.getresgid(), os.getgroups())"),
              ((1000, 1001, 1002), (1001, 1002, 1001), [2000, 3000]), "as it sees them")
        equal(child.ask("open('/playground/theirs', 'w').close()"), None, "makes a file")
        owner = os.stat("/playground/theirs")
        equal((owner.st_uid, owner.st_gid), (1001, 1002), "the file's owner")

    return mutate, check


@case
def ids_for_files_and_sets_of_capabilities():
    def setup():
        # Its own bounding set, and an ambient capability (CAP_CHOWN).
        call(libc.prctl, 24, 31)
        header, sets = struct.pack("Ii", 0x20080522, 0), bytearray(24)
        libc.capget(header, (ctypes.c_char * 24).from_buffer(sets))
        sets[8:12] = struct.pack("I", 1)
        call(libc.capset, header, bytes(sets))
        call(libc.prctl, 47, 2, 0, 0, 0)
        libc.setfsgid(44)
        libc.setfsuid(55)

    child = Child(setup)
    child.ask("1")
    fields = ("Uid", "Gid", "CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")
    before = [status(field, child.pid) for field in fields]

    def mutate():
        child.ask("libc.setfsuid(0)")
        child.ask("libc.prctl(47, 4, 0, 0, 0)")

    def check():
        equal([status(field, child.pid) for field in fields], before, "credentials")

    return mutate, check


def refuse_call(number):
    """Makes one system call fail with EPERM in this process."""
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7fff0000)]
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    call(libc.prctl, 22, 2, struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(buffer)))


@case
def seccomp_filters_of_its_own():
    child = Child(lambda: refuse_call(110))
    child.ask("1")

    def mutate():
        child.ask("refuse_call(121)")

    def check():
        equal(child.ask("libc.getppid()"), -1, "refused")
        equal(child.ask("libc.getpgid(0) > 0"), True, "not refused")

    return mutate, check


@case
def waits_that_a_filter_does_not_let_the_kernel_go_on_with():
    """It does so by a call that a program never makes itself (`restart_syscall`), and that filters do not know: OpenSSH's."""

    def polled(descriptor, milliseconds):
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        return poller.poll(milliseconds)

    def slept(seconds):
        return call(libc.nanosleep, struct.pack("qq", seconds, 0), None)

    put("polled", polled)
    put("slept", slept)
    reader, writer = os.pipe()
    empty, _ = os.pipe()
    waits = {f"polled({reader}, 1000000)": [(reader, 1)], f"polled({empty}, 1500)": [], "slept(1)": 0}
    children = [(Child(lambda: refuse_call(219)), wait, result) for wait, result in waits.items()]
    for child, wait, _ in children:
        child.ask("1")
        child.tell(wait)
        eventually(lambda: stat(child.pid)[0] == "S", "it waits")
    time.sleep(0.1)

    def check():
        os.write(writer, b"x")
        for child, _, result in children:
            equal(eval(read_line(child.hearing)), result, "what the call returned")

    return check, check


@case
def children_with_rights_that_their_parents_have_not():
    """The children are killed, and the parents, which cannot give birth to such ones any more, stay."""
    def confined():
        put("grandchild", Child())
        refuse_call(110)
        call(libc.prctl, 24, 31, 0, 0, 0)  # PR_CAPBSET_DROP

    def another_user():
        put("grandchild", Child())
        os.setresuid(1000, 1000, 1000)

    parents = [Child(confined), Child(another_user)]
    own = "(libc.getppid() > 0, os.getuid(), status('CapBnd'), status('Seccomp_filters'))"
    question = f"({own}, grandchild.ask({own!r}))"
    before = [parent.ask(question) for parent in parents]
    equal([answer[0] == answer[1] for answer in before], [False, False], "before")

    def mutate():
        for parent in parents:
            os.kill(parent.ask("grandchild.pid"), signal.SIGKILL)

    def check():
        equal([parent.ask(question) for parent in parents], before, "rights")

    return mutate, check


@case
def settings_that_a_program_starts_with_and_changes():
    """Huge pages refused, and the registration for private memory barriers."""
    call(libc.prctl, 41, 1, 0, 0, 0)
    call(libc.syscall, 324, 1 << 4, 0, 0)

    def mutate():
        call(libc.prctl, 41, 0, 0, 0, 0)

    def check():
        equal(libc.prctl(42, 0, 0, 0, 0), 1, "huge pages refused")
        equal(libc.syscall(324, 1 << 3, 0, 0), 0, "private barrier")

    return mutate, check


@case
def credentials_dropped_since():
    child = Child()
    fields = ("Uid", "Gid", "Groups", "CapEff", "CapPrm", "CapBnd")
    before = [status(field, child.pid) for field in fields]

    def mutate():
        child.ask("(os.setgroups([]), os.setresgid(1000, 1000, 1000), os.setresuid(1000, 1000, 1000))")

    def check():
        equal([status(field, child.pid) for field in fields], before, "credentials")
        equal(child.ask("os.setresuid(5, 6, 7)"), None, "it may still change its user")

    return mutate, check


@case
def scheduling():
    nice = os.nice(5)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    first = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, [first])

    def mutate():
        os.nice(3)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))

    def check():
        equal(os.nice(0), nice, "nice")
        equal(os.sched_getscheduler(0), os.SCHED_BATCH, "policy")
        equal(os.sched_getaffinity(0), {first}, "affinity")

    return mutate, check


@case
def process_controls():
    def setup():
        libc.prctl(1, int(signal.SIGUSR1))  # PR_SET_PDEATHSIG
        libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
        libc.prctl(29, 123_456)  # PR_SET_TIMERSLACK

    put("number", ctypes.c_int())
    child = Child(setup)
    parent_death = "(libc.prctl(2, ctypes.byref(number)), number.value)[1]"
    subreaper = "(libc.prctl(37, ctypes.byref(number)), number.value)[1]"

    def mutate():
        child.ask("(libc.prctl(1, 0), libc.prctl(36, 0), libc.prctl(29, 1))")

    def check():
        equal(child.ask(parent_death), signal.SIGUSR1, "signal at the parent's death")
        equal(child.ask(subreaper), 1, "subreaper")
        equal(child.ask("libc.prctl(30)"), 123_456, "timer slack")

    return mutate, check


@case
def rights_and_priorities_of_one_process():
    def setup():
        call(libc.prctl, 28, 0x40, 0, 0, 0)  # PR_SET_SECUREBITS: SECBIT_NO_CAP_AMBIENT_RAISE
        call(libc.prctl, 8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
        call(libc.prctl, 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
        call(libc.personality, 0x40000)
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
        call(libc.syscall, 251, 1, 0, 2 << 13 | 3)  # ioprio_set
        os.sched_setscheduler(0, os.SCHED_BATCH | 0x40000000, os.sched_param(0))

    marked, plain = Child(setup), Child()
    ask = (
        "(libc.prctl(7, 0, 0, 0, 0), libc.prctl(27, 0, 0, 0, 0), libc.prctl(3, 0, 0, 0, 0),"
        " libc.personality(0xffffffff), open('/proc/self/oom_score_adj').read(), libc.syscall(252, 1, 0),"
        " os.sched_getscheduler(0))"
    )
    before = [child.ask(ask) for child in (marked, plain)]
    equal(before[0][:3], (1, 0x50, 0), "what was asked for")

    def mutate():
        marked.ask("(libc.prctl(8, 0, 0, 0, 0), libc.prctl(4, 1, 0, 0, 0), libc.personality(0))")
        plain.ask("(libc.prctl(28, 0x40, 0, 0, 0), libc.syscall(251, 1, 0, 3 << 13))")
        plain.ask("open('/proc/self/oom_score_adj', 'w').write('700')")

    def check():
        equal([child.ask(ask) for child in (marked, plain)], before, "what holds")

    return mutate, check


@case
def what_proc_tells_of_a_program():
    bounds = (*range(25, 28), *range(44, 51))  # code, stack, data, break, arguments, environment

    def told():
        files = [open(f"/proc/self/{name}", "rb").read() for name in ("cmdline", "environ", "auxv", "comm")]
        with open("/proc/self/maps") as maps:
            own = [text for text in maps if "[v" in text or "[stack]" in text or "[heap]" in text]
        numbers = [stat("self")[at - 2] for at in bounds]
        return files, os.readlink("/proc/self/exe"), numbers, [text.split()[1:] for text in own]

    call(libc.prctl, 15, b"called other")
    before = told()

    def mutate():
        ctypes.memset(int(before[2][-4]), 0, 3)
        call(libc.prctl, 15, b"spoiled")

    def check():
        equal(told(), before, "what is told")
        equal(time.clock_gettime(time.CLOCK_MONOTONIC) > 0, True, "the vDSO works")

    return mutate, check


@case
def zombie_not_yet_waited_for():
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    killed = os.fork()
    if killed == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    for child in (pid, killed):
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)

    def mutate():
        os.waitpid(pid, 0)
        os.waitpid(killed, 0)

    def check():
        equal((stat(pid)[0], stat(killed)[0]), ("Z", "Z"), "states")
        equal(os.waitpid(pid, 0), (pid, 7 << 8), "exit status")
        equal(os.waitpid(killed, 0), (killed, signal.SIGKILL), "killed by a signal")
        raises(errno.ECHILD, os.waitpid, -1, 0)

    return mutate, check


@case
def zombie_that_leads_a_group():
    ready, tell = os.pipe()
    leader = os.fork()
    if leader == 0:
        os.setpgid(0, 0)
        os.write(tell, b"x")
        os._exit(3)
    os.read(ready, 1)
    os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)
    member = Child(lambda: os.setpgid(0, leader))
    equal(member.ask("os.getpgid(0)"), leader, "before")

    def mutate():
        os.waitpid(leader, 0)

    def check():
        equal(member.ask("os.getpgid(0)"), leader, "the group")
        equal(os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT).si_status, 3, "the zombie's status")
        member.ask("[signal.signal(signal.SIGUSR1, lambda *_: put('got', 1))] and 0")
        os.killpg(leader, signal.SIGUSR1)
        equal(member.ask("got"), 1, "a signal to the group")

    return mutate, check


@case
def zombie_that_leads_a_session():
    tellers = Tellers(1)
    leader = os.fork()
    if leader == 0:
        os.setsid()
        tellers.born(0)
        os._exit(3)
    os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)
    eventually(lambda: tellers.ask()[0][1:] == [1, leader], "adoption by init")
    before = tellers.ask()

    def mutate():
        os.waitpid(leader, 0)

    def check():
        equal(tellers.ask(), before, "number, parent and session")
        equal(os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT).si_status, 3, "the zombie's status")

    return mutate, check


@case
def zombie_of_a_parent_that_gives_up_rights_since():
    parent = Child()
    zombie = parent.ask("put('ends', subprocess.Popen(['sh', '-c', 'exit 3'])).pid")
    wait = f"os.waitid(os.P_PID, {zombie}, os.WEXITED | os.WNOWAIT).si_status"
    equal(parent.ask(wait), 3, "before")

    def mutate():
        parent.ask("os.setresuid(1000, 1000, 1000)")

    def check():
        equal(parent.ask(wait), 3, "the zombie's status")
        equal(parent.ask("os.getuid()"), 0, "rights")

    return mutate, check


@case
def group_whose_leader_ended_since():
    leader = Child(lambda: os.setpgid(0, 0))
    leader.ask("1")
    member = Child(lambda: os.setpgid(0, leader.pid))
    equal(member.ask("os.getpgid(0)"), leader.pid, "before")

    def mutate():
        leader.kill()

    def check():
        equal(leader.ask("(os.getpid(), os.getpgid(0))"), (leader.pid, leader.pid), "the leader")
        equal(member.ask("os.getpgid(0)"), leader.pid, "the member")

    return mutate, check


@case
def groups_that_those_have_left_whom_they_are_named_after():
    children = [Child(lambda: os.setpgid(0, 0)) for _ in range(2)]
    one, other = (child.ask("os.getpid()") for child in children)
    for group in one, other:
        children.append(Child(lambda: os.setpgid(0, group)))
        children[-1].ask("1")
    children[0].ask(f"os.setpgid(0, {other})")
    groups = lambda: [child.ask("os.getpgid(0)") for child in children]
    before = groups()
    equal(before, [other, other, one, other], "before")

    def mutate():
        children[0].ask("os.setpgid(0, 0)")
        children[1].ask(f"os.setpgid(0, {one})")
        children[2].kill()
        children[3].ask("os.setpgid(0, 0)")

    def check():
        equal(groups(), before, "groups")

    return mutate, check


@case
def stopped_process():
    child = Child()
    os.kill(child.pid, signal.SIGSTOP)
    eventually(lambda: stat(child.pid)[0] == "T", "the stop")

    def mutate():
        os.kill(child.pid, signal.SIGCONT)
        child.ask("1")

    def check():
        eventually(lambda: stat(child.pid)[0] == "T", "the stop again")
        child.tell("6 * 7")
        equal(select.select([child.hearing], [], [], 0.2)[0], [], "answers while stopped")
        os.kill(child.pid, signal.SIGCONT)
        equal(read_line(child.hearing), "42", "answers when continued")

    return mutate, check


@case
def orphan_of_a_double_fork():
    answers, told = os.pipe()
    asks, asked = os.pipe()
    middle = os.fork()
    if middle == 0:
        os.setsid()
        if os.fork() == 0:
            while word := os.read(asks, 1):
                os.write(told, f"{os.getpid()} {os.getppid()} {os.getsid(0)}\n".encode())
        os._exit(0)
    os.waitpid(middle, 0)

    def ask():
        os.write(asked, b"?")
        return [int(word) for word in read_line(answers).split()]

    eventually(lambda: ask()[1] == 1, "adoption")
    before = ask()

    def mutate():
        os.kill(before[0], signal.SIGKILL)
        eventually(lambda: not os.path.exists(f"/proc/{before[0]}"), "the end")

    def check():
        equal(ask(), before, "pid, parent, session")

    return mutate, check


@case
def sessions_and_groups():
    plain, group, session = Child(), Child(os.setpgrp), Child(os.setsid)
    member = Child()
    eventually(lambda: group.ask("os.getpgid(0)") == group.pid, "the group")
    os.setpgid(member.pid, group.pid)
    session.ask("put('inner', Child()) and 0")
    session.ask("put('other', Child(os.setpgrp)) and 0")
    everyone = {"plain": plain, "group": group, "session": session, "member": member}

    def ids():
        result = {name: child.ask("(os.getpid(), os.getppid(), os.getpgid(0), os.getsid(0))")
                  for name, child in everyone.items()}
        for name in ("inner", "other"):
            result[name] = session.ask(f"{name}.ask('(os.getpid(), os.getppid(), os.getpgid(0), os.getsid(0))')")
        return result

    before = ids()

    def mutate():
        plain.ask("os.setsid()")
        member.ask("os.setpgid(0, 0)")
        session.kill()
        group.kill()

    def check():
        equal(ids(), before, "pid, parent, group, session")

    return mutate, check


@case
def member_of_a_group_whose_leader_is_gone():
    leader = Child(os.setpgrp)
    leader.ask("1")
    member = Child()
    os.setpgid(member.pid, leader.pid)
    leader.kill()

    def mutate():
        member.ask("os.setpgid(0, 0)")

    def check():
        equal(os.getpgid(member.pid), leader.pid, "group")
        os.killpg(leader.pid, signal.SIGKILL)
        equal(os.waitpid(member.pid, 0), (member.pid, signal.SIGKILL), "the group's signal")

    return mutate, check


@case
def session_whose_leader_is_gone():
    leader = Child(os.setsid)
    leader.ask("1")
    numbers = leader.ask("(put('inner', Child()).asking, inner.hearing, inner.pid)")
    asking = leader.ask("os.dup(inner.asking)")
    # The grandchild is spoken to through its parent's descriptors, opened again by way of /proc.
    ask = os.open(f"/proc/{leader.pid}/fd/{numbers[0]}", os.O_WRONLY)
    hear = os.open(f"/proc/{leader.pid}/fd/{numbers[1]}", os.O_RDONLY)
    leader.kill()

    def ids():
        os.write(ask, b"(os.getpid(), os.getppid(), os.getpgid(0), os.getsid(0))\n")
        return eval(read_line(hear))

    before = ids()

    def mutate():
        os.kill(numbers[2], signal.SIGKILL)

    def check():
        equal(ids(), before, "pid, parent, group, session")
        equal(before, (numbers[2], 1, leader.pid, leader.pid), "adopted by init, in the dead leader's session")

    return mutate, check


class Tellers:
    """Processes that tell who they are: number, parent, session."""

    def __init__(self, number):
        self.talks = [os.pipe() + os.pipe() for _ in range(number)]

    def born(self, number, first=lambda: None):
        asks, _, _, told = self.talks[number]
        if os.fork() == 0:
            first()
            while os.read(asks, 1):
                os.write(told, f"{os.getpid()} {os.getppid()} {os.getsid(0)}\n".encode())
            os._exit(0)

    def ask(self):
        answers = []
        for _, asked, answer, _ in self.talks:
            os.write(asked, b"?")
            answers.append([int(word) for word in read_line(answer).split()])
        return answers


@case
def orphans_that_another_than_init_took():
    """One in a session whose leader lives, and two in one whose leader is dead."""
    call(libc.prctl, 36, 1)
    tellers = Tellers(3)

    def lead():
        os.setsid()
        middle = os.fork()
        if middle == 0:
            tellers.born(0)
            os._exit(0)
        os.waitpid(middle, 0)

    leader = Child(lead)
    equal(leader.ask("os.getsid(0)"), leader.pid, "it leads")
    dead = os.fork()
    if dead == 0:
        os.setsid()
        tellers.born(1)
        tellers.born(2)
        os._exit(0)
    os.waitpid(dead, 0)
    before = tellers.ask()
    equal([ids[1:] for ids in before], [[os.getpid(), s] for s in (leader.pid, dead, dead)], "parents and sessions")

    def mutate():
        for pid, _, _ in before:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def check():
        equal(tellers.ask(), before, "numbers, parents and sessions")
        with open(f"/proc/self/task/{os.getpid()}/children") as children:
            numbers = sorted(int(word) for word in children.read().split())
        equal(numbers, sorted([leader.pid] + [pid for pid, _, _ in before]), "children")

    return mutate, check


@case
def child_of_before_its_parent_made_a_session():
    """Of two whose parents have ended, one in a session that lives, and one in a session without a leader."""
    tellers = Tellers(4)

    def daemon(number, first):
        def begin():
            tellers.born(number + 1)
            os.setsid()

        middle = os.fork()
        if middle == 0:
            first()
            tellers.born(number, begin)
            os._exit(0)
        os.waitpid(middle, 0)
        return middle

    daemon(0, lambda: None)
    dead = daemon(2, os.setsid)
    eventually(lambda: [ids[1] for ids in tellers.ask()[::2]] == [1, 1], "adoption by init")
    before = tellers.ask()
    equal([ids[2] for ids in before], [before[0][0], os.getsid(0), before[2][0], dead], "sessions")

    def mutate():
        for pid, _, _ in before:
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: not os.path.exists(f"/proc/{pid}"), "the end")

    def check():
        equal(tellers.ask(), before, "numbers, parents and sessions")

    return mutate, check


@case
def child_killed_since():
    secret = put("secret", ["shared with the child"] * 100)
    child = Child()
    child.ask("put('secret', [1, 2, 3]) and 0")

    def mutate():
        child.kill()

    def check():
        equal(os.waitpid(child.pid, os.WNOHANG), (0, 0), "the child lives")
        equal(child.ask("(os.getpid(), os.getppid(), secret)"), (child.pid, os.getpid(), [1, 2, 3]), "answer")
        equal(len(secret), 100, "the parent's memory")
        child.tell("os._exit(3)")
        equal(os.waitpid(child.pid, 0), (child.pid, 3 << 8), "its exit")

    return mutate, check


@case
def child_left_a_zombie_since():
    child = Child()

    def mutate():
        child.tell("os._exit(3)")
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

    def check():
        equal(child.ask("6 * 7"), 42, "answer")
        equal(stat(child.pid)[0] != "Z", True, "state")
        child.tell("os._exit(4)")
        equal(os.waitpid(child.pid, 0), (child.pid, 4 << 8), "its exit")

    return mutate, check


@case
def children_born_since():
    pids = lambda: sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    before = pids()

    def mutate():
        for _ in range(4):
            child = Child()
            child.ask("put('more', Child()) and 0")
        if os.fork() == 0:
            os._exit(0)

    def check():
        raises(errno.ECHILD, os.waitpid, -1, os.WNOHANG)
        equal(pids(), before, "all processes")
        child = Child()
        equal(child.ask("os.getppid()"), os.getpid(), "a new child")
        child.kill()

    return mutate, check


@case
def child_executed_another_program_since():
    child = Child()
    child.ask("put('secret', 'kept') and 0")

    def mutate():
        child.tell("os.execv('/bin/sleep', ['sleep', '1000'])")
        eventually(lambda: status("Name", child.pid) == ["sleep"], "the other program")

    def check():
        equal(child.ask("(os.getpid(), secret)"), (child.pid, "kept"), "answer")
        equal(open(f"/proc/{child.pid}/cmdline").read(), open("/proc/self/cmdline").read(), "command line")
        equal(os.readlink(f"/proc/{child.pid}/exe"), os.readlink("/proc/self/exe"), "program")

    return mutate, check


@case
def itself_executed_another_program_since():
    cmdline = open("/proc/self/cmdline").read()

    def mutate():
        say("PASS")
        os.execv("/bin/cat", ["cat"])

    def check():
        equal(open("/proc/self/cmdline").read(), cmdline, "command line")

    return mutate, check


@case
def program_that_may_not_be_executed_any_more():
    shutil.copy("/bin/cat", "/playground/cat")
    cat = subprocess.Popen(["/playground/cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def through(text):
        os.write(cat.stdin.fileno(), text + b"\n")
        return read_line(cat.stdout.fileno()).encode()

    equal(through(b"early"), b"early", "answer")
    os.chmod("/playground/cat", 0)

    def mutate():
        cat.kill()
        cat.wait()

    def check():
        equal(through(b"late"), b"late", "answer")
        equal(os.readlink(f"/proc/{cat.pid}/exe"), "/playground/cat", "program")
        equal(os.stat("/playground/cat").st_mode & 0o7777, 0, "mode")

    return mutate, check


@case
def children_of_other_programs():
    cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    shell = subprocess.Popen(["sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    shell.stdin.write(b"x=secret\n")
    shell.stdin.flush()

    def mutate():
        cat.stdin.close()
        cat.wait()
        shell.stdin.write(b"x=spoiled\n")
        shell.stdin.flush()

    def check():
        cat.stdin.write(b"through cat\n")
        cat.stdin.flush()
        equal(read_line(cat.stdout.fileno()), "through cat", "answer of cat")
        shell.stdin.write(b"echo $x $$\nexit 5\n")
        shell.stdin.flush()
        equal(read_line(shell.stdout.fileno()), f"secret {shell.pid}", "answer of the shell")
        equal((shell.wait(), cat.poll()), (5, None), "ends")

    return mutate, check


def down(depth, expression):
    """The expression, asked `depth` generations further down."""
    for _ in range(depth):
        expression = f"put_child.ask({expression!r})"
    return expression


@case
def tree_of_ten_generations():
    top = Child()
    for depth in range(9):
        top.ask(down(depth, "put('put_child', Child()) and 0"))
    line = lambda: [top.ask(down(depth, "(os.getpid(), os.getppid())")) for depth in range(10)]
    before = line()

    def mutate():
        os.kill(before[4][0], signal.SIGKILL)
        os.kill(before[7][0], signal.SIGKILL)

    def check():
        equal(line(), before, "pids and parents")

    return mutate, check


@case
def tree_killed_whole_since():
    tops = [Child() for _ in range(4)]
    for top in tops:
        top.ask("put('put_child', Child()) and 0")
        top.ask("put_child.ask('put(\"x\", 5)')")
    before = [top.ask("put_child.pid") for top in tops]

    def mutate():
        for top, inner in zip(tops, before):
            os.kill(inner, signal.SIGKILL)
            top.kill()

    def check():
        equal([top.ask("put_child.ask('(os.getpid(), x)')") for top in tops], [(pid, 5) for pid in before], "grandchildren")

    return mutate, check


@case
def process_descriptor():
    child = Child()
    descriptor = os.pidfd_open(child.pid)

    def mutate():
        child.kill()

    def check():
        equal(select.select([descriptor], [], [], 0)[0], [], "the child lives")
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        equal(select.select([descriptor], [], [], 20)[0], [descriptor], "its end is told")
        os.waitpid(child.pid, 0)

    return mutate, check


@case
def multiprocessing_pool():
    import multiprocessing

    pool = multiprocessing.get_context("fork").Pool(3)
    before = sorted(pool.map(slow_pid, range(12)))

    def mutate():
        pool.terminate()
        pool.join()

    def check():
        equal(pool.map(square, range(100)), [number * number for number in range(100)], "results")
        equal(set(pool.map(slow_pid, range(12))) <= set(before), True, "the same workers")

    return mutate, check


def slow_pid(_):
    time.sleep(0.01)
    return os.getpid()


def square(number):
    return number * number


@case
def descriptors_of_processes_that_ended():
    def ended(waited):
        pid = os.fork()
        if pid == 0:
            os._exit(7)
        handles = [os.pidfd_open(pid) for _ in range(2)]
        os.waitid(os.P_PID, pid, os.WEXITED | (0 if waited else os.WNOWAIT))
        return handles

    gone, other, zombie = ended(True), ended(True), ended(False)

    def mutate():
        os.waitid(os.P_PIDFD, zombie[0], os.WEXITED)
        for handle in gone:
            os.close(handle)

    def inode(handle):
        return os.fstat(handle).st_ino

    def check():
        for handle in gone + other:
            raises(errno.ESRCH, signal.pidfd_send_signal, handle, 0)
            raises(errno.ECHILD, os.waitid, os.P_PIDFD, handle, os.WEXITED)
        equal(inode(gone[0]), inode(gone[1]), "two handles of one process")
        equal(inode(gone[0]) == inode(other[0]), False, "handles of two are of one")
        equal(os.waitid(os.P_PIDFD, zombie[0], os.WEXITED).si_status, 7, "status of the zombie")
        raises(errno.ECHILD, os.waitid, os.P_PIDFD, zombie[1], os.WEXITED)

    return mutate, check


@case
def root_directories_of_their_own():
    os.mkdir("/playground/jail")
    os.mkdir("/playground/jail/inside")
    with open("/playground/jail/file", "w") as file:
        file.write("in the jail")

    def enter():
        os.chroot("/playground/jail")
        os.chdir("/inside")
        server = socket.socket(socket.AF_UNIX)
        server.bind("socket")
        server.listen()
        put("server", server)
        put("grandchild", Child())

    free, jailed = Child(), Child(enter)
    equal(jailed.ask("open('/file').read()"), "in the jail")

    def mutate():
        jailed.ask("grandchild.kill()")
        jailed.ask("os.unlink('/inside/socket')")
        free.ask("os.chroot('/playground')")
        free.ask("os.chdir('/')")

    def check():
        for ask in (jailed.ask, lambda question: jailed.ask(f"grandchild.ask({question!r})")):
            equal(ask("open('/file').read()"), "in the jail", "a file there")
            equal(ask("os.getcwd()"), "/inside", "working directory")
            equal(ask("os.path.exists('/playground')"), False, "the way out is open")
        equal(free.ask("os.path.exists('/playground/jail/file')"), True, "another is shut in")
        client = socket.socket(socket.AF_UNIX)
        client.connect("/playground/jail/inside/socket")
        jailed.ask("server.accept()[0].send(b'hello')")
        equal(client.recv(10), b"hello", "through a socket in there")

    return mutate, check


@case
def semaphores_and_message_queues_of_system_v():
    IPC_RMID, GETALL, SETVAL, NOWAIT = 0, 13, 16, 0o4000
    key = 0x5EED
    semaphores = call(libc.semget, key, 3, 0o1640)
    private = call(libc.semget, 0, 1, 0o1600)
    queue = call(libc.msgget, key, 0o1600)

    def set_value(identifier, number, value):
        call(libc.semctl, identifier, number, SETVAL, value)

    def values(identifier, count):
        array = (ctypes.c_ushort * count)()
        call(libc.semctl, identifier, 0, GETALL, array)
        return list(array)

    def send(kind, text):
        message = struct.pack("l", kind) + text
        call(libc.msgsnd, queue, message, ctypes.c_size_t(len(text)), NOWAIT)

    def receive(kind):
        message = ctypes.create_string_buffer(108)
        size = call(libc.msgrcv, queue, message, ctypes.c_size_t(100), ctypes.c_long(kind), NOWAIT)
        return struct.unpack("l", message.raw[:8])[0], message.raw[8 : 8 + size]

    for number, value in enumerate((1, 20, 300)):
        set_value(semaphores, number, value)
    set_value(private, 0, 7)
    send(5, b"first")
    send(9, b"")
    send(2, b"third, and odd")

    def mutate():
        set_value(semaphores, 1, 21)
        call(libc.semctl, private, 0, IPC_RMID)
        receive(9)
        send(1, b"late")
        call(libc.semget, 0, 4, 0o1600)

    def check():
        equal(call(libc.semget, key, 3, 0), semaphores, "the set of the key")
        equal(values(semaphores, 3), [1, 20, 300], "values")
        equal(values(private, 1), [7], "value of the private set")
        equal(call(libc.msgget, key, 0), queue, "the queue of the key")
        equal(receive(2), (2, b"third, and odd"), "by its type")
        equal(receive(0), (5, b"first"), "the first")
        equal(receive(0), (9, b""), "the second")
        raises(errno.ENOMSG, receive, 0)
        with open("/proc/sysvipc/sem") as lines:
            found = {fields[1]: fields[2:] for fields in map(str.split, lines)}
        equal(found[str(semaphores)], ["640", "3", *"0000", *found[str(semaphores)][6:]], "rights")
        equal(len(found), 3, "lines of the list of sets")
        call(libc.semop, semaphores, struct.pack("Hhh", 1, -20, NOWAIT), ctypes.c_size_t(1))
        equal(values(semaphores, 3), [1, 0, 300], "values after an operation")

    return mutate, check


def refuse_call_in_all_threads(number):
    """Makes one system call fail in every thread, which the kernel does only for those that share their filters."""
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7fff0000)]
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(buffer))
    return libc.syscall(317, 1, 1, program)  # SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC


@case
def seccomp_filters_that_threads_share():
    def setup():
        refuse_call(110)
        threading.Thread(target=time.sleep, args=[100000], daemon=True).start()

    child = Child(setup)
    child.ask("1")

    def mutate():
        child.ask("refuse_call(121)")

    def check():
        equal(child.ask("libc.getppid()"), -1, "refused")
        equal(child.ask("refuse_call_in_all_threads(121)"), 0, "one more for all threads")
        equal(child.ask("libc.getpgid(0)"), -1, "refused by that")

    return mutate, check
