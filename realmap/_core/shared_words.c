/* What needs no mutex: SharedCounter, SharedEvent, SharedSemaphore, SharedBarrier. Each change is one store, so that
 * who dies leaves nothing half done. */
#include "core.h"

/* ---- counter ----------------------------------------------------------------------------------- */

static PyObject *number_unless(int failed, int64_t number) { return failed ? NULL : PyLong_FromLongLong(number); }

static int as_i64(PyObject *number, int64_t *out)
{
    *out = PyLong_AsLongLong(number);
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
