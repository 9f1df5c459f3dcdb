/* What the machine itself takes for the things that realmap does: the same operations in C, with nothing around them.
 *
 * One request a line on stdin, `OP ARG ...` (lengths in bytes); one answer a line on stdout: `ok NANOSECONDS`, the wall
 * time of COUNT operations together, or `no REASON`. It ends, and leaves nothing behind, at the end of stdin.
 *
 *   map LENGTH COUNT WORK HOW    mmap a segment at a chosen address, WORK on it, munmap; HOW: plain, populate, huge
 *   own LENGTH COUNT WORK        WORK on a mapping that is there already
 *   pread LENGTH COUNT WORK      pread a segment into a warm buffer, WORK on that (write: fill it, pwrite)
 *   readv LENGTH COUNT WORK      the same by process_vm_readv (process_vm_writev) from another process' memory
 *   pipe LENGTH COUNT WORK       the same through a pipe, on request (write: sent there, and confirmed)
 *   spin COUNT PIN               round trips over shared memory, both sides spinning
 *   socket COUNT PIN             round trips of 16 bytes over a SOCK_SEQPACKET pair, both sides blocking
 *   make LENGTH COUNT            shm_open, shm_unlink, ftruncate, mmap, munmap, close
 *   make_commit LENGTH COUNT     the same with posix_fallocate
 *   null COUNT                   getppid: a system call that does nothing
 *
 * WORK: none, touch (8 words), read (sum of all), write (all), pages (write a byte in each). PIN: 1 puts the two processes on two CPUs.
 */
#include "floor.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_WORDS 6
#define MAX_LENGTH ((uint64_t)1 << 40) /* far below the range that `map` takes its windows from */
#define MAX_COUNT ((uint64_t)1 << 40)

char segment_path[64];
size_t page;

static char reason[256];

bool fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(reason, sizeof reason, format, arguments);
    va_end(arguments);
    return false;
}

bool fail_errno(const char *what) { return fail("%s: %s", what, strerror(errno)); }

uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

size_t round_up(size_t length, size_t unit) { return (length + unit - 1) / unit * unit; }

static bool null(const struct request *request, uint64_t *ns) {
    uint64_t start = now();
    for (uint64_t i = 0; i < request->count; i++) syscall(SYS_getppid); /* not getppid(): a libc may remember it */
    *ns = now() - start;
    return true;
}

static const struct {
    const char *name;
    const char *takes; /* a letter for each argument, see parse() */
    const char *usage;
    operation *run;
} operations[] = {
    {"map", "LCWH", "LENGTH COUNT WORK HOW", map},
    {"own", "LCW", "LENGTH COUNT WORK", own},
    {"pread", "LCW", "LENGTH COUNT WORK", copy},
    {"readv", "LCW", "LENGTH COUNT WORK", copy_remote},
    {"pipe", "LCW", "LENGTH COUNT WORK", stream},
    {"spin", "CP", "COUNT PIN", spin},
    {"socket", "CP", "COUNT PIN", exchange},
    {"make", "LC", "LENGTH COUNT", make},
    {"make_commit", "LC", "LENGTH COUNT", make_commit},
    {"null", "C", "COUNT", null},
};

static bool parse_number(const char *what, const char *word, uint64_t max, uint64_t *number) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(word, &end, 10);
    if (word[0] < '0' || word[0] > '9' || *end || errno || value < 1 || value > max)
        return fail("%s is a whole number from 1 to %llu, not %s", what, (unsigned long long)max, word);
    *number = value;
    return true;
}

static bool parse_choice(const char *what, const char *word, const char *const *choices, int count, int *choice) {
    for (int i = 0; i < count; i++) {
        if (strcmp(word, choices[i]) == 0) {
            *choice = i;
            return true;
        }
    }
    return fail("there is no %s %s", what, word);
}

static bool parse(char kind, const char *word, struct request *request) {
    static const char *const works[] = {"none", "touch", "read", "write", "pages"};
    static const char *const hows[] = {"plain", "populate", "huge"};
    static const char *const pins[] = {"0", "1"};
    uint64_t number = 0;
    int choice = 0;
    bool good = false;
    switch (kind) {
    case 'L':
        good = parse_number("LENGTH", word, MAX_LENGTH, &number);
        request->length = (size_t)number;
        break;
    case 'C':
        good = parse_number("COUNT", word, MAX_COUNT, &request->count);
        break;
    case 'W':
        good = parse_choice("WORK", word, works, 5, &choice);
        request->work = (enum work)choice;
        break;
    case 'H':
        good = parse_choice("HOW", word, hows, 3, &choice);
        request->how = (enum how)choice;
        break;
    case 'P':
        good = parse_choice("PIN", word, pins, 2, &choice);
        request->pin = choice;
        break;
    }
    return good;
}

static bool serve(char *line, uint64_t *ns) {
    char *words[MAX_WORDS + 1];
    size_t count = 0;
    for (char *word = strtok(line, " \n"); word; word = strtok(NULL, " \n")) {
        if (count > MAX_WORDS) break; /* one too many is enough to be refused below */
        words[count++] = word;
    }
    if (count == 0) return fail("an empty request");
    for (size_t i = 0; i < sizeof operations / sizeof *operations; i++) {
        if (strcmp(words[0], operations[i].name) != 0) continue;
        if (count - 1 != strlen(operations[i].takes)) return fail("%s takes %s", words[0], operations[i].usage);
        struct request request = {0};
        for (size_t j = 1; j < count; j++)
            if (!parse(operations[i].takes[j - 1], words[j], &request)) return false;
        return operations[i].run(&request, ns);
    }
    return fail("unknown op %s", words[0]);
}

static pid_t watcher;
static int watched; /* our end of the pipe that it reads */

/* A process that only waits for the end of this one, to unlink what a SIGKILL between shm_open and shm_unlink left. */
static bool start_watcher(void) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC)) return false;
    watcher = fork();
    if (watcher < 0) return false;
    if (watcher == 0) {
        signal(SIGTERM, SIG_IGN);
        signal(SIGINT, SIG_IGN);
        char nothing;
        if (dup2(ends[0], 0) == 0 && close_range(1, ~0U, 0) == 0 && read(0, &nothing, 1) == 0) unlink(segment_path);
        _exit(0);
    }
    close(ends[0]);
    watched = ends[1];
    return true;
}

static void stop_watcher(void) { /* safe in a signal handler */
    close(watched);
    waitpid(watcher, NULL, 0);
}

static void stop(int number) {
    stop_partners();
    stop_watcher();
    signal(number, SIG_DFL);
    raise(number);
}

int main(void) {
    page = (size_t)sysconf(_SC_PAGESIZE);
    /* The time makes it new even where a killed process of the same pid left its name behind. */
    snprintf(segment_path, sizeof segment_path, "/dev/shm/realmap-bench-%d-%llx", (int)getpid(),
             (unsigned long long)now());
    if (!start_watcher()) {
        perror("floor");
        return 1;
    }
    signal(SIGTERM, stop);
    signal(SIGINT, stop);
    signal(SIGPIPE, SIG_IGN); /* a write to whoever died should fail, not kill */
    char *line = NULL;
    size_t room = 0;
    bool heard = true;
    while (heard && getline(&line, &room, stdin) >= 0) {
        uint64_t ns;
        if (serve(line, &ns))
            printf("ok %llu\n", (unsigned long long)ns);
        else
            printf("no %s\n", reason);
        heard = fflush(stdout) == 0;
    }
    free(line);
    stop_partners();
    stop_watcher();
    free_memory();
    return heard ? 0 : 1;
}
