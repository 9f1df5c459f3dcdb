/* The guard: a handler of SIGBUS that puts zero pages in place of what was truncated. No Python. */
#include "core.h"

/* A segment may be truncated by whoever can open it, at any moment, and touching what is gone raises SIGBUS. The
 * handler puts zero pages over the rest of that window in one mmap (page by page would reach the limit of mappings),
 * notes it, and returns: who touched it goes on, and is told afterwards. Any other SIGBUS goes to whoever had the
 * signal before.
 *
 *      guard_take ─▶ guard_arm ⇄ guard_disarm ─▶ guard_release
 *                    mapped       before it is unmapped
 *
 * These and stand_guard are for one thread at a time: in the core, for whoever has the GIL. The handler runs on any
 * thread, at any moment: it reads the table below, which never moves nor shrinks, and makes system calls; no locks, no
 * memory. A window that is being touched is not unmapped meanwhile (its exports are counted), so its entry stands
 * still; the others may change while they are looked at. */

#define NO_ZEROS UINTPTR_MAX
#define CHUNK 1024u
#define CHUNKS 16384u /* of 1024: more windows than Linux allows mappings by default, by two orders */

static Guarded *_Atomic chunks[CHUNKS];
static _Atomic uint32_t guarded_count; /* entries that were ever in use */
static uint32_t free_guarded;          /* the first one without a window: one more than its index */
static _Atomic uint64_t faults;        /* how often zero pages had to be put somewhere */

static Guarded *guarded_at(uint32_t index)
{
    return &atomic_load_explicit(&chunks[index / CHUNK], memory_order_acquire)[index % CHUNK];
}

/* An entry for a window that is about to be mapped, and to be armed then; NULL: no memory for it. */
static Guarded *guard_take(uintptr_t base, int prot, int inherited)
{
    Guarded *entry;
    if (free_guarded) {
        entry = guarded_at(free_guarded - 1);
        free_guarded = entry->next;
    } else {
        uint32_t index = atomic_load_explicit(&guarded_count, memory_order_relaxed);
        if (index == CHUNK * CHUNKS)
            return NULL;
        if (index % CHUNK == 0) {
            Guarded *chunk = calloc(CHUNK, sizeof *chunk);
            if (!chunk)
                return NULL;
            atomic_store_explicit(&chunks[index / CHUNK], chunk, memory_order_release);
        }
        entry = guarded_at(index);
        entry->index = index;
        atomic_store_explicit(&guarded_count, index + 1, memory_order_release);
    }
    atomic_store_explicit(&entry->prot, prot, memory_order_relaxed);
    atomic_store_explicit(&entry->inherited, inherited, memory_order_relaxed);
    atomic_store_explicit(&entry->sparse, 0, memory_order_relaxed);
    atomic_store_explicit(&entry->thread, 0, memory_order_relaxed);
    atomic_store_explicit(&entry->epoch, fork_epoch, memory_order_relaxed);
    atomic_store_explicit(&entry->base, base, memory_order_relaxed);
    atomic_store_explicit(&entry->zeros, NO_ZEROS, memory_order_relaxed);
    return entry;
}

/* From here on the guard knows the window: it is mapped, up to `end`. */
static void guard_arm(Guarded *entry, uintptr_t end)
{
    atomic_store_explicit(&entry->end, end, memory_order_release);
}

/* From here on it does not: what is mapped there next is another's. */
static void guard_disarm(Guarded *entry)
{
    atomic_store_explicit(&entry->end, 0, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst); /* whoever reads what is stored later reads this, too */
}

/* The first byte from which on zero pages are mapped, 0 where there are none. */
static uintptr_t guard_zeros(const Guarded *entry)
{
    atomic_thread_fence(memory_order_acquire); /* who has read them asks afterwards */
    uintptr_t zeros = atomic_load_explicit(&entry->zeros, memory_order_acquire);
    return zeros == NO_ZEROS ? 0 : zeros;
}

/* The window has gone: the entry is another's. */
static void guard_release(Guarded *entry)
{
    guard_disarm(entry);
    entry->next = free_guarded;
    free_guarded = entry->index + 1;
}

static int put_zeros(uintptr_t at, uintptr_t end, int prot)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
    return mmap((void *)at, end - at, prot, flags, -1, 0) != MAP_FAILED;
}

/* Zero pages over a whole window splits no mapping, so it needs none where Linux allows no more. Beyond the limit (the
 * last mmap that goes well takes a process one beyond it) Linux maps nothing at all, over nothing: then the window goes
 * first. Whoever touches it in that moment dies, as all would without it. */
static int give_way(uintptr_t base, uintptr_t end, int prot)
{
    return put_zeros(base, end, prot) || (!munmap((void *)base, end - base) && put_zeros(base, end, prot));
}

