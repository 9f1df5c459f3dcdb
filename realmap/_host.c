/* The C core: only what Python cannot do safely by itself.
 *
 *   Window   a range of this address space that maps pieces of files (or private memory) at an
 *            address that the caller chose. Exports its bytes through the buffer protocol and
 *            counts the exports, so that it is never unmapped under a live view.
 *   Ring     two queues of messages in sealed shared memory, one each way, and how to sleep and be
 *            woken without losing a wake-up.
 *   View     a part of one window, or of several that lie side by side; exporting it counts as
 *            an export of every window it covers.
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
#include <structmember.h>

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

/* Below this a map or unmap is a few microseconds, and giving the GIL away would let another
 * thread keep it for a whole switch interval (5 ms); above it, others should not wait for us. */
#define LONG_RANGE ((size_t)1 << 20)

enum state { NOT_READY, ALIVE, DEAD };

/* Counts the forks this process descends from: a window that a fork does not inherit knows by
 * it that it was lost, and must not unmap what may now be somebody else's at its address. */
static unsigned long fork_epoch;

static void count_fork(void) { fork_epoch++; }

typedef struct {
    PyObject_HEAD
    uintptr_t base;
    size_t span;
    size_t lead;
    Py_ssize_t length;
    Py_ssize_t exports;
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
static size_t page_size;

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

static PyObject *os_error(int error)
{
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
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
    int error = map_piece(address, span, prot, fd, (off_t)offset);
    if (error) {
        Py_DECREF(self);
        return os_error(error);
    }
    self->span = span;
    self->lead = lead;
    self->length = (Py_ssize_t)length;
    self->state = ALIVE;
    return (PyObject *)self;
}

/* Window._take_over(other, lead, length): a window with the mapping of `other`, which is dead from
 * then on, and other bytes of it exported. BufferError: a view of `other` lives, or it is dead. */
static PyObject *still_viewed(const char *what, Py_ssize_t exports);

static PyObject *window_take_over(PyObject *cls, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t lead, length;
    if (wants(nargs, 3, "Window._take_over") || as_u64(args[1], &lead) || as_u64(args[2], &length))
        return NULL;
    if (!PyObject_TypeCheck(args[0], window_type)) {
        PyErr_SetString(PyExc_TypeError, "only a window can be taken over");
        return NULL;
    }
    Window *other = (Window *)args[0];
    if (!is_alive(other)) {
        PyErr_SetString(PyExc_BufferError, "it is unmapped: its bytes are no longer there");
        return NULL;
    }
    if (other->exports)
        return still_viewed("drop", other->exports);
    if (lead > other->span || length > other->span - lead) {
        PyErr_SetString(PyExc_ValueError, "what a window exports lies inside of what it maps");
        return NULL;
    }
    Window *self = new_window((PyTypeObject *)cls, other->base, other->prot, other->inherited);
    if (!self)
        return NULL;
    self->span = other->span;
    self->lead = lead;
    self->length = (Py_ssize_t)length;
    self->state = ALIVE;
    other->state = DEAD;
    return (PyObject *)self;
}

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
    self->length += (Py_ssize_t)(end - self->base - self->span);
    self->span = end - self->base;
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
    int error = unmap_range(self->base, self->span);
    if (error) {
        self->state = ALIVE;
        return os_error(error);
    }
    Py_RETURN_TRUE;
}

