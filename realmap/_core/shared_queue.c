/* SharedQueue: messages in slots of shared memory, bounded, from many to many.
 *
 *      Spot of those who put: a mutex; its word counts what was put      consumers sleep on it
 *      Spot of those who get: a mutex; its word counts what was taken    producers sleep on it
 *      slots ─▶ [length | what it is | bytes] …
 *
 * A message is there once the count is stored, in one step, after its bytes; and gone likewise. So who dies with a mutex
 * has done nothing yet that counts: the next one goes on from there, and overwrites or takes the same slot. */
#include "core.h"

typedef struct {
    uint32_t length;
    uint32_t what;
    unsigned char bytes[];
} Item;

enum item { BYTES, BUFFER };

#define HANDLE_ROOM 56 /* bytes that a buffer's handle takes at most */
#define MOST_SLOTS ((uint32_t)1 << 30)

typedef struct {
    Shared shared;
    unsigned char *slots;
    size_t stride;
    uint32_t count; /* messages that it holds */
    uint32_t mask;  /* of a message's number: which slot */
    uint32_t size;  /* bytes that a message has at most */
    uint32_t own_put, own_taken; /* where this object left its own side: moved since, what was seen is of old */
    uint32_t seen_put, seen_taken; /* as last seen of the other side: not to share its cache line each time */
} SharedQueue;

static SharedQueue *as_queue(PyObject *op) { return (SharedQueue *)(void *)op; }
static Spot *takers_of(const SharedQueue *self) { return self->shared.spot + 1; }
static Item *item_at(const SharedQueue *self, uint32_t number)
{
    return (Item *)(void *)(self->slots + self->stride * (number & self->mask));
}

/* Slots are a power of two, so that the numbers of messages may overflow. */
static uint32_t slot_mask(uint32_t count)
{
    uint32_t mask = 0;
    while (mask < count - 1)
        mask = mask << 1 | 1;
    return mask;
}

/* Bytes from one slot to the next. What is no message, but a buffer's handle, has room in any case. */
static size_t slot_stride(uint32_t size)
{
    return (sizeof(Item) + (size < HANDLE_ROOM ? HANDLE_ROOM : size) + LINE - 1) / LINE * LINE;
}

/* Two numbers that a queue can be of; -1 with an exception set. */
static int queue_shape(PyObject *const *args, uint32_t *count, uint32_t *size)
{
    uint64_t many, most;
    if (as_u64(args[0], &many) || as_u64(args[1], &most))
        return -1;
    if (many && most && many <= MOST_SLOTS && most <= MOST_SLOTS) {
        *count = (uint32_t)many;
        *size = (uint32_t)most;
        return 0;
    }
    PyErr_SetString(PyExc_ValueError, "a queue has 1 to 1073741824 slots, of 1 to 1073741824 bytes");
    return -1;
}

/* _length(slots, size) -> how many bytes such a queue takes. */
static PyObject *queue_length(PyObject *Py_UNUSED(type), PyObject *const *args, Py_ssize_t nargs)
{
    uint32_t count, size;
    if (wants(nargs, 2, "_length") || queue_shape(args, &count, &size))
        return NULL;
    return PyLong_FromSize_t(2 * SPOT + ((size_t)slot_mask(count) + 1) * slot_stride(size));
}

/* _open(buffer, slots, size): all of the buffer is the queue's. */
static PyObject *queue_open(PyObject *cls, PyObject *const *args, Py_ssize_t nargs)
{
    uint32_t count, size;
    if (wants(nargs, 3, "_open") || queue_shape(args + 1, &count, &size))
        return NULL;
    PyObject *none = PyLong_FromLong(0), *op = NULL;
    if (none)
        op = shared_open(cls, (PyObject *const[]){args[0], none, args[1]}, 3);
    Py_XDECREF(none);
    if (!op)
        return NULL;
    SharedQueue *self = as_queue(op);
    size_t length = (size_t)as_view(self->shared.buffer)->length;
    self->stride = slot_stride(size);
    self->count = count;
    self->mask = slot_mask(count);
    self->size = size;
    self->slots = (unsigned char *)(self->shared.spot + 2);
    self->shared.span = length;
    if (length < 2 * SPOT || (length - 2 * SPOT) / self->stride <= self->mask)
        PyErr_SetString(PyExc_ValueError, "the buffer is too small for the queue");
    else if (!claim(&self->shared, takers_of(self), SHARED_QUEUE, self->size)) {
        make_mutex(takers_of(self));
        return op;
    }
    Py_DECREF(op);
    return NULL;
}

