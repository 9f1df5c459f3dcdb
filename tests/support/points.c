/* A signal at a chosen point: between two chosen opcodes of the main thread, as the interpreter counts them. It is
 * raised in C, so its Python handler runs where the interpreter, or a function of C, next asks for signals. */
#include <Python.h>
#include <frameobject.h>
#include <signal.h>
#include <string.h>

static long target, count, hit;
static int number;
static char within[4096];

static int trace(PyObject *Py_UNUSED(self), PyFrameObject *frame, int what, PyObject *Py_UNUSED(arg))
{
    if (what == PyTrace_CALL) {
        PyObject *code = (PyObject *)PyFrame_GetCode(frame);
        PyObject *file = PyObject_GetAttrString(code, "co_filename");
        const char *name = file ? PyUnicode_AsUTF8(file) : NULL;
        int inside = name && strstr(name, within) != NULL;
        Py_XDECREF(file);
        Py_DECREF(code);
        if (PyErr_Occurred())
            return -1;
        /* From 3.13 on a frame without a trace function of its own has no such events, though it is not called. */
        if (inside && PyObject_SetAttrString((PyObject *)frame, "f_trace", Py_True))
            return -1;
        return PyObject_SetAttrString((PyObject *)frame, "f_trace_opcodes", inside ? Py_True : Py_False);
    }
    if (what == PyTrace_OPCODE && ++count == target) {
        hit = 1;
        raise(number);
    }
    return 0;
}

/* From now on: signal `signal` at the `at`-th opcode of functions whose file's name has `part` in it. */
PyObject *begin(long at, int signal, const char *part)
{
    target = at;
    number = signal;
    count = hit = 0;
    strncpy(within, part, sizeof within - 1);
    /* 3.12 asks at the beginning whether any frame wants them. */
    PyObject *here = (PyObject *)PyEval_GetFrame();
    if (PyObject_SetAttrString(here, "f_trace_opcodes", Py_True))
        return NULL;
    PyEval_SetTrace(trace, NULL);
    if (PyObject_SetAttrString(here, "f_trace_opcodes", Py_False))
        return NULL;
    Py_RETURN_NONE;
}

/* No longer. Whether the point was reached. */
PyObject *end(void)
{
    PyEval_SetTrace(NULL, NULL);
    return PyBool_FromLong(hit);
}
