/* The guard: a handler of SIGBUS that puts zero pages in place of what was truncated. */
#include "core.h"

/* A segment may be truncated by whoever can open it, at any moment, and touching what is gone raises SIGBUS. The
 * handler puts zero pages over the rest of that window in one mmap (page by page would reach the limit of mappings),
 * notes it, and returns: who touched it goes on, and is told afterwards. Any other SIGBUS goes to whoever had the
 * signal before.
 *
 * It runs on any thread, at any moment, with or without the GIL: it reads the table below, which never moves nor
 * shrinks, and makes system calls; no locks, no memory, no Python. A window that is being touched is not unmapped
 * meanwhile (its exports are counted), so its entry stands still; the others may change while they are looked at. */

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

/* From here on the guard knows the window: it is mapped. */
static void arm(const Window *self)
{
    atomic_store_explicit(&self->guarded->end, self->base + self->span, memory_order_release);
}

/* From here on it does not: what is mapped there next is another's. */
static void disarm(const Window *self)
{
    if (self->guarded) {
        atomic_store_explicit(&self->guarded->end, 0, memory_order_relaxed);
        atomic_thread_fence(memory_order_seq_cst); /* whoever reads what is stored later reads this, too */
    }
}

/* An entry for a window that is about to be mapped, and to be armed then; NULL: no memory for it. */
static Guarded *guard(uintptr_t base, size_t span, int prot, int inherited)
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
            Guarded *chunk = PyMem_Calloc(CHUNK, sizeof *chunk);
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
    atomic_store_explicit(&entry->zeros, base + span, memory_order_relaxed);
    return entry;
}

/* The first byte from which on zero pages are mapped, 0 where there are none. */
static uintptr_t zeros_of(const Window *self)
{
    if (!self->guarded)
        return self->zeros;
    uintptr_t zeros = atomic_load_explicit(&self->guarded->zeros, memory_order_acquire);
    return zeros < self->base + self->span ? zeros : 0;
}

static void unguard(Window *self)
{
    Guarded *entry = self->guarded;
    if (!entry)
        return;
    self->zeros = zeros_of(self);
    self->thread = atomic_load_explicit(&entry->thread, memory_order_relaxed);
    disarm(self);
    self->guarded = NULL;
    entry->next = free_guarded;
    free_guarded = entry->index + 1;
}

static int put_zeros(uintptr_t at, size_t length, int prot)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
    return mmap((void *)at, length, prot, flags, -1, 0) != MAP_FAILED;
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
        if (page >= zeros && !sparse)
            return 1; /* another thread was quicker */
        /* Told of before it can be read: who sees the zeros sees the count. */
        atomic_store_explicit(&entry->thread, syscall(SYS_gettid), memory_order_relaxed);
        atomic_fetch_add(&faults, 1);
        int all = page < zeros && put_zeros(page, zeros - page, prot);
        if (!all) {
            /* Under strict accounting there may be room for one page where there is none for all. */
            if (!put_zeros(page, page_size, prot))
                return 0;
            atomic_store(&entry->sparse, 1);
        }
        while (page < zeros && !atomic_compare_exchange_weak(&entry->zeros, &zeros, page))
            ;
        return 1;
    }
    return 0;
}

/* Who had the signal, the last one on top. Only grows or shrinks under the GIL. */
#define DEPTH 8
static struct sigaction under[DEPTH];
static _Atomic int under_count;

/* What is being passed on by a thread: a handler that returns without having helped is called again by the same
 * access, for ever; and one that raises the signal once more comes back to us. */
typedef struct {
    _Atomic long thread;
    uintptr_t address;
    int tries;
    int level;
} Passing;

#define PASSINGS 64
#define PATIENCE 64
static Passing passings[PASSINGS];

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
    struct sigaction *next = at >= 0 ? &under[at] : NULL;
    if (next && next->sa_flags & SA_SIGINFO) {
        passing->level++;
        next->sa_sigaction(number, info, context);
        passing->level = 0;
    } else if (next && next->sa_handler != SIG_DFL && next->sa_handler != SIG_IGN) {
        passing->level++;
        next->sa_handler(number);
        passing->level = 0;
    } else if (fault || !next || next->sa_handler == SIG_DFL) {
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

static int same_handler(const struct sigaction *one, const struct sigaction *other)
{
    return (one->sa_flags & SA_SIGINFO) == (other->sa_flags & SA_SIGINFO) &&
           (one->sa_flags & SA_SIGINFO ? one->sa_sigaction == other->sa_sigaction
                                       : one->sa_handler == other->sa_handler);
}

/* Puts the guard on top of whoever has the signal now. Asked where memory is about to be used: faulthandler, or
 * signal.signal, may have come over it since. */
static void stand_guard(void)
{
    struct sigaction ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER}, now;
    sigemptyset(&ours.sa_mask);
    if (sigaction(SIGBUS, NULL, &now) || same_handler(&now, &ours))
        return;
    int count = atomic_load(&under_count);
    for (int i = 0; i < count; i++) /* who was there before and is again: those above it have gone */
        if (same_handler(&under[i], &now))
            count = i;
    if (count == DEPTH)
        count--;
    under[count] = now;
    atomic_store(&under_count, count + 1);
    sigaction(SIGBUS, &ours, NULL);
}


/* faults() -> how often zero pages had to take the place of what was truncated, in this process. */
static PyObject *host_faults(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromUnsignedLongLong(atomic_load_explicit(&faults, memory_order_acquire));
}
