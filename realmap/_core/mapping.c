/* Mapping: a range of frames at an address of a process, as a mirror has to know it. */
#include "core.h"

/* memory/mapping.py says what makes a mapping valid, and sets it, once; nothing of it changes then but whether it is
 * held, and pinned. While it is either it has a reference to its frames; whoever has that reads its fields freely. */

/* Nothing of it survives the unmapping by its process, pinned or not. */
static void mapping_unkeep(const Mapping *self)
{
    if (self->frames && PyObject_TypeCheck(self->frames, frames_type))
        unkeep(as_frames(self->frames)->serial);
}

static int mapping_let_go(Mapping *self)
{
    if (!PyObject_TypeCheck(self->frames, frames_type))
        return 0;
    int failed = frames_let_go_mapping(as_frames(self->frames), self);
    mapping_unkeep(self);
    return failed;
}

static int mapping_unpin(Mapping *self)
{
    if (!self->pins) {
        PyErr_SetString(PyExc_RuntimeError, "a mapping was unpinned more often than pinned");
        return -1;
    }
    return --self->pins || self->held ? 0 : mapping_let_go(self);
}

static void mapping_dealloc(PyObject *op)
{
    Mapping *self = as_mapping(op);
    PyObject *frames = self->frames;
    if (self->held || self->pins) { /* collection is a release; what fails here has nobody to be told to */
        PyObject *first[3] = {NULL};
        put_aside(first);
        if (mapping_let_go(self))
            PyErr_WriteUnraisable(frames);
        raise_first(first);
    }
    Py_XDECREF(frames);
    Py_XDECREF(self->who);
    Py_XDECREF(self->rights);
    free_object(op);
}

/* _set(address, frames, phys_offset, length, rights, who): what it is, once; it holds its frames from now on, as `who`.
 * InvalidHandle: the frames are gone. */
static PyObject *mapping_set(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    Mapping *self = as_mapping(op);
    uint64_t address, phys_offset, length;
    int allowed;
    if (wants(nargs, 6, "Mapping._set") || as_u64(args[0], &address) || as_u64(args[2], &phys_offset) ||
        as_u64(args[3], &length))
        return NULL;
    if (!PyLong_Check(args[4]) || as_int(args[4], &allowed))
        return PyErr_Format(PyExc_TypeError, "rights are an int");
    if (!PyTuple_Check(args[5]))
        return PyErr_Format(PyExc_TypeError, "a holder is described by a tuple");
    if (self->frames || address % page_size || phys_offset % page_size || length % page_size || !length ||
        length - 1 > UINT64_MAX - address || length > UINT64_MAX - phys_offset)
        return PyErr_Format(PyExc_ValueError, "a mapping is set once, and to whole pages");
    if (PyObject_TypeCheck(args[1], frames_type) && frames_hold_mapping(as_frames(args[1]), self))
        return NULL;
    self->frames = Py_NewRef(args[1]);
    self->who = Py_NewRef(args[5]);
    self->rights = Py_NewRef(args[4]);
    self->allowed = allowed;
    self->address = address;
    self->phys_offset = phys_offset;
    self->length = length;
    self->held = 1;
    Py_RETURN_NONE;
}

