/* Farewell: what a window says, and to whom, when it is unmapped. In the same call of C, whoever unmaps it: `unmap`, the
 * end of its process, the collector. */
#include "connection.h"

/* Nobody has to be told of its end: somebody was, or is about to be. */
static void window_forget(Window *self)
{
    Py_CLEAR(self->farewell);
    Py_CLEAR(self->told);
}

/* It has been unmapped, by whomever: who keeps books of it is told. */
static void window_tell(Window *self)
{
    PyObject *type, *value, *traceback;
    if (!self->farewell)
        return;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *endpoint = PyObject_CallNoArgs(self->told); /* a weak reference */
    if (endpoint && PyObject_TypeCheck(endpoint, endpoint_type))
        endpoint_notice(endpoint, self->farewell);
    Py_XDECREF(endpoint);
    PyErr_Restore(type, value, traceback);
    window_forget(self);
}

/* _farewell(endpoint, bytes, answer): when it is unmapped, whoever does that, the endpoint sends these bytes; it is
 * what `answer` (or None) has brought. _farewell(None, None, None): nobody is told. */
static PyObject *window_set_farewell(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    Window *self = (Window *)op;
    if (wants(nargs, 3, "Window._farewell"))
        return NULL;
    int none = Py_IsNone(args[0]);
    if (!none && (!PyObject_TypeCheck(args[0], endpoint_type) || !PyBytes_Check(args[1]) ||
                  !(Py_IsNone(args[2]) || PyObject_TypeCheck(args[2], answer_type))))
        return PyErr_Format(PyExc_TypeError, "a window tells an Endpoint, in bytes");
    PyObject *told = none ? NULL : PyWeakref_NewRef(args[0], NULL);
    if (!none && !told)
        return NULL;
    window_forget(self);
    if (!none) {
        self->told = told;
        self->farewell = Py_NewRef(args[1]);
        if (!Py_IsNone(args[2]))
            as_answer(args[2])->taken = 1;
    }
    Py_RETURN_NONE;
}
