/* Endpoint: a user's connection to its kernel. It owns the socket, the ring, whose turn it is to read, and what comes.
 *
 *      request():  send ──▶ lead: take the turn, read for all ──▶ answered: give the turn back, wake the next one
 *                     └───▶ stand by: another thread reads     ──▶ answered, or woken to lead
 *
 * There is no thread of its own. A thread waits without the GIL, against a deadline that signals do not extend; a loop
 * watches the socket, and reads by itself. Errors are values (Answer.outcome): an exception is a signal handler's own.
 * Whatever an answer has brought is that Answer's, until somebody takes it. */
#include "connection.h"

/* ---- the beginning and the end ---------------------------------------------------------------- */

static PyObject *new_endpoint(PyObject *cls)
{
    PyObject *op = new_object((PyTypeObject *)cls);
    if (op) {
        Endpoint *self = as_endpoint(op);
        table_reset(&self->table);
        self->last = &self->letters;
        self->epoch = fork_epoch;
        self->post.fd = -1;
    }
    return op;
}

/* _of(fd) -> Endpoint, or an errno: by a socket that is connected; its descriptor stays the caller's. */
static PyObject *endpoint_of(PyObject *cls, PyObject *fd)
{
    int given;
    if (as_int(fd, &given))
        return NULL;
    PyObject *op = new_endpoint(cls);
    int error = op ? post_take(&as_endpoint(op)->post, fcntl(given, F_DUPFD_CLOEXEC, 0)) : 0;
    if (!error)
        return op;
    Py_DECREF(op);
    return PyLong_FromLong(error);
}

