/* The C core: only what Python cannot do safely by itself.
 *
 *   Window   a range of this address space that maps pieces of files (or private memory) at an
 *            address that the caller chose. Exports its bytes through the buffer protocol and
 *            counts the exports, so that it is never unmapped under a live view.
 *   Land     what is mapped where in a range of addresses, and the windows kept there for their next use.
 *   Mirror   a window in a land, of frames that it holds a reference to.
 *   Events   what happened, in a ring of bounded size, for whoever asked to be told.
 *   Ring     two queues of messages in sealed shared memory, one each way, and how to sleep and be
 *            woken without losing a wake-up.
 *   View     a part of one window, or of several that lie side by side; exporting it counts as
 *            an export of every window it covers.
 *   guard    a handler of SIGBUS: where a segment under a window was truncated, zero pages take the place
 *            of what is gone, and the window says so from then on.
 *
 * A window's life: not ready (being mapped) -> alive -> dead. Dead is for good.
 *
 *      base          base + lead                     base + lead + length     base + span
 *       |---- lead ----|=========== what is exported ==========|------ rest -----|
 *       '----------------------- whole pages, mapped ----------------------------'
 *
 * Everything here runs with the GIL held, except munmap and mmap of long ranges. errno becomes
 * an OSError here and an error of ours in realmap/host/, nowhere else.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* With the headers of 3.12 and later these count no reference, since there None and the like are immortal. Built with
 * them this module runs on 3.11 as well, where they are not. */
#undef Py_RETURN_NONE
#undef Py_RETURN_TRUE
#undef Py_RETURN_FALSE
#define Py_RETURN_NONE return Py_NewRef(Py_None)
#define Py_RETURN_TRUE return Py_NewRef(Py_True)
#define Py_RETURN_FALSE return Py_NewRef(Py_False)

#include <structmember.h>

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

/* Below this a map or unmap is a few microseconds, and giving the GIL away would let another
 * thread keep it for a whole switch interval (5 ms); above it, others should not wait for us. */
#define LONG_RANGE ((size_t)1 << 20)

enum state { NOT_READY, ALIVE, DEAD };

/* Counts the forks this process descends from: a window that a fork does not inherit knows by
 * it that it was lost, and must not unmap what may now be somebody else's at its address. */
static unsigned long fork_epoch;

static void count_fork(void) { fork_epoch++; }

/* What the guard knows of a window. Written under the GIL, read by a signal handler on any thread. */
typedef struct {
    _Atomic uintptr_t base;
    _Atomic uintptr_t end;   /* 0: no window */
    _Atomic uintptr_t zeros; /* from here to the end are zero pages; `end` where there are none */
    _Atomic unsigned long epoch;
    _Atomic long thread; /* that ran into it last */
    _Atomic int sparse;  /* not all of them are there: page by page, where Linux gave no more at once */
    _Atomic int prot;
    _Atomic int inherited;
    uint32_t index;
    uint32_t next; /* of those without a window: one more than its index, or 0 */
} Guarded;

typedef struct {
    PyObject_HEAD
    uintptr_t base;
    size_t span;
    size_t lead;
    Py_ssize_t length;
    Py_ssize_t exports;
    Guarded *guarded; /* while it is mapped */
    uintptr_t zeros;  /* where its zero pages began, once it is not; 0: there were none */
    long thread;      /* and who ran into them */
    unsigned long epoch;
    int prot;
    char inherited;
    char state;
} Window;

typedef struct {
    PyObject_HEAD
    PyObject *windows; /* a tuple of Window, side by side, in order */
    uintptr_t start;
    Py_ssize_t length;
    Py_ssize_t exports;
    int writable;
    int dropped;
} View;

static PyTypeObject *window_type;
static PyTypeObject *land_type;
static PyTypeObject *events_type;
static size_t page_size;

/* Where nobody listens this is never run: it must not stand in the way of what is. */
#define COLD __attribute__((noinline, cold))

/* ---- numbers ------------------------------------------------------------------------------ */

/* A Python int as an unsigned 64-bit number; -1 with an exception set if it is none. */
static int as_u64(PyObject *number, uint64_t *out)
{
    *out = PyLong_AsUnsignedLongLong(number);
    return *out == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
}

static int as_int(PyObject *number, int *out)
{
    long value = PyLong_AsLong(number);
    if (value == -1 && PyErr_Occurred())
        return -1;
    if (value < INT32_MIN || value > INT32_MAX) {
        PyErr_SetString(PyExc_OverflowError, "number too large for a C int");
        return -1;
    }
    *out = (int)value;
    return 0;
}

static int wants(Py_ssize_t got, Py_ssize_t wanted, const char *what)
{
    if (got == wanted)
        return 0;
    PyErr_Format(PyExc_TypeError, "%s: %zd arguments, takes %zd", what, got, wanted);
    return -1;
}

/* ---- mapping ------------------------------------------------------------------------------ */

/* From a huge page's size on, an address is congruent to the offset behind it, so that huge pages can serve it. */
static size_t huge_size;

/* Maps one piece; fd -1 means private anonymous memory. 0, or an errno with nothing mapped. */
static int map_piece(uintptr_t address, size_t length, int prot, int fd, off_t offset)
{
    int flags = MAP_FIXED_NOREPLACE | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);
    void *got;
    if (length >= LONG_RANGE) {
        Py_BEGIN_ALLOW_THREADS
        got = mmap((void *)address, length, prot, flags, fd, offset);
        Py_END_ALLOW_THREADS
    } else {
        got = mmap((void *)address, length, prot, flags, fd, offset);
    }
    if (got == MAP_FAILED)
        return errno;
    if ((uintptr_t)got != address) { /* a kernel that does not know the flag took it for a hint */
        munmap(got, length);
        return EEXIST;
    }
    return 0;
}

static int unmap_range(uintptr_t address, size_t length)
{
    int failed;
    if (length >= LONG_RANGE) {
        Py_BEGIN_ALLOW_THREADS
        failed = munmap((void *)address, length);
        Py_END_ALLOW_THREADS
    } else {
        failed = munmap((void *)address, length);
    }
    return failed ? errno : 0;
}

/* Faults in every page of [address, address + length). Unlike MAP_POPULATE it says where that fails. By reading,
 * where that is allowed: Linux then takes several pages a fault, and those of shared memory are writable at once. */
static int populate_range(uintptr_t address, size_t length, int prot)
{
    int how = prot & PROT_READ ? MADV_POPULATE_READ : MADV_POPULATE_WRITE;
    int failed;
    if (length >= LONG_RANGE) {
        Py_BEGIN_ALLOW_THREADS
        failed = madvise((void *)address, length, how);
        Py_END_ALLOW_THREADS
    } else {
        failed = madvise((void *)address, length, how);
    }
    return failed ? errno : 0;
}

static PyObject *os_error(int error)
{
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* ---- the guard ---------------------------------------------------------------------------- */

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

/* Raises the MemoryFault that `op` makes of it: it knows whose byte the one at `address` is. */
static void raise_fault(PyObject *op, uintptr_t address)
{
    PyObject *error = PyObject_CallMethod(op, "_memory_fault", "K", (unsigned long long)address);
    if (error) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
}

/* The first byte of [start, start + length) that zero pages stand for; 0 where it is all there. */
static uintptr_t fault_in(const Window *window, uintptr_t start, size_t length)
{
    uintptr_t zeros = zeros_of(window);
    if (!zeros || start + length <= zeros)
        return 0;
    return start > zeros ? start : zeros;
}

static uintptr_t window_fault_at(const Window *self)
{
    return fault_in(self, self->base + self->lead, (size_t)self->length);
}

/* A fork that did not inherit this window leaves only its shell in the child. */
static int is_alive(const Window *self)
{
    return self->state == ALIVE && (self->inherited || self->epoch == fork_epoch);
}

static Window *new_window(PyTypeObject *type, uintptr_t base, int prot, int inherited)
{
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Window *self = (Window *)alloc(type, 0);
    if (self) {
        self->base = base;
        self->prot = prot;
        self->inherited = (char)inherited;
        self->epoch = fork_epoch;
        self->state = NOT_READY;
    }
    return self;
}

/* Checks that [address, address + length) is whole pages and does not wrap. */
static int check_range(uint64_t address, uint64_t length)
{
    if (address % page_size || length % page_size || !length || address + length < address ||
        length > PY_SSIZE_T_MAX) {
        PyErr_Format(PyExc_ValueError, "a window is whole pages: address %llu, length %llu",
                     (unsigned long long)address, (unsigned long long)length);
        return -1;
    }
    return 0;
}

/* Window._map(address, span, prot, fd, offset, lead, length, inherited): the common case, one
 * piece of one file, in one call. */
static PyObject *window_map(PyObject *cls, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t address, span, offset, lead, length;
    int prot, fd, inherited;
    if (wants(nargs, 8, "Window.map") || as_u64(args[0], &address) || as_u64(args[1], &span) ||
        as_int(args[2], &prot) || as_int(args[3], &fd) || as_u64(args[4], &offset) ||
        as_u64(args[5], &lead) || as_u64(args[6], &length) || as_int(args[7], &inherited) ||
        check_range(address, span))
        return NULL;
    if (lead > span || length > span - lead || offset > INT64_MAX) {
        PyErr_SetString(PyExc_ValueError, "what a window exports lies inside of what it maps");
        return NULL;
    }
    Window *self = new_window((PyTypeObject *)cls, address, prot, inherited);
    if (!self)
        return NULL;
    stand_guard();
    self->guarded = guard(address, span, prot, inherited);
    int error = self->guarded ? map_piece(address, span, prot, fd, (off_t)offset) : ENOMEM;
    if (error) {
        Py_DECREF(self);
        return os_error(error);
    }
    self->span = span;
    self->lead = lead;
    self->length = (Py_ssize_t)length;
    self->state = ALIVE;
    arm(self);
    return (PyObject *)self;
}

static PyObject *still_viewed(const char *what, Py_ssize_t exports);

/* Maps every (fd, offset, length) of `pieces` behind `end`, or nothing. New end, or 0. */
static uintptr_t map_pieces(Window *self, uintptr_t end, PyObject *pieces)
{
    PyObject *sequence = PySequence_Tuple(pieces);
    if (!sequence)
        return 0;
    uintptr_t at = end;
    Py_ssize_t count = PyTuple_Size(sequence);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *piece = PyTuple_GetItem(sequence, i);
        int fd, error = 0;
        uint64_t offset, length;
        if (!PyTuple_Check(piece) || PyTuple_Size(piece) != 3) {
            PyErr_SetString(PyExc_TypeError, "a piece is a tuple (fd, offset, length)");
            goto undo;
        }
        if (as_int(PyTuple_GetItem(piece, 0), &fd) || as_u64(PyTuple_GetItem(piece, 1), &offset) ||
            as_u64(PyTuple_GetItem(piece, 2), &length) || check_range(at, length))
            goto undo;
        error = offset > INT64_MAX ? EOVERFLOW : map_piece(at, length, self->prot, fd, (off_t)offset);
        if (error) {
            os_error(error);
            goto undo;
        }
        at += length;
    }
    Py_DECREF(sequence);
    return at;
undo:
    if (at > end)
        unmap_range(end, at - end);
    Py_DECREF(sequence);
    return 0;
}

/* Has a window guarded that is mapped already; 0: no memory for it. */
static int guard_window(Window *self)
{
    stand_guard();
    self->guarded = guard(self->base, self->span, self->prot, self->inherited);
    if (self->guarded)
        arm(self);
    return self->guarded != NULL;
}

/* Window._map_pieces(address, prot, pieces, lead, length, inherited): any number of pieces, of
 * any files, side by side; all of them or none. */
static PyObject *window_map_pieces(PyObject *cls, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t address, lead, length;
    int prot, inherited;
    if (wants(nargs, 6, "Window.map_pieces") || as_u64(args[0], &address) ||
        as_int(args[1], &prot) || as_u64(args[3], &lead) || as_u64(args[4], &length) ||
        as_int(args[5], &inherited))
        return NULL;
    Window *self = new_window((PyTypeObject *)cls, address, prot, inherited);
    if (!self)
        return NULL;
    uintptr_t end = map_pieces(self, address, args[2]);
    if (!end) {
        Py_DECREF(self);
        return NULL;
    }
    self->span = end - address;
    self->state = self->span ? ALIVE : DEAD;
    if (self->span && !guard_window(self)) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    if (lead > self->span || length > self->span - lead) {
        Py_DECREF(self);
        PyErr_SetString(PyExc_ValueError, "what a window exports lies inside of what it maps");
        return NULL;
    }
    self->lead = lead;
    self->length = (Py_ssize_t)length;
    return (PyObject *)self;
}

