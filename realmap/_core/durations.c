/* Durations: how long something took, each time: counted, so that their number costs nothing. */
#include "core.h"

/* Each power of two is eight buckets: what is read is right to 6 %. */
#define PER_OCTAVE 8

static size_t duration_bucket(uint64_t nanoseconds)
{
    int shift = 60 - __builtin_clzll(nanoseconds | PER_OCTAVE); /* what is left is from 8 to 15 */
    return (size_t)shift * PER_OCTAVE + (size_t)(nanoseconds >> shift);
}

static double duration_of(size_t bucket)
{
    if (bucket < 2 * PER_OCTAVE)
        return (double)bucket;
    int shift = (int)(bucket / PER_OCTAVE) - 1;
    return ((double)(bucket % PER_OCTAVE + PER_OCTAVE) + 0.5) * (double)(1ull << shift);
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
    self->count++;
    if (took > self->longest)
        self->longest = took;
    Py_RETURN_NONE;
}

/* In seconds: what half of them, and 99 of 100, did not exceed, and the longest. None for each where there are none. */
static PyObject *durations_summary(PyObject *op, PyObject *Py_UNUSED(none))
{
    Durations *self = as_durations(op);
    if (!self->count)
        return Py_BuildValue("(OOO)", Py_None, Py_None, Py_None);
    const uint64_t ranks[] = {(self->count + 1) / 2, self->count - self->count / 100};
    double found[2];
    uint64_t seen = 0;
    size_t bucket = 0;
    for (int i = 0; i < 2; i++) {
        while (seen < ranks[i])
            seen += self->buckets[bucket++];
        double middle = duration_of(bucket - 1), longest = (double)self->longest;
        found[i] = (middle < longest ? middle : longest) / 1e9;
    }
    return Py_BuildValue("(ddd)", found[0], found[1], (double)self->longest / 1e9);
}

#define BUCKETS (sizeof(((Durations *)NULL)->buckets) / sizeof(uint64_t))

/* A list of integers: the longest (ns), then each bucket that has any, and how many: as `add` takes it. */
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

/* One of those integers; not below 0 nor above `most`. */
static int as_count(PyObject *list, Py_ssize_t at, uint64_t most, uint64_t *value)
{
    PyObject *item = PyList_GetItem(list, at); /* borrowed */
    *value = item ? PyLong_AsUnsignedLongLong(item) : 0;
    if (PyErr_Occurred())
        return -1;
    if (*value > most)
        PyErr_Format(PyExc_ValueError, "counts that no Durations made: %llu", (unsigned long long)*value);
    return *value > most ? -1 : 0;
}

/* add(counts): those of another one as well. ValueError, OverflowError, TypeError: these are no such counts; what
 * stands before the wrong one is added. */
static PyObject *durations_add(PyObject *op, PyObject *counts)
{
    Durations *self = as_durations(op);
    if (!PyList_Check(counts))
        return PyErr_Format(PyExc_TypeError, "counts are a list");
    uint64_t longest = 0, bucket, count;
    if (PyList_Size(counts) && as_count(counts, 0, UINT64_MAX, &longest))
        return NULL;
    if (longest > self->longest)
        self->longest = longest;
    for (Py_ssize_t at = 1; at < PyList_Size(counts); at += 2) {
        if (as_count(counts, at, BUCKETS - 1, &bucket) ||
            as_count(counts, at + 1, UINT64_MAX / 2 - self->count, &count))
            return NULL;
        self->buckets[bucket] += count;
        self->count += count;
    }
    Py_RETURN_NONE;
}

static PyMethodDef durations_methods[] = {
    {"counts", durations_counts, METH_NOARGS, NULL},
    {"add", durations_add, METH_O, NULL},
    {"since", durations_since, METH_O, NULL},
    {"summary", durations_summary, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static void durations_dealloc(PyObject *op) { free_object(op); }

static PyType_Slot durations_slots[] = {
    {Py_tp_doc, "How long something took, each time."},
    {Py_tp_dealloc, durations_dealloc},
    {Py_tp_methods, durations_methods},
    {0, NULL},
};

static PyType_Spec durations_spec = {"realmap._core.Durations", sizeof(Durations), 0,
                                     Py_TPFLAGS_DEFAULT, durations_slots};
