/* Looking for a message for a moment before sleeping, and saying who sleeps. */
#include "core.h"

static inline void pause_cpu(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}


static Py_ssize_t find_ready(Ring **rings, Py_ssize_t count, Py_ssize_t start)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_ssize_t at = start + i < count ? start + i : start + i - count;
        if (ring_ready(rings[at]))
            return at;
    }
    return -1;
}

/* Between two looks at the clock lie a few microseconds. Where it has gone on for this long, somebody else had
 * this CPU: more processes want to run than there are. */
#define TAKEN 60000
#define OVERLOADED (-2)
#define SAME_CPU (-3)

/* Looks for a message for `budget` nanoseconds; the index of its ring, -1, OVERLOADED, or SAME_CPU: who was heard
 * last runs on this very CPU, and cannot say anything while we look. Without the GIL. */
static Py_ssize_t spin_for(Ring **rings, Py_ssize_t count, Py_ssize_t start, uint64_t budget)
{
    const Ring *last = rings[start ? start - 1 : count - 1];
    if (atomic_load_explicit(&last->in->cpu, memory_order_relaxed) == (uint32_t)sched_getcpu())
        return SAME_CPU;
    int64_t now = nanoseconds(), end = now + (int64_t)budget, taken = TAKEN + 500 * (int64_t)count;
    int turns = count < 32 ? 32 / (int)count : 1;
    while (now < end) {
        for (int turn = 0; turn < turns; turn++) {
            pause_cpu();
            Py_ssize_t found = find_ready(rings, count, start);
            if (found >= 0)
                return found;
        }
        int64_t before = now;
        now = nanoseconds();
        if (now - before > taken) {
            Py_ssize_t found = find_ready(rings, count, start);
            return found >= 0 ? found : OVERLOADED;
        }
    }
    return -1;
}

/* _exchange(bytes, ns, inbox, socket, sent) -> what became of it:
 *   0  not sent: it does not fit, or the other side sleeps
 *   1  sent; 6: and spun for `ns` nanoseconds in vain; 4: and others want this CPU; 5: and so does the other side
 *   3  sent, and a message came, which was appended to `inbox`
 * That it was sent is noted by appending to the list `sent`. An interrupt cannot come between sending and noting, nor
 * between taking and keeping. */
static PyObject *ring_exchange(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    Ring *self = (Ring *)op;
    uint64_t budget;
    int socket;
    if (wants(nargs, 5, "Ring._exchange") || as_u64(args[1], &budget) || as_int(args[3], &socket) ||
        !ring_is_here(self))
        return NULL;
    int sent = peer_sleeps(self) ? 0 : push_and_wake(op, args[0], socket);
    if (sent < 0 || (sent && PyList_Append(args[4], Py_True)))
        return NULL;
    if (!sent)
        return PyLong_FromLong(0);
    if (!ring_ready(self)) {
        if (!budget)
            return PyLong_FromLong(1);
        Py_INCREF(op); /* nobody may take it away while the GIL is */
        Py_ssize_t found;
        Py_BEGIN_ALLOW_THREADS
        found = spin_for(&self, 1, 0, budget);
        Py_END_ALLOW_THREADS
        int closed = !self->queues;
        Py_DECREF(op);
        if (closed)
            return PyLong_FromLong(1);
        if (found < 0)
            return PyLong_FromLong(found == OVERLOADED ? 4 : found == SAME_CPU ? 5 : 6);
    }
    PyObject *message = ring_pop(op, NULL);
    PyObject *kept = message ? PyObject_CallMethod(args[2], "append", "O", message) : NULL;
    Py_XDECREF(message);
    if (!kept)
        return NULL;
    Py_DECREF(kept);
    return PyLong_FromLong(3);
}

static void say_asleep(Ring *self, uint32_t asleep)
{
    atomic_store_explicit(&self->in->asleep, asleep, memory_order_relaxed);
}

/* The rings of a list or a tuple, borrowed, into `rings`; how many, or -1. */
static Py_ssize_t all_rings(PyObject *list, Ring ***rings)
{
    Py_ssize_t count = PyList_Check(list) ? PyList_Size(list) : -1;
    if (count < 0) {
        PyErr_SetString(PyExc_TypeError, "rings come in a list");
        return -1;
    }
    *rings = PyMem_Malloc(sizeof(Ring *) * (size_t)(count ? count : 1));
    if (!*rings) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyList_GetItem(list, i);
        if (!PyObject_TypeCheck(item, ring_type) || !ring_is_here((Ring *)item)) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_TypeError, "rings come in a list");
            PyMem_Free(*rings);
            return -1;
        }
        (*rings)[i] = (Ring *)item;
    }
    return count;
}

/* spin(rings, start, ns) -> the index of a ring that has a message, looked for from `start` on; -1 where none
 * has within `ns` nanoseconds, which are spent without the GIL; -2 where others want this CPU, -3 where who was heard
 * last wants it. */
static PyObject *host_spin(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t start, budget;
    Ring **rings;
    if (wants(nargs, 3, "spin") || as_u64(args[1], &start) || as_u64(args[2], &budget))
        return NULL;
    Py_ssize_t count = all_rings(args[0], &rings);
    if (count < 0)
        return NULL;
    Py_ssize_t from = count ? (Py_ssize_t)(start % (uint64_t)count) : 0;
    Py_ssize_t found = find_ready(rings, count, from);
    if (found < 0 && budget && count) {
        for (Py_ssize_t i = 0; i < count; i++)
            Py_INCREF((PyObject *)rings[i]); /* nobody may take one away while the GIL is */
        Py_BEGIN_ALLOW_THREADS
        found = spin_for(rings, count, from, budget);
        Py_END_ALLOW_THREADS
        for (Py_ssize_t i = 0; i < count; i++)
            Py_DECREF((PyObject *)rings[i]);
    }
    PyMem_Free(rings);
    return PyLong_FromSsize_t(found);
}

/* fall_asleep(rings) -> bool: says to every producer that it has to wake us. False: a message is
 * there already, and nobody has been told. */
static PyObject *host_fall_asleep(PyObject *Py_UNUSED(module), PyObject *list)
{
    Ring **rings;
    Py_ssize_t count = all_rings(list, &rings);
    if (count < 0)
        return NULL;
    for (Py_ssize_t i = 0; i < count; i++)
        say_asleep(rings[i], 1);
    atomic_thread_fence(memory_order_seq_cst);
    int empty = find_ready(rings, count, 0) < 0;
    if (!empty)
        for (Py_ssize_t i = 0; i < count; i++)
            say_asleep(rings[i], 0);
    PyMem_Free(rings);
    return PyBool_FromLong(empty);
}

/* wake_up(rings): nobody needs to wake us any more. */
static PyObject *host_wake_up(PyObject *Py_UNUSED(module), PyObject *list)
{
    Ring **rings;
    Py_ssize_t count = all_rings(list, &rings);
    if (count < 0)
        return NULL;
    for (Py_ssize_t i = 0; i < count; i++)
        say_asleep(rings[i], 0);
    PyMem_Free(rings);
    Py_RETURN_NONE;
}
