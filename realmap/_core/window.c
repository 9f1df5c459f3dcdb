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

/* Whether its bytes may be touched at all; where Linux would kill for it, an exception is set. */
static int is_usable(const Window *self)
{
    if (self->prot & (PROT_READ | PROT_WRITE))
        return 1;
    PyErr_SetString(PyExc_BufferError, "its rights allow neither to read nor to write its bytes");
    return 0;
}

static Window *new_window(PyTypeObject *type, uintptr_t base, int prot, int inherited)
{
    Window *self = as_window(new_object(type));
    if (self) {
        self->base = base;
        self->prot = prot;
        self->inherited = (char)inherited;
        self->epoch = fork_epoch;
        self->forks = atomic_load(&forks);
        self->state = NOT_READY;
    }
    return self;
}

/* A mirror is a window, too, but it is opened in a land. */
static int is_no_mirror(PyObject *cls)
{
    if (!PyType_IsSubtype(as_type(cls), mirror_type))
        return 1;
    PyErr_SetString(PyExc_TypeError, "a mirror is opened in a land, by _open");
    return 0;
}

/* Sets which of its bytes are exported. -1 with an exception set: it has not so many. */
static int set_exported(Window *self, uint64_t lead, uint64_t length)
{
    if (lead > self->span || length > self->span - lead) {
        PyErr_SetString(PyExc_ValueError, "what a window exports lies inside of what it maps");
        return -1;
    }
    self->lead = lead;
    self->length = (Py_ssize_t)length;
    return 0;
}

/* Maps every (fd, offset, length) of `pieces` from `start` on, or nothing; -1 with an exception set. Where they end is
 * in `end`. Whole pages; or, with `edges`, to the byte. */
static int map_pieces(Window *self, uintptr_t start, PyObject *pieces, uintptr_t *end, Edges *edges)
{
    PyObject *sequence = PySequence_Tuple(pieces);
    if (!sequence)
        return -1;
    uintptr_t at = start;
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
            as_u64(PyTuple_GetItem(piece, 2), &length) || (!edges && check_range(at, length)))
            goto undo;
        if (offset > INT64_MAX)
            error = EOVERFLOW;
        else if (edges)
            error = lend_piece(edges, at, length, self->prot, fd, (off_t)offset);
        else
            error = map_piece(at, length, self->prot, fd, (off_t)offset);
        if (error) {
            os_error(error);
            goto undo;
        }
        at += length;
    }
    Py_DECREF(sequence);
    *end = at;
    return 0;
undo:
    if (at > start)
        unmap_range(page_of(start), at - page_of(start));
    Py_DECREF(sequence);
    return -1;
}

/* Maps a new window, as it is to be from `lead` bytes behind its base on, and has it guarded; -1 with an exception set. */
static int map_window(Window *self, PyObject *pieces, size_t lead, Edges *edges)
{
    uintptr_t end;
    if (map_pieces(self, self->base + lead, pieces, &end, edges))
        return -1;
    self->span = page_of(end + page_size - 1) - self->base;
    self->state = self->span ? ALIVE : DEAD;
    if (!self->span)
        return 0;
    stand_guard();
    self->guarded = guard_take(self->base, self->prot, self->inherited);
    if (!self->guarded) {
        PyErr_NoMemory();
        return -1;
    }
    arm(self);
    return 0;
}

/* Window._map(address, prot, pieces, lead, length, inherited): any number of pieces, of any files, side by side; all of
 * them or none. fd -1: private memory. */
static PyObject *window_map(PyObject *cls, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t address, lead, length;
    int prot, inherited;
    if (!is_no_mirror(cls) || wants(nargs, 6, "Window._map") || as_u64(args[0], &address) ||
        as_int(args[1], &prot) || as_u64(args[3], &lead) || as_u64(args[4], &length) ||
        as_int(args[5], &inherited))
        return NULL;
    Window *self = new_window(as_type(cls), address, prot, inherited);
    if (!self)
        return NULL;
    if (map_window(self, args[2], 0, NULL) || set_exported(self, lead, length)) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

/* _extend(pieces): maps more right behind the end, all or nothing; what is exported grows too. */
static PyObject *window_extend(PyObject *op, PyObject *pieces)
{
    Window *self = as_window(op);
    if (!is_alive(self) || self->exports)
        return PyErr_Format(PyExc_BufferError, "only a live window without exports can be extended");
    uintptr_t end;
    if (map_pieces(self, self->base + self->span, pieces, &end, NULL))
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
                        "cannot %s: %zd view%s of it (memoryview, numpy array, held lock, ...) still live%s; "
                        "release them first",
                        what, exports, exports == 1 ? "" : "s", exports == 1 ? "s" : "");
}

/* Unmaps a live window without exports: 0, or an errno with nothing changed. */
static int close_window(Window *self)
{
    self->state = DEAD; /* first: while the GIL is away nobody may take an export */
    disarm(self);
    int error = unmap_range(self->base, self->span);
    if (error) {
        self->state = ALIVE;
        arm(self);
        return error;
    }
    unguard(self);
    return 0;
}

