/* SharedLock: a robust mutex of the C library, process-shared, in a Spot; SharedCondition: what is waited for with one.
 *
 * A mutex that somebody holds is in a list that Linux walks when its thread dies, by address. So an object that holds
 * one counts as an export of its window, and where its bytes were truncated meanwhile the window stays for good. */
#include "core.h"

#define RUINED 0x80000000u /* of a Spot's argument: nobody has recovered what its mutex guards */

COLD static int raise_panic(const char *why)
{
    raise_made(made_error("KernelPanic", Py_BuildValue("(s)", why)));
    return -1;
}

COLD static int raise_owner_died(const Shared *self)
{
    raise_made(made_error("owner_died", Py_BuildValue("(K)", (unsigned long long)(uintptr_t)self->spot)));
    return -1;
}

COLD static int wait_for_mutex(Shared *self, pthread_mutex_t *mutex, int64_t deadline)
{
    Wait wait = {.ready = mutex_tried, .sleep = sleep_on_mutex, .mutex = mutex, .outcome = EBUSY};
    return shared_wait(self, &wait, deadline) < 0 ? -1 : wait.outcome;
}

/* Takes a mutex of `self`: 0 or EOWNERDEAD; another errno where it was not, EBUSY: not until `deadline`. -1 with an
 * exception set: a signal handler's, or a MemoryFault. */
static inline int take_mutex(Shared *self, pthread_mutex_t *mutex, int64_t deadline)
{
    int outcome = pthread_mutex_trylock(mutex);
    return outcome != EBUSY || !deadline ? outcome : wait_for_mutex(self, mutex, deadline);
}

/* Where bytes were gone while a mutex was taken or given back, the C library's list is not as it should be, for good. */
COLD static int lost_mutex(Shared *self)
{
    if (!self->held)
        self->window->exports++;
    self->held = 1;
    self->thread = 0;
    return shared_leave(self);
}

static int has_lock(const Shared *self)
{
    return self->held && self->thread == this_thread && self->epoch == fork_epoch;
}

/* What is said of it is not left to the C library: glibc's trylock keeps a mutex that it says is not recoverable. */
COLD static int leave_ruined(Shared *self, int outcome)
{
    if (outcome == EOWNERDEAD)
        pthread_mutex_consistent(&self->spot->mutex);
    pthread_mutex_unlock(&self->spot->mutex);
    return raise_not_here(self, "this lock is of no use any more: who had it after its holder's death let go of it "
                                "without recovered()");
}

COLD static int raise_not_taken(int outcome)
{
    if (outcome == EDEADLK)
        return raise_panic("this thread holds the lock already (after OwnerDied, too), and would wait for itself");
    os_error(outcome);
    return -1;
}

/* Notes what came of taking it: 1; or -1 with an exception set, which for OwnerDied means that it is taken, too. */
static inline int lock_taken(Shared *self, int outcome)
{
    if (outcome && outcome != EOWNERDEAD)
        return raise_not_taken(outcome);
    if (spot_fault(self))
        return lost_mutex(self);
    if (atomic_load_explicit(&self->spot->argument, memory_order_relaxed) & RUINED)
        return leave_ruined(self, outcome);
    if (!self->held) /* else its thread has died, or it was the parent's */
        self->window->exports++;
    self->held = 1;
    self->thread = this_thread;
    self->epoch = fork_epoch;
    self->orphaned = outcome == EOWNERDEAD;
    return self->orphaned ? raise_owner_died(self) : 1;
}

COLD static int64_t acquire_until_given(PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    PyObject *given[2] = {NULL, NULL};
    if (arguments_of(args, nargs, names, (const char *[]){"blocking", "timeout"}, given, 2))
        return -1;
    int blocking = given[0] ? PyObject_IsTrue(given[0]) : 1;
    double seconds = given[1] && !Py_IsNone(given[1]) ? PyFloat_AsDouble(given[1]) : -1.0;
    if (blocking < 0 || (seconds == -1.0 && PyErr_Occurred()))
        return -1;
    if (blocking)
        return deadline_given(seconds == -1.0 ? NULL : given[1]); /* -1 is none, as of threading */
    if (seconds == -1.0)
        return 0;
    PyErr_SetString(PyExc_ValueError, "a timeout is for who waits");
    return -1;
}

