/* Ring: two queues, one each way, and a socket to wake who sleeps. */
#include "core.h"

/* Maps the memory behind `fd`, which is sealed and of RING_BYTES; 0, or an errno: EINVAL where it is too small. */
static int map_ring(Ring *self, int fd, int is_kernel)
{
    struct stat status;
    if (fstat(fd, &status))
        return errno;
    if (status.st_size < (off_t)(2 * sizeof(Queue)))
        return EINVAL;
    void *got = mmap(NULL, 2 * sizeof(Queue), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (got == MAP_FAILED)
        return errno;
    madvise(got, 2 * sizeof(Queue), MADV_DONTFORK); /* a ring has one user; a child is another */
    self->queues = got;
    self->duplex.in = &self->queues[is_kernel ? 0 : 1];
    self->duplex.out = &self->queues[is_kernel ? 1 : 0];
    atomic_store_explicit(&self->duplex.out->cpu, UINT32_MAX, memory_order_relaxed); /* nowhere yet */
    self->epoch = fork_epoch;
    return 0;
}

/* Ring._open(fd, is_kernel): an end of the ring in the memory behind a descriptor. */
static PyObject *ring_open(PyObject *cls, PyObject *const *args, Py_ssize_t nargs)
{
    int fd, is_kernel;
    if (wants(nargs, 2, "Ring._open") || as_int(args[0], &fd) || as_int(args[1], &is_kernel))
        return NULL;
    PyObject *self = new_object(as_type(cls));
    int error = self ? map_ring(as_ring(self), fd, is_kernel) : 0;
    if (!error)
        return self;
    Py_DECREF(self);
    if (error != EINVAL)
        return os_error(error);
    return PyErr_Format(PyExc_ValueError, "too small for a ring");
}

static int ring_is_here(Ring *self)
{
    if (self->queues && self->epoch == fork_epoch)
        return 1;
    PyErr_SetString(PyExc_ValueError, "the ring is closed, or another process's");
    return 0;
}

static Duplex *duplex_of(PyObject *op) { return &as_ring(op)->duplex; }

/* Those who sleep on a word and have been answered since. They are woken some at a time: who is woken at once takes the
 * CPU from whoever is at work for the others. */
#define OWED 8

static Ring *owed;
static int owed_count;

static void wake_owed(void)
{
    for (Ring *ring; (ring = owed);) {
        owed = ring->owed;
        ring->is_owed = 0;
        if (ring->queues && ring->epoch == fork_epoch)
            queue_wake(&ring->duplex, ON_WORD, -1);
        Py_DECREF((PyObject *)ring);
    }
    owed_count = 0;
}

static void owe(Ring *ring)
{
    if (ring->is_owed) /* it woke by itself meanwhile, and sleeps again */
        return;
    ring->is_owed = 1;
    ring->owed = owed;
    owed = as_ring(Py_NewRef((PyObject *)ring));
    if (++owed_count >= OWED)
        wake_owed();
}

/* wake_owed(): wakes who has been answered and was left asleep until now. */
static PyObject *core_wake_owed(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    wake_owed();
    Py_RETURN_NONE;
}

/* _send(bytes, socket) -> -1: it does not fit (now, or ever); else it is there, and how the other side slept (AWAKE: it
 * did not; ON_SOCKET: it was woken by a bell through its socket; ON_WORD: it is woken by `wake_owed` at the latest). */
static PyObject *ring_send(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    int socket;
    char *data;
    Py_ssize_t length;
    if (wants(nargs, 2, "Ring._send") || as_int(args[1], &socket) || !ring_is_here(as_ring(op)) ||
        PyBytes_AsStringAndSize(args[0], &data, &length))
        return NULL;
    Duplex *self = duplex_of(op);
    atomic_store_explicit(&self->out->crowd, crowd, memory_order_relaxed);
    int asleep = queue_push(self, data, (size_t)length);
    if (asleep == ON_WORD)
        owe(as_ring(op));
    else if (asleep > 0)
        queue_wake(self, (uint32_t)asleep, socket);
    return PyLong_FromLong(asleep);
}

/* _mailed(): something was sent by the socket: who sleeps on its word wakes. */
static PyObject *ring_mailed(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Ring *self = as_ring(op);
    wake_owed();
    if (self->queues && self->epoch == fork_epoch)
        queue_tell_of_mail(&self->duplex);
    Py_RETURN_NONE;
}

/* _pop() -> bytes, or None where nothing is there, or b"" where the socket must be read to its end before (said once
 * for what was sent there). ValueError: the other side's indices lie. */
static PyObject *ring_pop(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Duplex *self = duplex_of(op);
    const char *data;
    uint32_t size;
    if (!ring_is_here(as_ring(op)))
        return NULL;
    int64_t there = queue_peek(self, &data, &size);
    if (!there)
        Py_RETURN_NONE;
    uint32_t mailed = atomic_load_explicit(&self->in->mailed, memory_order_relaxed);
    if (mailed != self->in_mailed) {
        self->in_mailed = mailed;
        return PyBytes_FromStringAndSize(NULL, 0);
    }
    if (there < 0)
        return PyErr_Format(PyExc_ValueError, "a ring whose indices lie (the next message: %u bytes)", size);
    PyObject *message = PyBytes_FromStringAndSize(data, (Py_ssize_t)size);
    if (message)
        queue_done(self);
    return message;
}

/* _takes(length): whether a message of so many bytes fits now; _send will take it, once this was true. */
static PyObject *ring_takes(PyObject *op, PyObject *length)
{
    uint64_t size;
    if (!ring_is_here(as_ring(op)) || as_u64(length, &size))
        return NULL;
    return PyBool_FromLong(size <= queue_room(duplex_of(op)));
}

static PyObject *ring_close(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Ring *self = as_ring(op);
    if (self->queues && self->epoch == fork_epoch)
        munmap(self->queues, 2 * sizeof(Queue));
    self->queues = NULL;
    Py_RETURN_NONE;
}

static void ring_dealloc(PyObject *op)
{
    Py_XDECREF(ring_close(op, NULL));
    free_object(op);
}

static PyMethodDef ring_methods[] = {
    {"_open", FASTCALL(ring_open), METH_FASTCALL | METH_CLASS, NULL},
    {"_send", FASTCALL(ring_send), METH_FASTCALL, NULL},
    {"_mailed", ring_mailed, METH_NOARGS, NULL},
    {"_takes", ring_takes, METH_O, NULL},
    {"_pop", ring_pop, METH_NOARGS, NULL},
    {"_say", FASTCALL(ring_say), METH_FASTCALL, NULL},
    {"_see", FASTCALL(ring_see), METH_FASTCALL, NULL},
    {"_named", ring_named, METH_O, NULL},
    {"_reclaim", ring_reclaim, METH_O, NULL},
    {"_is_gone", ring_is_gone, METH_O, NULL},
    {"_close", ring_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot ring_slots[] = {
    {Py_tp_doc, "Two queues of messages in shared memory, one each way."},
    {Py_tp_dealloc, ring_dealloc},
    {Py_tp_methods, ring_methods},
    {0, NULL},
};

static PyType_Spec ring_spec = {"realmap._core.Ring", sizeof(Ring), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                ring_slots};

/* ---- several rings at once, and how long to look -------------------------------------------- */

/* The ends of the rings of a list, into `pairs`; how many, or -1. */
static Py_ssize_t all_rings(PyObject *list, Duplex ***pairs)
{
    Py_ssize_t count = PyList_Check(list) ? PyList_Size(list) : -1;
    if (count < 0) {
        PyErr_SetString(PyExc_TypeError, "rings come in a list");
        return -1;
    }
    *pairs = PyMem_Malloc(sizeof(Duplex *) * (size_t)(count ? count : 1));
    if (!*pairs) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyList_GetItem(list, i);
        if (!PyObject_TypeCheck(item, ring_type) || !ring_is_here(as_ring(item))) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_TypeError, "rings come in a list");
            PyMem_Free(*pairs);
            return -1;
        }
        (*pairs)[i] = duplex_of(item);
    }
    return count;
}