static PyObject *mapping_release(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Mapping *self = as_mapping(op);
    if (self->held) {
        self->held = 0;
        if (self->pins)
            mapping_unkeep(self);
        else if (mapping_let_go(self))
            return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *mapping_pin(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Mapping *self = as_mapping(op);
    if (!self->held && !self->pins)
        return PyErr_Format(PyExc_RuntimeError, "a mapping that was released cannot be pinned");
    self->pins++;
    Py_RETURN_NONE;
}

static PyObject *mapping_end_pin(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return none_unless(mapping_unpin(as_mapping(op)));
}

static PyObject *mapping_released(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(!as_mapping(op)->held);
}

static PyObject *mapping_usable(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(as_mapping(op)->held || as_mapping(op)->pins);
}

static PyMethodDef mapping_methods[] = {
    {"_set", FASTCALL(mapping_set), METH_FASTCALL, NULL},
    {"release", mapping_release, METH_NOARGS,
     "Gives up its reference to the frames; at the last unpin if a syscall works on it. Again: nothing."},
    {"pin", mapping_pin, METH_NOARGS,
     "Keeps the reference over a release, until `unpin`. For the kernel's own thread."},
    {"unpin", mapping_end_pin, METH_NOARGS, "Ends one `pin`."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef mapping_members[] = {
    {"address", T_ULONGLONG, offsetof(Mapping, address), READONLY, "Where its process has it, in bytes."},
    {"frames", T_OBJECT_EX, offsetof(Mapping, frames), READONLY, "The frames behind it, or None."},
    {"rights", T_OBJECT_EX, offsetof(Mapping, rights), READONLY, "What its process may do there."},
    {"phys_offset", T_ULONGLONG, offsetof(Mapping, phys_offset), READONLY, "Where in its frames it starts, in bytes."},
    {"length", T_ULONGLONG, offsetof(Mapping, length), READONLY, "Its bytes."},
    {"serial", T_ULONGLONG, offsetof(Mapping, serial), 0,
     "Which one it is: its range may be another's later. The same where it is moved, or a forked child adopts it."},
    {"_who", T_OBJECT_EX, offsetof(Mapping, who), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef mapping_getset[] = {
    {"released", mapping_released, NULL, "Whether its reference was given up: it is dead for good then.", NULL},
    {"_usable", mapping_usable, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot mapping_slots[] = {
    {Py_tp_doc, "A mapping, as a mirror has to know it."},
    {Py_tp_dealloc, mapping_dealloc},
    {Py_tp_methods, mapping_methods},
    {Py_tp_members, mapping_members},
    {Py_tp_getset, mapping_getset},
    {0, NULL},
};

static PyType_Spec mapping_spec = {"realmap._core.Mapping", sizeof(Mapping), 0,
                                   Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, mapping_slots};

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
static Frames *plain_range(const Mapping *mapping, int64_t offset, int64_t length, uint64_t *at)
{
    if (!(mapping->held || mapping->pins) || !PyObject_TypeCheck(mapping->frames, frames_type) || offset < 0 ||
        length <= 0 || (uint64_t)offset + (uint64_t)length > mapping->length ||
        mapping->phys_offset > (uint64_t)INT64_MAX / 2 || mapping->length > (uint64_t)INT64_MAX / 2)
        return NULL;
    *at = mapping->phys_offset + (uint64_t)offset;
    return as_frames(mapping->frames);
}

/* Whether the mapping's own rights allow all of `rights`. */
static int owner_allows(const Mapping *mapping, int rights) { return !(rights & ~mapping->allowed); }

/* copy_in(mapping, offset, length) -> bytes: a copy, where the mapping's owner may read it and it lies in one
 * segment. None: not this way, or not all of it is there; memory/frames.py knows the others, and why not. */
static PyObject *host_copy_in(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    if (wants(nargs, 3, "copy_in"))
        return NULL;
    if (!PyObject_TypeCheck(args[0], mapping_type))
        return PyErr_Format(PyExc_TypeError, "a copy is made of a mapping");
    Mapping *mapping = as_mapping(args[0]);
    uint64_t at;
    int64_t offset = plain(args[1]), length = plain(args[2]);
    Frames *frames = plain_range(mapping, offset, length, &at);
    if (!frames || !owner_allows(mapping, PROT_READ) || frames->fd < 0 || length > PY_SSIZE_T_MAX / 2)
        Py_RETURN_NONE;
    PyObject *copy = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
    if (!copy)
        return NULL;
    char *bytes = PyBytes_AsString(copy);
    int fd = frames->fd, failed = 0;
    ssize_t got;
    if ((size_t)length >= LONG_RANGE / 16) {
        mapping->pins++; /* while the GIL is away nobody may close the descriptor */
        Py_BEGIN_ALLOW_THREADS
        got = pread(fd, bytes, (size_t)length, (off_t)at);
        Py_END_ALLOW_THREADS
        failed = mapping_unpin(mapping);
    } else {
        got = pread(fd, bytes, (size_t)length, (off_t)at);
    }
    if (!failed && got == length)
        return copy;
    Py_DECREF(copy);
    return none_unless(failed);
}