/* Of `acquire(blocking=True, timeout=None)`: 0: it does not wait; -1 with an exception set. */
static inline int64_t acquire_until(PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    return nargs || names ? acquire_until_given(args, nargs, names) : INT64_MAX;
}

static PyObject *lock_acquire(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    Shared *self = as_shared(op);
    int64_t deadline = acquire_until(args, nargs, names);
    if (deadline < 0 || shared_enter(self))
        return NULL;
    int outcome = take_mutex(self, &self->spot->mutex, deadline);
    if (outcome < 0)
        return NULL;
    if (outcome == EBUSY || (outcome == EDEADLK && !deadline))
        return shared_leave(self) ? NULL : Py_NewRef(Py_False);
    return lock_taken(self, outcome) < 0 ? NULL : Py_NewRef(Py_True);
}

/* -1 with an exception set: this thread does not hold it, or its bytes are not there. */
static inline int lock_enter_held(const Shared *self)
{
    if (has_lock(self) && is_whole(self->window))
        return 0;
    if (shared_enter_slowly(self))
        return -1;
    return has_lock(self) ? 0 : raise_panic("this thread does not hold the lock, by this object");
}

/* -1 with an exception set. */
static int lock_give_back(Shared *self)
{
    if (self->orphaned) {
        atomic_fetch_or(&self->spot->argument, RUINED);
        pthread_mutex_consistent(&self->spot->mutex);
    }
    int error = pthread_mutex_unlock(&self->spot->mutex);
    if (spot_fault(self))
        return lost_mutex(self);
    if (error) {
        os_error(error);
        return -1;
    }
    self->held = self->orphaned = 0;
    self->window->exports--;
    return 0;
}

static PyObject *lock_release(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return none_unless(lock_enter_held(as_shared(op)) || lock_give_back(as_shared(op)));
}

static PyObject *lock_recovered(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Shared *self = as_shared(op);
    if (lock_enter_held(self))
        return NULL;
    if (!self->orphaned)
        return none_unless(raise_panic("nobody has died with this lock: there is nothing to recover"));
    int error = pthread_mutex_consistent(&self->spot->mutex);
    if (error)
        return os_error(error);
    self->orphaned = 0;
    return none_unless(shared_leave(self));
}

/* As lock.c says: before 3.14 no handler comes in between. */
static inline PyObject *enter_by(PyObject *op, Acquire acquire)
{
    return Py_Version < 0x030E0000 ? acquire(op, NULL, 0, NULL) : turn_taken(op, acquire);
}

static PyObject *shared_lock_enter(PyObject *op, PyObject *Py_UNUSED(ignored)) { return enter_by(op, lock_acquire); }

static PyObject *shared_lock_exit(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(nargs))
{
    return lock_release(op, NULL);
}

#define KEYWORDS METH_FASTCALL | METH_KEYWORDS
#define WITH_KEYWORDS(function) ((PyCFunction)(void (*)(void))(function))

#define ACQUIRE_DOC \
    "acquire(blocking=True, timeout=None)\n\nTakes it; False where it is another's, at once (not blocking) or after " \
    "`timeout` seconds\n(None or -1: no end).\nOwnerDied: who held it has died, and this thread holds it now. InvalidMemState: it was " \
    "released after that\nwithout `recovered()`. KernelPanic: this thread holds it already."
#define RELEASE_DOC "Gives it back. KernelPanic: this thread does not hold it, by this object."
#define RECOVERED_DOC \
    "What it guards is whole again, after OwnerDied. KernelPanic: nobody died, or this thread does not hold it."

static PyMethodDef shared_lock_methods[] = {
    {"acquire", WITH_KEYWORDS(lock_acquire), KEYWORDS, ACQUIRE_DOC},
    {"release", lock_release, METH_NOARGS, RELEASE_DOC},
    {"recovered", lock_recovered, METH_NOARGS, RECOVERED_DOC},
    {"__enter__", shared_lock_enter, METH_NOARGS, NULL},
    {"__exit__", FASTCALL(shared_lock_exit), METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot shared_lock_slots[] = {{Py_tp_methods, shared_lock_methods}, {0, NULL}};
static PyType_Spec shared_lock_spec = {"realmap._core.SharedLock", sizeof(Shared), 0, SHARED_FLAGS, shared_lock_slots};
