"""A sandbox with a limit of processes, which is reached."""


@case
def as_many_processes_as_there_may_be():
    """To make some of them again takes others, which are there for a moment: of a group and of a session whose leaders are dead."""
    ready, tell = os.pipe()
    leader = os.fork()
    if leader == 0:
        os.setpgid(0, 0)
        os.write(tell, b"x")
        signal.pause()
    os.read(ready, 1)
    member = Child(lambda: os.setpgid(0, leader))
    member.ask("1")
    os.kill(leader, signal.SIGKILL)
    os.waitpid(leader, 0)
    ask, asked = os.pipe()
    answers, answer = os.pipe()
    session = os.fork()
    if session == 0:
        os.setsid()
        if os.fork() == 0:
            Child._serve(ask, answer)
        os._exit(0)
    os.waitpid(session, 0)

    def orphan():
        os.write(asked, b"(os.getpid(), os.getppid(), os.getsid(0))\n")
        return eval(read_line(answers))

    eventually(lambda: orphan()[1] == 1, "adoption by init")
    before = orphan()
    others = []
    refused = 0
    # Who has just ended may count for a moment.
    while refused < 30 and len(others) < 100:
        try:
            others.append(Child())
        except BlockingIOError:
            refused += 1
            time.sleep(0.01)

    def mutate():
        others[0].kill()
        member.kill()

    def check():
        equal(orphan(), before, "the orphan")
        equal(member.ask("os.getpgid(0)"), leader, "the group")
        equal([other.ask("6 * 7") for other in others], [42] * len(others), "answers")
        raises(errno.EAGAIN, Child)

    return mutate, check
