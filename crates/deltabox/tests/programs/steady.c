/* Workers that notice an EINTR, a lost wake-up, a lost or invented signal, a time that is not kept. Each does a fixed amount of
 * work for each second of the argument, and prints what came out of it, which is the same on every run. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int seconds;

static void fail(const char *format, ...) {
    va_list args;
    int number = errno;
    va_start(args, format);
    fprintf(stderr, "FAIL ");
    vfprintf(stderr, format, args);
    fprintf(stderr, " (errno %d: %s)\n", number, strerror(number));
    va_end(args);
    _exit(1);
}

#define CHECK(condition) ((condition) ? (void)0 : fail("line %d: %s", __LINE__, #condition))

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static struct timespec milliseconds(long ms) {
    return (struct timespec){ms / 1000, ms % 1000 * 1000000};
}

static long futex(int *word, int operation, int value, struct timespec *timeout) {
    return syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, timeout, NULL, 0);
}

/* Two threads that wake each other. */
static int turn;

static void *answer(void *unused) {
    for (int i = 0; i < 3000 * seconds; i++) {
        while (__atomic_load_n(&turn, __ATOMIC_ACQUIRE) != 1)
            CHECK(futex(&turn, FUTEX_WAIT, 0, NULL) == 0 || errno == EAGAIN);
        __atomic_store_n(&turn, 0, __ATOMIC_RELEASE);
        CHECK(futex(&turn, FUTEX_WAKE, 1, NULL) >= 0);
    }
    return unused;
}

static void *ping_pong(void *unused) {
    pthread_t other;
    CHECK(pthread_create(&other, NULL, answer, NULL) == 0);
    for (int i = 0; i < 3000 * seconds; i++) {
        __atomic_store_n(&turn, 1, __ATOMIC_RELEASE);
        CHECK(futex(&turn, FUTEX_WAKE, 1, NULL) >= 0);
        while (__atomic_load_n(&turn, __ATOMIC_ACQUIRE) != 0)
            CHECK(futex(&turn, FUTEX_WAIT, 1, NULL) == 0 || errno == EAGAIN);
    }
    pthread_join(other, NULL);
    printf("ping-pong %d\n", 3000 * seconds);
    return unused;
}

/* Bytes through a pipe, in pieces that do not fit, from another process, which is waited for. A blocked write that has moved
 * bytes may return short. */
static void *pipe_bytes(void *unused) {
    int ends[2];
    CHECK(pipe(ends) == 0);
    long total = 2000000L * seconds;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        static unsigned char piece[150000];
        for (long at = 0; at < total;) {
            long size = total - at < (long)sizeof piece ? total - at : (long)sizeof piece;
            for (long i = 0; i < size; i++)
                piece[i] = (unsigned char)((at + i) * 7 >> 3);
            ssize_t n = write(ends[1], piece, (size_t)size);
            CHECK(n > 0);
            at += n;
        }
        _exit(17);
    }
    close(ends[1]);
    uint64_t sum = 0, got = 0;
    unsigned char piece[9999];
    for (;;) {
        ssize_t n = read(ends[0], piece, sizeof piece);
        CHECK(n >= 0);
        if (n == 0)
            break;
        for (ssize_t i = 0; i < n; i++)
            sum = sum * 31 + piece[i];
        got += (uint64_t)n;
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    printf("pipe %lu bytes, sum %lx, status %d\n", got, sum, WEXITSTATUS(status));
    return unused;
}

/* Queued signals to a process that waits for them, half of them by a handler. After every so many the sender waits until all
 * have been taken, as whoever queues signals must: there is a limit to how many may wait. */
enum { SIGNALS = 300 };
static volatile sig_atomic_t handled;
static volatile long handled_sum;

static void handle(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    handled++;
    handled_sum += info->si_value.sival_int;
}

static void receive_signals(int ready) {
    long sum = 0;
    sigset_t waited, none;
    sigemptyset(&none);
    sigemptyset(&waited);
    sigaddset(&waited, SIGRTMIN);
    struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO};
    CHECK(sigaction(SIGRTMIN + 1, &action, NULL) == 0);
    for (int second = 1; second <= seconds; second++) {
        CHECK(write(ready, "r", 1) == 1);
        for (int i = 0; i < SIGNALS; i++) {
            siginfo_t info;
            CHECK(sigwaitinfo(&waited, &info) == SIGRTMIN);
            sum += info.si_value.sival_int;
        }
        while (handled < second * SIGNALS)
            CHECK(sigsuspend(&none) == -1 && errno == EINTR);
    }
    printf("signals %d and %d, sums %ld and %ld\n", seconds * SIGNALS, (int)handled, sum, handled_sum);
    fflush(stdout);
    _exit(0);
}