/* Zero pages from `address` to the end of its window. 0: it is in no window of ours, or Linux gave none. */
static int heal(uintptr_t address)
{
    uintptr_t page = address - address % page_size;
    uint32_t count = atomic_load_explicit(&guarded_count, memory_order_acquire);
    for (uint32_t i = 0; i < count; i++) {
        Guarded *entry = guarded_at(i);
        uintptr_t end = atomic_load_explicit(&entry->end, memory_order_acquire);
        uintptr_t base = atomic_load_explicit(&entry->base, memory_order_acquire);
        if (page < base || page >= end)
            continue;
        uintptr_t zeros = atomic_load_explicit(&entry->zeros, memory_order_acquire);
        int prot = atomic_load_explicit(&entry->prot, memory_order_acquire);
        int inherited = atomic_load_explicit(&entry->inherited, memory_order_acquire);
        unsigned long epoch = atomic_load_explicit(&entry->epoch, memory_order_acquire);
        if (end != atomic_load_explicit(&entry->end, memory_order_acquire))
            continue; /* it changed while it was looked at: so it is not the one that is being touched */
        if (!inherited && epoch != fork_epoch)
            continue; /* a parent's: what is mapped here is another one */
        int sparse = atomic_load_explicit(&entry->sparse, memory_order_acquire);
        /* Told of before it can be read: who sees the zeros sees where they begin, and the count. */
        while (page < zeros && !atomic_compare_exchange_weak(&entry->zeros, &zeros, page))
            ;
        if (page >= zeros && !sparse)
            return 1; /* another thread was quicker, or is about to be */
        atomic_store_explicit(&entry->thread, syscall(SYS_gettid), memory_order_relaxed);
        atomic_fetch_add(&faults, 1);
        if (page < zeros && put_zeros(page, zeros < end ? zeros : end, prot))
            return 1;
        /* Under strict accounting there may be room for one page where there is none for all. */
        atomic_store(&entry->sparse, 1);
        if (put_zeros(page, page + page_size, prot))
            return 1;
        atomic_store(&entry->zeros, base);
        return give_way(base, end, prot);
    }
    return 0;
}

/* Who had the signal, the last one on top; each with how it is called in one word, so that a thread that is passing a
 * signal on never reads a half of one and a half of another (no address in a process has its topmost bit set). */
#define DEPTH 8
static _Atomic uintptr_t under[DEPTH];
static _Atomic int under_count;

static uintptr_t packed(const struct sigaction *action)
{
    uintptr_t handler = (uintptr_t)action->sa_handler;
    return handler << 1 | (action->sa_flags & SA_SIGINFO ? 1 : 0);
}

/* What is being passed on by a thread: a handler that returns without having helped is called again by the same
 * access, for ever; and one that raises the signal once more comes back to us. */
typedef struct {
    _Atomic long thread;
    _Atomic uintptr_t address;
    _Atomic int tries;
    _Atomic int level;
} Passing;

#define PASSINGS 64
#define PATIENCE 64
static Passing passings[PASSINGS]; /* two threads that share one may lose count, and no more */

static void pass_on(int number, siginfo_t *info, void *context)
{
    long thread = syscall(SYS_gettid);
    Passing *passing = &passings[thread % PASSINGS];
    int fault = info->si_code > 0; /* by an access; else somebody sent it */
    uintptr_t address = fault ? (uintptr_t)info->si_addr : 0;
    if (atomic_exchange(&passing->thread, thread) != thread)
        passing->level = passing->tries = 0;
    if (fault) {
        passing->tries = passing->address == address ? passing->tries + 1 : 0;
        passing->address = address;
        passing->level = 0;
    }
    int at = atomic_load(&under_count) - 1 - passing->level - passing->tries / PATIENCE;
    uintptr_t next = at >= 0 ? atomic_load(&under[at]) : (uintptr_t)SIG_DFL, handler = next >> 1;
    if (handler != (uintptr_t)SIG_DFL && handler != (uintptr_t)SIG_IGN) {
        passing->level++;
        if (next & 1)
            ((void (*)(int, siginfo_t *, void *))handler)(number, info, context);
        else
            ((void (*)(int))handler)(number);
        passing->level = 0;
    } else if (fault || handler == (uintptr_t)SIG_DFL) {
        struct sigaction end = {.sa_handler = SIG_DFL};
        sigaction(SIGBUS, &end, NULL);
        if (!fault) /* else the same access comes again */
            raise(SIGBUS);
    }
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    int error = errno;
    if (info->si_code != BUS_ADRERR || !heal((uintptr_t)info->si_addr))
        pass_on(number, info, context);
    errno = error;
}

/* Puts the guard on top of whoever has the signal now, and lets it through to this thread: blocked, a fault is death,
 * handler or not. Asked where memory is about to be used: faulthandler, signal.signal or a program that waits for all
 * signals by sigwait may have changed either since. */
static void stand_guard(void)
{
    struct sigaction ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER}, now;
    sigset_t bus;
    sigemptyset(&bus);
    sigaddset(&bus, SIGBUS);
    pthread_sigmask(SIG_UNBLOCK, &bus, NULL);
    sigemptyset(&ours.sa_mask);
    if (sigaction(SIGBUS, NULL, &now) || packed(&now) == packed(&ours))
        return;
    int count = atomic_load(&under_count);
    for (int i = 0; i < count; i++) /* who was there before and is again: those above it have gone */
        if (under[i] == packed(&now))
            count = i;
    if (count == DEPTH)
        count--;
    under[count] = packed(&now);
    atomic_store(&under_count, count + 1);
    sigaction(SIGBUS, &ours, NULL);
}
