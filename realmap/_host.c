/* The C core: only what Python cannot do safely by itself.
 *
 *   Window   a range of this address space that maps pieces of files (or private memory) at an
 *            address that the caller chose. Exports its bytes through the buffer protocol and
 *            counts the exports, so that it is never unmapped under a live view.
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
#include <stdint.h>
#include <sys/mman.h>
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
    PyObject *view_type = PyType_FromSpec(&view_spec);
    if (!window_type || !view_type || PyModule_AddType(module, window_type) ||
        PyModule_AddType(module, (PyTypeObject *)view_type)) {
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
