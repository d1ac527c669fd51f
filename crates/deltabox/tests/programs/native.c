/* What a Python program cannot hold in its hands: registers, a deep stack, a large bss. Same lines as driver.py. */

#include <fenv.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef const char *(*act)(void);

/* Without the heap: a case counts on the break to stay. */
static void say(const char *begin, const char *rest) {
    char line[100] = "";
    strncat(line, begin, 20);
    strncat(line, rest, 60);
    strcat(line, "\n");
    if (write(1, line, strlen(line)) < 0)
        exit(1);
}

/* Serves lines until the input ends. */
static void serve(act mutate, act check) {
    char line[32];
    say("ready", "");
    for (;;) {
        size_t length = 0;
        char byte;
        while (length < sizeof line - 1) {
            if (read(0, &byte, 1) != 1)
                exit(0);
            if (byte == '\n')
                break;
            line[length++] = byte;
        }
        line[length] = 0;
        const char *wrong = strcmp(line, "mutate") == 0 ? mutate() : check();
        if (wrong)
            say("FAIL ", wrong);
        else
            say("PASS", "");
    }
}

/* --- registers: a thread that spins with a pattern in all of them and stores them when told to stop */

struct registers {
    uint64_t vector[16][4];
    uint64_t general[8];
};
static struct registers in, out;
static volatile int stop;
static _Thread_local uint64_t own;
static uint64_t own_seen;
static int rounding_seen;
static pthread_t spinner;

__attribute__((target("avx2"))) static void hold(void) {
#define LOAD(n) "vmovdqu 32*" #n "(%%rsi), %%ymm" #n "\n"
#define STORE(n) "vmovdqu %%ymm" #n ", 32*" #n "(%%rdi)\n"
#define EACH(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11) f(12) f(13) f(14) f(15)
    __asm__ volatile(
        EACH(LOAD)
        "mov 512(%%rsi), %%r8\n mov 520(%%rsi), %%r9\n mov 528(%%rsi), %%r10\n mov 536(%%rsi), %%r11\n"
        "mov 544(%%rsi), %%r12\n mov 552(%%rsi), %%r13\n mov 560(%%rsi), %%r14\n mov 568(%%rsi), %%r15\n"
        "1: pause\n cmpl $0, (%%rdx)\n je 1b\n"
        EACH(STORE)
        "mov %%r8, 512(%%rdi)\n mov %%r9, 520(%%rdi)\n mov %%r10, 528(%%rdi)\n mov %%r11, 536(%%rdi)\n"
        "mov %%r12, 544(%%rdi)\n mov %%r13, 552(%%rdi)\n mov %%r14, 560(%%rdi)\n mov %%r15, 568(%%rdi)\n"
        "vzeroupper\n"
        : : "S"(&in), "D"(&out), "d"(&stop)
        : "memory", "cc", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
          "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",
          "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

static void *spin(void *seed) {
    own = (uint64_t)(uintptr_t)seed;
    fesetround(FE_UPWARD);
    hold();
    own_seen = own;
    rounding_seen = fegetround();
    return NULL;
}

static void start_spinner(uint64_t seed) {
    uint64_t *words = (uint64_t *)&in;
    for (size_t i = 0; i < sizeof in / sizeof *words; i++)
        words[i] = (seed + i) * 0x9e3779b97f4a7c15u;
    memset(&out, 0, sizeof out);
    stop = 0;
    if (pthread_create(&spinner, NULL, spin, (void *)(uintptr_t)seed))
        exit(1);
    usleep(50000);
}

static void stop_spinner(void) {
    stop = 1;
    pthread_join(spinner, NULL);
}

static const char *mutate_registers(void) {
    stop_spinner();
    start_spinner(999);
    return NULL;
}

static const char *check_registers(void) {
    stop_spinner();
    if (memcmp(in.vector, out.vector, sizeof in.vector))
        return "vector registers";
    if (memcmp(in.general, out.general, sizeof in.general))
        return "general registers";
    if (own_seen != 7)
        return "thread-local memory";
    if (rounding_seen != FE_UPWARD)
        return "rounding mode";
    return in.general[0] == (7 + 64) * 0x9e3779b97f4a7c15u ? NULL : "pattern";
}

/* --- a stack of 3 MB with a pattern in every frame, below which the program waits */

#define FRAMES 400
static uint64_t *frames[2 * FRAMES];

static void fill(uint64_t *frame, uint64_t seed) {
    for (int i = 0; i < 1000; i++)
        frame[i] = seed * 1000003 + (uint64_t)i;
}

static const char *wrong_frame(int from, int to, uint64_t seed) {
    for (int depth = from; depth < to; depth++)
        for (int i = 0; i < 1000; i++)
            if (frames[depth][i] != (seed + (uint64_t)depth) * 1000003 + (uint64_t)i)
                return "a frame of the stack";
    return NULL;
}

__attribute__((noinline)) static const char *descend(int depth, int end, uint64_t seed, const char *(*bottom)(void)) {
    uint64_t frame[1000];
    frames[depth] = frame;
    fill(frame, seed + (uint64_t)depth);
    const char *result = depth + 1 < end ? descend(depth + 1, end, seed, bottom) : bottom();
    return frame[999] == (seed + (uint64_t)depth) * 1000003 + 999 ? result : "a frame on the way back";
}

static const char *spoil_frames(void) {
    for (int depth = 0; depth < FRAMES; depth += 3)
        fill(frames[depth], 12345);
    return NULL;
}

static const char *mutate_stack(void) {
    return descend(FRAMES, 2 * FRAMES, 5, spoil_frames);
}

static const char *nothing(void) {
    return NULL;
}

static const char *check_stack(void) {
    const char *wrong = wrong_frame(0, FRAMES, 0);
    return wrong ? wrong : descend(FRAMES, 2 * FRAMES, 77, nothing);
}

static const char *serve_stack(void) {
    serve(mutate_stack, check_stack);
    return NULL;
}

/* --- 256 MB of bss, of which one page in 64 is touched; and a break that goes down */

static char bss[256 << 20];
static char *top;

static const char *mutate_bss(void) {
    for (size_t at = 0; at < sizeof bss; at += 128 << 12)
        memset(bss + at, 0xee, 3 << 12);
    sbrk(-(2 << 20));
    sbrk(1 << 20);
    memset(top - (2 << 20), 0xee, 1 << 20);
    return NULL;
}

static const char *check_bss(void) {
    for (size_t at = 0; at < sizeof bss; at += 64 << 12) {
        if (bss[at] != (char)(at >> 18) || bss[at + 100])
            return "a page that was touched";
        if (bss[at + (1 << 12)])
            return "a page that was not touched";
    }
    if (sbrk(0) != top)
        return "the break";
    for (char *at = top - (4 << 20); at < top; at++)
        if (*at != 0x55)
            return "memory below the break";
    return NULL;
}

int main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "";
    if (strcmp(name, "registers") == 0) {
        start_spinner(7);
        serve(mutate_registers, check_registers);
    } else if (strcmp(name, "deep_stack") == 0) {
        descend(0, FRAMES, 0, serve_stack);
    } else if (strcmp(name, "large_bss_and_lower_break") == 0) {
        for (size_t at = 0; at < sizeof bss; at += 64 << 12)
            bss[at] = (char)(at >> 18);
        memset(sbrk(4 << 20), 0x55, 4 << 20);
        top = sbrk(0);
        serve(mutate_bss, check_bss);
    }
    return 2;
}
