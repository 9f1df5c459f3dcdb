/* SharedCondition: waiting for something, with a lock: one of its own, in the same 64 bytes, or another one.
 *
 * All of it is guarded by that lock, but for the sleep. A notification gives out permits, and changes the word; who wakes
 * takes the lock, and then a permit, where there was a notification since he began to wait. So a permit that somebody
 * was woken for who died before he took it is another's. */
#include "core.h"

typedef struct {
    Shared shared;
    PyObject *lock; /* a SharedLock; NULL: its own mutex */
} Condition;

static Shared *lock_of(PyObject *op)
{
    PyObject *lock = ((Condition *)(void *)op)->lock;
    return as_shared(lock ? lock : op);
}

/* _use(lock): instead of one of its own, from now on. */
static PyObject *condition_use(PyObject *op, PyObject *lock)
{
    Condition *self = (Condition *)(void *)op;
    if (!PyObject_TypeCheck(lock, shared_lock_type) || self->lock)
        return PyErr_Format(PyExc_TypeError, "a condition has one lock, a realmap.sync.Lock");
    self->lock = Py_NewRef(lock);
    Py_RETURN_NONE;
}

static void condition_dealloc(PyObject *op)
{
    Py_CLEAR(((Condition *)(void *)op)->lock);
    shared_dealloc(op);
}

static PyObject *condition_acquire(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    return lock_acquire((PyObject *)lock_of(op), args, nargs, names);
}

static PyObject *condition_release(PyObject *op, PyObject *ignored)
{
    return lock_release((PyObject *)lock_of(op), ignored);
}

static PyObject *condition_enter_block(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return enter_by(op, condition_acquire);
}

static PyObject *condition_exit_block(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(nargs))
{
    return condition_release(op, NULL);
}

static PyObject *condition_recovered(PyObject *op, PyObject *ignored)
{
    return lock_recovered((PyObject *)lock_of(op), ignored);
}

/* As `acquire`, but nothing keeps it from that: exceptions of signal handlers, and OwnerDied, are put aside. -1: its bytes
 * are gone, or it is of no use any more. */
static int take_back(Shared *lock, PyObject *first[3])
{
    int taken = -1, tried = -1;
    while (tried < 0 && !shared_enter(lock)) {
        tried = take_mutex(lock, &lock->spot->mutex, INT64_MAX);
        if (tried >= 0)
            taken = lock_taken(lock, tried) < 0 && !has_lock(lock) ? -1 : 0;
        if (tried == EOWNERDEAD && !taken) /* to be told of that matters more than what a handler has raised */
            for (int i = 0; i < 3; i++)
                Py_CLEAR(first[i]);
        put_aside(first);
    }
    put_aside(first);
    return taken;
}

/* -1 with an exception set. */
static int condition_enter(PyObject *op)
{
    Shared *lock = lock_of(op);
    if (shared_enter(as_shared(op)) || lock_enter_held(lock))
        return -1;
    return lock->orphaned ? raise_panic("recovered() comes first: to wait is to release the lock") : 0;
}

static uint32_t permits_of(const Spot *spot)
{
    return atomic_load_explicit(&spot->argument, memory_order_relaxed) & ~RUINED;
}

/* Which lie in the argument, but for its highest bit. */
static void set_permits(Spot *spot, uint32_t count)
{
    uint32_t ruined = atomic_load_explicit(&spot->argument, memory_order_relaxed) & RUINED;
    atomic_store_explicit(&spot->argument, ruined | count, memory_order_relaxed);
}

static PyObject *wait_entered(Shared *self, Shared *lock, int64_t deadline)
{
    Spot *spot = self->spot;
    PyObject *first[3] = {NULL};
    _Atomic uint32_t unseen = 0; /* all who wait are counted, not only those asleep */
    uint32_t began = atomic_load_explicit(&spot->word, memory_order_relaxed), seen = began;
    int permitted = 0, changed;
    atomic_fetch_add_explicit(&spot->sleepers, 1, memory_order_relaxed);
    do {
        if (lock_give_back(lock))
            return NULL;
        changed = wait_for_word(self, &spot->word, seen, &unseen, deadline);
        put_aside(first);
        if (take_back(lock, first) || spot_fault(self)) {
            put_aside(first);
            return raise_first(first) || shared_leave(self) ? NULL : Py_NewRef(Py_False);
        }
        seen = atomic_load_explicit(&spot->word, memory_order_relaxed);
        permitted = !first[0] && seen != began && permits_of(spot);
    } while (changed > 0 && !permitted && !first[0]);
    uint32_t permits = permits_of(spot) - (uint32_t)permitted;
    uint32_t others = atomic_fetch_sub_explicit(&spot->sleepers, 1, memory_order_relaxed) - 1;
    set_permits(spot, permits < others ? permits : others);
    return raise_first(first) ? NULL : PyBool_FromLong(permitted);
}

static PyObject *condition_wait(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    Shared *self = as_shared(op), *lock = lock_of(op);
    int64_t deadline = timeout_of(args, nargs, names);
    if (deadline < 0 || condition_enter(op))
        return NULL;
    self->window->exports++; /* also while its lock is waited for, which may lie in another buffer */
    PyObject *answer = wait_entered(self, lock, deadline);
    self->window->exports--;
    return answer;
}

static PyObject *condition_notify(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    Shared *self = as_shared(op);
    Spot *spot = self->spot;
    PyObject *given = NULL;
    int64_t count = 1;
    if (arguments_of(args, nargs, names, (const char *[]){"n"}, &given, 1) || (given && as_i64(given, &count)) ||
        condition_enter(op))
        return NULL;
    uint32_t waiting = atomic_load_explicit(&spot->sleepers, memory_order_relaxed), given_out = permits_of(spot);
    uint32_t most = waiting < INT32_MAX ? waiting : INT32_MAX, free = most > given_out ? most - given_out : 0;
    if (count > 0 && waiting) {
        set_permits(spot, given_out + (count < free ? (uint32_t)count : free));
        atomic_fetch_add(&spot->word, 1);
        wake_sleepers(&spot->word, &spot->sleepers, count < INT32_MAX ? (int)count : INT32_MAX);
    }
    return none_unless(shared_leave(self));
}

static PyMethodDef condition_methods[] = {
    {"_use", condition_use, METH_O, NULL},
    {"acquire", WITH_KEYWORDS(condition_acquire), KEYWORDS, ACQUIRE_DOC},
    {"release", condition_release, METH_NOARGS, RELEASE_DOC},
    {"recovered", condition_recovered, METH_NOARGS, RECOVERED_DOC},
    {"wait", WITH_KEYWORDS(condition_wait), KEYWORDS,
     "wait(timeout=None)\n\nReleases the lock, waits to be notified, and has the lock again: whether it was notified within "
     "so many seconds.\nOwnerDied: as of `acquire`. KernelPanic: this thread does not hold the lock."},
    {"notify", WITH_KEYWORDS(condition_notify), KEYWORDS,
     "notify(n=1): wakes so many of those who wait. KernelPanic: this thread does not hold the lock."},
    {"__enter__", condition_enter_block, METH_NOARGS, NULL},
    {"__exit__", FASTCALL(condition_exit_block), METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef condition_members[] = {
    {"_lock", T_OBJECT, offsetof(Condition, lock), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot condition_slots[] = {
    {Py_tp_dealloc, condition_dealloc},
    {Py_tp_methods, condition_methods},
    {Py_tp_members, condition_members},
    {0, NULL},
};
static PyType_Spec condition_spec = {"realmap._core.SharedCondition", sizeof(Condition), 0, SHARED_FLAGS,
                                     condition_slots};