static void window_dealloc(PyObject *op)
{
    Window *self = (Window *)op;
    PyTypeObject *type = Py_TYPE(op);
    if (is_alive(self))
        munmap((void *)self->base, self->span);
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

static PyObject *window_alive(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(is_alive((Window *)op));
}

#define FASTCALL(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef window_methods[] = {
    {"_map", FASTCALL(window_map), METH_FASTCALL | METH_CLASS, NULL},
    {"_map_pieces", FASTCALL(window_map_pieces), METH_FASTCALL | METH_CLASS, NULL},
    {"_take_over", FASTCALL(window_take_over), METH_FASTCALL | METH_CLASS, NULL},
    {"_extend", window_extend, METH_O, NULL},
    {"_unmap", window_unmap, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef window_getset[] = {
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

static PyMethodDef view_methods[] = {
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

/* ---- rings -------------------------------------------------------------------------------- */

/* Two queues, each with one producer and one consumer, in memory that both sides may write:
 *
 *      user    ── calls ────▶  kernel        queue 0
 *      user    ◀── answers ──  kernel        queue 1
 *
 *      tail ─▶ the producer's count of messages     asleep ─▶ 1 while the consumer sleeps, or is about to
 *      head ─▶ the consumer's count
 *
 * Each side keeps its own counts where the other cannot reach them; what the other side wrote is
 * read once, then checked. A peer that scribbles here is found out, and hurts only itself.
 *
 * Publishing and the sleep flag: the producer stores tail and then looks at asleep, the consumer
 * stores asleep and then looks at tail. Both need a sequentially consistent fence in between, or
 * each can miss the other's store (on x86 too), and a wake-up is lost. */

#define RING_SLOTS 32u
#define RING_SLOT 2048u /* bytes a message takes, 4 of them its length */
#define LINE 64

typedef struct {
    _Alignas(LINE) _Atomic uint32_t tail;
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

/* _push(bytes) -> 0: it does not fit (now, or ever); 1: it is there; 2: and the other side must be woken. */
static PyObject *ring_push(PyObject *op, PyObject *message)
{
    Ring *self = (Ring *)op;
    char *data;
    Py_ssize_t length;
    if (!ring_is_here(self) || PyBytes_AsStringAndSize(message, &data, &length))
        return NULL;
    uint32_t used = self->out_tail - atomic_load_explicit(&self->out->head, memory_order_acquire);
    if (length > (Py_ssize_t)(RING_SLOT - sizeof(uint32_t)) || used >= RING_SLOTS)
        return PyLong_FromLong(0);
    unsigned char *slot = self->out->slots[self->out_tail % RING_SLOTS];
    uint32_t size = (uint32_t)length;
    memcpy(slot, &size, sizeof size);
    memcpy(slot + sizeof size, data, size);
    self->out_tail++;
    atomic_store_explicit(&self->out->tail, self->out_tail, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    if (!atomic_load_explicit(&self->out->asleep, memory_order_relaxed))
        return PyLong_FromLong(1);
    /* Of several that see it asleep, one wakes it. */
    return PyLong_FromLong(atomic_exchange(&self->out->asleep, 0) ? 2 : 1);
}

static int ring_ready(const Ring *self)
{
    return atomic_load_explicit(&self->in->tail, memory_order_acquire) != self->in_head;
}

/* _pop() -> bytes, or None where nothing is there. ValueError: the other side's indices lie. */
static PyObject *ring_pop(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Ring *self = (Ring *)op;
    if (!ring_is_here(self))
        return NULL;
    uint32_t there = atomic_load_explicit(&self->in->tail, memory_order_acquire) - self->in_head;
    if (!there)
        Py_RETURN_NONE;
    const unsigned char *slot = self->in->slots[self->in_head % RING_SLOTS];
    uint32_t size; /* copied, then checked: the other side may be changing it this moment */
    memcpy(&size, (const void *)slot, sizeof size);
    if (there > RING_SLOTS || size > RING_SLOT - sizeof size) {
        PyErr_Format(PyExc_ValueError, "a ring whose indices lie: %u messages, the next of %u bytes", there, size);
        return NULL;
    }
    PyObject *message = PyBytes_FromStringAndSize((const char *)slot + sizeof size, (Py_ssize_t)size);
    if (!message)
        return NULL;
    self->in_head++;
    atomic_store_explicit(&self->in->head, self->in_head, memory_order_release);
    return message;
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

static Py_ssize_t find_ready(Ring **rings, Py_ssize_t count, Py_ssize_t start)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_ssize_t at = start + i < count ? start + i : start + i - count;
        if (ring_ready(rings[at]))
            return at;
    }
    return -1;
}

/* spin(rings, start, ns) -> the index of a ring that has a message, looked for from `start` on; -1
 * where none has within `ns` nanoseconds, which are spent without the GIL. */
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
        int64_t end = nanoseconds() + (int64_t)budget;
        do {
            for (int turn = 0; turn < 32 && found < 0; turn++) {
                pause_cpu();
                found = find_ready(rings, count, from);
            }
        } while (found < 0 && nanoseconds() < end);
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

static PyMethodDef host_methods[] = {
    {"unmap_all", FASTCALL(host_unmap_all), METH_FASTCALL, NULL},
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
    PyObject *module = PyModule_Create(&host_module);
    if (!module)
        return NULL;
    window_type = (PyTypeObject *)PyType_FromSpec(&window_spec);
    ring_type = (PyTypeObject *)PyType_FromSpec(&ring_spec);
    PyObject *view_type = PyType_FromSpec(&view_spec);
    if (!window_type || !view_type || !ring_type || PyModule_AddType(module, window_type) ||
        PyModule_AddType(module, (PyTypeObject *)view_type) || PyModule_AddType(module, ring_type) ||
        PyModule_AddIntConstant(module, "RING_BYTES", 2 * sizeof(Queue)) ||
        PyModule_AddIntConstant(module, "RING_MESSAGE", RING_SLOT - sizeof(uint32_t))) {
        Py_DECREF(module);
        return NULL;
    }
    Py_DECREF(view_type);
    int error = pthread_atfork(NULL, NULL, count_fork);
    if (error) {
        Py_DECREF(module);
        return os_error(error);
    }
    return module;
}
