/* Shared: what processes synchronize with, in 64 bytes of a buffer; how it is made, and how it is waited for.
 *
 * Death may come between any two steps. So what is here is whole after each store, or guarded by a robust mutex; and a
 * wake-up that went to somebody who was just dying is made good: who sleeps looks again after every slice. */
#include "core.h"

enum shared_kind { /* with a mark above it that nothing else has there by chance */
    SHARED_LOCK = 0x5265616c,
    SHARED_CONDITION,
    SHARED_EVENT,
    SHARED_SEMAPHORE,
    SHARED_BARRIER,
    SHARED_COUNTER,
    SHARED_QUEUE,
};

#define SHARED_SPIN 100000 /* nanoseconds: as wire/ring.py has it */

COLD static PyObject *raise_of(const char *module, const char *name, const char *why)
{
    PyObject *found = PyImport_ImportModule(module), *kind = found ? PyObject_GetAttrString(found, name) : NULL;
    if (kind)
        PyErr_SetString(kind, why);
    Py_XDECREF(kind);
    Py_XDECREF(found);
    return NULL;
}

/* Raises the InvalidMemState that realmap/errors.py makes of it. */
COLD static int raise_not_here(const Shared *self, const char *why)
{
    raise_made(made_error("not_here", Py_BuildValue("(Ks)", (unsigned long long)(uintptr_t)self->spot, why)));
    return -1;
}

/* ---- what every use begins and ends with ------------------------------------------------------- */

static uintptr_t spot_fault(const Shared *self) { return fault_in(self->window, (uintptr_t)self->spot, self->span); }

/* Of threads that have used something here: not a pthread_t, which the next thread has again. */
static _Thread_local unsigned long this_thread;

/* The first use of a thread, or one that is refused. */
COLD static int shared_enter_slowly(const Shared *self)
{
    static unsigned long last;
    if (!is_alive(self->window)) {
        raise_unmapped();
        return -1;
    }
    uintptr_t fault = spot_fault(self);
    if (fault) {
        raise_fault(self->buffer, fault);
        return -1;
    }
    if (!this_thread) { /* before every sleep once more: to ask Linux takes longer than to take a lock */
        stand_guard();
        this_thread = ++last;
    }
    return 0;
}

static inline int is_whole(const Window *window) { return is_alive(window) && !zeros_of(window); }

/* -1 with an exception set: it is unmapped, or bytes of it are gone. */
static inline int shared_enter(const Shared *self)
{
    return this_thread && is_whole(self->window) ? 0 : shared_enter_slowly(self);
}

COLD static int raise_gone(const Shared *self)
{
    raise_fault(self->buffer, spot_fault(self));
    return -1;
}

/* -1 with an exception set: its bytes have turned out to be gone, and what was read there is nothing. */
static inline int shared_leave(const Shared *self) { return spot_fault(self) ? raise_gone(self) : 0; }

/* ---- waiting ----------------------------------------------------------------------------------- */

static int doze_off(Wait *wait, int64_t until)
{
    struct timespec limit = {.tv_sec = until / 1000000000, .tv_nsec = until % 1000000000};
    int ready;
    stand_guard();
    Py_BEGIN_ALLOW_THREADS
    wait->sleep(wait, &limit);
    ready = wait->ready(wait);
    Py_END_ALLOW_THREADS
    return ready;
}

/* Waits until it is ready: 1; or until `deadline`: 0. -1 with an exception set: a signal handler's, or a MemoryFault.
 * It stays mapped meanwhile, but Python code may have forked: who goes on afterwards enters again. */
static int shared_wait(Shared *self, Wait *wait, int64_t deadline)
{
    int64_t began = nanoseconds(), patience = budget_now(&self->budget, began, 0), now = began;
    if (patience > deadline - began)
        patience = deadline - began;
    int ready = 0;
    self->window->exports++;
    if (patience > 0) {
        ptrdiff_t found;
        Py_BEGIN_ALLOW_THREADS
        found = look_for(wait, patience);
        Py_END_ALLOW_THREADS
        began = now = nanoseconds();
        budget_spun(&self->budget, found, now);
        ready = found == 0;
    }
    while (!ready && now < deadline) {
        ready = doze_off(wait, deadline - now < SLICE ? deadline : now + SLICE);
        if (!ready && (PyErr_CheckSignals() || shared_enter(self)))
            ready = -1;
        now = nanoseconds();
        if (ready > 0)
            budget_slept(&self->budget, now - began);
    }
    self->window->exports--;
    return ready;
}

/* Waits until a word of its has another value than `seen`; as shared_wait. */
static int wait_for_word(Shared *self, _Atomic uint32_t *word, uint32_t seen, _Atomic uint32_t *sleepers,
                         int64_t deadline)
{
    Wait wait = {.ready = has_changed, .sleep = sleep_on_word, .word = word, .seen = seen, .sleepers = sleepers};
    return shared_wait(self, &wait, deadline);
}

