/* Python's numbers as C's, with an exception where they are none. */
#include "core.h"

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