static void *signals(void *unused) {
    int ready[2], status;
    char byte;
    CHECK(pipe(ready) == 0);
    fflush(stdout);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0)
        receive_signals(ready[1]);
    for (int i = 0; i < seconds * SIGNALS; i++) {
        if (i % SIGNALS == 0)
            CHECK(read(ready[0], &byte, 1) == 1);
        for (int kind = 0; kind < 2; kind++)
            CHECK(sigqueue(child, SIGRTMIN + kind, (union sigval){.sival_int = i * (kind + 1)}) == 0);
        struct timespec pause = milliseconds(1);
        CHECK(nanosleep(&pause, NULL) == 0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    printf("receiver's status %d\n", status);
    return unused;
}

/* Every kind of wait that ends by its time alone: never early, never by EINTR. */
static int wait_for(int kind, int epoll, long ms) {
    struct timespec limit = milliseconds(ms);
    struct timeval limit_us = {ms / 1000, ms % 1000 * 1000};
    sigset_t waited;
    int word = 1;
    sigemptyset(&waited);
    sigaddset(&waited, SIGRTMIN + 2);
    struct epoll_event event;
    switch (kind) {
    case 0: return nanosleep(&limit, NULL) == 0;
    case 1: return clock_nanosleep(CLOCK_MONOTONIC, 0, &limit, &limit) == 0;
    case 2: return poll(NULL, 0, (int)ms) == 0;
    case 3: return ppoll(NULL, 0, &limit, NULL) == 0;
    case 4: return select(0, NULL, NULL, NULL, &limit_us) == 0;
    case 5: return epoll_wait(epoll, &event, 1, (int)ms) == 0;
    case 6: return sigtimedwait(&waited, NULL, &limit) == -1 && errno == EAGAIN;
    case 7: return futex(&word, FUTEX_WAIT, 1, &limit) == -1 && errno == ETIMEDOUT;
    case 8: return syscall(SYS_epoll_pwait2, epoll, &event, 1, &limit, NULL, 8) == 0;
    default: return -1;
    }
}

static const long LIMITS[] = {3, 11, 25, 70};

static void *timed_waits(void *argument) {
    int kind = (int)(intptr_t)argument;
    int epoll = epoll_create1(0), waits = 0;
    CHECK(epoll >= 0);
    for (int second = 0; second < seconds; second++)
        for (int i = 0; i < 32; i++) {
            long ms = LIMITS[i % 4];
            int64_t begin = now();
            if (!wait_for(kind, epoll, ms))
                fail("wait of kind %d", kind);
            if (now() - begin < ms * 1000000)
                fail("wait of kind %d: over after %ld ns instead of %ld ms", kind, now() - begin, ms);
            waits++;
        }
    printf("waits of kind %d: %d\n", kind, waits);
    return NULL;
}

/* A timer that ticks: no tick is lost or invented, however late they are read. */
static void *ticks(void *unused) {
    int timer = timerfd_create(CLOCK_MONOTONIC, 0);
    struct itimerspec setting = {milliseconds(5), milliseconds(5)};
    int64_t begin = now();
    CHECK(timer >= 0 && timerfd_settime(timer, 0, &setting, NULL) == 0);
    uint64_t told = 0, n, wanted = 150 * (uint64_t)seconds;
    while (told < wanted) {
        CHECK(read(timer, &n, sizeof n) == sizeof n);
        told += n;
        if (told * 5000000 > (uint64_t)(now() - begin))
            fail("%lu ticks after %ld ns", told, now() - begin);
    }
    printf("ticks %lu\n", wanted);
    return unused;
}

/* Edges of an eventfd and of a connection, by an epoll without a limit. */
static int counter, connection[2];

static void *ring(void *unused) {
    for (int i = 0; i < 1000 * seconds; i++) {
        uint64_t one = 1;
        char byte;
        CHECK(write(counter, &one, sizeof one) == sizeof one);
        CHECK(write(connection[1], "x", 1) == 1);
        CHECK(read(connection[1], &byte, 1) == 1);
    }
    return unused;
}

static void *edges(void *unused) {
    counter = eventfd(0, EFD_NONBLOCK);
    CHECK(counter >= 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, connection) == 0);
    int epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.fd = counter};
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, counter, &event) == 0);
    event.data.fd = connection[0];
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, connection[0], &event) == 0);
    pthread_t bell;
    CHECK(pthread_create(&bell, NULL, ring, NULL) == 0);
    uint64_t counted = 0, n;
    int bytes = 0;
    while (counted < 1000 * (uint64_t)seconds || bytes < 1000 * seconds) {
        CHECK(epoll_wait(epoll, &event, 1, -1) == 1);
        char byte;
        if (event.data.fd == counter) {
            if (read(counter, &n, sizeof n) == sizeof n)
                counted += n;
        } else if (recv(connection[0], &byte, 1, MSG_DONTWAIT) == 1) {
            bytes++;
            CHECK(write(connection[0], "y", 1) == 1);
        }
    }
    pthread_join(bell, NULL);
    printf("edges %lu, bytes %d\n", counted, bytes);
    return unused;
}

/* A condition that is waited for with a limit that is never reached. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int stage;

static void *reach(void *argument) {
    int parity = (int)(intptr_t)argument;
    pthread_mutex_lock(&lock);
    while (stage < 1000 * seconds) {
        struct timespec limit;
        clock_gettime(CLOCK_REALTIME, &limit);
        limit.tv_sec += 600;
        while (stage % 2 != parity && stage < 1000 * seconds)
            CHECK(pthread_cond_timedwait(&changed, &lock, &limit) == 0);
        stage++;
        pthread_cond_signal(&changed);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

int main(int argc, char **argv) {
    enum { KINDS = 9 };
    void *(*const works[])(void *) = {ping_pong, pipe_bytes, signals, ticks, edges};
    pthread_t threads[16];
    int count = 0;
    sigset_t blocked;
    (void)argc;
    seconds = atoi(argv[1]);
    sigfillset(&blocked);
    CHECK(pthread_sigmask(SIG_BLOCK, &blocked, NULL) == 0);
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("begun\n");
    for (intptr_t parity = 0; parity < 2; parity++)
        CHECK(pthread_create(&threads[count++], NULL, reach, (void *)parity) == 0);
    for (unsigned i = 0; i < sizeof works / sizeof *works; i++)
        CHECK(pthread_create(&threads[count++], NULL, works[i], NULL) == 0);
    for (intptr_t kind = 0; kind < KINDS; kind++)
        CHECK(pthread_create(&threads[count++], NULL, timed_waits, (void *)kind) == 0);
    while (count > 0)
        pthread_join(threads[--count], NULL);
    printf("conditions %d\n", stage > 1000 * seconds);
    return 0;
}
