"""Timers that are set again and again for a short time."""

import random


def tick(report, set_again):
    """Each setting must be answered by one signal. Tells how often that was so now and then, or what else happened."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    # Of many threads a checkpoint reads the queues one after another.
    for _ in range(100):
        threading.Thread(target=time.sleep, args=[100000], daemon=True).start()
    count = 0
    while True:
        set_again(random.random() * 0.06)
        if signal.sigtimedwait([signal.SIGALRM], 30) is None:
            os.write(report, b"lost\n")
            signal.pause()
        if signal.sigtimedwait([signal.SIGALRM], 0.0005) is not None:
            os.write(report, b"twice\n")
            signal.pause()
        count += 1
        if count % 2 == 0:
            os.write(report, b"fine\n")


def posix_timer():
    timer = Timer(5000)
    return timer.set


def interval_timer():
    return lambda first: signal.setitimer(signal.ITIMER_REAL, first)


@case
def ticking():
    reports = []
    for kind in [posix_timer, interval_timer] * 3:
        hearing, report = os.pipe()
        if os.fork() == 0:
            tick(report, kind())
        os.close(report)
        reports.append(hearing)

    def check():
        for hearing in reports:
            for _ in range(2):
                equal(read_line(hearing), "fine", "a report")

    return check, check