/* _extend(pieces): maps more right behind the end, all or nothing; what is exported grows too. */
static PyObject *window_extend(PyObject *op, PyObject *pieces)
{
    Window *self = (Window *)op;
    if (!is_alive(self) || self->exports) {
        PyErr_SetString(PyExc_BufferError, "only a live window without exports can be extended");
        return NULL;
    }
    uintptr_t end = map_pieces(self, self->base + self->span, pieces);
    if (!end)
        return NULL;
    int lost = !is_alive(self) || self->exports; /* the GIL may have gone away meanwhile */
    if (lost || zeros_of(self)) { /* what comes behind zero pages would count as such */
        unmap_range(self->base + self->span, end - self->base - self->span);
        if (lost)
            PyErr_SetString(PyExc_BufferError, "only a live window without exports can be extended");
        else
            raise_fault(op, zeros_of(self));
        return NULL;
    }
    self->length += (Py_ssize_t)(end - self->base - self->span);
    self->span = end - self->base;
    atomic_store_explicit(&self->guarded->zeros, end, memory_order_release);
    arm(self);
    Py_RETURN_NONE;
}

static PyObject *still_viewed(const char *what, Py_ssize_t exports)
{
    return PyErr_Format(PyExc_BufferError,
                        "cannot %s: %zd view%s of it (memoryview, numpy array, ...) still live%s; "
                        "release them first",
                        what, exports, exports == 1 ? "" : "s", exports == 1 ? "s" : "");
}

/* _unmap() -> bool: False if it was dead already; BufferError while exports live. */
static PyObject *window_unmap(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Window *self = (Window *)op;
    if (!is_alive(self)) {
        self->state = DEAD;
        Py_RETURN_FALSE;
    }
    if (self->exports)
        return still_viewed("unmap", self->exports);
    self->state = DEAD; /* first: while the GIL is away nobody may take an export */
    disarm(self);
    int error = unmap_range(self->base, self->span);
    if (error) {
        self->state = ALIVE;
        arm(self);
        return os_error(error);
    }
    unguard(self);
    Py_RETURN_TRUE;
}

static void window_dealloc(PyObject *op)
{
    Window *self = (Window *)op;
    PyTypeObject *type = Py_TYPE(op);
    disarm(self);
    if (is_alive(self))
        munmap((void *)self->base, self->span);
    unguard(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type);
}

static int window_getbuffer(PyObject *op, Py_buffer *buffer, int flags)
{
    Window *self = (Window *)op;
    buffer->obj = NULL;
    if (!is_alive(self)) {
        PyErr_SetString(PyExc_BufferError, "it is unmapped: its bytes are no longer there");
        return -1;
    }
    if (window_fault_at(self)) {
        raise_fault(op, window_fault_at(self));
        return -1;
    }
    stand_guard();
    if (PyBuffer_FillInfo(buffer, op, (void *)(self->base + self->lead), self->length,
                          !(self->prot & PROT_WRITE), flags))
        return -1;
    self->exports++;
    return 0;
}

static void window_releasebuffer(PyObject *op, Py_buffer *Py_UNUSED(buffer))
{
    ((Window *)op)->exports--;
}

static Py_ssize_t window_length(PyObject *op) { return ((Window *)op)->length; }

static PyObject *window_address(PyObject *op, void *Py_UNUSED(closure))
{
    Window *self = (Window *)op;
    return PyLong_FromUnsignedLongLong(self->base + self->lead);
}

static PyObject *window_base(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(((Window *)op)->base);
}

static PyObject *window_span(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(((Window *)op)->span);
}

static PyObject *window_exports(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromSsize_t(((Window *)op)->exports);
}

static PyObject *window_prot(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromLong(((Window *)op)->prot);
}

static PyObject *window_fault(PyObject *op, void *Py_UNUSED(closure))
{
    uintptr_t at = window_fault_at((Window *)op);
    if (!at)
        Py_RETURN_NONE;
    return PyLong_FromUnsignedLongLong(at);
}

static PyObject *window_thread(PyObject *op, void *Py_UNUSED(closure))
{
    Window *self = (Window *)op;
    long thread = self->guarded ? atomic_load_explicit(&self->guarded->thread, memory_order_relaxed) : self->thread;
    return PyLong_FromLong(thread);
}

static PyObject *window_zeros(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(zeros_of((Window *)op));
}

/* _memory_fault(address): the error for a byte that is gone; what builds on a window knows more. */
static PyObject *window_memory_fault(PyObject *Py_UNUSED(op), PyObject *address)
{
    PyObject *errors = PyImport_ImportModule("realmap.errors");
    PyObject *error = errors ? PyObject_CallMethod(errors, "gone", "O", address) : NULL;
    Py_XDECREF(errors);
    return error;
}

static PyObject *window_alive(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(is_alive((Window *)op));
}

#define FASTCALL(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef window_methods[] = {
    {"_map", FASTCALL(window_map), METH_FASTCALL | METH_CLASS, NULL},
    {"_map_pieces", FASTCALL(window_map_pieces), METH_FASTCALL | METH_CLASS, NULL},
    {"_extend", window_extend, METH_O, NULL},
    {"_unmap", window_unmap, METH_NOARGS, NULL},
    {"_memory_fault", window_memory_fault, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef window_getset[] = {
    {"fault", window_fault, NULL, "Where its bytes are gone from, since somebody truncated their segment; else None.", NULL},
    {"_zeros", window_zeros, NULL, NULL, NULL},
    {"_fault_thread", window_thread, NULL, NULL, NULL},
    {"address", window_address, NULL, "Where the exported bytes start, in this address space.", NULL},
    {"_base", window_base, NULL, NULL, NULL},
    {"_span", window_span, NULL, NULL, NULL},
    {"_prot", window_prot, NULL, NULL, NULL},
    {"exports", window_exports, NULL, "How many views of it live; it cannot be unmapped before 0.", NULL},
    {"alive", window_alive, NULL, "Whether it is mapped.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot window_slots[] = {
    {Py_tp_doc, "A range of this address space, mapped at a chosen address, with counted exports."},
    {Py_tp_dealloc, window_dealloc},
    {Py_tp_methods, window_methods},
    {Py_tp_getset, window_getset},
    {Py_sq_length, window_length},
    {Py_bf_getbuffer, window_getbuffer},
    {Py_bf_releasebuffer, window_releasebuffer},
    {0, NULL},
};

static PyType_Spec window_spec = {
    .name = "realmap._host.Window",
    .basicsize = sizeof(Window),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = window_slots,
};

/* ---- views -------------------------------------------------------------------------------- */

/* View._over(windows, start, length, writable): windows lie side by side and cover the range; a
 * view is writable where it was asked for and every window is. */
static PyObject *view_over(PyObject *cls, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t start, length;
    int writable;
    if (wants(nargs, 4, "View.over") || as_u64(args[1], &start) || as_u64(args[2], &length) ||
        as_int(args[3], &writable))
        return NULL;
    if (!PyTuple_Check(args[0]) || !PyTuple_Size(args[0])) {
        PyErr_SetString(PyExc_TypeError, "a view lies over a tuple of windows");
        return NULL;
    }
    uintptr_t covered = 0;
    for (Py_ssize_t i = 0; i < PyTuple_Size(args[0]); i++) {
        PyObject *item = PyTuple_GetItem(args[0], i);
        if (!PyObject_TypeCheck(item, window_type)) {
            PyErr_SetString(PyExc_TypeError, "a view lies over a tuple of windows");
            return NULL;
        }
        Window *window = (Window *)item;
        uintptr_t begin = window->base + window->lead;
        if (i == 0 ? start < begin : begin != covered) {
            PyErr_SetString(PyExc_ValueError, "the windows do not cover the view without a gap");
            return NULL;
        }
        covered = begin + (size_t)window->length;
        writable = writable && (window->prot & PROT_WRITE);
    }
    if (start > covered || length > covered - start) {
        PyErr_SetString(PyExc_ValueError, "the view is longer than its windows");
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot((PyTypeObject *)cls, Py_tp_alloc);
    View *self = (View *)alloc((PyTypeObject *)cls, 0);
    if (!self)
        return NULL;
    Py_INCREF(args[0]);
    self->windows = args[0];
    self->start = start;
    self->length = (Py_ssize_t)length;
    self->writable = writable;
    return (PyObject *)self;
}

static int view_is_alive(View *self)
{
    if (self->dropped)
        return 0;
    for (Py_ssize_t i = 0; i < PyTuple_Size(self->windows); i++)
        if (!is_alive((Window *)PyTuple_GetItem(self->windows, i)))
            return 0;
    return 1;
}

static uintptr_t view_fault_at(View *self)
{
    for (Py_ssize_t i = 0; i < PyTuple_Size(self->windows); i++) {
        Window *window = (Window *)PyTuple_GetItem(self->windows, i);
        uintptr_t end = window->base + window->lead + (size_t)window->length, stop = self->start + (size_t)self->length;
        uintptr_t start = window->base > self->start ? window->base : self->start;
        uintptr_t at = start < end && start < stop ? fault_in(window, start, (stop < end ? stop : end) - start) : 0;
        if (at)
            return at;
    }
    return 0;
}

static void count_exports(View *self, Py_ssize_t by)
{
    self->exports += by;
    for (Py_ssize_t i = 0; i < PyTuple_Size(self->windows); i++)
        ((Window *)PyTuple_GetItem(self->windows, i))->exports += by;
}

static int view_getbuffer(PyObject *op, Py_buffer *buffer, int flags)
{
    View *self = (View *)op;
    buffer->obj = NULL;
    if (!view_is_alive(self)) {
        PyErr_SetString(PyExc_BufferError, "it is unmapped: its bytes are no longer there");
        return -1;
    }
    if (view_fault_at(self)) {
        raise_fault(op, view_fault_at(self));
        return -1;
    }
    stand_guard();
    if (PyBuffer_FillInfo(buffer, op, (void *)self->start, self->length, !self->writable, flags))
        return -1;
    count_exports(self, 1);
    return 0;
}

static void view_releasebuffer(PyObject *op, Py_buffer *Py_UNUSED(buffer))
{
    count_exports((View *)op, -1);
}

/* _drop() -> bool: False if it was dropped already; BufferError while exports live. */
static PyObject *view_drop(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    View *self = (View *)op;
    if (self->dropped)
        Py_RETURN_FALSE;
    if (self->exports)
        return still_viewed("drop", self->exports);
    self->dropped = 1;
    Py_RETURN_TRUE;
}

/* Windows are reached from here, so that a cycle through one can be collected. They are not cleared:
 * an export in the same cycle counts itself off on them; the cycle is broken elsewhere. */
static int view_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((View *)op)->windows);
    return 0;
}

static void view_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    PyObject *windows = ((View *)op)->windows;
    ((View *)op)->windows = NULL;
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_XDECREF(windows);
    Py_DECREF(type);
}

static Py_ssize_t view_length(PyObject *op) { return ((View *)op)->length; }

static PyObject *view_address(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(((View *)op)->start);
}

static PyObject *view_exports(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromSsize_t(((View *)op)->exports);
}

static PyObject *view_alive(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(view_is_alive((View *)op));
}

static PyObject *view_fault(PyObject *op, void *Py_UNUSED(closure))
{
    uintptr_t at = view_fault_at((View *)op);
    if (!at)
        Py_RETURN_NONE;
    return PyLong_FromUnsignedLongLong(at);
}

