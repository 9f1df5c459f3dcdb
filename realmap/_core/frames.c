/* Frames and Mapping: what a mirror has to know of those of memory/. */
#include "core.h"

/* What a mirror has to know of frames and mappings. The classes of memory/frames.py and memory/mapping.py
 * build on these; their invariants are theirs. */


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
    .name = "realmap._core.Frames",
    .basicsize = sizeof(Frames),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = frames_slots,
};

static PyType_Spec mapping_spec = {
    .name = "realmap._core.Mapping",
    .basicsize = sizeof(Mapping),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = mapping_slots,
};


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
