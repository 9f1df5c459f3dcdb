/* What needs no mutex: SharedCounter, SharedEvent, SharedSemaphore, SharedBarrier. Each change is one store, so that
 * who dies leaves nothing half done. */
#include "core.h"

/* ---- counter ----------------------------------------------------------------------------------- */

static PyObject *number_unless(int failed, int64_t number) { return failed ? NULL : PyLong_FromLong(number); }

static int as_i64(PyObject *number, int64_t *out)
{
    *out = PyLong_AsLong(number);
    return *out == -1 && PyErr_Occurred() ? -1 : 0;
}

static PyObject *counter_value(PyObject *op, void *Py_UNUSED(closure))
{
    Shared *self = as_shared(op);
    if (shared_enter(self))
        return NULL;
    int64_t value = atomic_load(&self->spot->count);
    return number_unless(shared_leave(self), value);
}

static PyObject *counter_add(PyObject *op, PyObject *number)
{
    Shared *self = as_shared(op);
    int64_t more, sum;
    if (as_i64(number, &more) || shared_enter(self))
        return NULL;
    int64_t before = atomic_load_explicit(&self->spot->count, memory_order_relaxed);
    do {
        if (__builtin_add_overflow(before, more, &sum))
            return PyErr_Format(PyExc_OverflowError, "a counter has 64 bits");
    } while (!atomic_compare_exchange_weak(&self->spot->count, &before, sum));
    return number_unless(shared_leave(self), sum);
}

static PyObject *counter_compare_exchange(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    Shared *self = as_shared(op);
    int64_t old, new;
    if (wants(nargs, 2, "compare_exchange") || as_i64(args[0], &old) || as_i64(args[1], &new) || shared_enter(self))
        return NULL;
    int done = atomic_compare_exchange_strong(&self->spot->count, &old, new);
    return shared_leave(self) ? NULL : PyBool_FromLong(done);
}