static PyMethodDef view_methods[] = {
    {"_memory_fault", window_memory_fault, METH_O, NULL},
    {"_over", FASTCALL(view_over), METH_FASTCALL | METH_CLASS, NULL},
    {"_drop", view_drop, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef view_members[] = {
    {"_windows", T_OBJECT_EX, offsetof(View, windows), READONLY, NULL},
    {"writable", T_INT, offsetof(View, writable), READONLY, "Whether its bytes may be written."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef view_getset[] = {
    {"address", view_address, NULL, "Where its bytes start, in this address space.", NULL},
    {"exports", view_exports, NULL, "How many views of it live.", NULL},
    {"alive", view_alive, NULL, "Whether what it shows is mapped.", NULL},
    {"fault", view_fault, NULL, "Where its bytes are gone from, since somebody truncated their segment; else None.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot view_slots[] = {
    {Py_tp_doc, "A part of one window, or of several side by side."},
    {Py_tp_dealloc, view_dealloc},
    {Py_tp_traverse, view_traverse},
    {Py_tp_methods, view_methods},
    {Py_tp_members, view_members},
    {Py_tp_getset, view_getset},
    {Py_sq_length, view_length},
    {Py_bf_getbuffer, view_getbuffer},
    {Py_bf_releasebuffer, view_releasebuffer},
    {0, NULL},
};

static PyType_Spec view_spec = {
    .name = "realmap._host.View",
    .basicsize = sizeof(View),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = view_slots,
};

/* ---- events ------------------------------------------------------------------------------- */

/* What happened, each in a record of 64 bytes, until somebody takes it. No objects are made of them here: one made in
 * a destructor could collect garbage, and run anything. What does not fit is counted as lost, and the first record
 * that fits again says so before itself (GAP). kernel/events.py names the kinds, and what the facts of each are. */

#define FACTS 6

enum kind { GAP, MIRROR, DROP, EVICT };

typedef struct {
    int64_t time; /* of the monotonic clock, in nanoseconds */
    uint16_t kind;
    uint16_t flags;
    uint32_t process; /* its number; of MIRROR, DROP: how many mirrors live */
    uint64_t facts[FACTS];
} Event;

typedef struct {
    PyObject_HEAD
    Event *ring;
    size_t capacity;
    size_t first;
    size_t count;
    unsigned long long lost;
    uint64_t told; /* how many of those lost a GAP has told of */
} Events;

static int64_t nanoseconds(void);

static void put_event(Events *self, Event event)
{
    /* A GAP takes a place of its own. */
    size_t wanted = self->told == self->lost ? 1 : 2;
    if (self->capacity - self->count < wanted) {
        self->lost++;
        return;
    }
    if (!self->count)
        self->first = 0; /* so that no more memory is touched than the most that waited */
    event.time = nanoseconds();
    if (wanted == 2) {
        Event gap = {.time = event.time, .kind = GAP, .facts = {self->lost - self->told}};
        self->told = self->lost;
        self->ring[(self->first + self->count++) % self->capacity] = gap;
    }
    self->ring[(self->first + self->count++) % self->capacity] = event;
}

/* Events(capacity): for so many records. MemoryError: there is no room. */
static PyObject *events_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(keywords))
{
    uint64_t capacity;
    if (wants(PyTuple_Size(args), 1, "Events") || as_u64(PyTuple_GetItem(args, 0), &capacity))
        return NULL;
    if (!capacity || capacity > SIZE_MAX / sizeof(Event))
        return PyErr_NoMemory();
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Events *self = (Events *)alloc(type, 0);
    if (!self)
        return NULL;
    /* Linux gives its pages as they are touched. */
    void *ring = mmap(NULL, capacity * sizeof(Event), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (ring == MAP_FAILED) {
        Py_DECREF((PyObject *)self);
        return PyErr_NoMemory();
    }
    self->ring = ring;
    self->capacity = (size_t)capacity;
    return (PyObject *)self;
}

static void events_dealloc(PyObject *op)
{
    Events *self = (Events *)op;
    PyTypeObject *type = Py_TYPE(op);
    if (self->ring)
        munmap(self->ring, self->capacity * sizeof(Event));
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type);
}

/* note(kind, flags, process, *facts): up to six facts, of 64 bits each; those left out are 0. */
static PyObject *events_note(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t numbers[3 + FACTS] = {0};
    if (nargs < 3 || nargs > 3 + FACTS) {
        PyErr_Format(PyExc_TypeError, "Events.note: %zd arguments, takes 3 to 9", nargs);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < nargs; i++) {
        numbers[i] = PyLong_AsUnsignedLongLongMask(args[i]);
        if (numbers[i] == (uint64_t)-1 && PyErr_Occurred())
            return NULL;
    }
    Event event = {.kind = (uint16_t)numbers[0], .flags = (uint16_t)numbers[1], .process = (uint32_t)numbers[2]};
    memcpy(event.facts, numbers + 3, sizeof event.facts);
    put_event((Events *)op, event);
    Py_RETURN_NONE;
}

/* take(most) -> bytes: up to so many records, the oldest first; they are gone from here. */
static PyObject *events_take(PyObject *op, PyObject *number)
{
    Events *self = (Events *)op;
    uint64_t most;
    if (as_u64(number, &most))
        return NULL;
    size_t count = most < self->count ? (size_t)most : self->count;
    size_t straight = self->capacity - self->first < count ? self->capacity - self->first : count;
    PyObject *taken = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(count * sizeof(Event)));
    if (!taken)
        return NULL;
    char *bytes = PyBytes_AsString(taken);
    memcpy(bytes, self->ring + self->first, straight * sizeof(Event));
    memcpy(bytes + straight * sizeof(Event), self->ring, (count - straight) * sizeof(Event));
    self->first = (self->first + count) % self->capacity;
    self->count -= count;
    return taken;
}

static PyMethodDef events_methods[] = {
    {"note", FASTCALL(events_note), METH_FASTCALL, "note(kind, flags, process, *facts): it happens now."},
    {"take", events_take, METH_O, "take(most): the oldest records, as bytes."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef events_members[] = {
    {"lost", T_ULONGLONG, offsetof(Events, lost), READONLY, "How many did not fit."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot events_slots[] = {
    {Py_tp_doc, "What happened, in a ring of bounded size."},
    {Py_tp_new, events_new},
    {Py_tp_dealloc, events_dealloc},
    {Py_tp_methods, events_methods},
    {Py_tp_members, events_members},
    {0, NULL},
};

static PyType_Spec events_spec = {
    .name = "realmap._host.Events",
    .basicsize = sizeof(Events),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = events_slots,
};

/* ---- lands -------------------------------------------------------------------------------- */

/* What is mapped in a land: the mirrors that live, and the windows kept for their next use. Under
 * the GIL each of these functions happens as a whole, so no lock is needed, in a destructor either.
 *
 *      Land.live   ── by base ─────────────▶ Mirror ⇄ its Python object
 *      Land.exact  ── frames, range, rights ▶ Kept     no object: nobody uses it
 *      Land.of     ── frames ──────────────▶ Kept
 *      oldest … newest ────────────────────▶ Kept     in the order they were kept in
 *
 * Space is taken by moving the cursor through the current hole. The ordered tree of what is where
 * is Python's (memory/bookkeeping.py): it learns of what came (_fresh) and went (_gone) when the
 * hole is used up, which is when it is needed. */

typedef struct Node {
    struct Node *next;
    struct Node **at; /* what points to it: so that it can be taken out of a long chain */
    uint64_t key;
} Node;

#define FEW 64

typedef struct {
    Node **buckets;
    size_t mask;
    size_t count;
    Node *few[FEW];
} Table;

typedef struct Kept {
    Node exact;
    Node of;
    struct Kept *older;
    struct Kept *newer;
    uintptr_t base;
    size_t span;
    uint64_t serial;
    uint64_t start;
    int prot;
    char in_tree;
} Kept;

typedef struct Land {
    PyObject_HEAD
    unsigned long long cursor;
    unsigned long long hole_end;
    unsigned long long end;
    unsigned long long staked; /* up to where stakes have been seen to */
    unsigned long long budget;
    unsigned long long kept_bytes;
    unsigned long long hits;
    unsigned long long misses;
    unsigned long long evictions;
    unsigned long long made; /* mirrors so far, and the bytes that they showed */
    unsigned long long made_bytes;
    Table live;
    Table exact;
    Table of;
    Kept *oldest;
    Kept *newest;
    PyObject *gone; /* a list of bases that the tree still has */
    PyObject *stakes; /* a list of addresses, a page each */
    Events *events; /* NULL while nobody listens */
    struct Land *other; /* the next of all lands */
    unsigned long epoch;
} Land;

typedef struct {
    Window window;
    Node node;
    Land *land; /* while its place is taken there */
    PyObject *mapping;
    PyObject *mappings;
    PyObject *frames;
    PyObject *holders; /* the `mirrors` of its one frames, while it holds a reference to them */
    PyObject *caller; /* the UserBuffer of the call that it was made in */
    PyObject *weakrefs;
    uint64_t serial; /* of its frames; 0 where it shows several */
    uint64_t start; /* what its first page shows: an offset in the frames */
    char in_tree;
} Mirror;

#define OWNER(type, member, pointer) ((type *)(void *)((char *)(pointer) - offsetof(type, member)))

static Land *all_lands;

static size_t bucket_of(const Table *table, uint64_t key)
{
    key ^= key >> 32;
    key *= 0xd6e8feb86659fd93u;
    key ^= key >> 32;
    return (size_t)key & table->mask;
}

static void table_reset(Table *table)
{
    if (table->buckets != table->few)
        PyMem_Free(table->buckets);
    memset(table, 0, sizeof *table);
    table->buckets = table->few;
    table->mask = FEW - 1;
}

static void table_put(Table *table, Node *node)
{
    Node **bucket = &table->buckets[bucket_of(table, node->key)];
    node->next = *bucket;
    node->at = bucket;
    if (node->next)
        node->next->at = &node->next;
    *bucket = node;
}

static void table_add(Table *table, Node *node)
{
    size_t size = table->mask + 1;
    Node **wider = table->count < size ? NULL : PyMem_Calloc(2 * size, sizeof(Node *));
    if (wider) { /* without memory for it the chains only get longer */
        Node **old = table->buckets;
        table->buckets = wider;
        table->mask = 2 * size - 1;
        for (size_t i = 0; i < size; i++)
            for (Node *at = old[i], *next; at; at = next) {
                next = at->next;
                table_put(table, at);
            }
        if (old != table->few)
            PyMem_Free(old);
    }
    table_put(table, node);
    table->count++;
}

static void table_remove(Table *table, Node *node)
{
    *node->at = node->next;
    if (node->next)
        node->next->at = node->at;
    table->count--;
}

static Node *same_key(Node *node, uint64_t key)
{
    while (node && node->key != key)
        node = node->next;
    return node;
}

static Node *table_find(const Table *table, uint64_t key)
{
    return same_key(table->buckets[bucket_of(table, key)], key);
}

static uint64_t exact_key(uint64_t serial, uint64_t start, size_t span, int prot)
{
    return serial * 0x9e3779b97f4a7c15u + (start / page_size) * 0xc2b2ae3d27d4eb4fu + span + (uint64_t)prot;
}

/* A stake is a page without rights at the top of the 512 GiB that one entry of the top page table covers. With a
 * mapping above it, Linux gives up no page tables when a mirror goes, and does not flush the TLB for it: measured,
 * that is half the cost of mapping and unmapping an untouched page. Where it cannot be had, it is only slower. */
static void stake(Land *land, uint64_t at)
{
    uint64_t slot = (uint64_t)1 << 39;
    land->staked = page_size == 4096 ? (at / slot + 1) * slot : UINT64_MAX;
    uintptr_t address = (uintptr_t)(land->staked - page_size);
    /* In a small land, or right below it, every page counts. */
    if (land->staked > land->end || address - at < (uint64_t)1 << 30)
        return;
    if (map_piece(address, page_size, PROT_NONE, -1, 0))
        return;
    PyObject *number = PyLong_FromUnsignedLongLong(address);
    if (!number || PyList_Append(land->stakes, number)) {
        PyErr_Clear();
        munmap((void *)address, page_size);
    } else if (land->hole_end > address) {
        land->hole_end = address;
    }
    Py_XDECREF(number);
}

static void pull_stakes(Land *land)
{
    for (Py_ssize_t i = 0; land->stakes && land->epoch == fork_epoch && i < PyList_Size(land->stakes); i++)
        munmap((void *)(uintptr_t)PyLong_AsUnsignedLongLong(PyList_GetItem(land->stakes, i)), page_size);
    Py_CLEAR(land->stakes);
}

/* A place in the current hole, with a free page behind it; 0 where it has none. */
static int reserve(Land *land, size_t span, uint64_t residue, uintptr_t *base)
{
    uint64_t at = land->cursor;
    if (span >= huge_size)
        at += (residue - at) & (huge_size - 1);
    if (at >= land->staked && at < land->hole_end)
        stake(land, at);
    if (at > land->hole_end || span > land->hole_end - at)
        return 0;
    land->cursor = at + span + page_size;
    *base = (uintptr_t)at;
    return 1;
}

/* A place is free again. Without memory for the note, the tree has it as taken for ever. */
static void give_place_back(Land *land, uintptr_t base, int in_tree)
{
    if (!in_tree || !land->gone)
        return;
    PyObject *address = PyLong_FromUnsignedLongLong(base);
    if (!address || PyList_Append(land->gone, address))
        PyErr_Clear();
    Py_XDECREF(address);
}

static void forget_kept(Land *land, Kept *kept)
{
    table_remove(&land->exact, &kept->exact);
    table_remove(&land->of, &kept->of);
    *(kept->older ? &kept->older->newer : &land->oldest) = kept->newer;
    *(kept->newer ? &kept->newer->older : &land->newest) = kept->older;
    land->kept_bytes -= kept->span;
}

static void evict(Land *land, Kept *kept)
{
    forget_kept(land, kept);
    land->evictions++;
    if (land->events)
        put_event(land->events, (Event){.kind = EVICT, .flags = (uint16_t)kept->prot,
                  .facts = {kept->base, kept->span, 0, kept->serial, kept->start, PyThread_get_thread_ident()}});
    /* It cannot fail: it takes whole mappings away, never a part of one. */
    if (land->epoch == fork_epoch)
        unmap_range(kept->base, kept->span);
    give_place_back(land, kept->base, kept->in_tree);
    PyMem_Free(kept);
}

/* A larger window is looked for among so many of the same frames, the ones kept last. */
#define STEPS 32

/* A kept window that shows [start, start + span) of these frames with these rights: that one, or a larger one. */
static Kept *find_kept(Land *land, uint64_t serial, uint64_t start, size_t span, int prot)
{
    uint64_t key = exact_key(serial, start, span, prot);
    for (Node *at = table_find(&land->exact, key); at; at = same_key(at->next, key)) {
        Kept *kept = OWNER(Kept, exact, at);
        if (kept->serial == serial && kept->start == start && kept->span == span && kept->prot == prot)
            return kept;
    }
    int steps = STEPS;
    for (Node *at = table_find(&land->of, serial); at && steps--; at = same_key(at->next, serial)) {
        Kept *kept = OWNER(Kept, of, at);
        if (kept->prot == prot && kept->start <= start && start + span <= kept->start + kept->span)
            return kept;
    }
    return NULL;
}

static int clear_kept(Land *land)
{
    int had = land->oldest != NULL;
    while (land->oldest) /* looked up anew: the GIL may go away in between */
        evict(land, land->oldest);
    return had;
}

/* Land._prepare(start, end, budget): nothing is there, and nothing kept. Also in a forked child, which has
 * lost whatever was there. */
static PyObject *land_prepare(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    Land *land = (Land *)op;
    uint64_t start, end, budget;
    if (wants(nargs, 3, "Land._prepare") || as_u64(args[0], &start) || as_u64(args[1], &end) ||
        as_u64(args[2], &budget))
        return NULL;
    PyObject *gone = PyList_New(0), *stakes = PyList_New(0);
    if (!gone || !stakes) {
        Py_XDECREF(gone);
        Py_XDECREF(stakes);
        return NULL;
    }
    pull_stakes(land);
    land->stakes = stakes;
    Py_XDECREF((PyObject *)land->events);
    land->events = NULL;
    for (size_t i = 0; i <= land->live.mask; i++)
        for (Node *at = land->live.buckets[i]; at; at = at->next) {
            OWNER(Mirror, node, at)->land = NULL;
            Py_DECREF(op); /* the caller has one more */
        }
    clear_kept(land);
    table_reset(&land->live);
    table_reset(&land->exact);
    table_reset(&land->of);
    land->oldest = land->newest = NULL;
    land->cursor = start;
    land->hole_end = land->end = end;
    land->staked = 0;
    land->budget = budget;
    land->kept_bytes = land->hits = land->misses = land->evictions = land->made = land->made_bytes = 0;
    land->epoch = fork_epoch;
    Py_XDECREF(land->gone);
    land->gone = gone;
    Py_RETURN_NONE;
}

static PyObject *land_new(PyTypeObject *type, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(keywords))
{
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Land *self = (Land *)alloc(type, 0);
    if (self) {
        table_reset(&self->live);
        table_reset(&self->exact);
        table_reset(&self->of);
        self->other = all_lands;
        all_lands = self;
    }
    return (PyObject *)self;
}

static void land_dealloc(PyObject *op)
{
    Land *land = (Land *)op;
    PyTypeObject *type = Py_TYPE(op);
    for (Land **at = &all_lands; *at; at = &(*at)->other)
        if (*at == land) {
            *at = land->other;
            break;
        }
    clear_kept(land);
    pull_stakes(land);
    table_reset(&land->live);
    table_reset(&land->exact);
    table_reset(&land->of);
    Py_XDECREF(land->gone);
    Py_XDECREF((PyObject *)land->events);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type);
}

/* What is copied out of the tables before any object is made of it: making one may collect garbage, and a mirror in it. */
typedef struct {
    uint64_t fields[5];
} Row;

/* Rows as a list of tuples of `width` numbers; frees the rows. */
static PyObject *listed(Row *rows, size_t count, int width)
{
    PyObject *found = PyList_New(0);
    for (size_t i = 0; found && i < count; i++) {
        PyObject *row = PyTuple_New(width);
        for (int j = 0; row && j < width; j++) {
            PyObject *number = PyLong_FromUnsignedLongLong(rows[i].fields[j]);
            if (!number || PyTuple_SetItem(row, j, number))
                Py_CLEAR(row);
        }
        if (!row || PyList_Append(found, row))
            Py_CLEAR(found);
        Py_XDECREF(row);
    }
    PyMem_Free(rows);
    return found;
}

/* _fresh() -> [(start, end)]: what was taken since the tree last learned of it. */
static PyObject *land_fresh(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Land *land = (Land *)op;
    size_t count = 0;
    Row *rows = PyMem_Calloc(land->live.count + land->exact.count + 1, sizeof *rows);
    if (!rows)
        return PyErr_NoMemory();
    for (size_t i = 0; i <= land->live.mask; i++)
        for (Node *at = land->live.buckets[i]; at; at = at->next) {
            Mirror *mirror = OWNER(Mirror, node, at);
            if (!mirror->in_tree) {
                mirror->in_tree = 1;
                rows[count++] = (Row){{mirror->window.base, mirror->window.base + mirror->window.span}};
            }
        }
    for (Kept *kept = land->oldest; kept; kept = kept->newer)
        if (!kept->in_tree) {
            kept->in_tree = 1;
            rows[count++] = (Row){{kept->base, kept->base + kept->span}};
        }
    return listed(rows, count, 2);
}

/* _gone() -> [start]: what the tree has and is free again. */
static PyObject *land_gone(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    PyObject *empty = PyList_New(0);
    if (!empty)
        return NULL;
    PyObject *gone = ((Land *)op)->gone;
    ((Land *)op)->gone = empty;
    return gone;
}

static PyObject *land_reserve(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t span, residue;
    uintptr_t base;
    if (wants(nargs, 2, "Land._reserve") || as_u64(args[0], &span) || as_u64(args[1], &residue))
        return NULL;
    if (!reserve((Land *)op, span, residue, &base))
        Py_RETURN_NONE;
    return PyLong_FromUnsignedLongLong(base);
}

/* _mirrors() -> [Mirror]: those that live. One that is being collected this moment is none any more. */
static PyObject *land_mirrors(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Land *land = (Land *)op;
    PyObject *found = PyList_New(0);
    for (size_t i = 0; found && i <= land->live.mask; i++)
        for (Node *at = land->live.buckets[i]; found && at; at = at->next) {
            Mirror *mirror = OWNER(Mirror, node, at);
            if (Py_REFCNT((PyObject *)mirror) && is_alive(&mirror->window) &&
                PyList_Append(found, (PyObject *)mirror))
                Py_CLEAR(found);
        }
    return found;
}

/* _mirror_at(base) -> the mirror whose pages start there, or None. */
static PyObject *land_mirror_at(PyObject *op, PyObject *address)
{
    uint64_t base;
    if (as_u64(address, &base))
        return NULL;
    Node *node = table_find(&((Land *)op)->live, base);
    Mirror *mirror = node ? OWNER(Mirror, node, node) : NULL;
    if (!mirror || !Py_REFCNT((PyObject *)mirror) || !is_alive(&mirror->window))
        Py_RETURN_NONE;
    Py_INCREF((PyObject *)mirror);
    return (PyObject *)mirror;
}

/* _kept() -> [(base, span, serial of the frames, start in them, prot)], the one kept longest first. */
static PyObject *land_kept(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Land *land = (Land *)op;
    size_t count = 0;
    Row *rows = PyMem_Calloc(land->exact.count + 1, sizeof *rows);
    if (!rows)
        return PyErr_NoMemory();
    for (Kept *kept = land->oldest; kept; kept = kept->newer)
        rows[count++] = (Row){{kept->base, kept->span, kept->serial, kept->start, (uint64_t)kept->prot}};
    return listed(rows, count, 5);
}

/* _clear_kept() -> bool: unmaps all of them; whether there were any. */
static PyObject *land_clear_kept(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return PyBool_FromLong(clear_kept((Land *)op));
}

static PyObject *land_live(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t(((Land *)op)->live.count);
}

/* _listen(events): has them told of every mirror from now on; None: nobody any more. */
static PyObject *land_listen(PyObject *op, PyObject *events)
{
    Land *land = (Land *)op;
    if (!Py_IsNone(events) && !PyObject_TypeCheck(events, events_type)) {
        PyErr_SetString(PyExc_TypeError, "a land tells Events");
        return NULL;
    }
    PyObject *before = (PyObject *)land->events;
    land->events = Py_IsNone(events) ? NULL : (Events *)events;
    Py_XINCREF((PyObject *)land->events);
    Py_XDECREF(before);
    Py_RETURN_NONE;
}

static PyMethodDef land_methods[] = {
    {"_prepare", FASTCALL(land_prepare), METH_FASTCALL, NULL},
    {"_reserve", FASTCALL(land_reserve), METH_FASTCALL, NULL},
    {"_fresh", land_fresh, METH_NOARGS, NULL},
    {"_gone", land_gone, METH_NOARGS, NULL},
    {"_mirrors", land_mirrors, METH_NOARGS, NULL},
    {"_mirror_at", land_mirror_at, METH_O, NULL},
    {"_kept", land_kept, METH_NOARGS, NULL},
    {"_clear_kept", land_clear_kept, METH_NOARGS, NULL},
    {"_listen", land_listen, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef land_members[] = {
    {"_cursor", T_ULONGLONG, offsetof(Land, cursor), 0, NULL},
    {"_hole_end", T_ULONGLONG, offsetof(Land, hole_end), 0, NULL},
    {"_stakes", T_OBJECT, offsetof(Land, stakes), READONLY, NULL},
    {"_budget", T_ULONGLONG, offsetof(Land, budget), READONLY, NULL},
    {"_kept_bytes", T_ULONGLONG, offsetof(Land, kept_bytes), READONLY, NULL},
    {"_hits", T_ULONGLONG, offsetof(Land, hits), READONLY, NULL},
    {"_misses", T_ULONGLONG, offsetof(Land, misses), READONLY, NULL},
    {"_evictions", T_ULONGLONG, offsetof(Land, evictions), READONLY, NULL},
    {"_made", T_ULONGLONG, offsetof(Land, made), READONLY, NULL},
    {"_made_bytes", T_ULONGLONG, offsetof(Land, made_bytes), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef land_getset[] = {
    {"live", land_live, NULL, "How many mirrors live.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot land_slots[] = {
    {Py_tp_doc, "What is mapped where in a range of addresses."},
    {Py_tp_new, land_new},
    {Py_tp_dealloc, land_dealloc},
    {Py_tp_methods, land_methods},
    {Py_tp_members, land_members},
    {Py_tp_getset, land_getset},
    {0, NULL},
};

static PyType_Spec land_spec = {
    .name = "realmap._host.Land",
    .basicsize = sizeof(Land),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = land_slots,
};

/* The first land from `at` on that is not being collected, held: the GIL may go away while it is at work. */
static Land *living(Land *at)
{
    while (at && !Py_REFCNT((PyObject *)at))
        at = at->other;
    Py_XINCREF((PyObject *)at);
    return at;
}

/* unkeep(serial): unmaps every kept window of these frames, in every land. */
static PyObject *host_unkeep(PyObject *Py_UNUSED(module), PyObject *number)
{
    uint64_t serial;
    if (as_u64(number, &serial))
        return NULL;
    for (Land *land = living(all_lands), *next; land; land = next) {
        Node *at;
        while ((at = table_find(&land->of, serial)))
            evict(land, OWNER(Kept, of, at));
        next = living(land->other);
        Py_DECREF((PyObject *)land);
    }
    Py_RETURN_NONE;
}

/* ---- mirrors ------------------------------------------------------------------------------ */

/* What a mirror has to know of frames and mappings. The classes of memory/frames.py and memory/mapping.py
 * build on these; their invariants are theirs. */

typedef struct {
    PyObject_HEAD
    PyObject *holders; /* {id: who}: one entry for each reference, */
    PyObject *mirrors; /* but those of mirrors are here: they come and go, and there may be many of the others */
    unsigned long long serial;
    unsigned long long huge; /* bytes that huge pages back */
    int fd;                  /* of the one segment; -1 where there are several, or none any more */
} Frames;

typedef struct {
    PyObject_HEAD
    PyObject *frames;
    PyObject *rights;
    unsigned long long phys_offset;
    unsigned long long length;
    Py_ssize_t pins;
    char held;
} Mapping;

static PyTypeObject *frames_type;
static PyTypeObject *mapping_type;
static PyObject *word_mirror; /* "mirror" */

static void frames_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    Py_XDECREF(((Frames *)op)->holders);
    Py_XDECREF(((Frames *)op)->mirrors);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type);
}

static void mapping_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    Mapping *self = (Mapping *)op;
    Py_XDECREF(self->frames);
    Py_XDECREF(self->rights);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type);
}

static PyMemberDef frames_members[] = {
    {"_holders", T_OBJECT_EX, offsetof(Frames, holders), 0, NULL},
    {"_mirrors", T_OBJECT_EX, offsetof(Frames, mirrors), 0, NULL},
    {"serial", T_ULONGLONG, offsetof(Frames, serial), 0, "A number of its own, in this process."},
    {"huge", T_ULONGLONG, offsetof(Frames, huge), 0, "How many bytes of it huge pages back."},
    {"_fd", T_INT, offsetof(Frames, fd), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyMemberDef mapping_members[] = {
    {"frames", T_OBJECT_EX, offsetof(Mapping, frames), 0, "The frames behind it, or None."},
    {"rights", T_OBJECT_EX, offsetof(Mapping, rights), 0, "What its process may do there."},
    {"phys_offset", T_ULONGLONG, offsetof(Mapping, phys_offset), 0, "Where in its frames it starts, in bytes."},
    {"length", T_ULONGLONG, offsetof(Mapping, length), 0, "Its bytes."},
    {"_pins", T_PYSSIZET, offsetof(Mapping, pins), 0, NULL},
    {"_held", T_BOOL, offsetof(Mapping, held), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot frames_slots[] = {
    {Py_tp_doc, "Frames, as a mirror has to know them."},
    {Py_tp_dealloc, frames_dealloc},
    {Py_tp_members, frames_members},
    {0, NULL},
};

static PyType_Slot mapping_slots[] = {
    {Py_tp_doc, "A mapping, as a mirror has to know it."},
    {Py_tp_dealloc, mapping_dealloc},
    {Py_tp_members, mapping_members},
    {0, NULL},
};

static PyType_Spec frames_spec = {
    .name = "realmap._host.Frames",
    .basicsize = sizeof(Frames),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = frames_slots,
};

static PyType_Spec mapping_spec = {
    .name = "realmap._host.Mapping",
    .basicsize = sizeof(Mapping),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = mapping_slots,
};

static Mirror *new_mirror(PyObject *cls, PyObject *mapping, PyObject *frames, int prot)
{
    Mirror *self = (Mirror *)new_window((PyTypeObject *)cls, 0, prot, 0);
    if (self) {
        Py_INCREF(mapping);
        Py_INCREF(frames);
        self->mapping = mapping;
        self->frames = frames;
    }
    return self;
}

static void enter(Land *land, Mirror *self, uintptr_t base, size_t span, int in_tree)
{
    self->window.base = base;
    self->window.span = span;
    self->node.key = base;
    self->in_tree = (char)in_tree;
    Py_INCREF((PyObject *)land);
    self->land = land;
    table_add(&land->live, &self->node);
}

static void count_made(Land *land, uint64_t length)
{
    land->made++;
    land->made_bytes += length;
}

/* Takes it out of its land; its place is given back, or somebody else's from now on. */
static void leave(Mirror *self, int give_back)
{
    Land *land = self->land;
    if (!land)
        return;
    self->land = NULL;
    table_remove(&land->live, &self->node);
    if (give_back)
        give_place_back(land, self->window.base, self->in_tree);
    Py_DECREF((PyObject *)land);
}

/* Notes its reference with the frames: {id: ("mirror", address)}. */
static int hold(Mirror *self, PyObject *holders)
{
    PyObject *key = PyLong_FromVoidPtr(self);
    PyObject *address = PyLong_FromUnsignedLongLong(self->window.base + self->window.lead);
    PyObject *who = address ? PyTuple_Pack(2, word_mirror, address) : NULL;
    int failed = !key || !who || PyDict_SetItem(holders, key, who);
    Py_XDECREF(key);
    Py_XDECREF(address);
    Py_XDECREF(who);
    if (!failed) {
        Py_INCREF(holders);
        self->holders = holders;
    }
    return failed ? -1 : 0;
}

/* Gives up its reference, or references; where it was the last one, the frames go. Again: nothing. */
static int let_go(Mirror *self)
{
    PyObject *holders = self->holders;
    if (!holders) {
        Py_ssize_t count = self->mappings ? PyTuple_Size(self->frames) : 0;
        for (Py_ssize_t i = 0; i < count; i++) {
            PyObject *done = PyObject_CallMethod(PyTuple_GetItem(self->frames, i), "let_go", "O", self);
            if (!done)
                return -1;
            Py_DECREF(done);
        }
        return 0;
    }
    self->holders = NULL;
    PyObject *key = PyLong_FromVoidPtr(self);
    int failed = !key || PyDict_DelItem(holders, key);
    Py_XDECREF(key);
    Frames *frames = (Frames *)self->frames;
    if (!failed && !PyDict_Size(holders) && !PyDict_Size(frames->holders)) {
        PyObject *done = PyObject_CallMethod(self->frames, "_free", NULL);
        failed = !done;
        Py_XDECREF(done);
    }
    Py_DECREF(holders);
    return failed ? -1 : 0;
}

/* Leaves the window of a mirror that is being dropped to its land. 0: it must be unmapped. */
static int keep(Mirror *self)
{
    Land *land = self->land;
    Window *window = &self->window;
    if (!land || !self->serial || window->span > land->budget || zeros_of(window))
        return 0;
    if (!((Mapping *)self->mapping)->held)
        return 0; /* nothing survives the unmapping by its process */
    uint64_t key = exact_key(self->serial, self->start, window->span, window->prot);
    for (Node *at = table_find(&land->exact, key); at; at = same_key(at->next, key)) {
        Kept *other = OWNER(Kept, exact, at);
        if (other->serial == self->serial && other->start == self->start && other->span == window->span)
            return 0; /* two mirrors of one range: one window is enough */
    }
    Kept *kept = PyMem_Calloc(1, sizeof *kept);
    if (!kept)
        return 0;
    kept->exact.key = key;
    kept->of.key = kept->serial = self->serial;
    kept->base = window->base;
    kept->span = window->span;
    kept->start = self->start;
    kept->prot = window->prot;
    kept->in_tree = self->in_tree;
    kept->older = land->newest;
    *(land->newest ? &land->newest->newer : &land->oldest) = kept;
    land->newest = kept;
    table_add(&land->exact, &kept->exact);
    table_add(&land->of, &kept->of);
    land->kept_bytes += kept->span;
    unguard(window); /* nobody touches it before it is a mirror's again */
    Py_INCREF((PyObject *)land); /* the GIL may go away in between */
    leave(self, 0);
    while (land->kept_bytes > land->budget && land->oldest)
        evict(land, land->oldest);
    Py_DECREF((PyObject *)land);
    return 1;
}

/* Where it faulted, the call that it was made in has to end in that; it may be the only one to know. */
static void tell_caller(Mirror *self)
{
    uintptr_t at = self->caller ? window_fault_at(&self->window) : 0;
    if (!at)
        return;
    PyObject *told = PyObject_CallMethod(self->caller, "note_fault", "OK", self, (unsigned long long)at);
    if (!told)
        PyErr_Clear();
    Py_XDECREF(told);
}

/* What the flags of MIRROR and DROP say besides its rights. */
#define WAS_KEPT 4
#define FAULTED 8

/* Tells of a mirror that has come, or goes. `user`: where in its process its first byte is; 0 where nobody knows. */
COLD static void tell_mirror(Events *events, enum kind kind, const Mirror *self, int flags, size_t live, uint64_t user)
{
    const Window *window = &self->window;
    put_event(events, (Event){.kind = (uint16_t)kind, .flags = (uint16_t)(window->prot | flags),
              .process = (uint32_t)live,
              .facts = {window->base + window->lead, (uint64_t)window->length, user, self->serial,
                        self->start + window->lead, PyThread_get_thread_ident()}});
}

/* Tells of a mirror that has just been made. Asking its mapping for the address may run anything. */
COLD static void tell_made(Mirror *self, int flags)
{
    uint64_t user = 0;
    Mapping *mapping = (Mapping *)self->mapping;
    PyObject *address = PyObject_GetAttrString(self->mapping, "address");
    if (address) {
        user = PyLong_AsUnsignedLongLongMask(address) + self->start + self->window.lead - mapping->phys_offset;
        Py_DECREF(address);
    }
    if (PyErr_Occurred())
        PyErr_Clear();
    if (self->land && self->land->events)
        tell_mirror(self->land->events, MIRROR, self, flags, self->land->live.count, user);
}

/* Unmaps it (or has it kept), gives back its place and its references. Again: nothing.
 * -1 with an exception set and nothing changed: a view lives, or Linux did not unmap it. */
static int end_mirror(Mirror *self)
{
    Window *window = &self->window;
    if (is_alive(window)) {
        if (window->exports) {
            still_viewed("unmap", window->exports);
            return -1;
        }
        window->state = DEAD; /* first: while the GIL is away nobody may take an export */
        Events *events = self->land ? self->land->events : NULL;
        size_t live = self->land ? self->land->live.count - 1 : 0;
        Py_XINCREF((PyObject *)events);
        int kept = keep(self);
        if (!kept) {
            disarm(window);
            int error = unmap_range(window->base, window->span);
            if (error) {
                window->state = ALIVE;
                arm(window);
                Py_XDECREF((PyObject *)events);
                os_error(error);
                return -1;
            }
        }
        if (events) {
            tell_mirror(events, DROP, self, (kept ? WAS_KEPT : 0) | (zeros_of(window) ? FAULTED : 0), live, 0);
            Py_DECREF((PyObject *)events);
        }
        unguard(window);
        tell_caller(self);
    }
    window->state = DEAD;
    leave(self, 1);
    return let_go(self);
}

/* A plain int from 0 on; -1 where it is another object, or does not fit. Nothing is raised. */
static int64_t plain(PyObject *number)
{
    if (!PyLong_CheckExact(number))
        return -1;
    int64_t value = PyLong_AsLongLong(number);
    if (value == -1 && PyErr_Occurred())
        PyErr_Clear();
    return value;
}

/* The range [offset, offset + length) of a mapping, where it is one of the plain kind: whole and held, of one
 * segment or of several (whose descriptor is -1). Its frames, or NULL; where in them it is, in `at`. */
static Frames *plain_range(Mapping *mapping, int64_t offset, int64_t length, uint64_t *at)
{
    Frames *frames = (Frames *)mapping->frames;
    if (!frames || !PyObject_TypeCheck((PyObject *)frames, frames_type) || !frames->holders ||
        !frames->mirrors || !PyDict_Check(frames->holders) || !PyDict_Check(frames->mirrors) || !(mapping->held || mapping->pins) || offset < 0 || length <= 0 ||
        (uint64_t)offset + (uint64_t)length > mapping->length || mapping->phys_offset > (uint64_t)INT64_MAX / 2 ||
        mapping->length > (uint64_t)INT64_MAX / 2)
        return NULL;
    *at = mapping->phys_offset + (uint64_t)offset;
    return frames;
}

/* 1: the mapping's own rights allow all of `rights`; 0: they do not; -1 with an exception set: they are none. */
static int owner_allows(Mapping *mapping, int rights)
{
    long allowed = mapping->rights ? PyLong_AsLong(mapping->rights) : 0;
    if (allowed == -1 && PyErr_Occurred())
        return -1;
    return !(rights & ~allowed);
}

/* copy_in(mapping, offset, length) -> bytes: a copy, where the mapping's owner may read it and it lies in one
 * segment. None: not this way, or not all of it is there; memory/frames.py knows the others, and why not. */
static PyObject *host_copy_in(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    if (wants(nargs, 3, "copy_in"))
        return NULL;
    if (!PyObject_TypeCheck(args[0], mapping_type)) {
        PyErr_SetString(PyExc_TypeError, "a copy is made of a mapping");
        return NULL;
    }
    Mapping *mapping = (Mapping *)args[0];
    uint64_t at;
    int64_t offset = plain(args[1]), length = plain(args[2]);
    Frames *frames = plain_range(mapping, offset, length, &at);
    int allowed = frames ? owner_allows(mapping, PROT_READ) : 0;
    if (allowed < 0)
        return NULL;
    if (!allowed || frames->fd < 0 || length > PY_SSIZE_T_MAX / 2)
        Py_RETURN_NONE;
    PyObject *copy = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
    if (!copy)
        return NULL;
    char *bytes = PyBytes_AsString(copy);
    int fd = frames->fd;
    ssize_t got;
    if ((size_t)length >= LONG_RANGE / 16) {
        mapping->pins++; /* while the GIL is away nobody may close the descriptor */
        Py_BEGIN_ALLOW_THREADS
        got = pread(fd, bytes, (size_t)length, (off_t)at);
        Py_END_ALLOW_THREADS
        PyObject *unpinned = PyObject_CallMethod((PyObject *)mapping, "unpin", NULL);
        if (!unpinned) {
            Py_DECREF(copy);
            return NULL;
        }
        Py_DECREF(unpinned);
    } else {
        got = pread(fd, bytes, (size_t)length, (off_t)at);
    }
    if (got != length) {
        Py_DECREF(copy);
        Py_RETURN_NONE;
    }
    return copy;
}

/* Mirror._open(land, mapping, offset, length, rights, caller): a mirror of [offset, offset + length) of a mapping,
 * by a window that was kept, or in the current hole of the land; for a `caller` (else None) only where the mapping's
 * own rights allow `rights`. None: not this way, and nothing has changed; memory/cross_process.py finds out why not, and knows
 * the others. */
static PyObject *mirror_open(PyObject *cls, PyObject *const *args, Py_ssize_t nargs)
{
    if (wants(nargs, 6, "Mirror._open"))
        return NULL;
    PyObject *caller = Py_IsNone(args[5]) ? NULL : args[5];
    int64_t asked = PyLong_Check(args[4]) ? PyLong_AsLongLong(args[4]) : 0;
    if (asked == -1 && PyErr_Occurred())
        PyErr_Clear();
    int rights = asked >= 1 && asked <= 3 ? (int)asked : 0;
    if (!PyObject_TypeCheck(args[0], land_type) || !PyObject_TypeCheck(args[1], mapping_type)) {
        PyErr_SetString(PyExc_TypeError, "a mirror is opened in a land, of a mapping");
        return NULL;
    }
    Land *land = (Land *)args[0];
    Mapping *mapping = (Mapping *)args[1];
    uint64_t at;
    int64_t offset = plain(args[2]), size = plain(args[3]);
    Frames *frames = plain_range(mapping, offset, size, &at);
    int allowed = caller && frames ? owner_allows(mapping, rights) : 1;
    if (allowed < 0)
        return NULL;
    if (!frames || !allowed || !rights)
        Py_RETURN_NONE;
    uint64_t length = (uint64_t)size, serial = frames->serial;
    uint64_t start = at - at % page_size, end = at + length + page_size - 1;
    end -= end % page_size;
    if (frames->huge) { /* whole huge pages, as far as the mapping goes */
        uint64_t last = mapping->phys_offset + mapping->length;
        start -= start % huge_size;
        start = start < mapping->phys_offset ? mapping->phys_offset : start;
        end = (end + huge_size - 1) / huge_size * huge_size;
        end = end > last ? last : end;
    }
    size_t span = (size_t)(end - start);
    uint64_t lead = at - start;
    int fd = frames->fd, prot = rights;
    Mirror *self = new_mirror(cls, (PyObject *)mapping, (PyObject *)frames, prot);
    if (!self)
        return NULL;
    Py_XINCREF(caller);
    self->caller = caller;
    Kept *kept = land->budget ? find_kept(land, serial, start, span, prot) : NULL;
    int was_kept = kept != NULL;
    if (was_kept) {
        land->hits++;
        forget_kept(land, kept);
        enter(land, self, kept->base, kept->span, kept->in_tree);
        lead += start - kept->start;
        start = kept->start;
        PyMem_Free(kept);
    } else {
        uintptr_t base;
        land->misses += land->budget != 0;
        if (fd < 0 || !reserve(land, span, start, &base)) {
            Py_DECREF((PyObject *)self);
            Py_RETURN_NONE;
        }
        enter(land, self, base, span, 0);
    }
    self->serial = serial;
    self->start = start;
    self->window.lead = lead;
    self->window.length = (Py_ssize_t)length;
    /* Its place and its reference are taken before it is mapped: the GIL may go away meanwhile, and the frames
     * must not. */
    self->window.state = was_kept ? ALIVE : NOT_READY;
    Window *window = &self->window;
    window->guarded = guard(window->base, window->span, prot, 0);
    if (!window->guarded || hold(self, frames->mirrors)) {
        Py_DECREF((PyObject *)self);
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    }
    if (!was_kept && map_piece(self->window.base, span, prot, fd, (off_t)start)) {
        Py_DECREF((PyObject *)self);
        Py_RETURN_NONE;
    }
    self->window.state = ALIVE;
    arm(&self->window);
    count_made(land, length);
    if (land->events)
        tell_made(self, was_kept ? WAS_KEPT : 0);
    return (PyObject *)self;
}

/* Mirror._open_at(land, base, mappings, frames, pieces, start, lead, length, prot): any number of pieces
 * at a place that was reserved. `frames` is a tuple; the caller takes the references. OSError: nothing stays. */
static PyObject *mirror_open_at(PyObject *cls, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t base, start, lead, length;
    int prot;
    if (wants(nargs, 9, "Mirror._open_at") || as_u64(args[1], &base) || as_u64(args[5], &start) ||
        as_u64(args[6], &lead) || as_u64(args[7], &length) || as_int(args[8], &prot))
        return NULL;
    if (!PyObject_TypeCheck(args[0], land_type) || !PyTuple_Check(args[2]) || !PyTuple_Size(args[2]) ||
        !PyObject_TypeCheck(PyTuple_GetItem(args[2], 0), mapping_type) || !PyTuple_Check(args[3])) {
        PyErr_SetString(PyExc_TypeError, "a mirror is opened in a land, of tuples of mappings and frames");
        return NULL;
    }
    Mirror *self = new_mirror(cls, PyTuple_GetItem(args[2], 0), args[3], prot);
    if (!self)
        return NULL;
    Py_INCREF(args[2]);
    self->mappings = args[2];
    uintptr_t end = map_pieces(&self->window, base, args[4]);
    if (!end) {
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    self->window.state = end > base ? ALIVE : DEAD;
    enter((Land *)args[0], self, base, end - base, 0);
    if (end > base && !guard_window(&self->window)) {
        Py_DECREF((PyObject *)self);
        return PyErr_NoMemory();
    }
    if (lead > self->window.span || length > self->window.span - lead) {
        PyErr_SetString(PyExc_ValueError, "what a mirror exports lies inside of what it maps");
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    if (PyTuple_Size(args[2]) == 1 && PyTuple_Size(args[3]) == 1 &&
        PyObject_TypeCheck(PyTuple_GetItem(args[3], 0), frames_type))
        self->serial = ((Frames *)PyTuple_GetItem(args[3], 0))->serial;
    self->start = start;
    self->window.lead = lead;
    self->window.length = (Py_ssize_t)length;
    count_made((Land *)args[0], length);
    if (self->land->events && is_alive(&self->window))
        tell_made(self, 0);
    return (PyObject *)self;
}

/* _populate(): faults in every page. OSError: one cannot be had. */
static PyObject *mirror_populate(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Window *self = (Window *)op;
    if (!is_alive(self)) {
        PyErr_SetString(PyExc_BufferError, "it is unmapped: its bytes are no longer there");
        return NULL;
    }
    int error = populate_range(self->base, self->span, self->prot);
    if (error)
        return os_error(error);
    Py_RETURN_NONE;
}

/* _end() -> bool: what `drop` does; whether bytes of it were gone meanwhile. False again once it is dropped.
 * BufferError: a view lives. OSError: Linux did not unmap it. */
static PyObject *mirror_end(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    int lived = is_alive((Window *)op);
    if (end_mirror((Mirror *)op))
        return NULL;
    return PyBool_FromLong(lived && window_fault_at((Window *)op));
}

/* Collection is a drop; no view can live then. What fails here has nobody to be told to. */
static void mirror_finalize(PyObject *op)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (end_mirror((Mirror *)op))
        PyErr_Clear();
    PyErr_Restore(type, value, traceback);
}

static void mirror_dealloc(PyObject *op)
{
    Mirror *self = (Mirror *)op;
    PyObject *refs[] = {self->mapping, self->mappings, self->frames, self->holders, self->caller};
    if (self->holders) { /* a base type's own objects are not finalized */
        self->caller = NULL; /* nobody is told: it cannot be shown to anybody any more */
        mirror_finalize(op);
    }
    if (self->weakrefs)
        PyObject_ClearWeakRefs(op);
    refs[3] = self->holders;
    leave(self, 0); /* where it could not be unmapped before: its place stays taken, or is an obstacle */
    for (size_t i = 0; i < sizeof refs / sizeof *refs; i++)
        Py_XDECREF(refs[i]);
    window_dealloc(op);
}

static PyObject *mirror_mappings(PyObject *op, void *Py_UNUSED(closure))
{
    Mirror *self = (Mirror *)op;
    if (!self->mappings)
        return PyTuple_Pack(1, self->mapping);
    Py_INCREF(self->mappings);
    return self->mappings;
}

static PyMethodDef mirror_methods[] = {
    {"_open", FASTCALL(mirror_open), METH_FASTCALL | METH_CLASS, NULL},
    {"_open_at", FASTCALL(mirror_open_at), METH_FASTCALL | METH_CLASS, NULL},
    {"_populate", mirror_populate, METH_NOARGS, NULL},
    {"_end", mirror_end, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef mirror_members[] = {
    {"mapping", T_OBJECT_EX, offsetof(Mirror, mapping), READONLY, "The mapping that its first byte belongs to."},
    {"_frames", T_OBJECT_EX, offsetof(Mirror, frames), READONLY, NULL},
    {"_start", T_ULONGLONG, offsetof(Mirror, start), READONLY, NULL},
    {"_caller", T_OBJECT, offsetof(Mirror, caller), 0, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Mirror, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef mirror_getset[] = {
    {"mappings", mirror_mappings, NULL, "All mappings that it shows, in order.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot mirror_slots[] = {
    {Py_tp_doc, "A window in a land, of frames that it holds a reference to."},
    {Py_tp_dealloc, mirror_dealloc},
    {Py_tp_finalize, mirror_finalize},
    {Py_tp_methods, mirror_methods},
    {Py_tp_members, mirror_members},
    {Py_tp_getset, mirror_getset},
    {0, NULL},
};

static PyType_Spec mirror_spec = {
    .name = "realmap._host.Mirror",
    .basicsize = sizeof(Mirror),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = mirror_slots,
};

/* ---- rings -------------------------------------------------------------------------------- */

/* Two queues, each with one producer and one consumer, in memory that both sides may write:
 *
 *      user    ── calls ────▶  kernel        queue 0
 *      user    ◀── answers ──  kernel        queue 1
 *
 *      tail ─▶ the producer's count of messages     asleep ─▶ 1 while the consumer sleeps, or is about to
 *      head ─▶ the consumer's count                 mailed ─▶ the producer's count of what it sent by the socket
 *
 * Each side keeps its own counts where the other cannot reach them; what the other side wrote is
 * read once, then checked. A peer that scribbles here is found out, and hurts only itself.
 *
 * Publishing and the sleep flag: the producer stores tail and then looks at asleep, the consumer
 * stores asleep and then looks at tail. Both need a sequentially consistent fence in between, or
 * each can miss the other's store (on x86 too), and a wake-up is lost.
 *
 * Order: what was sent by the socket (the consumer slept, the ring was full) is counted in mailed before the next
 * tail, so whoever sees that tail reads the socket first. */

#define RING_SLOTS 32u
#define RING_SLOT 2048u /* bytes a message takes, 4 of them its length */
#define LINE 64
#define BELL 4 /* wire/channel.py */
#define BELL_TRIES 100

typedef struct {
    _Alignas(LINE) _Atomic uint32_t tail;
    _Atomic uint32_t cpu; /* where the producer ran when it last had something to say */
    _Atomic uint32_t mailed;
    _Alignas(LINE) _Atomic uint32_t head;
    _Alignas(LINE) _Atomic uint32_t asleep;
    _Alignas(LINE) unsigned char slots[RING_SLOTS][RING_SLOT];
} Queue;

typedef struct {
    PyObject_HEAD
    Queue *queues;
    Queue *in;
    Queue *out;
    uint32_t in_head;
    uint32_t out_tail;
    uint32_t in_mailed; /* as far as the socket was read */
    unsigned long epoch;
} Ring;

static PyTypeObject *ring_type;

static inline void pause_cpu(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Ring._open(fd, is_kernel): maps the memory behind `fd`, which is sealed and of RING_BYTES. */
static PyObject *ring_open(PyObject *cls, PyObject *const *args, Py_ssize_t nargs)
{
    int fd, is_kernel;
    if (wants(nargs, 2, "Ring._open") || as_int(args[0], &fd) || as_int(args[1], &is_kernel))
        return NULL;
    struct stat status;
    if (fstat(fd, &status))
        return os_error(errno);
    if (status.st_size < (off_t)(2 * sizeof(Queue))) {
        PyErr_SetString(PyExc_ValueError, "too small for a ring");
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot((PyTypeObject *)cls, Py_tp_alloc);
    Ring *self = (Ring *)alloc((PyTypeObject *)cls, 0);
    if (!self)
        return NULL;
    void *got = mmap(NULL, 2 * sizeof(Queue), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (got == MAP_FAILED) {
        int error = errno;
        Py_DECREF(self);
        return os_error(error);
    }
    madvise(got, 2 * sizeof(Queue), MADV_DONTFORK); /* a ring has one user; a child is another */
    self->queues = got;
    self->in = &self->queues[is_kernel ? 0 : 1];
    self->out = &self->queues[is_kernel ? 1 : 0];
    atomic_store_explicit(&self->out->cpu, UINT32_MAX, memory_order_relaxed); /* nowhere yet */
    self->epoch = fork_epoch;
    return (PyObject *)self;
}

static int ring_is_here(Ring *self)
{
    if (self->queues && self->epoch == fork_epoch)
        return 1;
    PyErr_SetString(PyExc_ValueError, "the ring is closed, or another process's");
    return 0;
}

/* 0: it does not fit (now, or ever); 1: it is there; 2: and the other side must be woken. (No Python in here, nor in
 * queue_peek and queue_done: tools/hostile/ring_threads.c runs them in bare threads.) */
static int queue_push(Ring *self, const char *data, size_t length)
{
    uint32_t used = self->out_tail - atomic_load_explicit(&self->out->head, memory_order_acquire);
    if (length > RING_SLOT - sizeof(uint32_t) || used >= RING_SLOTS)
        return 0;
    unsigned char *slot = self->out->slots[self->out_tail % RING_SLOTS];
    uint32_t size = (uint32_t)length;
    memcpy(slot, &size, sizeof size);
    memcpy(slot + sizeof size, data, size);
    self->out_tail++;
    atomic_store_explicit(&self->out->tail, self->out_tail, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    if (!atomic_load_explicit(&self->out->asleep, memory_order_relaxed))
        return 1;
    /* Of several that see it asleep, one wakes it. */
    return atomic_exchange(&self->out->asleep, 0) ? 2 : 1;
}

/* _push(bytes) -> 0, 1 or 2, as above. */
static PyObject *ring_push(PyObject *op, PyObject *message)
{
    char *data;
    Py_ssize_t length;
    if (!ring_is_here((Ring *)op) || PyBytes_AsStringAndSize(message, &data, &length))
        return NULL;
    return PyLong_FromLong(queue_push((Ring *)op, data, (size_t)length));
}

/* Pushes, and wakes the other side by a bell through its socket where it sleeps; in one go: no interrupt may come in
 * between. -1 with an exception set; 0: it does not fit. */
static int push_and_wake(PyObject *op, PyObject *message, int socket)
{
    PyObject *pushed = ring_push(op, message);
    if (!pushed)
        return -1;
    int done = (int)PyLong_AsLong(pushed);
    Py_DECREF(pushed);
    if (done == 2) { /* where that cannot be sent there is unread mail, which wakes as well, or nobody any more */
        int tries = BELL_TRIES;
        while (send(socket, (const char[]){BELL}, 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && tries-- &&
               (errno == ENOBUFS || errno == ENOMEM || errno == EINTR)) /* or Linux has no memory this moment */
            sched_yield();
    }
    return done ? 1 : 0;
}

/* Whether the other side sleeps: it must be woken by the socket in any case, so a message had better go there. */
static int peer_sleeps(Ring *self)
{
    atomic_store_explicit(&self->out->cpu, (uint32_t)sched_getcpu(), memory_order_relaxed);
    return atomic_load_explicit(&self->out->asleep, memory_order_relaxed) != 0;
}

/* _send(bytes, socket) -> bool: pushes, and wakes. False: it does not fit. */
static PyObject *ring_send(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    int socket;
    if (wants(nargs, 2, "Ring._send") || as_int(args[1], &socket) || !ring_is_here((Ring *)op))
        return NULL;
    int done = push_and_wake(op, args[0], socket);
    return done < 0 ? NULL : PyBool_FromLong(done);
}

/* _offer(bytes, socket) -> bool: as _send, but False also where the other side sleeps. */
static PyObject *ring_offer(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs == 2 && ring_is_here((Ring *)op) && peer_sleeps((Ring *)op))
        Py_RETURN_FALSE;
    return PyErr_Occurred() ? NULL : ring_send(op, args, nargs);
}

static int ring_ready(const Ring *self)
{
    return atomic_load_explicit(&self->in->tail, memory_order_acquire) != self->in_head;
}

/* The next message, and how many there are; -1 where the other side's indices lie. */
static int64_t queue_peek(const Ring *self, const char **data, uint32_t *size)
{
    uint32_t there = atomic_load_explicit(&self->in->tail, memory_order_acquire) - self->in_head;
    *size = 0;
    if (!there)
        return 0;
    const unsigned char *slot = self->in->slots[self->in_head % RING_SLOTS];
    /* Copied, then checked: the other side may be changing it this moment. */
    memcpy(size, (const void *)slot, sizeof *size);
    *data = (const char *)slot + sizeof *size;
    return there > RING_SLOTS || *size > RING_SLOT - sizeof *size ? -1 : (int64_t)there;
}

/* The message was copied: its slot is free. */
static void queue_done(Ring *self)
{
    self->in_head++;
    atomic_store_explicit(&self->in->head, self->in_head, memory_order_release);
}

/* _mailed(): something was sent by the socket, before whatever goes by the ring from now on. */
static PyObject *ring_mailed(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Ring *self = (Ring *)op;
    if (!ring_is_here(self))
        return NULL;
    atomic_fetch_add_explicit(&self->out->mailed, 1, memory_order_relaxed); /* tail, stored later, releases it */
    Py_RETURN_NONE;
}

/* _pop() -> bytes, or None where nothing is there, or b"" where the socket must be read to its end before (said once
 * for what was sent there). ValueError: the other side's indices lie. */
static PyObject *ring_pop(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Ring *self = (Ring *)op;
    const char *data;
    uint32_t size;
    if (!ring_is_here(self))
        return NULL;
    int64_t there = queue_peek(self, &data, &size);
    if (!there)
        Py_RETURN_NONE;
    uint32_t mailed = atomic_load_explicit(&self->in->mailed, memory_order_relaxed);
    if (mailed != self->in_mailed) {
        self->in_mailed = mailed;
        return PyBytes_FromStringAndSize(NULL, 0);
    }
    if (there < 0) {
        PyErr_Format(PyExc_ValueError, "a ring whose indices lie (the next message: %u bytes)", size);
        return NULL;
    }
    PyObject *message = PyBytes_FromStringAndSize(data, (Py_ssize_t)size);
    if (message)
        queue_done(self);
    return message;
}

/* _takes(length): whether _offer would take a message of so many bytes now; _push will, once this was true. */
static PyObject *ring_takes(PyObject *op, PyObject *length)
{
    Ring *self = (Ring *)op;
    uint64_t size;
    if (!ring_is_here(self) || as_u64(length, &size))
        return NULL;
    uint32_t used = self->out_tail - atomic_load_explicit(&self->out->head, memory_order_acquire);
    return PyBool_FromLong(size <= RING_SLOT - sizeof(uint32_t) && used < RING_SLOTS && !peer_sleeps(self));
}

static Py_ssize_t find_ready(Ring **rings, Py_ssize_t count, Py_ssize_t start)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_ssize_t at = start + i < count ? start + i : start + i - count;
        if (ring_ready(rings[at]))
            return at;
    }
    return -1;
}

/* Between two looks at the clock lie a few microseconds. Where it has gone on for this long, somebody else had
 * this CPU: more processes want to run than there are. */
#define TAKEN 60000
#define OVERLOADED (-2)
#define SAME_CPU (-3)

/* Looks for a message for `budget` nanoseconds; the index of its ring, -1, OVERLOADED, or SAME_CPU: who was heard
 * last runs on this very CPU, and cannot say anything while we look. Without the GIL. */
static Py_ssize_t spin_for(Ring **rings, Py_ssize_t count, Py_ssize_t start, uint64_t budget)
{
    const Ring *last = rings[start ? start - 1 : count - 1];
    if (atomic_load_explicit(&last->in->cpu, memory_order_relaxed) == (uint32_t)sched_getcpu())
        return SAME_CPU;
    int64_t now = nanoseconds(), end = now + (int64_t)budget, taken = TAKEN + 500 * (int64_t)count;
    int turns = count < 32 ? 32 / (int)count : 1;
    while (now < end) {
        for (int turn = 0; turn < turns; turn++) {
            pause_cpu();
            Py_ssize_t found = find_ready(rings, count, start);
            if (found >= 0)
                return found;
        }
        int64_t before = now;
        now = nanoseconds();
        if (now - before > taken) {
            Py_ssize_t found = find_ready(rings, count, start);
            return found >= 0 ? found : OVERLOADED;
        }
    }
    return -1;
}

/* _exchange(bytes, ns, inbox, socket, sent) -> what became of it:
 *   0  not sent: it does not fit, or the other side sleeps
 *   1  sent; 6: and spun for `ns` nanoseconds in vain; 4: and others want this CPU; 5: and so does the other side
 *   3  sent, and a message came, which was appended to `inbox`
 * That it was sent is noted by appending to the list `sent`. An interrupt cannot come between sending and noting, nor
 * between taking and keeping. */
static PyObject *ring_exchange(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    Ring *self = (Ring *)op;
    uint64_t budget;
    int socket;
    if (wants(nargs, 5, "Ring._exchange") || as_u64(args[1], &budget) || as_int(args[3], &socket) ||
        !ring_is_here(self))
        return NULL;
    int sent = peer_sleeps(self) ? 0 : push_and_wake(op, args[0], socket);
    if (sent < 0 || (sent && PyList_Append(args[4], Py_True)))
        return NULL;
    if (!sent)
        return PyLong_FromLong(0);
    if (!ring_ready(self)) {
        if (!budget)
            return PyLong_FromLong(1);
        Py_INCREF(op); /* nobody may take it away while the GIL is */
        Py_ssize_t found;
        Py_BEGIN_ALLOW_THREADS
        found = spin_for(&self, 1, 0, budget);
        Py_END_ALLOW_THREADS
        int closed = !self->queues;
        Py_DECREF(op);
        if (closed)
            return PyLong_FromLong(1);
        if (found < 0)
            return PyLong_FromLong(found == OVERLOADED ? 4 : found == SAME_CPU ? 5 : 6);
    }
    PyObject *message = ring_pop(op, NULL);
    PyObject *kept = message ? PyObject_CallMethod(args[2], "append", "O", message) : NULL;
    Py_XDECREF(message);
    if (!kept)
        return NULL;
    Py_DECREF(kept);
    return PyLong_FromLong(3);
}

static void say_asleep(Ring *self, uint32_t asleep)
{
    atomic_store_explicit(&self->in->asleep, asleep, memory_order_relaxed);
}

/* The rings of a list or a tuple, borrowed, into `rings`; how many, or -1. */
static Py_ssize_t all_rings(PyObject *list, Ring ***rings)
{
    Py_ssize_t count = PyList_Check(list) ? PyList_Size(list) : -1;
    if (count < 0) {
        PyErr_SetString(PyExc_TypeError, "rings come in a list");
        return -1;
    }
    *rings = PyMem_Malloc(sizeof(Ring *) * (size_t)(count ? count : 1));
    if (!*rings) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyList_GetItem(list, i);
        if (!PyObject_TypeCheck(item, ring_type) || !ring_is_here((Ring *)item)) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_TypeError, "rings come in a list");
            PyMem_Free(*rings);
            return -1;
        }
        (*rings)[i] = (Ring *)item;
    }
    return count;
}

/* spin(rings, start, ns) -> the index of a ring that has a message, looked for from `start` on; -1 where none
 * has within `ns` nanoseconds, which are spent without the GIL; -2 where others want this CPU, -3 where who was heard
 * last wants it. */
static PyObject *host_spin(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t start, budget;
    Ring **rings;
    if (wants(nargs, 3, "spin") || as_u64(args[1], &start) || as_u64(args[2], &budget))
        return NULL;
    Py_ssize_t count = all_rings(args[0], &rings);
    if (count < 0)
        return NULL;
    Py_ssize_t from = count ? (Py_ssize_t)(start % (uint64_t)count) : 0;
    Py_ssize_t found = find_ready(rings, count, from);
    if (found < 0 && budget && count) {
        for (Py_ssize_t i = 0; i < count; i++)
            Py_INCREF((PyObject *)rings[i]); /* nobody may take one away while the GIL is */
        Py_BEGIN_ALLOW_THREADS
        found = spin_for(rings, count, from, budget);
        Py_END_ALLOW_THREADS
        for (Py_ssize_t i = 0; i < count; i++)
            Py_DECREF((PyObject *)rings[i]);
    }
    PyMem_Free(rings);
    return PyLong_FromSsize_t(found);
}

/* fall_asleep(rings) -> bool: says to every producer that it has to wake us. False: a message is
 * there already, and nobody has been told. */
static PyObject *host_fall_asleep(PyObject *Py_UNUSED(module), PyObject *list)
{
    Ring **rings;
    Py_ssize_t count = all_rings(list, &rings);
    if (count < 0)
        return NULL;
    for (Py_ssize_t i = 0; i < count; i++)
        say_asleep(rings[i], 1);
    atomic_thread_fence(memory_order_seq_cst);
    int empty = find_ready(rings, count, 0) < 0;
    if (!empty)
        for (Py_ssize_t i = 0; i < count; i++)
            say_asleep(rings[i], 0);
    PyMem_Free(rings);
    return PyBool_FromLong(empty);
}

/* wake_up(rings): nobody needs to wake us any more. */
static PyObject *host_wake_up(PyObject *Py_UNUSED(module), PyObject *list)
{
    Ring **rings;
    Py_ssize_t count = all_rings(list, &rings);
    if (count < 0)
        return NULL;
    for (Py_ssize_t i = 0; i < count; i++)
        say_asleep(rings[i], 0);
    PyMem_Free(rings);
    Py_RETURN_NONE;
}

static PyObject *ring_close(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Ring *self = (Ring *)op;
    if (self->queues && self->epoch == fork_epoch)
        munmap(self->queues, 2 * sizeof(Queue));
    self->queues = NULL;
    Py_RETURN_NONE;
}

static void ring_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    Py_XDECREF(ring_close(op, NULL));
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type);
}

static PyMethodDef ring_methods[] = {
    {"_open", FASTCALL(ring_open), METH_FASTCALL | METH_CLASS, NULL},
    {"_push", ring_push, METH_O, NULL},
    {"_send", FASTCALL(ring_send), METH_FASTCALL, NULL},
    {"_offer", FASTCALL(ring_offer), METH_FASTCALL, NULL},
    {"_takes", ring_takes, METH_O, NULL},
    {"_mailed", ring_mailed, METH_NOARGS, NULL},
    {"_exchange", FASTCALL(ring_exchange), METH_FASTCALL, NULL},
    {"_pop", ring_pop, METH_NOARGS, NULL},
    {"_close", ring_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot ring_slots[] = {
    {Py_tp_doc, "Two queues of messages in shared memory, one each way."},
    {Py_tp_dealloc, ring_dealloc},
    {Py_tp_methods, ring_methods},
    {0, NULL},
};

static PyType_Spec ring_spec = {
    .name = "realmap._host.Ring",
    .basicsize = sizeof(Ring),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = ring_slots,
};

/* ---- turns -------------------------------------------------------------------------------- */

/* Whose turn it is: a lock that nobody waits for, with levels for calls within a call of the same thread (in a signal
 * handler, or a destructor). Every function is one call of C, so that an interrupt finds it done or not done, and
 * restore may be called again. */
typedef struct {
    PyObject_HEAD
    unsigned long owner;
    Py_ssize_t level;
} Turn;

static int is_mine(const Turn *self) { return self->level && self->owner == PyThread_get_thread_ident(); }

/* level() -> how often this thread has taken it. */
static PyObject *turn_level(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Turn *self = (Turn *)op;
    return PyLong_FromSsize_t(is_mine(self) ? self->level : 0);
}

/* take() -> bool: False where another thread has it. */
static PyObject *turn_take(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Turn *self = (Turn *)op;
    if (self->level && !is_mine(self))
        Py_RETURN_FALSE;
    self->owner = PyThread_get_thread_ident();
    self->level++;
    Py_RETURN_TRUE;
}

/* restore(level): what this thread took since it had that level is given back. */
static PyObject *turn_restore(PyObject *op, PyObject *number)
{
    Turn *self = (Turn *)op;
    Py_ssize_t level = PyLong_AsSsize_t(number);
    if (level < 0) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "a level is not negative");
        return NULL;
    }
    if (is_mine(self) && level < self->level)
        self->level = level;
    Py_RETURN_NONE;
}

static void turn_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type);
}

static PyMethodDef turn_methods[] = {
    {"level", turn_level, METH_NOARGS, "How often this thread has taken it and not given it back."},
    {"take", turn_take, METH_NOARGS, "Takes it; False where another thread has it."},
    {"restore", turn_restore, METH_O, "Gives back what this thread took since it had that level."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot turn_slots[] = {
    {Py_tp_doc, "Whose turn it is: a lock with levels that nobody waits for."},
    {Py_tp_dealloc, turn_dealloc},
    {Py_tp_methods, turn_methods},
    {0, NULL},
};

static PyType_Spec turn_spec = {
    .name = "realmap._host.Turn",
    .basicsize = sizeof(Turn),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = turn_slots,
};

/* ---- the module --------------------------------------------------------------------------- */

/* unmap_all(address, length): what is mapped there goes, whatever it is (a forked child's land). */
static PyObject *host_unmap_all(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t address, length;
    if (wants(nargs, 2, "unmap_all") || as_u64(args[0], &address) || as_u64(args[1], &length) ||
        check_range(address, length))
        return NULL;
    int error = unmap_range(address, length);
    if (error)
        return os_error(error);
    Py_RETURN_NONE;
}

/* collapse(fd, length) -> bytes: backs a file whose space is taken with huge pages, as far as Linux has any; how
 * many bytes it did. MADV_COLLAPSE (Linux 6.1) does not ask for shmem_enabled, but it leaves holes alone. */
static PyObject *host_collapse(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    int fd;
    uint64_t length;
    if (wants(nargs, 2, "collapse") || as_int(args[0], &fd) || as_u64(args[1], &length) ||
        check_range(0, length))
        return NULL;
    size_t got = 0, room = (size_t)length + huge_size;
    int error = 0;
    Py_BEGIN_ALLOW_THREADS
    /* A range that is large enough holds a place for it at a multiple of a huge page. */
    char *range = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *place = range;
    if (range != MAP_FAILED) {
        place += -(uintptr_t)range & (huge_size - 1);
        if (mmap(place, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED) {
            madvise(place, length, MADV_HUGEPAGE);
            for (size_t at = 0; at + huge_size <= length; at += huge_size)
                if (!madvise(place + at, huge_size, MADV_COLLAPSE))
                    got += huge_size;
        } else {
            error = errno;
        }
        munmap(range, room);
    } else {
        error = errno;
    }
    Py_END_ALLOW_THREADS
    if (error)
        return os_error(error);
    return PyLong_FromSize_t(got);
}

/* faults() -> how often zero pages had to take the place of what was truncated, in this process. */
static PyObject *host_faults(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromUnsignedLongLong(atomic_load_explicit(&faults, memory_order_acquire));
}

static PyMethodDef host_methods[] = {
    {"faults", host_faults, METH_NOARGS, NULL},
    {"unmap_all", FASTCALL(host_unmap_all), METH_FASTCALL, NULL},
    {"collapse", FASTCALL(host_collapse), METH_FASTCALL, NULL},
    {"unkeep", host_unkeep, METH_O, NULL},
    {"copy_in", FASTCALL(host_copy_in), METH_FASTCALL, NULL},
    {"spin", FASTCALL(host_spin), METH_FASTCALL, NULL},
    {"fall_asleep", host_fall_asleep, METH_O, NULL},
    {"wake_up", host_wake_up, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef host_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "realmap._host",
    .m_doc = "Windows at chosen addresses, with counted exports.",
    .m_size = -1,
    .m_methods = host_methods,
};

PyMODINIT_FUNC PyInit__host(void)
{
    page_size = (size_t)sysconf(_SC_PAGESIZE);
    huge_size = page_size * (page_size / sizeof(uint64_t));
    word_mirror = PyUnicode_InternFromString("mirror");
    if (!word_mirror)
        return NULL;
    PyObject *module = PyModule_Create(&host_module);
    if (!module)
        return NULL;
    window_type = (PyTypeObject *)PyType_FromSpec(&window_spec);
    ring_type = (PyTypeObject *)PyType_FromSpec(&ring_spec);
    land_type = (PyTypeObject *)PyType_FromSpec(&land_spec);
    events_type = (PyTypeObject *)PyType_FromSpec(&events_spec);
    if (!events_type || PyModule_AddType(module, events_type)) {
        Py_DECREF(module);
        return NULL;
    }
    PyObject *mirror_type = window_type ? PyType_FromSpecWithBases(&mirror_spec, (PyObject *)window_type) : NULL;
    PyObject *view_type = PyType_FromSpec(&view_spec);
    PyObject *turn_type = PyType_FromSpec(&turn_spec);
    if (!turn_type || PyModule_AddType(module, (PyTypeObject *)turn_type)) {
        Py_DECREF(module);
        return NULL;
    }
    Py_DECREF(turn_type);
    frames_type = (PyTypeObject *)PyType_FromSpec(&frames_spec);
    mapping_type = (PyTypeObject *)PyType_FromSpec(&mapping_spec);
    if (!frames_type || !mapping_type || PyModule_AddType(module, frames_type) || PyModule_AddType(module, mapping_type)) {
        Py_DECREF(module);
        return NULL;
    }
    if (!window_type || !view_type || !ring_type || !land_type || !mirror_type ||
        PyModule_AddType(module, land_type) || PyModule_AddType(module, (PyTypeObject *)mirror_type) || PyModule_AddType(module, window_type) ||
        PyModule_AddType(module, (PyTypeObject *)view_type) || PyModule_AddType(module, ring_type) ||
        PyModule_AddIntConstant(module, "RING_BYTES", 2 * sizeof(Queue)) ||
        PyModule_AddIntConstant(module, "RING_MESSAGE", RING_SLOT - sizeof(uint32_t))) {
        Py_DECREF(module);
        return NULL;
    }
    Py_DECREF(view_type);
    Py_DECREF(mirror_type);
    int error = pthread_atfork(NULL, NULL, count_fork);
    if (error) {
        Py_DECREF(module);
        return os_error(error);
    }
    return module;
}
