/* Events: what happened, in a ring of bounded size, for whoever asked to be told. */
#include "core.h"

/* What happened, each in a record of 64 bytes, until somebody takes it. No objects are made of them here: one made in
 * a destructor could collect garbage, and run anything. What does not fit is counted as lost, and the first record
 * that fits again says so before itself (GAP). wire/records.py names the kinds, and what the facts of each are. */

static void put_event(Events *self, Event event)
{
    /* A GAP takes a place of its own. */
    size_t wanted = self->told == self->lost ? 1 : 2;
    if (self->capacity - self->count < wanted) {
        self->lost++;
        return;
    }
    if (!self->count)
        self->first = 0; /* so that no more memory is touched than the most that waited */
    event.time = nanoseconds();
    if (wanted == 2) {
        Event gap = {.time = event.time, .kind = GAP, .facts = {self->lost - self->told}};
        self->told = self->lost;
        self->ring[(self->first + self->count++) % self->capacity] = gap;
    }
    self->ring[(self->first + self->count++) % self->capacity] = event;
}

/* Events(capacity): for so many records. MemoryError: there is no room. */
static PyObject *events_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(keywords))
{
    uint64_t capacity;
    if (wants(PyTuple_Size(args), 1, "Events") || as_u64(PyTuple_GetItem(args, 0), &capacity))
        return NULL;
    if (!capacity || capacity > SIZE_MAX / sizeof(Event))
        return PyErr_NoMemory();
    Events *self = as_events(new_object(type));
    if (!self)
        return NULL;
    /* Linux gives its pages as they are touched. */
    void *ring = mmap(NULL, capacity * sizeof(Event), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (ring == MAP_FAILED) {
        Py_DECREF((PyObject *)self);
        return PyErr_NoMemory();
    }
    self->ring = ring;
    self->capacity = (size_t)capacity;
    return (PyObject *)self;
}

static void events_dealloc(PyObject *op)
{
    Events *self = as_events(op);
    if (self->ring)
        munmap(self->ring, self->capacity * sizeof(Event));
    free_object(op);
}

/* note(kind, flags, process, *facts): up to six facts, of 64 bits each; those left out are 0. */
static PyObject *events_note(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t numbers[3 + FACTS] = {0};
    if (nargs < 3 || nargs > 3 + FACTS)
        return PyErr_Format(PyExc_TypeError, "Events.note: %zd arguments, takes 3 to 9", nargs);
    for (Py_ssize_t i = 0; i < nargs; i++) {
        numbers[i] = PyLong_AsUnsignedLongLongMask(args[i]);
        if (numbers[i] == (uint64_t)-1 && PyErr_Occurred())
            return NULL;
    }
    Event event = {.kind = (uint16_t)numbers[0], .flags = (uint16_t)numbers[1], .process = (uint32_t)numbers[2]};
    memcpy(event.facts, numbers + 3, sizeof event.facts);
    put_event(as_events(op), event);
    Py_RETURN_NONE;
}

/* take(most) -> bytes: up to so many records, the oldest first; they are gone from here. */
static PyObject *events_take(PyObject *op, PyObject *number)
{
    Events *self = as_events(op);
    uint64_t most;
    if (as_u64(number, &most))
        return NULL;
    size_t count = most < self->count ? (size_t)most : self->count;
    size_t straight = self->capacity - self->first < count ? self->capacity - self->first : count;
    PyObject *taken = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(count * sizeof(Event)));
    if (!taken)
        return NULL;
    char *bytes = PyBytes_AsString(taken);
    memcpy(bytes, self->ring + self->first, straight * sizeof(Event));
    memcpy(bytes + straight * sizeof(Event), self->ring, (count - straight) * sizeof(Event));
    self->first = (self->first + count) % self->capacity;
    self->count -= count;
    return taken;
}

static PyMethodDef events_methods[] = {
    {"note", FASTCALL(events_note), METH_FASTCALL, "note(kind, flags, process, *facts): it happens now."},
    {"take", events_take, METH_O, "take(most): the oldest records, as bytes."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef events_members[] = {
    {"lost", T_ULONGLONG, offsetof(Events, lost), READONLY, "How many did not fit."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot events_slots[] = {
    {Py_tp_doc, "What happened, in a ring of bounded size."},
    {Py_tp_new, events_new},
    {Py_tp_dealloc, events_dealloc},
    {Py_tp_methods, events_methods},
    {Py_tp_members, events_members},
    {0, NULL},
};

static PyType_Spec events_spec = {"realmap._core.Events", sizeof(Events), 0, Py_TPFLAGS_DEFAULT, events_slots};