/* Takes the mutex of a side: 1; 0: not until `deadline`; -1 with an exception set. Others have it for no longer than they
 * copy a message, and to wait for that is not to wait for room. It stays mapped until it is given back. */
static int queue_take(SharedQueue *self, Spot *side, int64_t deadline)
{
    if (shared_enter(&self->shared))
        return -1;
    int outcome = take_mutex(&self->shared, &side->mutex, 0);
    if (outcome == EBUSY) {
        int64_t soon = nanoseconds() + SLICE;
        outcome = take_mutex(&self->shared, &side->mutex, deadline > soon ? deadline : soon);
    }
    if (outcome == EOWNERDEAD)
        outcome = pthread_mutex_consistent(&side->mutex);
    if (outcome > 0 && outcome != EBUSY) {
        os_error(outcome);
        outcome = -1;
    }
    self->shared.window->exports += !outcome;
    return outcome < 0 ? -1 : !outcome;
}

/* -1 with an exception set: bytes of it are gone. */
static int queue_give_back(SharedQueue *self, Spot *side)
{
    pthread_mutex_unlock(&side->mutex);
    self->shared.window->exports--;
    return spot_fault(&self->shared) ? lost_mutex(&self->shared) : 0;
}

/* Puts a message, once there is room: 1; 0: not until `deadline`; -1 with an exception set. */
static int queue_put_item(SharedQueue *self, const void *data, uint32_t length, enum item what, int64_t deadline)
{
    Spot *side = self->shared.spot, *takers = takers_of(self);
    for (;;) {
        int taken = queue_take(self, side, deadline);
        if (taken <= 0)
            return taken;
        uint32_t put = atomic_load_explicit(&side->word, memory_order_relaxed);
        if (put != self->own_put || put - self->seen_taken >= self->count)
            self->seen_taken = atomic_load_explicit(&takers->word, memory_order_acquire);
        uint32_t full_at = self->seen_taken;
        if (put - full_at < self->count) {
            Item *item = item_at(self, put);
            item->length = length;
            item->what = what;
            move(item->bytes, data, length);
            self->own_put = put + 1;
            atomic_store_explicit(&side->word, put + 1, memory_order_release);
            if (queue_give_back(self, side))
                return -1;
            wake_sleepers(&side->word, &side->sleepers, 1);
            return 1;
        }
        if (queue_give_back(self, side))
            return -1;
        int room = wait_for_word(&self->shared, &takers->word, full_at, &takers->sleepers, deadline);
        if (room <= 0 || shared_leave(&self->shared))
            return room <= 0 ? room : -1;
    }
}

/* The bytes of a message, and what it is; NULL with an exception set. The mutex is ours. */
static PyObject *copy_item(const SharedQueue *self, const Item *item, uint32_t *what)
{
    uint32_t length = item->length;
    *what = item->what;
    if (length > self->stride - sizeof *item || *what > BUFFER)
        return raise_not_here(&self->shared, "somebody has written over the messages of this queue"), NULL;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, length);
    if (bytes)
        move(PyBytes_AsString(bytes), item->bytes, length);
    return bytes;
}

/* The next message, once there is one: NULL without an exception set: not until `deadline`. */
static PyObject *queue_get_item(SharedQueue *self, uint32_t *what, int64_t deadline)
{
    Spot *side = takers_of(self), *putters = self->shared.spot;
    for (;;) {
        if (queue_take(self, side, deadline) <= 0)
            return NULL;
        uint32_t taken = atomic_load_explicit(&side->word, memory_order_relaxed);
        if (taken != self->own_taken || self->seen_put - taken - 1 >= self->count) /* none, or others have taken what was seen */
            self->seen_put = atomic_load_explicit(&putters->word, memory_order_acquire);
        uint32_t empty_at = self->seen_put;
        if (empty_at != taken) {
            PyObject *bytes = copy_item(self, item_at(self, taken), what);
            if (bytes)
                self->own_taken = taken + 1, atomic_store_explicit(&side->word, taken + 1, memory_order_release);
            if (queue_give_back(self, side))
                Py_CLEAR(bytes);
            else if (bytes)
                wake_sleepers(&side->word, &side->sleepers, 1);
            return bytes;
        }
        if (queue_give_back(self, side) ||
            wait_for_word(&self->shared, &putters->word, empty_at, &putters->sleepers, deadline) <= 0 ||
            shared_leave(&self->shared))
            return NULL;
    }
}

