/* Operations between two processes. A partner is forked when first needed, and blocks wherever it is not measured. */
#include "floor.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define MESSAGE 16        /* bytes, of the socket's round trip */
#define LOOKS 4096        /* in vain, before it is asked whether the other side runs at all */
#define WARM_SPINS 1000   /* round trips before the clock starts: both sides are awake then */
#define WARM_EXCHANGES 10 /* the same */

#define PIPE_ROOM (1 << 20) /* bytes: what Linux lets everybody have unless told otherwise */

#define SEND 's' /* orders to a partner that streams */
#define RECEIVE 'r'

struct words { /* what the spinning sides look at, each on a cache line (and its neighbour) of its own */
    _Alignas(128) _Atomic uint64_t there;
    _Alignas(128) _Atomic uint64_t back;
    _Alignas(128) uint64_t rounds;
};

enum kind { HAS_BYTES, STREAMS, SPINS, ECHOES };

#define PARTNERS 16
static struct partner {
    volatile pid_t pid; /* 0: a free slot */
    enum kind kind;
    size_t length; /* bytes, 0 where it has none */
    int to, from;
    unsigned char *shared; /* at the same address in both */
} partners[PARTNERS];

static bool read_all(int fd, unsigned char *bytes, size_t length) {
    for (size_t done = 0; done < length;) {
        ssize_t n = read(fd, bytes + done, length - done);
        if (n < 0) return fail_errno("read");
        if (n == 0) return fail("the partner ended");
        done += (size_t)n;
    }
    return true;
}

static bool write_all(int fd, const unsigned char *bytes, size_t length) {
    for (size_t done = 0; done < length;) {
        ssize_t n = write(fd, bytes + done, length - done);
        if (n < 0) return fail_errno("write");
        done += (size_t)n;
    }
    return true;
}

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Until `word` has become `value`; false when `partner` (0: nobody to ask about) has ended. */
static bool await(_Atomic uint64_t *word, uint64_t value, pid_t partner) {
    for (unsigned looks = 1; atomic_load_explicit(word, memory_order_acquire) != value; looks++) {
        relax();
        if (looks % LOOKS) continue;
        siginfo_t info = {0};
        if (partner && (waitid(P_PID, (id_t)partner, &info, WEXITED | WNOHANG | WNOWAIT) || info.si_pid))
            return fail("the partner ended");
        sched_yield(); /* it may be waiting for this very CPU */
    }
    return true;
}

/* ---- what a partner does: its orders are descriptor 0, its answers 1 ---- */

static void stream_side(size_t length) {
    unsigned char *buffer = anonymous(length, MAP_PRIVATE);
    unsigned char order = 0;
    if (!buffer || !write_all(1, &order, 1)) return;
    while (read_all(0, &order, 1)) {
        bool good = order == SEND ? write_all(1, buffer, length)
                                  : read_all(0, buffer, length) && write_all(1, &order, 1);
        if (!good) return;
    }
}

static void spin_side(struct words *words) {
    unsigned char order = 0;
    if (!write_all(1, &order, 1)) return;
    while (read_all(0, &order, 1)) {
        for (uint64_t i = 1; i <= words->rounds; i++) {
            await(&words->there, i, 0);
            atomic_store_explicit(&words->back, i, memory_order_release);
        }
    }
}

static void echo_side(void) {
    unsigned char message[MESSAGE] = {0};
    if (!write_all(1, message, 1)) return;
    while (recv(0, message, MESSAGE, 0) == MESSAGE && send(1, message, MESSAGE, 0) == MESSAGE) continue;
}

static void wait_side(void) {
    unsigned char order = 0;
    if (write_all(1, &order, 1)) read_all(0, &order, 1);
}

static _Noreturn void run_partner(const struct partner *partner, pid_t parent, int in, int out) {
    signal(SIGTERM, SIG_DFL);
    signal(SIGINT, SIG_DFL);
    /* The parent may have died before the prctl. Other partners' pipes must not be kept open by this one. */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != parent) _exit(1);
    if (dup2(in, 0) != 0 || dup2(out, 1) != 1 || close_range(3, ~0U, 0)) _exit(1);
    switch (partner->kind) {
    case HAS_BYTES:
        wait_side();
        break;
    case STREAMS:
        stream_side(partner->length);
        break;
    case SPINS:
        spin_side((struct words *)partner->shared);
        break;
    case ECHOES:
        echo_side();
        break;
    }
    _exit(0);
}