/* `timeout` as it was given, NULL or None: no end; -1 with an exception set: it is no number, or a negative one. */
static int64_t deadline_given(PyObject *timeout)
{
    if (!timeout || Py_IsNone(timeout))
        return INT64_MAX;
    if (PyBool_Check(timeout)) { /* meant as `block`, of queue.Queue */
        PyErr_Format(PyExc_TypeError, "a timeout is in seconds, not %R; to wait without a bound give none", timeout);
        return -1;
    }
    double seconds = PyFloat_AsDouble(timeout);
    if (seconds == -1.0 && PyErr_Occurred())
        return -1;
    if (seconds >= 0)
        return seconds < 1e9 ? nanoseconds() + (int64_t)(seconds * 1e9) : INT64_MAX;
    PyErr_SetString(PyExc_ValueError, "a timeout is a number of seconds from 0 on, or None: no end");
    return -1;
}

/* The arguments by their names, which are NULL where they are not given; -1 with an exception set. */
static int arguments_of(PyObject *const *args, Py_ssize_t nargs, PyObject *names, const char *const *known,
                        PyObject **found, Py_ssize_t most)
{
    Py_ssize_t named = names ? PyTuple_Size(names) : 0;
    if (nargs > most) {
        PyErr_Format(PyExc_TypeError, "%zd arguments, takes %zd at most", nargs, most);
        return -1;
    }
    for (Py_ssize_t i = 0; i < nargs; i++)
        found[i] = args[i];
    for (Py_ssize_t i = 0; i < named; i++) {
        PyObject *name = PyTuple_GetItem(names, i);
        Py_ssize_t at = 0;
        while (at < most && PyUnicode_CompareWithASCIIString(name, known[at]))
            at++;
        if (at == most || found[at]) {
            PyErr_Format(PyExc_TypeError, at == most ? "no argument is called %R" : "argument %R is given twice", name);
            return -1;
        }
        found[at] = args[nargs + i];
    }
    return 0;
}

/* The one argument of a wait: its timeout, as a time of the monotonic clock; -1 with an exception set. */
static int64_t timeout_of(PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    PyObject *timeout = NULL;
    return arguments_of(args, nargs, names, (const char *[]){"timeout"}, &timeout, 1) ? -1 : deadline_given(timeout);
}

/* ---- made by whoever comes first --------------------------------------------------------------- */

static int has_mutex(uint32_t kind) { return kind == SHARED_LOCK || kind == SHARED_CONDITION || kind == SHARED_QUEUE; }

/* Makes it, where nobody has, with an argument (0: any will do); -1 with an exception set: something else is there. */
static int claim(const Shared *self, Spot *spot, uint32_t kind, uint32_t argument)
{
    _Atomic uint64_t *head = (_Atomic uint64_t *)(void *)spot;
    uint64_t mine = kind | (uint64_t)argument << 32, found = atomic_load(head);
    if (!found && memcmp((const char *)spot + sizeof mine, (const char[SPOT]){0}, SPOT - sizeof mine)) {
        atomic_thread_fence(memory_order_seq_cst);
        found = atomic_load(head); /* somebody else has made it just now, and uses it */
        if (!found && !shared_leave(self))
            raise_not_here(self, "there are other bytes already: it takes 64 that are zero");
        if (!found)
            return -1;
    }
    if (!found)
        atomic_compare_exchange_strong(head, &found, mine);
    if (shared_leave(self))
        return -1;
    if (found && (uint32_t)found != kind)
        return raise_not_here(self, "there is something of another kind already");
    if (found && argument && kind != SHARED_SEMAPHORE && found >> 32 != argument)
        return raise_not_here(self, "there is one already, with another number");
    return 0;
}

