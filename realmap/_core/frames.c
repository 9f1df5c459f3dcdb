/* Frames: who refers to a list of segments, and what a mirror has to know of them. */
#include "core.h"

/* The refcount of frames is the number of mappings in a chain, and of entries of a dict for all others, of which very
 * many frames have none. Only this file changes them, each time as a whole under the GIL: so a reference can be given up
 * from a destructor, at any moment. memory/frames.py has the segments; its `_free` is called when the last reference has
 * gone, once. */

static uint64_t last_serial;

static PyObject *frames_new(PyTypeObject *type, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(keywords))
{
    Frames *self = as_frames(new_object(type));
    if (!self)
        return NULL;
    self->fd = -1;
    self->freed = 1;
    return (PyObject *)self;
}

static void frames_dealloc(PyObject *op)
{
    Py_XDECREF(as_frames(op)->others);
    free_object(op);
}

/* _set(fd, huge): they are there from now on; once. `fd`: of the one segment, or -1. */
static PyObject *frames_set(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    Frames *self = as_frames(op);
    int fd;
    uint64_t huge;
    if (wants(nargs, 2, "Frames._set") || as_int(args[0], &fd) || as_u64(args[1], &huge))
        return NULL;
    if (self->serial)
        return PyErr_Format(PyExc_ValueError, "frames are set once");
    self->serial = ++last_serial;
    self->huge = huge;
    self->fd = fd;
    self->freed = 0;
    Py_RETURN_NONE;
}

/* _grew(): they are several segments from now on. */
static PyObject *frames_grew(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    as_frames(op)->fd = -1;
    Py_RETURN_NONE;
}

/* InvalidHandle where they are gone. To be asked last: whatever makes an object may collect garbage, and their last
 * holder in it. */
static int require_frames(const Frames *self)
{
    if (self->freed)
        raise_made(made_error("frames_gone", PyTuple_New(0)));
    return self->freed ? -1 : 0;
}

/* Notes a reference of `owner`. `who` is taken over; NULL: an exception is set. */
static int frames_hold(Frames *self, const void *owner, PyObject *who)
{
    PyObject *made = who && !self->others ? PyDict_New() : NULL;
    if (made && !self->others) /* asked again: to make it may have collected garbage, and somebody held them in that */
        self->others = Py_NewRef(made);
    Py_XDECREF(made);
    PyObject *key = who && self->others ? PyLong_FromVoidPtr((void *)owner) : NULL;
    int failed = !key || require_frames(self) || PyDict_SetItem(self->others, key, who);
    Py_XDECREF(key);
    Py_XDECREF(who);
    return failed ? -1 : 0;
}

/* The same of a mapping, which holds them once at most. */
static int frames_hold_mapping(Frames *self, Mapping *mapping)
{
    if (require_frames(self))
        return -1;
    mapping->next = self->mappings;
    mapping->at = &self->mappings;
    if (mapping->next)
        mapping->next->at = &mapping->next;
    self->mappings = mapping;
    self->mapped++;
    return 0;
}

static Py_ssize_t count_references(const Frames *self)
{
    return self->mapped + (self->others ? PyDict_Size(self->others) : 0);
}