/* Where the ring that was heard last is in the list: one behind it; 0 where it is not there any more. */
static ptrdiff_t behind(Duplex **pairs, ptrdiff_t count, PyObject *last)
{
    for (ptrdiff_t i = 0; PyObject_TypeCheck(last, ring_type) && i < count; i++)
        if (pairs[i] == duplex_of(last))
            return i + 1 < count ? i + 1 : 0;
    return 0;
}

/* gather(rings, last, ns) -> those that have a message, from the one behind `last` on: so nobody is starved by a
 * talker. Where none has, one is looked for, for `ns` nanoseconds, which are spent without the GIL; -1 where none came,
 * -2 where others want this CPU, -3 where who was heard last wants it. Only who closes the rings may call it: none may go
 * meanwhile. */
static PyObject *core_gather(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t budget;
    Duplex **pairs;
    if (wants(nargs, 3, "gather") || as_u64(args[2], &budget))
        return NULL;
    Py_ssize_t count = all_rings(args[0], &pairs);
    if (count < 0)
        return NULL;
    wake_owed();
    PyObject *found = NULL;
    Py_ssize_t from = behind(pairs, count, args[1]), first = find_ready(pairs, count, from);
    if (first < 0 && budget && count && (found = PyList_GetSlice(args[0], 0, count))) { /* so that none goes */
        Py_BEGIN_ALLOW_THREADS
        first = spin_for(pairs, count, from, budget > INT64_MAX / 2 ? INT64_MAX / 2 : (int64_t)budget);
        Py_END_ALLOW_THREADS
        Py_CLEAR(found);
    }
    if (!PyErr_Occurred())
        found = first < 0 ? PyLong_FromSsize_t(first) : PyList_New(0);
    for (Py_ssize_t i = 0; found && first >= 0 && i < count; i++) {
        Py_ssize_t at = first + i < count ? first + i : first + i - count;
        if (!queue_ready(pairs[at]))
            continue;
        count_into_crowd(pairs[at]);
        if (PyList_Append(found, PyList_GetItem(args[0], at)))
            Py_CLEAR(found);
    }
    PyMem_Free(pairs);
    return found;
}

