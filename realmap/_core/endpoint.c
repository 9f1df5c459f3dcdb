/* Endpoint: a user's connection to its kernel. It owns the socket, the ring, whose turn it is to read, and what comes.
 *
 *      request():  send ──▶ lead: take the turn, read for all ──▶ answered: give the turn back, wake the next one
 *                     └───▶ stand by: another thread reads     ──▶ answered, or woken to lead
 *
 * There is no thread of its own. A thread waits without the GIL, against a deadline that signals do not extend; a loop
 * watches the socket, and reads by itself. Errors are values (Answer.outcome): an exception is a signal handler's own.
 * Whatever an answer has brought is that Answer's, until somebody takes it. */
#include "core.h"

/* ---- requests ----------------------------------------------------------------------------------- */

/* A request that is sent, or about to be. `ordered`: nothing that is said later is heard before it, and nothing later that
 * was said before. NULL with an exception set: no memory, or a buffer that is unmapped. */
static Answer *start(Endpoint *self, uint64_t key, PyObject *message, PyObject *holds, PyObject *late, PyObject *bell,
                     int ordered)
{
    if (!PyBytes_Check(message) || table_find(&self->table, key))
        return as_answer(PyErr_Format(PyExc_ValueError, "a request is bytes, with a number of its own"));
    Answer *answer = new_answer(self, key, holds, late, bell);
    if (!answer)
        return NULL;
    answer->ordered = (char)ordered;
    if (self->end || self->epoch != fork_epoch) {
        answer->outcome = ENDED;
        answer->unread = 1;
        return answer;
    }
    if (has_gone(holds)) {
        Py_DECREF((PyObject *)answer);
        return NULL;
    }
    Py_INCREF((PyObject *)answer); /* the table's */
    table_add(&self->table, &answer->node);
    answer->pending = 1;
    if (bell)
        line_up(self, answer);
    if (ordered && self->ring && self->table.count > 1)
        queue_mailed(&self->ring->duplex); /* calls may lie in the socket yet: it is read first */
    if (post_message(self, message, answer)) {
        answer->error = ENOMEM;
        finish(self, answer, FAILED);
    }
    return answer;
}

/* next_id() -> a number for a request. */
static PyObject *endpoint_next_id(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromUnsignedLong(++as_endpoint(op)->number);
}

/* What is left of a request: its answer as it is, or NULL where a handler has raised. */
static PyObject *leave_with(Endpoint *self, Answer *answer, int failed)
{
    PyObject *type = NULL, *value = NULL, *traceback = NULL;
    if (failed || answer->outcome == TIMED_OUT)
        abandon(self, answer);
    if (failed)
        PyErr_Fetch(&type, &value, &traceback);
    wake_next(self, NULL); /* who was woken to lead may be leaving here */
    if (settle(self, NULL)) {
        if (failed)
            PyErr_Clear();
        failed = 1;
    }
    if (!failed)
        return (PyObject *)answer;
    Py_DECREF((PyObject *)answer);
    if (type)
        PyErr_Restore(type, value, traceback);
    return NULL;
}

/* Seconds from now as a time of the monotonic clock; None: never; a function is asked for them. -1 with an exception
 * set: no number, or the function's own. */
static int64_t deadline_of(PyObject *timeout)
{
    if (PyCallable_Check(timeout)) {
        PyObject *more = PyObject_CallNoArgs(timeout);
        int64_t until = !more || PyCallable_Check(more) ? -1 : deadline_of(more);
        if (more && until < 0 && !PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "a timeout is a number of seconds");
        Py_XDECREF(more);
        return until;
    }
    double seconds = Py_IsNone(timeout) ? 1e9 : PyFloat_AsDouble(timeout);
    if (seconds == -1.0 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError))
            return -1;
        PyErr_Clear();
        seconds = 1e9;
    }
    return nanoseconds() + (int64_t)((seconds < 1e9 ? seconds > 0 ? seconds : 0 : 1e9) * 1e9);
}

/* request(number, message, timeout, holds, late) -> Answer, over in some way. `timeout` in seconds, or None, or a
 * function that is asked for them, again whenever they are over, and raises where it has been long enough; `holds` is
 * kept until the kernel has answered; `late`, or None: what makes the message that is sent where nobody took the
 * answer, out of its bytes. An exception is a signal handler's own, or that function's. */
