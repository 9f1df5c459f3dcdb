/* Durations: how long something took, each time: counted, so that their number costs nothing. */
#include "core.h"

/* Each power of two is eight buckets (serving/durations.py). */
#define PER_OCTAVE 8

static size_t duration_bucket(uint64_t nanoseconds)
{
    int shift = 60 - __builtin_clzll(nanoseconds | PER_OCTAVE); /* what is left is from 8 to 15 */
    return (size_t)shift * PER_OCTAVE + (size_t)(nanoseconds >> shift);
}

/* since(began): it has ended now, and began at that time of the monotonic clock, in nanoseconds. */
static PyObject *durations_since(PyObject *op, PyObject *arg)
{
    Durations *self = as_durations(op);
    int64_t began = PyLong_AsLong(arg);
    if (began == -1 && PyErr_Occurred())
        return NULL;
    int64_t now = nanoseconds();
    uint64_t took = now > began ? (uint64_t)now - (uint64_t)began : 0;
    self->buckets[duration_bucket(took)]++;
    if (took > self->longest)
        self->longest = took;
    Py_RETURN_NONE;
}

#define BUCKETS (sizeof(((Durations *)NULL)->buckets) / sizeof(uint64_t))

/* A list of integers: the longest (ns), then each bucket that has any, and how many: what is made of it is Python's
 * (serving/durations.py). */
static PyObject *durations_counts(PyObject *op, PyObject *Py_UNUSED(none))
{
    Durations *self = as_durations(op);
    PyObject *found = PyList_New(0);
    append_new(&found, PyLong_FromUnsignedLongLong(self->longest));
    for (size_t bucket = 0; found && bucket < BUCKETS; bucket++)
        if (self->buckets[bucket]) {
            append_new(&found, PyLong_FromSize_t(bucket));
            append_new(&found, PyLong_FromUnsignedLongLong(self->buckets[bucket]));
        }
    return found;
}

static PyMethodDef durations_methods[] = {
    {"counts", durations_counts, METH_NOARGS, NULL},
    {"since", durations_since, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot durations_slots[] = {
    {Py_tp_doc, "How long something took, each time."},
    {Py_tp_dealloc, free_object},
    {Py_tp_methods, durations_methods},
    {0, NULL},
};

static PyType_Spec durations_spec = {"realmap._core.Durations", sizeof(Durations), 0,
                                     Py_TPFLAGS_DEFAULT, durations_slots};
