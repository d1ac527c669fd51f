/* Threads and processes that are born and die, and mappings that come and go, all at once. Each checks what it has. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition) ((condition) ? (void)0 : fail(__LINE__, #condition))

static int rounds;

static void fail(int line, const char *what) {
    fprintf(stderr, "FAIL line %d: %s (%s)\n", line, what, strerror(errno));
    _exit(1);
}

static unsigned roll(unsigned *dice) {
    *dice = *dice * 1103515245 + 12345;
    return *dice >> 8;
}

static void *add_one(void *number) {
    return (void *)((intptr_t)number + 1);
}

static void *threads(void *unused) {
    for (int i = 0; i < 20 * rounds; i++) {
        pthread_t all[4];
        for (intptr_t t = 0; t < 4; t++)
            CHECK(pthread_create(&all[t], NULL, add_one, (void *)t) == 0);
        for (intptr_t t = 0; t < 4; t++) {
            void *result;
            CHECK(pthread_join(all[t], &result) == 0 && (intptr_t)result == t + 1);
        }
    }
    return unused;
}

static void exit_of(pid_t child, int wanted) {
    int status;
    CHECK(child > 0);
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == wanted);
}

/* Children, and children of theirs, some of which run another program. */
static void *processes(void *unused) {
    for (int i = 0; i < 3 * rounds; i++) {
        pid_t child = fork();
        if (child == 0) {
            pid_t grandchild = fork();
            if (grandchild == 0)
                _exit(i % 100);
            int status;
            if (waitpid(grandchild, &status, 0) != grandchild || WEXITSTATUS(status) != i % 100)
                _exit(101);
            execl("/bin/sh", "sh", "-c", "exit 7", (char *)NULL);
            _exit(102);
        }
        exit_of(child, 7);
        child = vfork();
        if (child == 0) {
            execl("/bin/true", "true", (char *)NULL);
            _exit(103);
        }
        exit_of(child, 0);
    }
    return unused;
}

enum { PAGE = 4096, MAPPINGS = 40, LARGEST = 64 };

struct mapping {
    unsigned char *at;
    size_t pages;
    unsigned char byte;
};

static void check_mapping(const struct mapping *m) {
    for (size_t page = 0; page < m->pages; page++)
        CHECK(m->at[page * PAGE] == (unsigned char)(m->byte + page));
}

static void fill(struct mapping *m) {
    for (size_t page = 0; page < m->pages; page++)
        m->at[page * PAGE] = (unsigned char)(m->byte + page);
}

/* After a rollback a mapping may be two to the kernel (docs/limits.md). Then it is copied, as realloc does. */
static unsigned char *resized(struct mapping *m, size_t pages) {
    void *at = mremap(m->at, m->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE);
    if (at == MAP_FAILED && errno == EFAULT) {
        at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(at != MAP_FAILED);
        memcpy(at, m->at, (pages < m->pages ? pages : m->pages) * PAGE);
        CHECK(munmap(m->at, m->pages * PAGE) == 0);
    }
    CHECK(at != MAP_FAILED);
    return at;
}

static void *mappings(void *seed) {
    unsigned dice = (unsigned)(intptr_t)seed;
    struct mapping all[MAPPINGS] = {0};
    for (int i = 0; i < 400 * rounds; i++) {
        struct mapping *m = &all[roll(&dice) % MAPPINGS];
        if (m->at == NULL) {
            m->pages = 1 + roll(&dice) % LARGEST;
            m->byte = (unsigned char)roll(&dice);
            m->at = mmap(NULL, m->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            CHECK(m->at != MAP_FAILED);
            fill(m);
            continue;
        }
        check_mapping(m);
        size_t pages = 1 + roll(&dice) % LARGEST;
        switch (roll(&dice) % 5) {
        case 0:
            CHECK(munmap(m->at, m->pages * PAGE) == 0);
            m->at = NULL;
            break;
        case 1:
            CHECK(mprotect(m->at, m->pages * PAGE, PROT_READ) == 0);
            check_mapping(m);
            CHECK(mprotect(m->at, m->pages * PAGE, PROT_READ | PROT_WRITE) == 0);
            break;
        case 2:
            m->at = resized(m, pages);
            for (size_t page = m->pages; page < pages; page++)
                CHECK(m->at[page * PAGE] == 0);
            m->pages = pages;
            fill(m);
            break;
        case 3:
            CHECK(madvise(m->at, m->pages * PAGE, MADV_DONTNEED) == 0);
            CHECK(m->at[0] == 0);
            fill(m);
            break;
        default:
            m->byte++;
            fill(m);
        }
    }
    return NULL;
}

int main(int argc, char **argv) {
    pthread_t all[4];
    (void)argc;
    rounds = atoi(argv[1]);
    printf("begun\n");
    fflush(stdout);
    CHECK(pthread_create(&all[0], NULL, threads, NULL) == 0);
    CHECK(pthread_create(&all[1], NULL, processes, NULL) == 0);
    CHECK(pthread_create(&all[2], NULL, mappings, (void *)1) == 0);
    CHECK(pthread_create(&all[3], NULL, mappings, (void *)2) == 0);
    for (int i = 0; i < 4; i++)
        CHECK(pthread_join(all[i], NULL) == 0);
    printf("ended\n");
    return 0;
}
