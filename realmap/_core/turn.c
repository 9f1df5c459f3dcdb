/* Turn: whose turn it is to read. */
#include "core.h"

/* Whose turn it is: a lock that nobody waits for, with levels for calls within a call of the same thread (in a signal
 * handler, or a destructor). Every function is one call of C, so that an interrupt finds it done or not done, and
 * restore may be called again. */


static int is_mine(const Turn *self) { return self->level && self->owner == PyThread_get_thread_ident(); }

/* level() -> how often this thread has taken it. */
static PyObject *turn_level(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Turn *self = (Turn *)op;
    return PyLong_FromSsize_t(is_mine(self) ? self->level : 0);
}

/* take() -> bool: False where another thread has it. */
static PyObject *turn_take(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Turn *self = (Turn *)op;
    if (self->level && !is_mine(self))
        Py_RETURN_FALSE;
    self->owner = PyThread_get_thread_ident();
    self->level++;
    Py_RETURN_TRUE;
}

/* restore(level): what this thread took since it had that level is given back. */
static PyObject *turn_restore(PyObject *op, PyObject *number)
{
    Turn *self = (Turn *)op;
    Py_ssize_t level = PyLong_AsSsize_t(number);
    if (level < 0) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "a level is not negative");
        return NULL;
    }
    if (is_mine(self) && level < self->level)
        self->level = level;
    Py_RETURN_NONE;
}

static void turn_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type);
}

static PyMethodDef turn_methods[] = {
    {"level", turn_level, METH_NOARGS, "How often this thread has taken it and not given it back."},
    {"take", turn_take, METH_NOARGS, "Takes it; False where another thread has it."},
    {"restore", turn_restore, METH_O, "Gives back what this thread took since it had that level."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot turn_slots[] = {
    {Py_tp_doc, "Whose turn it is: a lock with levels that nobody waits for."},
    {Py_tp_dealloc, turn_dealloc},
    {Py_tp_methods, turn_methods},
    {0, NULL},
};

static PyType_Spec turn_spec = {
    .name = "realmap._core.Turn",
    .basicsize = sizeof(Turn),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = turn_slots,
};
