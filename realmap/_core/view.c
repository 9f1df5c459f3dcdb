/* View: a part of one window, or of several that lie side by side; exporting it exports every window it covers. */
#include "core.h"

typedef struct {
    PyObject_HEAD
    PyObject *windows; /* a tuple of Window, side by side, in order: */
    Window **parts;    /* the same, `count` of them */
    size_t count;
    uintptr_t start;
    Py_ssize_t length;
    Py_ssize_t exports;
    int writable;
    int dropped;
} View;

ACCESSOR(View, as_view)

/* View._over(windows, start, length, writable): windows lie side by side and cover the range; a
 * view is writable where it was asked for and every window is. */
static PyObject *view_over(PyObject *cls, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t start, length;
    int writable;
    if (wants(nargs, 4, "View.over") || as_u64(args[1], &start) || as_u64(args[2], &length) ||
        as_int(args[3], &writable))
        return NULL;
    if (!is_tuple_of(args[0], window_type))
        return PyErr_Format(PyExc_TypeError, "a view lies over a tuple of windows");
    uintptr_t covered = 0;
    for (Py_ssize_t i = 0; i < PyTuple_Size(args[0]); i++) {
        Window *window = as_window(PyTuple_GetItem(args[0], i));
        uintptr_t begin = window->base + window->lead;
        if (i == 0 ? start < begin : begin != covered)
            return PyErr_Format(PyExc_ValueError, "the windows do not cover the view without a gap");
        covered = begin + (size_t)window->length;
        writable = writable && (window->prot & PROT_WRITE);
    }
    if (start > covered || length > covered - start)
        return PyErr_Format(PyExc_ValueError, "the view is longer than its windows");
    View *self = as_view(new_object(as_type(cls)));
    Window **parts = self ? PyMem_Calloc((size_t)PyTuple_Size(args[0]), sizeof *parts) : NULL;
    if (!parts) {
        Py_XDECREF((PyObject *)self);
        return PyErr_NoMemory();
    }
    self->windows = Py_NewRef(args[0]);
    self->parts = parts;
    self->count = (size_t)PyTuple_Size(args[0]);
    for (size_t i = 0; i < self->count; i++)
        parts[i] = as_window(PyTuple_GetItem(args[0], (Py_ssize_t)i));
    self->start = start;
    self->length = (Py_ssize_t)length;
    self->writable = writable;
    return (PyObject *)self;
}

static int view_is_alive(PyObject *op)
{
    View *self = as_view(op);
    if (self->dropped)
        return 0;
    for (size_t i = 0; i < self->count; i++)
        if (!is_alive(self->parts[i]))
            return 0;
    return 1;
}

/* The first buffer in tuples, lists and dicts that is unmapped; NULL: none is. `deep`: within so many others, where another
 * thread may have changed them since they were looked at. */
static PyObject *first_gone(PyObject *held, int deep)
{
    if (PyObject_TypeCheck(held, view_type))
        return view_is_alive(held) ? NULL : held;
    int is_tuple = PyTuple_Check(held);
    Py_ssize_t count = deep == PACKED_DEPTH ? 0 : is_tuple ? PyTuple_Size(held) : PyList_Check(held) ? PyList_Size(held) : 0;
    PyObject *found = NULL, *value;
    for (Py_ssize_t i = 0; !found && i < count; i++)
        found = first_gone(is_tuple ? PyTuple_GetItem(held, i) : PyList_GetItem(held, i), deep + 1);
    Py_ssize_t at = 0;
    while (!found && deep < PACKED_DEPTH && PyDict_Check(held) && PyDict_Next(held, &at, NULL, &value))
        found = first_gone(value, deep + 1);
    return found;
}

/* Whether one of the buffers that a request names was unmapped since they were looked at: its place may be another's by
 * now. An exception is set then. */
static int has_gone(PyObject *holds)
{
    PyObject *gone = holds ? first_gone(holds, 0) : NULL;
    if (gone)
        raise_made(made_error("unmapped", Py_BuildValue("(K)", (unsigned long long)as_view(gone)->start)));
    return gone != NULL;
}

static uintptr_t view_fault_at(PyObject *op)
{
    View *self = as_view(op);
    for (size_t i = 0; i < self->count; i++) {
        Window *window = self->parts[i];
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
    for (size_t i = 0; i < self->count; i++)
        self->parts[i]->exports += by;
}

static int view_lend(PyObject *op, Lent *lent)
{
    View *self = as_view(op);
    for (size_t i = 0; i < self->count; i++)
        if (!is_usable(self->parts[i]))
            return -1;
    *lent = (Lent){(unsigned char *)self->start, self->length, self->writable};
    count_exports(self, 1);
    return 0;
}

static void view_give_back(PyObject *op) { count_exports(as_view(op), -1); }

static const Lender view_lender = {view_lend, view_give_back, view_is_alive, view_fault_at};

LENDS_BYTES(view)

/* _drop() -> bool: False if it was dropped already; BufferError while exports live. */
static PyObject *view_drop(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    View *self = as_view(op);
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
    Py_VISIT(as_view(op)->windows);
    return 0;
}

static void view_dealloc(PyObject *op)
{
    PyObject_GC_UnTrack(op);
    PyObject *windows = as_view(op)->windows;
    PyMem_Free(as_view(op)->parts);
    free_object(op);
    Py_XDECREF(windows); /* last: a window's end may run anything */
}

static Py_ssize_t view_length(PyObject *op) { return as_view(op)->length; }

static PyObject *view_alive(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(view_is_alive(op));
}

static PyObject *view_fault(PyObject *op, void *Py_UNUSED(closure))
{
    return address_or_none(view_fault_at(op));
}

static PyMethodDef view_methods[] = {
    {"_memory_fault", window_memory_fault, METH_O, NULL},
    {"_over", FASTCALL(view_over), METH_FASTCALL | METH_CLASS, NULL},
    {"_drop", view_drop, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef view_members[] = {
    {"address", T_ULONGLONG, offsetof(View, start), READONLY, "Where its bytes start, in this address space."},
    {"exports", T_PYSSIZET, offsetof(View, exports), READONLY, "How many views of it live."},
    {"_windows", T_OBJECT_EX, offsetof(View, windows), READONLY, NULL},
    {"writable", T_INT, offsetof(View, writable), READONLY, "Whether its bytes may be written."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef view_getset[] = {
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
    LENDING_SLOTS(view),
    {0, NULL},
};

static PyType_Spec view_spec = {"realmap._core.View", sizeof(View), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                view_slots};
