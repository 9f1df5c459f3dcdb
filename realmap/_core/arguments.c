/* Python's numbers as C's, and C's failures as exceptions. */
#include "core.h"

_Static_assert(sizeof(long) == 8, "a long is 64 bits"); /* its functions cost a tenth of those of a long long */

/* A Python int as an unsigned 64-bit number; -1 with an exception set if it is none. */
static int as_u64(PyObject *number, uint64_t *out)
{
    *out = PyLong_AsUnsignedLong(number);
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

/* A new object of a type, all of it zero. NULL with an exception set: no memory. */
static PyObject *new_object(PyTypeObject *type)
{
    return ((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
}

/* What a dealloc ends with. */
static void free_object(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type);
}

/* None; or NULL, with the exception that is set. */
static PyObject *none_unless(int failed) { return failed ? NULL : Py_NewRef(Py_None); }

/* An address as an int; None for 0. */
static PyObject *address_or_none(uintptr_t address)
{
    return address ? PyLong_FromUnsignedLongLong(address) : Py_NewRef(Py_None);
}

/* Puts an exception aside, the first of several: the rest has to be done all the same. */
static void put_aside(PyObject *first[3])
{
    if (!PyErr_Occurred())
        return;
    if (first[0])
        PyErr_Clear();
    else
        PyErr_Fetch(&first[0], &first[1], &first[2]);
}

/* Raises what was put aside; 0 where nothing was. */
static int raise_first(PyObject *first[3])
{
    if (!first[0])
        return 0;
    PyErr_Restore(first[0], first[1], first[2]);
    return -1;
}

static int wants(Py_ssize_t got, Py_ssize_t wanted, const char *what)
{
    if (got == wanted)
        return 0;
    PyErr_Format(PyExc_TypeError, "%s: %zd arguments, takes %zd", what, got, wanted);
    return -1;
}

/* Appends what was just made; *list is NULL, with an error, where that or its making failed. Of no list: nothing. */
static void append_new(PyObject **list, PyObject *item)
{
    if (*list && (!item || PyList_Append(*list, item)))
        Py_CLEAR(*list);
    Py_XDECREF(item);
}

/* Whether `items` is a tuple of objects of that type, at least one. */
static int is_tuple_of(PyObject *items, PyTypeObject *type)
{
    Py_ssize_t count = PyTuple_Check(items) ? PyTuple_Size(items) : 0;
    for (Py_ssize_t i = 0; i < count; i++)
        if (!PyObject_TypeCheck(PyTuple_GetItem(items, i), type))
            return 0;
    return count > 0;
}

/* Raises an exception that Python made; takes it over. NULL: one is raised already. */
static void raise_made(PyObject *error)
{
    if (error && PyExceptionInstance_Check(error))
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    else if (error)
        PyErr_SetString(PyExc_TypeError, "that is no exception");
    Py_XDECREF(error);
}

/* What a function of realmap/errors.py makes of `facts`, a tuple that is taken over: errors of ours are Python's. */
COLD static PyObject *made_error(const char *function, PyObject *facts)
{
    PyObject *errors = facts ? PyImport_ImportModule("realmap.errors") : NULL;
    PyObject *make = errors ? PyObject_GetAttrString(errors, function) : NULL;
    PyObject *error = make ? PyObject_CallObject(make, facts) : NULL;
    Py_XDECREF(make);
    Py_XDECREF(errors);
    Py_XDECREF(facts);
    return error;
}

static void raise_unmapped(void)
{
    PyErr_SetString(PyExc_BufferError, "it is unmapped: its bytes are no longer there");
}
