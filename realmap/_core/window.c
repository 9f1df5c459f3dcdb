/* Window: a range of this address space that maps pieces of files at a chosen address, with counted exports. */
#include "core.h"

/* faults() -> how often zero pages had to take the place of what was truncated, in this process. */
static PyObject *host_faults(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromUnsignedLongLong(atomic_load_explicit(&faults, memory_order_acquire));
}

static void arm(const Window *self) { guard_arm(self->guarded, self->base + self->span); }

static void disarm(const Window *self)
{
    if (self->guarded)
        guard_disarm(self->guarded);
}

/* The first byte from which on zero pages are mapped, or were; 0 where there are none. */
static uintptr_t zeros_of(const Window *self)
{
    return self->guarded ? guard_zeros(self->guarded) : self->zeros;
}

/* The guard has done with it; what it knew stays known. */
static void unguard(Window *self)
{
    Guarded *entry = self->guarded;
    if (!entry)
        return;
    self->zeros = guard_zeros(entry);
    self->thread = atomic_load_explicit(&entry->thread, memory_order_relaxed);
    self->guarded = NULL;
    guard_release(entry);
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
    self->guarded = guard_take(address, prot, inherited);
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
    self->guarded = guard_take(self->base, self->prot, self->inherited);
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
    .name = "realmap._core.Window",
    .basicsize = sizeof(Window),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = window_slots,
};