/* put(data, timeout=None) */
static PyObject *queue_put(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    SharedQueue *self = as_queue(op);
    PyObject *given[2] = {NULL, NULL};
    if (arguments_of(args, nargs, names, (const char *[]){"data", "timeout"}, given, 2))
        return NULL;
    if (!given[0])
        return PyErr_Format(PyExc_TypeError, "put: no data");
    if (PyObject_TypeCheck(given[0], view_type))
        return PyObject_CallMethod(op, "_put_buffer", "OO", given[0], given[1] ? given[1] : Py_None);
    int64_t deadline = deadline_given(given[1]);
    Py_buffer data;
    if (deadline < 0 || PyObject_GetBuffer(given[0], &data, PyBUF_SIMPLE))
        return NULL;
    int done = -1;
    if (data.len > (Py_ssize_t)self->size)
        raise_made(made_error("too_long", Py_BuildValue("(nn)", data.len, (Py_ssize_t)self->size)));
    else
        done = queue_put_item(self, data.buf, (uint32_t)data.len, BYTES, deadline);
    PyBuffer_Release(&data);
    if (!done)
        return raise_of("queue", "Full", "no room in the queue");
    return none_unless(done < 0);
}

/* _put_handle(bytes, timeout) -> bool: what a buffer travels as. */
static PyObject *queue_put_handle(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    SharedQueue *self = as_queue(op);
    char *data;
    Py_ssize_t length;
    if (wants(nargs, 3, "_put_handle") || !PyList_Check(args[2]) || PyBytes_AsStringAndSize(args[0], &data, &length))
        return NULL;
    int64_t deadline = deadline_given(args[1]);
    if ((size_t)length > self->stride - sizeof(Item))
        return PyErr_Format(PyExc_ValueError, "the queue has no room for that");
    int done = deadline < 0 ? -1 : queue_put_item(self, data, (uint32_t)length, BUFFER, deadline);
    if (done > 0)
        PyList_SetItem(args[2], 0, Py_NewRef(Py_True)); /* before a signal handler can raise */
    return done < 0 ? NULL : PyBool_FromLong(done);
}

static PyObject *queue_get(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    SharedQueue *self = as_queue(op);
    uint32_t what = BYTES;
    int64_t deadline = timeout_of(args, nargs, names);
    PyObject *bytes = deadline < 0 ? NULL : queue_get_item(self, &what, deadline);
    if (bytes && what == BUFFER)
        return PyObject_CallMethod(op, "_attached", "N", bytes);
    if (!bytes && !PyErr_Occurred())
        return raise_of("queue", "Empty", "nothing in the queue");
    return bytes;
}

static PyObject *queue_qsize(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    SharedQueue *self = as_queue(op);
    if (shared_enter(&self->shared))
        return NULL;
    uint32_t taken = atomic_load(&takers_of(self)->word), put = atomic_load(&self->shared.spot->word);
    uint32_t there = put - taken < self->count ? put - taken : self->count;
    return number_unless(shared_leave(&self->shared), there);
}

static PyMethodDef shared_queue_methods[] = {
    {"_length", FASTCALL(queue_length), METH_FASTCALL | METH_STATIC, NULL},
    {"_open", FASTCALL(queue_open), METH_FASTCALL | METH_CLASS, NULL},
    {"_put_handle", FASTCALL(queue_put_handle), METH_FASTCALL, NULL},
    {"put", WITH_KEYWORDS(queue_put), KEYWORDS,
     "put(data, timeout=None)\n\nPuts bytes (of anything that has some), or a Buffer, once there is room. queue.Full: not "
     "within `timeout` seconds.\nInvalidSize: more bytes than a slot has. Errors of a Buffer as of `Process.share`."},
    {"get", WITH_KEYWORDS(queue_get), KEYWORDS,
     "get(timeout=None)\n\nThe next message, once there is one: bytes, or a Buffer. queue.Empty: not within `timeout` "
     "seconds.\nInvalidMemState: somebody has written over it. Errors of a Buffer as of `Process.attach`."},
    {"qsize", queue_qsize, METH_NOARGS, "How many messages are in there."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef shared_queue_members[] = {
    {"slots", T_UINT, offsetof(SharedQueue, count), READONLY, "How many messages it holds."},
    {"size", T_UINT, offsetof(SharedQueue, size), READONLY, "How many bytes a message has at most."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot shared_queue_slots[] = {
    {Py_tp_methods, shared_queue_methods}, {Py_tp_members, shared_queue_members}, {0, NULL}};
static PyType_Spec shared_queue_spec = {"realmap._core.SharedQueue", sizeof(SharedQueue), 0, SHARED_FLAGS,
                                        shared_queue_slots};
