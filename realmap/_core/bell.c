/* Bell: how an event loop is told, from any thread, that answers are there, or that it has to read from now on: once,
 * however many there are by the time that it comes.
 *
 * The loop calls it, and it calls `look`. Where a signal handler raises in there the loop only notes that, and goes on;
 * so the bell has itself called once more, and nobody is forgotten. */
#include "connection.h"

/* After so many nanoseconds a loop is told again. */
#define LOST 5000000

typedef struct {
    PyObject_HEAD
    PyObject *look;
    PyObject *soon;
    PyObject *closed;
    Answer *over, **last; /* what its loop has not taken note of yet, the first one first */
    int64_t rung;         /* when the loop was told to call it; 0: it has */
    Post post; /* what the loop watches: the connection's socket, by a descriptor of its own */
} Bell;

ACCESSOR(Bell, as_bell)

/* Has the loop call the bell soon, whatever comes in between; 0 where it is closed, and nobody waits there any more. What a
 * signal handler raised meanwhile is left in place, for whoever asks PyErr_Occurred(). */
static int ring_the_loop(PyObject *op)
{
    Bell *self = as_bell(op);
    PyObject *first[3] = {NULL}, *done = NULL;
    int closed = 0;
    /* It will call, unless it has been closed since; or a signal handler that raised in the loop has lost it. */
    if (self->rung && nanoseconds() - self->rung < LOST) {
        done = PyObject_CallNoArgs(self->closed);
        closed = done && PyObject_IsTrue(done) == 1;
        Py_XDECREF(done);
        return !closed;
    }
    self->rung = nanoseconds(); /* before: the loop may call it before this returns */
    for (int tries = 0; tries < 100 && !done && closed < 2; tries++) {
        done = PyObject_CallFunctionObjArgs(self->soon, op, NULL);
        if (!done) /* twice: it is the loop that says so */
            closed = PyErr_ExceptionMatches(PyExc_RuntimeError) ? closed + 1 : 0;
        put_aside(first);
    }
    Py_XDECREF(done);
    if (!done)
        self->rung = 0;
    raise_first(first);
    if (done || !closed)
        return 1;
    PyErr_Clear();
    return 0;
}

/* Bell(look, soon, closed): `look()` is what the loop does then; `soon(bell)` has it call the bell, from any thread;
 * `closed()` whether it never will again. */
static PyObject *bell_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(keywords))
{
    if (wants(PyTuple_Size(args), 3, "Bell"))
        return NULL;
    PyObject *op = new_object(type);
    if (op) {
        as_bell(op)->look = Py_NewRef(PyTuple_GetItem(args, 0));
        as_bell(op)->soon = Py_NewRef(PyTuple_GetItem(args, 1));
        as_bell(op)->closed = Py_NewRef(PyTuple_GetItem(args, 2));
        as_bell(op)->post.fd = -1;
        as_bell(op)->last = &as_bell(op)->over;
    }
    return op;
}

static PyObject *bell_call(PyObject *op, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(keywords))
{
    as_bell(op)->rung = 0;
    PyObject *first[3] = {NULL}, *done = PyObject_CallNoArgs(as_bell(op)->look);
    if (done)
        return done;
    put_aside(first);
    ring_the_loop(op);
    PyErr_Clear();
    raise_first(first);
    return NULL;
}

/* An answer is over: its loop takes note of it. The reference is the bell's from now on. */
static void bell_add(PyObject *op, Answer *answer)
{
    answer->after = NULL;
    *as_bell(op)->last = answer;
    as_bell(op)->last = &answer->after;
}

/* first() -> the first answer that was not taken note of, or None. It stays the first until `drop`: a signal handler may
 * raise in between. */
static PyObject *bell_first(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Answer *first = as_bell(op)->over;
    return Py_NewRef(first ? (PyObject *)first : Py_None);
}

/* drop(answer): it was taken note of. Again: nothing. */
static PyObject *bell_drop(PyObject *op, PyObject *answer)
{
    Bell *self = as_bell(op);
    Answer *first = self->over;
    if (first && (PyObject *)first == answer) {
        self->over = first->after;
        if (!self->over)
            self->last = &self->over;
        Py_DECREF((PyObject *)first);
    }
    Py_RETURN_NONE;
}

/* watch(endpoint) -> a descriptor of its socket for the loop to watch; -1 where there is none any more. One of the bell's
 * own: that of a connection which is closed meanwhile may be another's a moment later. */
static PyObject *bell_watch(PyObject *op, PyObject *endpoint)
{
    Bell *self = as_bell(op);
    if (!PyObject_TypeCheck(endpoint, endpoint_type))
        return PyErr_Format(PyExc_TypeError, "a bell watches an Endpoint");
    const Post *post = &as_endpoint(endpoint)->post;
    if (!post_is_ours(&self->post) && post_is_ours(post)) {
        self->post = *post;
        self->post.fd = fcntl(post->fd, F_DUPFD_CLOEXEC, 0);
    }
    return PyLong_FromLong(self->post.fd);
}

/* close(): that descriptor. Again: nothing. */
static PyObject *bell_close(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    post_close(&as_bell(op)->post);
    Py_RETURN_NONE;
}

static PyObject *bell_fileno(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromLong(as_bell(op)->post.fd);
}

static int bell_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(as_bell(op)->look);
    Py_VISIT(as_bell(op)->soon);
    Py_VISIT(as_bell(op)->closed);
    for (Answer *at = as_bell(op)->over; at; at = at->after)
        Py_VISIT((PyObject *)at);
    return 0;
}

static int bell_clear(PyObject *op)
{
    for (Answer *at; (at = as_bell(op)->over);)
        Py_XDECREF(bell_drop(op, (PyObject *)at));
    Py_CLEAR(as_bell(op)->look);
    Py_CLEAR(as_bell(op)->soon);
    Py_CLEAR(as_bell(op)->closed);
    return 0;
}

static void bell_dealloc(PyObject *op)
{
    PyObject_GC_UnTrack(op);
    bell_clear(op);
    post_close(&as_bell(op)->post);
    free_object(op);
}

static PyMethodDef bell_methods[] = {
    {"first", bell_first, METH_NOARGS, "The first answer that was not taken note of, or None."},
    {"drop", bell_drop, METH_O, "drop(answer): it was taken note of, if it is the first one. Again: nothing."},
    {"watch", bell_watch, METH_O, "watch(endpoint): a descriptor of its socket for the loop to watch, or -1."},
    {"fileno", bell_fileno, METH_NOARGS, "That descriptor, or -1."},
    {"close", bell_close, METH_NOARGS, "Closes it."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot bell_slots[] = {
    {Py_tp_doc, "How an event loop is told, from any thread, that it has to look."},
    {Py_tp_new, bell_new},
    {Py_tp_call, bell_call},
    {Py_tp_methods, bell_methods},
    {Py_tp_traverse, bell_traverse},
    {Py_tp_clear, bell_clear},
    {Py_tp_dealloc, bell_dealloc},
    {0, NULL},
};

static PyType_Spec bell_spec = {"realmap._core.Bell", sizeof(Bell), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, bell_slots};