/* _connect(path, timeout) -> Endpoint, or an errno: ETIMEDOUT where nobody was let in within so many seconds. */
static PyObject *endpoint_connect(PyObject *cls, PyObject *const *args, Py_ssize_t nargs)
{
    char *path;
    Py_ssize_t length;
    if (wants(nargs, 2, "Endpoint._connect") || PyBytes_AsStringAndSize(args[0], &path, &length))
        return NULL;
    int64_t until = deadline_of(args[1]);
    PyObject *op = until < 0 ? NULL : new_endpoint(cls);
    if (!op)
        return NULL;
    Endpoint *self = as_endpoint(op);
    int error = post_take(&self->post, socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    while (!error) {
        int64_t wait = until - nanoseconds();
        Post post = self->post;
        if (wait > SLICE)
            wait = SLICE;
        Py_BEGIN_ALLOW_THREADS
        error = post_connect(&post, path, (size_t)length, wait > 0 ? wait : 0);
        Py_END_ALLOW_THREADS
        if (error != EAGAIN && error != EINTR)
            break;
        if (PyErr_CheckSignals()) {
            Py_DECREF(op);
            return NULL;
        }
        error = self->epoch != fork_epoch ? ECHILD : nanoseconds() >= until ? ETIMEDOUT : 0;
    }
    if (!error)
        return op;
    Py_DECREF(op);
    return PyLong_FromLong(error);
}

/* join(fd, spin) -> 0, or an errno: a ring behind a descriptor, beside the socket; how long to look into it, in
 * nanoseconds. */
static PyObject *endpoint_join(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    Endpoint *self = as_endpoint(op);
    uint64_t most;
    int fd;
    if (wants(nargs, 2, "Endpoint.join") || as_int(args[0], &fd) || as_u64(args[1], &most))
        return NULL;
    Ring *ring = self->ring ? NULL : as_ring(new_object(ring_type));
    int error = ring ? map_ring(ring, fd, 0) : self->ring ? EEXIST : ENOMEM;
    if (error) {
        PyErr_Clear();
        Py_XDECREF((PyObject *)ring);
        return PyLong_FromLong(error);
    }
    int cpus = (int)sysconf(_SC_NPROCESSORS_ONLN);
    self->ring = ring;
    budget_set(&self->budget, most, cpus);
    budget_set(&self->moment, most < MOMENT ? most : MOMENT, cpus);
    return PyLong_FromLong(0);
}

static void close_endpoint(Endpoint *self)
{
    self->closed = 1;
    end_connection(self, CLOSED);
    if (self->epoch == fork_epoch && post_is_ours(&self->post))
        shutdown(self->post.fd, SHUT_RDWR); /* who waits for it wakes; in a child it would be the parent's, too */
    if (!self->busy || self->epoch != fork_epoch)
        post_close(&self->post);
}

/* close(): it is over; everybody who waits is told. Again: nothing. */
static PyObject *endpoint_close(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Endpoint *self = as_endpoint(op);
    close_endpoint(self);
    return none_unless(settle(self, NULL));
}

/* lose(): in a forked child, whose it is not: the descriptor is closed. */
static PyObject *endpoint_lose(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    if (as_endpoint(op)->epoch != fork_epoch) {
        post_close(&as_endpoint(op)->post);
        unmap_stock(as_endpoint(op)); /* this process's copies */
    }
    Py_RETURN_NONE;
}

/* reject(): what the kernel said was no message of ours. */
static PyObject *endpoint_reject(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    end_connection(as_endpoint(op), NONSENSE);
    return none_unless(settle(as_endpoint(op), NULL));
}

static PyObject *endpoint_fileno(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromLong(as_endpoint(op)->post.fd);
}

static PyObject *endpoint_end(PyObject *op, void *Py_UNUSED(closure))
{
    Endpoint *self = as_endpoint(op);
    return PyLong_FromLong(self->end ? self->end : self->epoch == fork_epoch ? OPEN : LOST_IN_CHILD);
}

static PyObject *endpoint_is_armed(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(as_endpoint(op)->armed && !as_endpoint(op)->letters);
}

static PyObject *endpoint_has_ring(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(as_endpoint(op)->ring != NULL);
}

static int endpoint_traverse(PyObject *op, visitproc visit, void *arg)
{
    Endpoint *self = as_endpoint(op);
    Py_VISIT(Py_TYPE(op));
    for (size_t i = 0; self->table.buckets && i <= self->table.mask; i++)
        for (Node *at = self->table.buckets[i]; at; at = at->next)
            Py_VISIT((PyObject *)OWNER(Answer, node, at));
    for (Answer *at = self->over; at; at = at->after)
        Py_VISIT((PyObject *)at);
    for (Late *at = self->late; at; at = at->next)
        Py_VISIT(at->function);
    Py_VISIT(self->bell);
    return 0;
}

static int endpoint_clear(PyObject *op)
{
    Endpoint *self = as_endpoint(op);
    close_endpoint(self);
    for (Answer *at; (at = self->over);) {
        self->over = at->after;
        Py_DECREF((PyObject *)at);
    }
    for (Late *at; (at = self->late);) {
        self->late = at->next;
        Py_DECREF(at->function);
        Py_DECREF(at->data);
        free(at);
    }
    Py_CLEAR(self->bell);
    return 0;
}

static void endpoint_dealloc(PyObject *op)
{
    Endpoint *self = as_endpoint(op);
    PyObject_GC_UnTrack(op);
    if (self->weakrefs)
        PyObject_ClearWeakRefs(op);
    endpoint_clear(op);
    Py_XDECREF((PyObject *)self->ring);
    Py_XDECREF(self->bye);
    table_reset(&self->table);
    free(self->datagram);
    free(self->message);
    free_object(op);
}

static PyMethodDef endpoint_methods[] = {
    {"_connect", FASTCALL(endpoint_connect), METH_FASTCALL | METH_CLASS, NULL},
    {"_of", endpoint_of, METH_O | METH_CLASS, NULL},
    {"join", FASTCALL(endpoint_join), METH_FASTCALL, "join(fd, spin): a ring beside the socket."},
    {"request", FASTCALL(endpoint_request), METH_FASTCALL, "request(number, message, timeout, holds, late) -> Answer"},
    {"call", FASTCALL(endpoint_call), METH_FASTCALL, "call(name, args, by) -> a value, an Answer, what is in `by`, or NotImplemented"},
    {"plain", FASTCALL(endpoint_plain), METH_FASTCALL, "plain(name, args, by) -> (number, message) of a call, or None"},
    {"next_id", endpoint_next_id, METH_NOARGS, "A number for a request."},
    {"unmap", FASTCALL(endpoint_unmap), METH_FASTCALL, "unmap(window, number, message) -> Answer, None, or an errno"},
    {"park", FASTCALL(endpoint_park), METH_FASTCALL, "park(window, number, kind) -> Answer, True, or False"},
    {"unpark", FASTCALL(endpoint_unpark), METH_FASTCALL, "unpark(type, kind, span) -> a Window, or None"},
    {"name", FASTCALL(endpoint_name), METH_FASTCALL, "name(window, text, length, lasts) -> whether it has that name"},
    {"end_name", endpoint_end_name, METH_O, "end_name(text) -> whether a name was ended that the kernel does not know"},
    {"empty_stock", endpoint_empty_stock, METH_O, "empty_stock(message): unmaps all that is parked, and says so."},
    {"start", FASTCALL(endpoint_start), METH_FASTCALL, "start(number, message, holds, bell) -> Answer"},
    {"give_up", endpoint_give_up, METH_O, "give_up(answer): nobody waits for it any more."},
    {"read", endpoint_read, METH_O, "read(bell): hands on what is there; 0: another reads; 1, 2: what to watch for."},
    {"notice", endpoint_send_notice, METH_O, "notice(message): sends what wants no answer, and never waits."},
    {"reject", endpoint_reject, METH_NOARGS, "What the kernel said was no message of ours."},
    {"lose", endpoint_lose, METH_NOARGS, "In a forked child: the descriptor is closed."},
    {"close", endpoint_close, METH_NOARGS, "It is over. Again: nothing."},
    {"fileno", endpoint_fileno, METH_NOARGS, "The socket's descriptor; -1 once it is closed."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef endpoint_members[] = {
    {"bye", T_OBJECT, offsetof(Endpoint, bye), READONLY, "The kernel's last message, or None."},
    {"pending", T_ULONGLONG, offsetof(Endpoint, table.count), READONLY, "How many requests have not been answered."},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Endpoint, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef endpoint_getset[] = {
    {"end", endpoint_end, NULL, "OPEN, or why it is of no use any more.", NULL},
    {"is_armed", endpoint_is_armed, NULL, "Whether a loop that watches the socket sees what comes.", NULL},
    {"has_stock", endpoint_has_stock, NULL, "Whether anything is parked.", NULL},
    {"has_ring", endpoint_has_ring, NULL, "Whether there is a ring beside the socket.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot endpoint_slots[] = {
    {Py_tp_doc, "A user's connection to its kernel."},
    {Py_tp_dealloc, endpoint_dealloc},
    {Py_tp_traverse, endpoint_traverse},
    {Py_tp_clear, endpoint_clear},
    {Py_tp_methods, endpoint_methods},
    {Py_tp_members, endpoint_members},
    {Py_tp_getset, endpoint_getset},
    {0, NULL},
};

static PyType_Spec endpoint_spec = {"realmap._core.Endpoint", sizeof(Endpoint), 0,
                                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                    endpoint_slots};