/* fall_asleep(rings) -> bool: says to every producer that it has to wake us, by our socket. False: a message is there
 * already, and nobody has been told. */
static PyObject *core_fall_asleep(PyObject *Py_UNUSED(module), PyObject *list)
{
    Duplex **pairs;
    Py_ssize_t count = all_rings(list, &pairs);
    if (count < 0)
        return NULL;
    int done = fall_asleep(pairs, count, ON_SOCKET);
    PyMem_Free(pairs);
    return PyBool_FromLong(done);
}

/* wake_up(rings): nobody needs to wake us any more. */
static PyObject *core_wake_up(PyObject *Py_UNUSED(module), PyObject *list)
{
    Duplex **pairs;
    Py_ssize_t count = all_rings(list, &pairs);
    if (count < 0)
        return NULL;
    wake_up(pairs, count);
    PyMem_Free(pairs);
    Py_RETURN_NONE;
}

typedef struct {
    PyObject_HEAD
    Budget budget;
} SpinBudget;

static Budget *budget_of(PyObject *op) { return &((SpinBudget *)op)->budget; }

/* SpinBudget(most, cpus): nanoseconds, and how many CPUs there are: with one, who is waited for could not run. */
static PyObject *spin_budget_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(keywords))
{
    uint64_t most;
    int cpus;
    if (wants(PyTuple_Size(args), 2, "SpinBudget") || as_u64(PyTuple_GetItem(args, 0), &most) ||
        as_int(PyTuple_GetItem(args, 1), &cpus))
        return NULL;
    PyObject *self = new_object(type);
    if (self)
        budget_set(budget_of(self), most, cpus);
    return self;
}

static PyObject *spin_budget_now(PyObject *op, PyObject *clock)
{
    uint64_t now;
    return as_u64(clock, &now) ? NULL : PyLong_FromLongLong(budget_now(budget_of(op), (int64_t)now, 0));
}

static PyObject *spin_budget_spun(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t now;
    int found;
    if (wants(nargs, 2, "SpinBudget.spun") || as_int(args[0], &found) || as_u64(args[1], &now))
        return NULL;
    budget_spun(budget_of(op), found, (int64_t)now);
    Py_RETURN_NONE;
}

static PyObject *spin_budget_slept(PyObject *op, PyObject *length)
{
    uint64_t slept;
    if (as_u64(length, &slept))
        return NULL;
    budget_slept(budget_of(op), (int64_t)slept);
    Py_RETURN_NONE;
}

static PyMethodDef spin_budget_methods[] = {
    {"now", spin_budget_now, METH_O, "now(clock): how long to look this time."},
    {"spun", FASTCALL(spin_budget_spun), METH_FASTCALL, "spun(found, clock): what looking for all of it came to."},
    {"slept", spin_budget_slept, METH_O, "slept(length): the next message came after a sleep of this length."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot spin_budget_slots[] = {
    {Py_tp_doc, "How long to look for the next message before sleeping, in nanoseconds."},
    {Py_tp_new, spin_budget_new},
    {Py_tp_dealloc, free_object},
    {Py_tp_methods, spin_budget_methods},
    {0, NULL},
};

static PyType_Spec spin_budget_spec = {"realmap._core.SpinBudget", sizeof(SpinBudget), 0,
                                       Py_TPFLAGS_DEFAULT, spin_budget_slots};