/* _open(buffer, offset, argument): of the kind that the type is. Buffer and offset have been checked by realmap.sync. */
static PyObject *shared_open(PyObject *cls, PyObject *const *args, Py_ssize_t nargs)
{
    static const struct {
        PyTypeObject **type;
        uint32_t kind;
    } kinds[] = {
        {&shared_lock_type, SHARED_LOCK},           {&shared_event_type, SHARED_EVENT},
        {&shared_counter_type, SHARED_COUNTER},     {&shared_condition_type, SHARED_CONDITION},
        {&shared_semaphore_type, SHARED_SEMAPHORE}, {&shared_barrier_type, SHARED_BARRIER},
        {&shared_queue_type, SHARED_QUEUE},
    };
    static long cpus;
    uint64_t offset, argument;
    if (wants(nargs, 3, "_open") || as_u64(args[1], &offset) || as_u64(args[2], &argument))
        return NULL;
    View *view = PyObject_TypeCheck(args[0], view_type) ? as_view(args[0]) : NULL;
    if (!view || view->count != 1 || !view->writable || offset > (uint64_t)view->length ||
        (uint64_t)view->length - offset < SPOT || (view->start + offset) % SPOT || argument > UINT32_MAX)
        return PyErr_Format(PyExc_ValueError, "not at a multiple of 64 of a writable buffer, with 64 bytes of it");
    size_t kind = 0;
    while (kind < sizeof kinds / sizeof *kinds && !PyType_IsSubtype(as_type(cls), *kinds[kind].type))
        kind++;
    if (kind == sizeof kinds / sizeof *kinds)
        return PyErr_Format(PyExc_TypeError, "of no kind");
    Shared *self = as_shared(new_object(as_type(cls)));
    if (!self)
        return NULL;
    self->buffer = Py_NewRef(args[0]);
    self->window = view->parts[0];
    self->spot = (Spot *)(void *)(view->start + offset);
    self->span = SPOT;
    if (!cpus)
        cpus = sysconf(_SC_NPROCESSORS_ONLN);
    budget_set(&self->budget, SHARED_SPIN, (int)cpus);
    if (shared_enter(self) || claim(self, self->spot, kinds[kind].kind, (uint32_t)argument)) {
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    if (has_mutex(kinds[kind].kind))
        make_mutex(self->spot);
    return (PyObject *)self;
}

static void shared_dealloc(PyObject *op)
{
    Shared *self = as_shared(op);
    PyObject *buffer = self->buffer;
    if (self->held && self->epoch != fork_epoch) /* the parent's */
        self->window->exports--;
    else if (self->held) /* Linux and the C library know where it lies: it stays mapped */
        buffer = NULL;
    free_object(op);
    Py_XDECREF(buffer);
}

static PyObject *shared_offset(PyObject *op, void *Py_UNUSED(closure))
{
    Shared *self = as_shared(op);
    return PyLong_FromSize_t((uintptr_t)self->spot - as_view(self->buffer)->start);
}

/* __init_subclass__(): a class has the methods of the core's type below it as its own: the interpreter has a short way,
 * half as long, to those of exactly the class of an object. */
static PyObject *shared_init_subclass(PyObject *cls, PyObject *args, PyObject *names)
{
    PyObject *others = PyObject_CallFunctionObjArgs((PyObject *)&PySuper_Type, (PyObject *)shared_type, cls, NULL);
    PyObject *next = others ? PyObject_GetAttrString(others, "__init_subclass__") : NULL; /* of Generic, of a mixin */
    PyObject *done = next ? PyObject_Call(next, args, names) : NULL;
    PyObject *bases = done ? PyObject_GetAttrString(cls, "__bases__") : NULL;
    int failed = !bases;
    for (Py_ssize_t i = 0; !failed && i < PyTuple_Size(bases); i++) {
        PyTypeObject *base = as_type(PyTuple_GetItem(bases, i));
        PyMethodDef *method = PyType_IsSubtype(base, shared_type) ? PyType_GetSlot(base, Py_tp_methods) : NULL;
        for (; !failed && method && method->ml_name; method++) {
            PyObject *found = PyObject_GetAttrString(cls, method->ml_name);
            PyObject *given = PyObject_GetAttrString((PyObject *)base, method->ml_name);
            PyObject *own = NULL;
            failed = !found || !given;
            if (!failed && found == given && !(method->ml_flags & (METH_CLASS | METH_STATIC)))
                failed = !(own = PyDescr_NewMethod(as_type(cls), method)) ||
                         PyObject_SetAttrString(cls, method->ml_name, own);
            Py_XDECREF(found);
            Py_XDECREF(given);
            Py_XDECREF(own);
        }
    }
    Py_XDECREF(bases);
    Py_XDECREF(done);
    Py_XDECREF(next);
    Py_XDECREF(others);
    return none_unless(failed);
}

static PyMethodDef shared_methods[] = {
    {"_open", FASTCALL(shared_open), METH_FASTCALL | METH_CLASS, NULL},
    {"__init_subclass__", FASTCALL(shared_init_subclass), METH_VARARGS | METH_KEYWORDS | METH_CLASS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef shared_members[] = {
    {"buffer", T_OBJECT_EX, offsetof(Shared, buffer), READONLY, "Where it lies."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef shared_getset[] = {
    {"offset", shared_offset, NULL, "Its first byte in there.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot shared_slots[] = {
    {Py_tp_dealloc, shared_dealloc},
    {Py_tp_methods, shared_methods},
    {Py_tp_members, shared_members},
    {Py_tp_getset, shared_getset},
    {0, NULL},
};

#define SHARED_FLAGS Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION
static PyType_Spec shared_spec = {"realmap._core.Shared", sizeof(Shared), 0, SHARED_FLAGS, shared_slots};