/* ---- having partners ---- */

static bool kill_partner(struct partner *partner) {
    pid_t pid = partner->pid;
    if (!pid) return false;
    partner->pid = 0; /* first: a signal handler must not kill who has been waited for */
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    return true;
}

/* Only what a signal handler may do: memory and descriptors go with the process, which is about to end. */
void stop_partners(void) {
    for (struct partner *partner = partners; partner < partners + PARTNERS; partner++) kill_partner(partner);
}

static void close_two(int one, int other) {
    close(one);
    if (other != one) close(other);
}

static void drop(struct partner *partner) {
    if (!kill_partner(partner)) return;
    close_two(partner->to, partner->from);
    if (partner->shared) munmap(partner->shared, round_up(partner->length, page));
}

struct ends {
    int in, out;  /* the partner's */
    int to, from; /* ours */
};

static bool connect_ends(enum kind kind, struct ends *ends) {
    int orders[2], answers[2];
    if (kind == ECHOES) {
        if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, orders)) {
            fail_errno("socketpair");
            return false;
        }
        *ends = (struct ends){.in = orders[0], .out = orders[0], .to = orders[1], .from = orders[1]};
        return true;
    }
    if (pipe2(orders, O_CLOEXEC)) {
        fail_errno("pipe");
        return false;
    }
    if (pipe2(answers, O_CLOEXEC)) {
        fail_errno("pipe");
        close_two(orders[0], orders[1]);
        return false;
    }
    if (kind == STREAMS) { /* larger is faster; where it is not allowed, it stays as it is */
        fcntl(orders[1], F_SETPIPE_SZ, PIPE_ROOM);
        fcntl(answers[1], F_SETPIPE_SZ, PIPE_ROOM);
    }
    *ends = (struct ends){.in = orders[0], .out = answers[1], .to = orders[1], .from = answers[0]};
    return true;
}

static bool start(struct partner *partner, enum kind kind, size_t length) {
    struct ends ends;
    if (!connect_ends(kind, &ends)) return false;
    *partner = (struct partner){.kind = kind, .length = length, .to = ends.to, .from = ends.from};
    bool shares = kind == HAS_BYTES || kind == SPINS;
    pid_t self = getpid(), pid = -1;
    if (!shares || (partner->shared = anonymous(length, MAP_SHARED))) {
        pid = fork();
        if (pid < 0) fail_errno("fork");
    }
    if (pid == 0) run_partner(partner, self, ends.in, ends.out);
    close_two(ends.in, ends.out);
    if (pid < 0) {
        close_two(ends.to, ends.from);
        if (partner->shared) munmap(partner->shared, round_up(length, page));
        return false;
    }
    partner->pid = pid;
    unsigned char ready;
    if (read_all(partner->from, &ready, 1)) return true;
    drop(partner);
    return false;
}

static struct partner *have(enum kind kind, size_t length) {
    static unsigned next;
    for (struct partner *partner = partners; partner < partners + PARTNERS; partner++)
        if (partner->pid && partner->kind == kind && partner->length == length) return partner;
    struct partner *partner = &partners[next++ % PARTNERS];
    drop(partner);
    return start(partner, kind, length) ? partner : NULL;
}

static bool put_on(pid_t pid, int cpu) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    return sched_setaffinity(pid, sizeof one, &one) == 0 || fail_errno("sched_setaffinity");
}

static bool pin(const struct request *request, pid_t partner, const cpu_set_t *allowed) {
    int cpus[2], found = 0;
    if (!request->pin) return true;
    for (int cpu = 0; cpu < CPU_SETSIZE && found < 2; cpu++)
        if (CPU_ISSET(cpu, allowed)) cpus[found++] = cpu;
    if (found < 2) return fail("only one CPU");
    return put_on(0, cpus[0]) && put_on(partner, cpus[1]);
}

static bool unpin(pid_t partner, const cpu_set_t *allowed) {
    bool good = sched_setaffinity(0, sizeof *allowed, allowed) == 0;
    return (sched_setaffinity(partner, sizeof *allowed, allowed) == 0 && good) || fail_errno("sched_setaffinity");
}

/* ---- operations ---- */

/* Operations `first` to `first + count - 1` of one request; those before `warm` are not timed. */
typedef bool operations(const struct request *request, const struct partner *partner, uint64_t first, uint64_t count);

