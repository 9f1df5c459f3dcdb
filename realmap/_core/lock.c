/* Lock: an RLock whose `with` takes it and gives it back in one step, whatever signal handlers raise.
 *
 * From Python 3.14 on, `with` calls `__enter__` like any method, and handlers run between its return and the block: one
 * that raises there would leave an RLock taken. Here `__enter__` returns a Turn, which `with` drops at once. Dropped
 * while an exception passes by, it was that moment, and gives the lock back. */
#include "core.h"

typedef struct {
    PyObject_HEAD
    PyObject *lock;
} Turn;

static PyTypeObject *rlock_type, *lock_type, *turn_type;

typedef PyObject *(*Acquire)(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);

/* `acquire`: of the core, whatever a class of somebody else's calls so; NULL: of the interpreter. */
static PyObject *turn_taken(PyObject *op, Acquire acquire)
{
    Turn *turn = (Turn *)(void *)new_object(turn_type);
    if (!turn)
        return NULL;
    PyObject *taken = acquire ? acquire(op, NULL, 0, NULL) : PyObject_CallMethod(op, "acquire", NULL);
    if (taken)
        turn->lock = Py_NewRef(op);
    else
        Py_CLEAR(turn);
    Py_XDECREF(taken);
    return (PyObject *)turn;
}

static PyObject *lock_enter(PyObject *op, PyObject *Py_UNUSED(ignored)) { return turn_taken(op, NULL); }

static PyObject *lock_exit(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(nargs))
{
    return PyObject_CallMethod(op, "release", NULL);
}

static void turn_dealloc(PyObject *op)
{
    PyObject *lock = ((Turn *)(void *)op)->lock;
    if (lock && PyErr_Occurred()) {
        PyObject *first[3] = {NULL};
        put_aside(first);
        PyObject *done = PyObject_CallMethod(lock, "__exit__", "OOO", Py_None, Py_None, Py_None);
        if (!done)
            PyErr_WriteUnraisable(lock);
        Py_XDECREF(done);
        raise_first(first);
    }
    Py_XDECREF(lock);
    free_object(op);
}

static PyMethodDef lock_methods[] = {
    {"__enter__", lock_enter, METH_NOARGS, NULL},
    {"__exit__", FASTCALL(lock_exit), METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot lock_slots[] = {{Py_tp_methods, lock_methods}, {0, NULL}};
static PyType_Spec lock_spec = {"realmap._core.Lock", 0, 0, Py_TPFLAGS_DEFAULT, lock_slots};

static PyType_Slot turn_slots[] = {{Py_tp_dealloc, turn_dealloc}, {0, NULL}};
static PyType_Spec turn_spec = {"realmap._core.Turn", sizeof(Turn), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, turn_slots};