/* Their end: nobody may hold them any more. Again: nothing. */
static int frames_end(Frames *self)
{
    if (self->freed)
        return 0;
    self->freed = 1;
    self->fd = -1;
    unkeep(self->serial);
    PyObject *done = PyObject_CallMethod((PyObject *)self, "_free", NULL);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* Gives up the reference of `owner`; with the last one they end. Where it has none: nothing. */
static int frames_let_go(Frames *self, const void *owner)
{
    if (!self->others)
        return 0;
    PyObject *key = PyLong_FromVoidPtr((void *)owner);
    int failed = !key || PyDict_DelItem(self->others, key);
    Py_XDECREF(key);
    if (!failed)
        return count_references(self) ? 0 : frames_end(self);
    if (!PyErr_ExceptionMatches(PyExc_KeyError))
        return -1;
    PyErr_Clear();
    return 0;
}

/* The same of a mapping that has one. */
static int frames_let_go_mapping(Frames *self, Mapping *mapping)
{
    *mapping->at = mapping->next;
    if (mapping->next)
        mapping->next->at = mapping->at;
    self->mapped--;
    return count_references(self) ? 0 : frames_end(self);
}

/* hold(holder, *who) */
static PyObject *frames_hold_for(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    if (!nargs)
        return PyErr_Format(PyExc_TypeError, "hold: whom for?");
    PyObject *who = PyTuple_New(nargs - 1);
    for (Py_ssize_t i = 1; who && i < nargs; i++)
        if (PyTuple_SetItem(who, i - 1, Py_NewRef(args[i])))
            Py_CLEAR(who);
    return none_unless(frames_hold(as_frames(op), args[0], who));
}

static PyObject *frames_let_go_of(PyObject *op, PyObject *holder)
{
    return none_unless(frames_let_go(as_frames(op), holder));
}

/* Appends every holder, as it was noted. Nothing is made on the way, so none comes or goes. */
static int append_holders(const Frames *self, PyObject *list)
{
    PyObject *key, *who;
    int failed = 0;
    for (const Mapping *each = self->mappings; each && !failed; each = each->next)
        failed = PyList_Append(list, each->who);
    for (Py_ssize_t at = 0; self->others && !failed && PyDict_Next(self->others, &at, &key, &who);)
        failed = PyList_Append(list, who);
    return failed;
}

static PyObject *frames_who_holds(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    PyObject *found = PyList_New(0);
    if (found && append_holders(as_frames(op), found))
        Py_CLEAR(found);
    return found;
}

/* holders_of(frames) -> [how many hold the first ones, each of them as it was noted, how many hold the next ones, …]:
 * for a snapshot, which asks of very many at one moment; so it is one list, and one pass. */
static PyObject *core_holders_of(PyObject *Py_UNUSED(module), PyObject *frames)
{
    if (!PyList_Check(frames)) {
        PyErr_SetString(PyExc_TypeError, "holders_of takes a list");
        return NULL;
    }
    Py_ssize_t count = PyList_Size(frames);
    PyObject *found = PyList_New(0);
    for (Py_ssize_t i = 0; found && i < count; i++) {
        PyObject *each = PyList_GetItem(frames, i);
        if (!each || !PyObject_TypeCheck(each, frames_type)) {
            PyErr_SetString(PyExc_TypeError, "holders are those of frames");
            Py_CLEAR(found);
            break;
        }
        append_new(&found, PyLong_FromSsize_t(count_references(as_frames(each))));
        if (found && append_holders(as_frames(each), found))
            Py_CLEAR(found);
    }
    return found;
}

static PyObject *frames_end_them(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return none_unless(frames_end(as_frames(op)));
}

static PyObject *frames_refcount(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromSsize_t(count_references(as_frames(op)));
}

static PyMethodDef frames_methods[] = {
    {"_set", FASTCALL(frames_set), METH_FASTCALL, NULL},
    {"_grew", frames_grew, METH_NOARGS, NULL},
    {"_end", frames_end_them, METH_NOARGS, NULL},
    {"hold", FASTCALL(frames_hold_for), METH_FASTCALL,
     "hold(holder, *who): takes a reference for `holder`, described by `who`. InvalidHandle: the frames are gone."},
    {"let_go", frames_let_go_of, METH_O,
     "let_go(holder): gives up its reference; the last one closes the segments. A second time: nothing."},
    {"who_holds", frames_who_holds, METH_NOARGS, "Everyone who holds a reference, as it was noted."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef frames_members[] = {
    {"freed", T_BOOL, offsetof(Frames, freed), READONLY, "Whether the last reference went, and the segments with it."},
    {"serial", T_ULONGLONG, offsetof(Frames, serial), READONLY, "A number of its own, in this process."},
    {"huge", T_ULONGLONG, offsetof(Frames, huge), READONLY, "How many bytes of it huge pages back."},
    {"_fd", T_INT, offsetof(Frames, fd), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef frames_getset[] = {
    {"refcount", frames_refcount, NULL, "How many mappings, mirrors and handles refer to these frames.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot frames_slots[] = {
    {Py_tp_doc, "Frames, as a mirror has to know them."},
    {Py_tp_new, frames_new},
    {Py_tp_dealloc, frames_dealloc},
    {Py_tp_methods, frames_methods},
    {Py_tp_members, frames_members},
    {Py_tp_getset, frames_getset},
    {0, NULL},
};

static PyType_Spec frames_spec = {"realmap._core.Frames", sizeof(Frames), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, frames_slots};