static bool measure(const struct request *request, struct partner *partner, operations *run, uint64_t warm,
                    uint64_t *ns) {
    cpu_set_t allowed;
    if (!partner) return false;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return fail_errno("sched_getaffinity");
    bool good = pin(request, partner->pid, &allowed) && run(request, partner, 0, warm);
    uint64_t start = now();
    good = good && run(request, partner, warm, request->count);
    *ns = now() - start;
    if (good && request->pin) good = unpin(partner->pid, &allowed);
    if (!good) { /* it may be anywhere in its part of this: the next request gets a new one */
        drop(partner);
        sched_setaffinity(0, sizeof allowed, &allowed);
    }
    return good;
}

static bool copy_remote_some(const struct request *request, const struct partner *partner, uint64_t first,
                             uint64_t count) {
    unsigned char *buffer = warm_buffer(request->length);
    bool write = request->work == WORK_WRITE;
    if (!buffer) return false;
    for (uint64_t i = first; i < first + count; i++) {
        if (write) do_work(WORK_WRITE, buffer, request->length);
        for (size_t done = 0; done < request->length;) {
            struct iovec here = {buffer + done, request->length - done};
            struct iovec there = {partner->shared + done, request->length - done};
            ssize_t n = write ? process_vm_writev(partner->pid, &here, 1, &there, 1, 0)
                              : process_vm_readv(partner->pid, &here, 1, &there, 1, 0);
            if (n < 0) return fail_errno(write ? "process_vm_writev" : "process_vm_readv");
            if (n == 0) return fail("the partner's memory ended at %zu bytes", done);
            done += (size_t)n;
        }
        if (!write) do_work(request->work, buffer, request->length);
    }
    return true;
}

bool copy_remote(const struct request *request, uint64_t *ns) {
    return measure(request, have(HAS_BYTES, request->length), copy_remote_some, 1, ns);
}

static bool stream_some(const struct request *request, const struct partner *partner, uint64_t first, uint64_t count) {
    unsigned char *buffer = warm_buffer(request->length);
    bool write = request->work == WORK_WRITE;
    const unsigned char order = write ? RECEIVE : SEND;
    unsigned char done;
    if (!buffer) return false;
    for (uint64_t i = first; i < first + count; i++) {
        if (write) do_work(WORK_WRITE, buffer, request->length);
        if (!write_all(partner->to, &order, 1)) return false;
        if (write && !(write_all(partner->to, buffer, request->length) && read_all(partner->from, &done, 1)))
            return false;
        if (!write && !read_all(partner->from, buffer, request->length)) return false;
        if (!write) do_work(request->work, buffer, request->length);
    }
    return true;
}

bool stream(const struct request *request, uint64_t *ns) {
    return measure(request, have(STREAMS, request->length), stream_some, 1, ns);
}

static bool spin_some(const struct request *request, const struct partner *partner, uint64_t first, uint64_t count) {
    struct words *words = (struct words *)partner->shared;
    if (first == 0) { /* it blocks: wake it, for the warm-up and what is timed together */
        const unsigned char order = 0;
        atomic_store(&words->there, 0);
        atomic_store(&words->back, 0);
        words->rounds = WARM_SPINS + request->count;
        if (!write_all(partner->to, &order, 1)) return false;
    }
    for (uint64_t i = first + 1; i <= first + count; i++) {
        atomic_store_explicit(&words->there, i, memory_order_release);
        if (!await(&words->back, i, partner->pid)) return false;
    }
    return true;
}

bool spin(const struct request *request, uint64_t *ns) {
    return measure(request, have(SPINS, sizeof(struct words)), spin_some, WARM_SPINS, ns);
}

static bool exchange_some(const struct request *request, const struct partner *partner, uint64_t first,
                          uint64_t count) {
    unsigned char message[MESSAGE] = {0};
    (void)request;
    for (uint64_t i = first; i < first + count; i++) {
        if (send(partner->to, message, MESSAGE, 0) != MESSAGE) return fail_errno("send");
        ssize_t n = recv(partner->from, message, MESSAGE, 0);
        if (n < 0) return fail_errno("recv");
        if (n != MESSAGE) return fail("the partner ended");
    }
    return true;
}

bool exchange(const struct request *request, uint64_t *ns) {
    return measure(request, have(ECHOES, 0), exchange_some, WARM_EXCHANGES, ns);
}
