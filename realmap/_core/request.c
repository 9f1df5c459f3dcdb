/* What a thread, or a loop, has done by an endpoint: requests, plain calls and unmappings, their answers; and notices. */
#include "connection.h"

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

/* A call as a message, and its number. NULL where its arguments are not so plain, or this connection has ended, without an
 * exception; or with one. `by`, the third one: a dict of names that are not for this connection, and then NULL, and what is
 * `found` there; or whose numbers its requests have. */
static PyObject *write_plain(Endpoint *self, PyObject *const *args, Py_ssize_t nargs, uint64_t *number, PyObject **found)
{
    *found = NULL;
    *number = 0;
    if (wants(nargs, 3, "a call") || self->end || self->epoch != fork_epoch || !PyUnicode_CheckExact(args[0]))
        return NULL;
    Endpoint *counter = PyObject_TypeCheck(args[2], endpoint_type) ? as_endpoint(args[2]) : NULL;
    if (!PyTuple_Check(args[1]) || (!counter && !PyDict_Check(args[2])))
        return PyErr_Format(PyExc_TypeError, "arguments are a tuple, names a dict");
    if (!counter && ((*found = PyDict_GetItemWithError(args[2], args[0])) || PyErr_Occurred()))
        return NULL;
    *number = ++(counter ? counter : self)->number;
    return plain_call(*number, args[0], args[1]);
}

/* plain(name, args, by) -> (number, message) of a call; None: as write_plain. */
static PyObject *endpoint_plain(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t number;
    PyObject *found, *message = write_plain(as_endpoint(op), args, nargs, &number, &found);
    if (message)
        return Py_BuildValue("KN", (unsigned long long)number, message);
    return none_unless(PyErr_Occurred() != NULL);
}

/* call(name, args, by) -> the value of the answer to a call, for which it waits without a bound; the Answer where that is no
 * plain value; what is found in `by`, or NotImplemented, and nothing was done: as write_plain. An exception is a signal
 * handler's own. */
static PyObject *endpoint_call(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    Endpoint *self = as_endpoint(op);
    uint64_t number;
    PyObject *found, *message = write_plain(self, args, nargs, &number, &found);
    if (!message)
        return PyErr_Occurred() ? NULL : Py_NewRef(found ? found : Py_NotImplemented);
    Answer *answer = start(self, number, message, Py_None, Py_None, NULL, 0);
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