/* _unmap() -> bool: False if it was dead already; BufferError while exports live. */
static PyObject *window_unmap(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Window *self = as_window(op);
    if (!is_alive(self)) {
        self->state = DEAD;
        Py_RETURN_FALSE;
    }
    if (self->exports)
        return still_viewed("unmap", self->exports);
    int error = close_window(self);
    if (error)
        return os_error(error);
    window_tell(self);
    Py_RETURN_TRUE;
}

/* _fault_in(): has every page there, zeroed, where that may be written, in one call of Linux instead of a fault each. It is
 * for speed alone: what cannot be had now is had at first touch. */
static PyObject *window_fault_in(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Window *self = as_window(op);
    if (is_alive(self))
        populate_range(self->base, self->span, self->prot & PROT_WRITE ? PROT_WRITE : self->prot);
    Py_RETURN_NONE;
}

static void window_dealloc(PyObject *op)
{
    Window *self = as_window(op);
    disarm(self);
    if (is_alive(self) && munmap((void *)self->base, self->span))
        munmap((void *)self->base, self->span); /* Linux may have had no memory that moment */
    unguard(self);
    window_tell(self);
    free_object(op);
}

static int window_lend(PyObject *op, Lent *lent)
{
    Window *self = as_window(op);
    if (!is_usable(self))
        return -1;
    *lent = (Lent){(unsigned char *)(self->base + self->lead), self->length, self->prot & PROT_WRITE};
    self->exports++;
    return 0;
}

static void window_give_back(PyObject *op) { as_window(op)->exports--; }
static int window_is_alive(PyObject *op) { return is_alive(as_window(op)); }
static uintptr_t window_fault_of(PyObject *op) { return window_fault_at(as_window(op)); }

static const Lender window_lender = {window_lend, window_give_back, window_is_alive, window_fault_of};

LENDS_BYTES(window)

static Py_ssize_t window_length(PyObject *op) { return as_window(op)->length; }

static PyObject *window_address(PyObject *op, void *Py_UNUSED(closure))
{
    Window *self = as_window(op);
    return PyLong_FromUnsignedLongLong(self->base + self->lead);
}

static PyObject *window_fault(PyObject *op, void *Py_UNUSED(closure))
{
    return address_or_none(window_fault_at(as_window(op)));
}

static PyObject *window_thread(PyObject *op, void *Py_UNUSED(closure))
{
    Window *self = as_window(op);
    long thread = self->guarded ? atomic_load_explicit(&self->guarded->thread, memory_order_relaxed) : self->thread;
    return PyLong_FromLong(thread);
}

static PyObject *window_zeros(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(zeros_of(as_window(op)));
}

/* _memory_fault(address): the error for a byte that is gone; what builds on a window knows more. */
static PyObject *window_memory_fault(PyObject *Py_UNUSED(op), PyObject *address)
{
    return made_error("gone", PyTuple_Pack(1, address));
}

static PyObject *window_alive(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(is_alive(as_window(op)));
}

static PyMethodDef window_methods[] = {
    {"_map", FASTCALL(window_map), METH_FASTCALL | METH_CLASS, NULL},
    {"_extend", window_extend, METH_O, NULL},
    {"_unmap", window_unmap, METH_NOARGS, NULL},
    {"_farewell", FASTCALL(window_set_farewell), METH_FASTCALL, NULL},
    {"_fault_in", window_fault_in, METH_NOARGS, NULL},
    {"_memory_fault", window_memory_fault, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef window_members[] = {
    {"_base", T_ULONGLONG, offsetof(Window, base), READONLY, NULL},
    {"_span", T_ULONGLONG, offsetof(Window, span), READONLY, NULL},
    {"_prot", T_INT, offsetof(Window, prot), READONLY, NULL},
    {"_serial", T_ULONGLONG, offsetof(Window, serial), 0, "What whoever made it knows it by."},
    {"exports", T_PYSSIZET, offsetof(Window, exports), READONLY, "How many views of it live; it cannot be unmapped before 0."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef window_getset[] = {
    {"fault", window_fault, NULL, "Where its bytes are gone from, since somebody truncated their segment; else None.", NULL},
    {"_zeros", window_zeros, NULL, NULL, NULL},
    {"_fault_thread", window_thread, NULL, NULL, NULL},
    {"address", window_address, NULL, "Where the exported bytes start, in this address space.", NULL},
    {"alive", window_alive, NULL, "Whether it is mapped.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot window_slots[] = {
    {Py_tp_doc, "A range of this address space, mapped at a chosen address, with counted exports."},
    {Py_tp_dealloc, window_dealloc},
    {Py_tp_methods, window_methods},
    {Py_tp_members, window_members},
    {Py_tp_getset, window_getset},
    {Py_sq_length, window_length},
    LENDING_SLOTS(window),
    {0, NULL},
};

static PyType_Spec window_spec = {"realmap._core.Window", sizeof(Window), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                  window_slots};