static PyObject *endpoint_request(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    Endpoint *self = as_endpoint(op);
    uint64_t number;
    if (wants(nargs, 5, "Endpoint.request") || as_u64(args[0], &number))
        return NULL;
    int64_t until = deadline_of(args[2]);
    Answer *answer = until < 0 ? NULL : start(self, number, args[1], args[3], args[4], NULL, 0);
    if (!answer)
        return NULL;
    int failed = wait_for(self, answer, until);
    while (!failed && answer->outcome == TIMED_OUT && PyCallable_Check(args[2])) {
        answer->outcome = ON_ITS_WAY; /* it may come while the function is asked */
        wake_next(self, NULL);
        until = deadline_of(args[2]);
        failed = until < 0 || wait_for(self, answer, until);
    }
    return leave_with(self, answer, failed);
}

/* A call, numbered, as a message. NULL where its arguments are not so plain, its name is one of the dict `others`, or this
 * connection has ended, without an exception; or with one. */
static PyObject *write_plain(Endpoint *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (wants(nargs, 3, "a call") || self->end || self->epoch != fork_epoch || !PyUnicode_CheckExact(args[0]) ||
        PyDict_Contains(args[2], args[0]))
        return NULL;
    return plain_call(++self->number, args[0], args[1]);
}

/* plain(name, args, others) -> (number, message) of a call; None: as write_plain. */
static PyObject *endpoint_plain(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    PyObject *message = write_plain(as_endpoint(op), args, nargs);
    if (message)
        return Py_BuildValue("KN", (unsigned long long)as_endpoint(op)->number, message);
    return none_unless(PyErr_Occurred() != NULL);
}

/* call(name, args, others) -> the value of the answer to a call, for which it waits without a bound; the Answer where that
 * is no plain value; NotImplemented, and nothing was done: as write_plain. An exception is a signal handler's own. */
static PyObject *endpoint_call(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    Endpoint *self = as_endpoint(op);
    PyObject *message = write_plain(self, args, nargs);
    if (!message)
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_NotImplemented);
    Answer *answer = start(self, self->number, message, Py_None, Py_None, NULL, 0);
    Py_DECREF(message);
    PyObject *got = answer ? leave_with(self, answer, wait_for(self, answer, INT64_MAX)) : NULL;
    PyObject *value = got ? plain_value(answer) : NULL;
    if (!value)
        return got;
    Py_DECREF(got);
    return value;
}

/* Tells the kernel of the end of a window, and waits for its answer: whatever comes in between, it is told once. Where there
 * is no memory to send `message` now, `farewell` is sent some other time, and the answer FAILED. */
static PyObject *tell_of_end(Endpoint *self, PyObject *number, PyObject *message, PyObject *farewell)
{
    uint64_t key;
    Answer *answer = as_u64(number, &key) ? NULL : start(self, key, message, NULL, Py_None, NULL, 1);
    int failed = answer ? wait_for(self, answer, INT64_MAX) : -1;
    if (!answer || answer->outcome == FAILED)
        endpoint_notice((PyObject *)self, farewell);
    if (!answer)
        return NULL;
    for (Letter *at = failed ? self->letters : NULL; at; at = at->next)
        if (at->answer == answer) { /* nobody waits for the answer, but the kernel is told */
            at->answer = NULL;
            answer->sent = 1;
        }
    return leave_with(self, answer, failed);
}

/* unmap(window, number, message) -> Answer; None: it was unmapped before; an errno: Linux did not. Unmaps it and tells
 * the kernel, in one step. BufferError: a view lives. */
static PyObject *endpoint_unmap(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    if (wants(nargs, 3, "Endpoint.unmap"))
        return NULL;
    if (!PyBytes_Check(args[2]))
        return PyErr_Format(PyExc_TypeError, "a request is bytes");
    if (!PyObject_TypeCheck(args[0], window_type) || PyObject_TypeCheck(args[0], mirror_type))
        return PyErr_Format(PyExc_TypeError, "what is unmapped is a Window");
    Window *window = as_window(args[0]);
    if (!is_alive(window))
        Py_RETURN_NONE;
    if (window->exports)
        return still_viewed("unmap", window->exports);
    int error = close_window(window);
    if (error)
        return PyLong_FromLong(error);
    PyObject *farewell = Py_XNewRef(window->farewell);
    window_forget(window);
    if (!farewell) /* nobody knows of it */
        Py_RETURN_NONE;
    PyObject *answer = tell_of_end(as_endpoint(op), args[1], args[2], farewell);
    Py_DECREF(farewell);
    return answer;
}

