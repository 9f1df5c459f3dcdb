/* Ring: two queues, one each way, and a socket to wake who sleeps. */
#include "core.h"

static int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Ring._open(fd, is_kernel): maps the memory behind `fd`, which is sealed and of RING_BYTES. */
static PyObject *ring_open(PyObject *cls, PyObject *const *args, Py_ssize_t nargs)
{
    int fd, is_kernel;
    if (wants(nargs, 2, "Ring._open") || as_int(args[0], &fd) || as_int(args[1], &is_kernel))
        return NULL;
    struct stat status;
    if (fstat(fd, &status))
        return os_error(errno);
    if (status.st_size < (off_t)(2 * sizeof(Queue))) {
        PyErr_SetString(PyExc_ValueError, "too small for a ring");
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot((PyTypeObject *)cls, Py_tp_alloc);
    Ring *self = (Ring *)alloc((PyTypeObject *)cls, 0);
    if (!self)
        return NULL;
    void *got = mmap(NULL, 2 * sizeof(Queue), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (got == MAP_FAILED) {
        int error = errno;
        Py_DECREF(self);
        return os_error(error);
    }
    madvise(got, 2 * sizeof(Queue), MADV_DONTFORK); /* a ring has one user; a child is another */
    self->queues = got;
    self->in = &self->queues[is_kernel ? 0 : 1];
    self->out = &self->queues[is_kernel ? 1 : 0];
    atomic_store_explicit(&self->out->cpu, UINT32_MAX, memory_order_relaxed); /* nowhere yet */
    self->epoch = fork_epoch;
    return (PyObject *)self;
}

static int ring_is_here(Ring *self)
{
    if (self->queues && self->epoch == fork_epoch)
        return 1;
    PyErr_SetString(PyExc_ValueError, "the ring is closed, or another process's");
    return 0;
}


/* _push(bytes) -> 0, 1 or 2, as above. */
static PyObject *ring_push(PyObject *op, PyObject *message)
{
    char *data;
    Py_ssize_t length;
    if (!ring_is_here((Ring *)op) || PyBytes_AsStringAndSize(message, &data, &length))
        return NULL;
    return PyLong_FromLong(queue_push((Ring *)op, data, (size_t)length));
}

/* Pushes, and wakes the other side by a bell through its socket where it sleeps; in one go: no interrupt may come in
 * between. -1 with an exception set; 0: it does not fit. */
static int push_and_wake(PyObject *op, PyObject *message, int socket)
{
    PyObject *pushed = ring_push(op, message);
    if (!pushed)
        return -1;
    int done = (int)PyLong_AsLong(pushed);
    Py_DECREF(pushed);
    if (done == 2) { /* where that cannot be sent there is unread mail, which wakes as well, or nobody any more */
        int tries = BELL_TRIES;
        while (send(socket, (const char[]){BELL}, 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && tries-- &&
               (errno == ENOBUFS || errno == ENOMEM || errno == EINTR)) /* or Linux has no memory this moment */
            sched_yield();
    }
    return done ? 1 : 0;
}


/* _send(bytes, socket) -> bool: pushes, and wakes. False: it does not fit. */
static PyObject *ring_send(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    int socket;
    if (wants(nargs, 2, "Ring._send") || as_int(args[1], &socket) || !ring_is_here((Ring *)op))
        return NULL;
    int done = push_and_wake(op, args[0], socket);
    return done < 0 ? NULL : PyBool_FromLong(done);
}

/* _offer(bytes, socket) -> bool: as _send, but False also where the other side sleeps. */
static PyObject *ring_offer(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs == 2 && ring_is_here((Ring *)op) && peer_sleeps((Ring *)op))
        Py_RETURN_FALSE;
    return PyErr_Occurred() ? NULL : ring_send(op, args, nargs);
}


/* _mailed(): something was sent by the socket, before whatever goes by the ring from now on. */
static PyObject *ring_mailed(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Ring *self = (Ring *)op;
    if (!ring_is_here(self))
        return NULL;
    atomic_fetch_add_explicit(&self->out->mailed, 1, memory_order_relaxed); /* tail, stored later, releases it */
    Py_RETURN_NONE;
}

/* _pop() -> bytes, or None where nothing is there, or b"" where the socket must be read to its end before (said once
 * for what was sent there). ValueError: the other side's indices lie. */
static PyObject *ring_pop(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Ring *self = (Ring *)op;
    const char *data;
    uint32_t size;
    if (!ring_is_here(self))
        return NULL;
    int64_t there = queue_peek(self, &data, &size);
    if (!there)
        Py_RETURN_NONE;
    uint32_t mailed = atomic_load_explicit(&self->in->mailed, memory_order_relaxed);
    if (mailed != self->in_mailed) {
        self->in_mailed = mailed;
        return PyBytes_FromStringAndSize(NULL, 0);
    }
    if (there < 0) {
        PyErr_Format(PyExc_ValueError, "a ring whose indices lie (the next message: %u bytes)", size);
        return NULL;
    }
    PyObject *message = PyBytes_FromStringAndSize(data, (Py_ssize_t)size);
    if (message)
        queue_done(self);
    return message;
}

/* _takes(length): whether _offer would take a message of so many bytes now; _push will, once this was true. */
static PyObject *ring_takes(PyObject *op, PyObject *length)
{
    Ring *self = (Ring *)op;
    uint64_t size;
    if (!ring_is_here(self) || as_u64(length, &size))
        return NULL;
    uint32_t used = self->out_tail - atomic_load_explicit(&self->out->head, memory_order_acquire);
    return PyBool_FromLong(size <= RING_SLOT - sizeof(uint32_t) && used < RING_SLOTS && !peer_sleeps(self));
}


static PyObject *ring_close(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Ring *self = (Ring *)op;
    if (self->queues && self->epoch == fork_epoch)
        munmap(self->queues, 2 * sizeof(Queue));
    self->queues = NULL;
    Py_RETURN_NONE;
}

static void ring_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    Py_XDECREF(ring_close(op, NULL));
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type);
}

static PyMethodDef ring_methods[] = {
    {"_open", FASTCALL(ring_open), METH_FASTCALL | METH_CLASS, NULL},
    {"_push", ring_push, METH_O, NULL},
    {"_send", FASTCALL(ring_send), METH_FASTCALL, NULL},
    {"_offer", FASTCALL(ring_offer), METH_FASTCALL, NULL},
    {"_takes", ring_takes, METH_O, NULL},
    {"_mailed", ring_mailed, METH_NOARGS, NULL},
    {"_exchange", FASTCALL(ring_exchange), METH_FASTCALL, NULL},
    {"_pop", ring_pop, METH_NOARGS, NULL},
    {"_close", ring_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot ring_slots[] = {
    {Py_tp_doc, "Two queues of messages in shared memory, one each way."},
    {Py_tp_dealloc, ring_dealloc},
    {Py_tp_methods, ring_methods},
    {0, NULL},
};

static PyType_Spec ring_spec = {
    .name = "realmap._core.Ring",
    .basicsize = sizeof(Ring),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = ring_slots,
};