static PyMethodDef counter_methods[] = {
    {"add", counter_add, METH_O, "add(number): adds it; the value afterwards. OverflowError: it has 64 bits."},
    {"compare_exchange", FASTCALL(counter_compare_exchange), METH_FASTCALL, "compare_exchange(old, new): whether it was `old`, and is `new` now."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef counter_getset[] = {
    {"value", counter_value, NULL, "What it is now.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot counter_slots[] = {{Py_tp_methods, counter_methods}, {Py_tp_getset, counter_getset}, {0, NULL}};
static PyType_Spec counter_spec = {"realmap._core.SharedCounter", sizeof(Shared), 0, SHARED_FLAGS, counter_slots};

/* ---- event ------------------------------------------------------------------------------------- */

/* Its word is odd while it is set, and another one each time: who waits sees that it was, also where it is cleared. */

static PyObject *event_is_set(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Shared *self = as_shared(op);
    if (shared_enter(self))
        return NULL;
    uint32_t word = atomic_load_explicit(&self->spot->word, memory_order_acquire);
    return shared_leave(self) ? NULL : PyBool_FromLong(word & 1);
}

static PyObject *event_set(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Shared *self = as_shared(op);
    if (shared_enter(self))
        return NULL;
    atomic_thread_fence(memory_order_seq_cst);
    uint32_t word = atomic_load_explicit(&self->spot->word, memory_order_relaxed);
    do {
        if (word & 1)
            break;
    } while (!atomic_compare_exchange_weak(&self->spot->word, &word, word + 1));
    if (!(word & 1))
        wake_sleepers(&self->spot->word, &self->spot->sleepers, INT32_MAX);
    return none_unless(shared_leave(self));
}

static PyObject *event_clear(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Shared *self = as_shared(op);
    if (shared_enter(self))
        return NULL;
    uint32_t word = atomic_load_explicit(&self->spot->word, memory_order_relaxed);
    while (word & 1 && !atomic_compare_exchange_weak(&self->spot->word, &word, word + 1))
        ;
    atomic_thread_fence(memory_order_seq_cst);
    return none_unless(shared_leave(self));
}

static PyObject *event_wait(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    Shared *self = as_shared(op);
    int64_t deadline = timeout_of(args, nargs, names);
    if (deadline < 0 || shared_enter(self))
        return NULL;
    uint32_t word = atomic_load_explicit(&self->spot->word, memory_order_acquire);
    int is_set = word & 1 ? 1 : wait_for_word(self, &self->spot->word, word, &self->spot->sleepers, deadline);
    return is_set < 0 || shared_leave(self) ? NULL : PyBool_FromLong(is_set);
}

static PyMethodDef event_methods[] = {
    {"is_set", event_is_set, METH_NOARGS, "Whether it is set."},
    {"set", event_set, METH_NOARGS, "Sets it, and wakes all who wait."},
    {"clear", event_clear, METH_NOARGS, "It is not set any more."},
    {"wait", WITH_KEYWORDS(event_wait), KEYWORDS, "wait(timeout=None): until it is set; whether it was within so many seconds."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot event_slots[] = {{Py_tp_methods, event_methods}, {0, NULL}};
static PyType_Spec event_spec = {"realmap._core.SharedEvent", sizeof(Shared), 0, SHARED_FLAGS, event_slots};

/* ---- semaphore --------------------------------------------------------------------------------- */

/* There are as many as it was made with, and what its word has become since. */
static int64_t tokens_of(const Spot *spot, uint32_t word)
{
    return (int32_t)(atomic_load_explicit(&spot->argument, memory_order_relaxed) + word);
}

static PyObject *semaphore_acquire(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    Shared *self = as_shared(op);
    Spot *spot = self->spot;
    int64_t deadline = acquire_until(args, nargs, names);
    if (deadline < 0 || shared_enter(self))
        return NULL;
    int got = 1;
    uint32_t word = atomic_load_explicit(&spot->word, memory_order_relaxed);
    while (got > 0) {
        if (tokens_of(spot, word) > 0) {
            if (atomic_compare_exchange_weak(&spot->word, &word, word - 1))
                break;
        } else {
            got = deadline ? wait_for_word(self, &spot->word, word, &spot->sleepers, deadline) : 0;
            word = got > 0 ? atomic_load_explicit(&spot->word, memory_order_relaxed) : word;
        }
        if (got > 0 && spot_fault(self))
            break;
    }
    return got < 0 || shared_leave(self) ? NULL : PyBool_FromLong(got);
}

static PyObject *semaphore_release(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    Shared *self = as_shared(op);
    Spot *spot = self->spot;
    PyObject *given = NULL;
    int64_t more = 1;
    if (arguments_of(args, nargs, names, (const char *[]){"n"}, &given, 1) || (given && as_i64(given, &more)) ||
        shared_enter(self))
        return NULL;
    uint32_t word = atomic_load_explicit(&spot->word, memory_order_relaxed);
    do {
        if (more < 1 || more > INT32_MAX - tokens_of(spot, word))
            return PyErr_Format(PyExc_ValueError, "n is 1 or more, and a semaphore holds 2147483647 at most");
    } while (!atomic_compare_exchange_weak(&spot->word, &word, word + (uint32_t)more));
    wake_sleepers(&spot->word, &spot->sleepers, (int)more);
    return none_unless(shared_leave(self));
}

static PyObject *semaphore_enter(PyObject *op, PyObject *Py_UNUSED(ignored)) { return enter_by(op, semaphore_acquire); }

static PyObject *semaphore_exit(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(nargs))
{
    return semaphore_release(op, NULL, 0, NULL);
}

static PyObject *semaphore_value(PyObject *op, void *Py_UNUSED(closure))
{
    Shared *self = as_shared(op);
    if (shared_enter(self))
        return NULL;
    int64_t tokens = tokens_of(self->spot, atomic_load_explicit(&self->spot->word, memory_order_relaxed));
    return number_unless(shared_leave(self), tokens);
}

static PyMethodDef semaphore_methods[] = {
    {"acquire", WITH_KEYWORDS(semaphore_acquire), KEYWORDS,
     "acquire(blocking=True, timeout=None): takes one; False where there is none, at once (not blocking) or after "
     "`timeout` seconds."},
    {"release", WITH_KEYWORDS(semaphore_release), KEYWORDS, "release(n=1): adds so many. ValueError: fewer than one."},
    {"__enter__", semaphore_enter, METH_NOARGS, NULL},
    {"__exit__", FASTCALL(semaphore_exit), METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef semaphore_getset[] = {
    {"value", semaphore_value, NULL, "How many could be acquired now.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot semaphore_slots[] = {{Py_tp_methods, semaphore_methods}, {Py_tp_getset, semaphore_getset}, {0, NULL}};
static PyType_Spec semaphore_spec = {"realmap._core.SharedSemaphore", sizeof(Shared), 0, SHARED_FLAGS, semaphore_slots};

/* ---- barrier ----------------------------------------------------------------------------------- */

/* All of it in one word, of which half is slept on:
 *
 *      | broken 1 | arrived 15 | history 16 | generation 32 |
 *
 * A generation ends when all have come, when somebody gives up, or by a reset; the history says of the last ones, the
 * latest lowest, which were torn. So who is late to wake still learns how his ended. */
typedef struct {
    uint32_t generation, history, arrived;
    int broken;
} Stage;

static Stage stage_of(uint64_t bits)
{
    return (Stage){(uint32_t)bits, bits >> 32 & 0xffff, bits >> 48 & 0x7fff, (int)(bits >> 63)};
}

static uint64_t stage_bits(Stage stage)
{
    return stage.generation | (uint64_t)(stage.history & 0xffff) << 32 | (uint64_t)stage.arrived << 48 |
           (uint64_t)stage.broken << 63;
}

static Stage next_stage(Stage now, int torn, int broken)
{
    return (Stage){now.generation + 1, now.history << 1 | (uint32_t)torn, 0, broken};
}

static _Atomic uint32_t *generation_word(Spot *spot) { return (_Atomic uint32_t *)(void *)&spot->stage; }

static void wake_all_arrived(Spot *spot) { wake_sleepers(generation_word(spot), &spot->sleepers, INT32_MAX); }

COLD static PyObject *raise_broken(void)
{
    return raise_of("threading", "BrokenBarrierError", "somebody has given up, or aborted or reset the barrier");
}

/* Ends a generation, where it has not ended: for who came and gives up. Whether it did. */
static int tear(Spot *spot, uint32_t generation)
{
    uint64_t bits = atomic_load(&spot->stage);
    do {
        if ((uint32_t)bits != generation)
            return 0;
    } while (!atomic_compare_exchange_weak(&spot->stage, &bits, stage_bits(next_stage(stage_of(bits), 1, 1))));
    wake_all_arrived(spot);
    return 1;
}

static PyObject *barrier_wait(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    Shared *self = as_shared(op);
    Spot *spot = self->spot;
    int64_t deadline = timeout_of(args, nargs, names);
    if (deadline < 0 || shared_enter(self))
        return NULL;
    uint32_t parties = atomic_load_explicit(&spot->argument, memory_order_relaxed);
    uint64_t bits = atomic_load(&spot->stage);
    Stage now, then;
    do {
        now = then = stage_of(bits);
        if (now.broken)
            return shared_leave(self) ? NULL : raise_broken();
        then.arrived++;
        if (then.arrived >= parties)
            then = next_stage(now, 0, 0);
    } while (!atomic_compare_exchange_weak(&spot->stage, &bits, stage_bits(then)));
    if (then.generation != now.generation) {
        wake_all_arrived(spot);
        return number_unless(shared_leave(self), now.arrived);
    }
    int ended = wait_for_word(self, generation_word(spot), now.generation, &spot->sleepers, deadline);
    if (ended < 0) {
        if (is_alive(self->window))
            tear(spot, now.generation);
        return NULL;
    }
    if (shared_leave(self) || (!ended && tear(spot, now.generation)))
        return PyErr_Occurred() ? NULL : raise_broken();
    then = stage_of(atomic_load(&spot->stage));
    uint32_t age = then.generation - now.generation - 1;
    if (shared_leave(self))
        return NULL;
    return age < 16 && then.history >> age & 1 ? raise_broken() : PyLong_FromUnsignedLong(now.arrived);
}

/* Another stage, whatever the one is now. */
static PyObject *change_stage(PyObject *op, Stage (*changed)(Stage))
{
    Shared *self = as_shared(op);
    if (shared_enter(self))
        return NULL;
    uint64_t bits = atomic_load(&self->spot->stage);
    while (!atomic_compare_exchange_weak(&self->spot->stage, &bits, stage_bits(changed(stage_of(bits)))))
        ;
    wake_all_arrived(self->spot);
    return none_unless(shared_leave(self));
}

static Stage aborted(Stage now) { return next_stage(now, 1, 1); }
static Stage reset(Stage now) { return next_stage(now, 1, 0); }

static PyObject *barrier_abort(PyObject *op, PyObject *Py_UNUSED(ignored)) { return change_stage(op, aborted); }
static PyObject *barrier_reset(PyObject *op, PyObject *Py_UNUSED(ignored)) { return change_stage(op, reset); }

enum barrier_fact { PARTIES, ARRIVED, IS_BROKEN };

static PyObject *barrier_fact(PyObject *op, void *fact)
{
    Shared *self = as_shared(op);
    if (shared_enter(self))
        return NULL;
    Stage now = stage_of(atomic_load(&self->spot->stage));
    uint32_t parties = atomic_load_explicit(&self->spot->argument, memory_order_relaxed);
    if (shared_leave(self))
        return NULL;
    if ((uintptr_t)fact == IS_BROKEN)
        return PyBool_FromLong(now.broken);
    return PyLong_FromUnsignedLong((uintptr_t)fact == PARTIES ? parties : now.arrived);
}

static PyMethodDef barrier_methods[] = {
    {"wait", WITH_KEYWORDS(barrier_wait), KEYWORDS,
     "wait(timeout=None): until all have come; a number from 0 on, which is another one for each.\n"
     "threading.BrokenBarrierError: somebody has given up (this thread, after `timeout` seconds), aborted or reset."},
    {"abort", barrier_abort, METH_NOARGS, "Breaks it, for all who wait and will, until a reset."},
    {"reset", barrier_reset, METH_NOARGS, "Whole again, and empty; who waits gets BrokenBarrierError."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef barrier_getset[] = {
    {"parties", barrier_fact, NULL, "How many have to come.", (void *)PARTIES},
    {"n_waiting", barrier_fact, NULL, "How many have come.", (void *)ARRIVED},
    {"broken", barrier_fact, NULL, "Whether it is.", (void *)IS_BROKEN},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot barrier_slots[] = {{Py_tp_methods, barrier_methods}, {Py_tp_getset, barrier_getset}, {0, NULL}};
static PyType_Spec barrier_spec = {"realmap._core.SharedBarrier", sizeof(Shared), 0, SHARED_FLAGS, barrier_slots};