/* start(number, message, holds, bell) -> Answer, on its way. The bell is rung, from any thread, when it is over or when
 * somebody has to read from now on; `read` reads, `give_up` gives up. */
static PyObject *endpoint_start(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t number;
    if (wants(nargs, 4, "Endpoint.start") || as_u64(args[0], &number))
        return NULL;
    if (!PyObject_TypeCheck(args[3], bell_type))
        return PyErr_Format(PyExc_TypeError, "a loop is told by a Bell");
    Answer *answer = start(as_endpoint(op), number, args[1], args[2], Py_None, args[3], 0);
    if (!answer || !settle(as_endpoint(op), args[3])) /* it may have found out that all is over */
        return (PyObject *)answer;
    Py_DECREF((PyObject *)answer);
    return NULL;
}

/* give_up(answer): nobody waits for it any more. */
static PyObject *endpoint_give_up(PyObject *op, PyObject *answer)
{
    Endpoint *self = as_endpoint(op);
    if (!PyObject_TypeCheck(answer, answer_type) || as_answer(answer)->endpoint != self)
        return PyErr_Format(PyExc_TypeError, "what is given up is an Answer of this endpoint");
    abandon(self, as_answer(answer));
    wake_next(self, NULL);
    return none_unless(settle(self, NULL));
}

/* Who is alone is often answered in less time than its loop takes to come round, and to be woken. So long at most. */
#define MOMENT 8000

static void look_shortly(Endpoint *self, Duplex *pair)
{
    int64_t patience = budget_now(&self->moment, nanoseconds(), crowd_of(pair));
    ptrdiff_t found = queue_ready(pair) ? 0 : patience > 0 ? spin_for(&pair, 1, 0, patience) : -1;
    if (found >= 0 || patience > 0)
        budget_spun(&self->moment, found, nanoseconds());
}

/* read(bell) -> what the loop of that bell is to watch the socket for: 0: nothing, another thread reads, and wakes who
 * waits; 1: what comes; 2: and room to send; 3: what comes, and it is to look again soon: Linux had no memory to send.
 * Hands on what is there, and waits for nothing. */
static PyObject *endpoint_read(PyObject *op, PyObject *bell)
{
    Endpoint *self = as_endpoint(op);
    if (is_here(self) && self->reader)
        return PyLong_FromLong(0);
    self->reader = PyThread_get_thread_ident();
    Duplex *pair = self->ring && !self->end ? &self->ring->duplex : NULL;
    if (pair)
        queue_say(pair, AWAKE);
    while (receive_one(self) && !pair)
        ; /* beside a ring one at a time: what else there is the loop is told again, and most often it is a bell alone */
    if (pair && self->table.count == 1 && !peer_sleeps(pair))
        look_shortly(self, pair);
    do
        take_from_ring(self);
    while (!self->end && pair && !fall_asleep(&pair, 1, ON_SOCKET));
    self->armed = !self->end;
    flush(self);
    int watch = !self->letters ? 1 : self->stalled ? 3 : 2;
    give_turn_back(self, bell);
    return settle(self, bell) ? NULL : PyLong_FromLong(watch);
}

static void endpoint_notice(PyObject *op, PyObject *message)
{
    Endpoint *self = as_endpoint(op);
    if (!self->end && self->epoch == fork_epoch)
        post_message(self, message, NULL);
}

/* notice(message): sends what wants no answer; later if it cannot be sent now. Never waits. */
static PyObject *endpoint_send_notice(PyObject *op, PyObject *message)
{
    if (!PyBytes_Check(message))
        return PyErr_Format(PyExc_TypeError, "a notice is bytes");
    endpoint_notice(op, message);
    Py_RETURN_NONE;
}

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
    budget_set(&self->budget, (int64_t)(most < INT64_MAX / 8 ? most : INT64_MAX / 8), cpus);
    budget_set(&self->moment, most < MOMENT ? (int64_t)most : MOMENT, cpus);
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
    {"call", FASTCALL(endpoint_call), METH_FASTCALL, "call(name, args, others) -> a value, an Answer, or NotImplemented"},
    {"plain", FASTCALL(endpoint_plain), METH_FASTCALL, "plain(name, args, others) -> (number, message) of a call, or None"},
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

static PyType_Spec endpoint_spec = {
    .name = "realmap._core.Endpoint",
    .basicsize = sizeof(Endpoint),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = endpoint_slots,
};
