/* Bytes: indexing as on a bytearray, over whatever lends its bytes: windows, mirrors, views. */
#include "core.h"

/* The bytes of an object that lends them, and how its type does: `lend` raises what its rights forbid, or else counts
 * an export, so that they stay mapped whatever Python code an index or a value runs; `give_back` ends that. */
typedef struct {
    unsigned char *start;
    Py_ssize_t length;
    int writable;
} Lent;

typedef struct {
    int (*lend)(PyObject *op, Lent *lent);
    void (*give_back)(PyObject *op);
    int (*is_alive)(PyObject *op);
    uintptr_t (*fault_at)(PyObject *op);
} Lender;

/* Raises the MemoryFault that `op` makes of it: it knows whose byte the one at `address` is. */
COLD static void raise_fault(PyObject *op, uintptr_t address)
{
    raise_made(PyObject_CallMethod(op, "_memory_fault", "K", (unsigned long long)address));
}

/* To ask Linux who has SIGBUS costs as much as reading ten bytes, and in a loop over bytes it is not asked for each: no
 * Python code puts another handler there between two accesses that are so close. (A thread without the GIL might.) */
#define CLOSE 200  /* nanoseconds */
#define LONGEST 2000

/* Has the guard on top, on this thread, for the bytes that are touched next. */
static void keep_guard(void)
{
    static unsigned long thread;
    static int64_t before, stood;
    int64_t now = nanoseconds();
    int in_a_row = now - before < CLOSE && now - stood < LONGEST && thread == PyThread_get_thread_ident();
    before = now;
    if (in_a_row)
        return;
    stand_guard();
    thread = PyThread_get_thread_ident();
    before = stood = nanoseconds();
}

/* Whether they can be touched now. Python code may have run since they were lent, and have forked: then they are the
 * parent's. */
static int are_there(PyObject *op, const Lender *lender)
{
    if (!lender->is_alive(op)) {
        raise_unmapped();
        return 0;
    }
    keep_guard();
    return 1;
}

/* Has them lent. -1 with an exception set: they are unmapped, or some are gone, or nobody may touch them. */
static int lend(PyObject *op, Lent *lent, const Lender *lender)
{
    if (!lender->is_alive(op)) {
        raise_unmapped();
        return -1;
    }
    uintptr_t fault = lender->fault_at(op);
    if (!fault)
        return lender->lend(op, lent);
    raise_fault(op, fault);
    return -1;
}

/* What is long is moved without the GIL: the bytes stay where they are, since they are lent. */
static void move(void *to, const void *from, Py_ssize_t count)
{
    if (count) /* else either may be nowhere */
        WITHOUT_GIL_IF_LONG((size_t)count, memmove(to, from, (size_t)count));
}

COLD static void raise_no_index(PyObject *key)
{
    PyObject *name = PyType_GetName(Py_TYPE(key));
    if (name)
        PyErr_Format(PyExc_TypeError, "indices of bytes must be integers or slices, not %U", name);
    Py_XDECREF(name);
}

/* An index from 0 on; -1 with an exception set. */
static Py_ssize_t index_of(PyObject *key, Py_ssize_t length)
{
    Py_ssize_t at = PyLong_CheckExact(key) ? PyLong_AsSsize_t(key) : -1; /* the common case, in one call */
    if (at == -1) {
        PyErr_Clear();
        if (!PyIndex_Check(key)) {
            raise_no_index(key);
            return -1;
        }
        at = PyNumber_AsSsize_t(key, PyExc_IndexError);
        if (at == -1 && PyErr_Occurred())
            return -1;
    }
    if (at < 0)
        at += length;
    if (at < 0 || at >= length) {
        PyErr_Format(PyExc_IndexError, "index out of range: there are %zd bytes", length);
        return -1;
    }
    return at;
}

/* A slice as the first index, how many, and the step from one to the next; -1 with an exception set. */
static int slice_of(PyObject *key, Py_ssize_t length, Py_ssize_t *first, Py_ssize_t *count, Py_ssize_t *step)
{
    Py_ssize_t stop;
    if (PySlice_Unpack(key, first, &stop, step) < 0)
        return -1;
    *count = PySlice_AdjustIndices(length, first, &stop, *step);
    return 0;
}

static PyObject *get_slice(PyObject *op, PyObject *key, const Lent *lent, const Lender *lender)
{
    Py_ssize_t first, count, step;
    if (slice_of(key, lent->length, &first, &count, &step))
        return NULL;
    PyObject *found = PyBytes_FromStringAndSize(NULL, count);
    if (!found)
        return NULL;
    if (!are_there(op, lender)) {
        Py_DECREF(found);
        return NULL;
    }
    char *to = PyBytes_AsString(found);
    if (step == 1)
        move(to, lent->start + first, count);
    else
        for (size_t i = 0; i < (size_t)count; i++)
            to[i] = (char)lent->start[(size_t)first + i * (size_t)step];
    return found;
}

static PyObject *get_byte(PyObject *op, Py_ssize_t at, const Lent *lent, const Lender *lender)
{
    return at >= 0 && are_there(op, lender) ? PyLong_FromLong(lent->start[at]) : NULL;
}

/* What was read, once it is given back; where bytes have turned out to be gone, that instead. */
static PyObject *as_read(PyObject *op, PyObject *found, const Lender *lender)
{
    lender->give_back(op);
    uintptr_t fault = found ? lender->fault_at(op) : 0;
    if (!fault)
        return found;
    Py_DECREF(found);
    raise_fault(op, fault);
    return NULL;
}

/* op[key]: an int, or the bytes of a slice: a copy. */
static PyObject *get_bytes(PyObject *op, PyObject *key, const Lender *lender)
{
    Lent lent;
    if (lend(op, &lent, lender))
        return NULL;
    PyObject *found = PySlice_Check(key) ? get_slice(op, key, &lent, lender)
                                         : get_byte(op, index_of(key, lent.length), &lent, lender);
    return as_read(op, found, lender);
}

/* The item at an index from 0 on: what iteration asks for. */
static PyObject *get_item(PyObject *op, Py_ssize_t at, const Lender *lender)
{
    Lent lent;
    if (lend(op, &lent, lender))
        return NULL;
    if (at < 0 || at >= lent.length) {
        PyErr_SetString(PyExc_IndexError, "index out of range");
        at = -1;
    }
    return as_read(op, get_byte(op, at, &lent, lender), lender);
}

static int set_byte(PyObject *op, PyObject *key, PyObject *value, const Lent *lent, const Lender *lender)
{
    Py_ssize_t at = index_of(key, lent->length);
    if (at < 0)
        return -1;
    int overflow;
    long byte = PyLong_AsLongAndOverflow(value, &overflow);
    if (byte == -1 && PyErr_Occurred())
        return -1;
    if (byte < 0 || byte > 255 || overflow) {
        PyErr_SetString(PyExc_ValueError, "byte must be in range(0, 256)");
        return -1;
    }
    if (!are_there(op, lender))
        return -1;
    lent->start[at] = (unsigned char)byte;
    return 0;
}

/* The bytes of `data` into a slice of as many. They may be other bytes of the same memory. */
static int put_slice(PyObject *op, PyObject *key, const Py_buffer *data, const Lent *lent, const Lender *lender)
{
    Py_ssize_t first, count, step;
    if (slice_of(key, lent->length, &first, &count, &step))
        return -1;
    if (data->len != count) {
        raise_made(made_error("other_length", Py_BuildValue("(nn)", data->len, count)));
        return -1;
    }
    int in_a_row = PyBuffer_IsContiguous(data, 'C');
    if (!in_a_row && (data->ndim != 1 || data->itemsize != 1)) {
        PyErr_SetString(PyExc_TypeError, "bytes that do not lie in a row are taken one by one, larger items are not");
        return -1;
    }
    if (!are_there(op, lender))
        return -1;
    if (in_a_row && step == 1) {
        move(lent->start + first, data->buf, count);
        return 0;
    }
    unsigned char *row = PyMem_Malloc((size_t)count);
    if (!row) {
        PyErr_NoMemory();
        return -1;
    }
    int failed = PyBuffer_ToContiguous(row, data, count, 'C');
    for (size_t i = 0; !failed && i < (size_t)count; i++)
        lent->start[(size_t)first + i * (size_t)step] = row[i];
    PyMem_Free(row);
    return failed;
}

static int set_slice(PyObject *op, PyObject *key, PyObject *value, const Lent *lent, const Lender *lender)
{
    Py_buffer data;
    if (PyObject_GetBuffer(value, &data, PyBUF_FULL_RO))
        return -1;
    int failed = put_slice(op, key, &data, lent, lender);
    PyBuffer_Release(&data);
    return failed;
}

/* op[key] = value: an int from 0 to 255, or for a slice as many bytes as it has: memory does not move. */
static int set_bytes(PyObject *op, PyObject *key, PyObject *value, const Lender *lender)
{
    Lent lent;
    int failed = -1;
    if (lend(op, &lent, lender))
        return -1;
    if (!value)
        PyErr_SetString(PyExc_TypeError, "bytes of memory cannot be deleted");
    else if (!lent.writable)
        raise_made(made_error("read_only", Py_BuildValue("(O)", op)));
    else
        failed = PySlice_Check(key) ? set_slice(op, key, value, &lent, lender)
                                    : set_byte(op, key, value, &lent, lender);
    lender->give_back(op);
    uintptr_t fault = failed ? 0 : lender->fault_at(op);
    if (fault)
        raise_fault(op, fault);
    return fault ? -1 : failed;
}

/* The buffer protocol: an export lives as long as whoever has it likes. */
static int export_bytes(PyObject *op, Py_buffer *buffer, int flags, const Lender *lender)
{
    Lent lent;
    buffer->obj = NULL;
    if (lend(op, &lent, lender))
        return -1;
    stand_guard();
    if (!PyBuffer_FillInfo(buffer, op, lent.start, lent.length, !lent.writable, flags))
        return 0;
    lender->give_back(op);
    return -1;
}

/* What a type is asked for its bytes by, which lends them as KIND_lender says. */
#define LENDS_BYTES(kind) \
    static PyObject *kind##_item(PyObject *op, Py_ssize_t at) { return get_item(op, at, &kind##_lender); } \
    static PyObject *kind##_get(PyObject *op, PyObject *key) { return get_bytes(op, key, &kind##_lender); } \
    static int kind##_set(PyObject *op, PyObject *key, PyObject *to) { return set_bytes(op, key, to, &kind##_lender); } \
    static int kind##_export(PyObject *op, Py_buffer *to, int flags) { return export_bytes(op, to, flags, &kind##_lender); } \
    static void kind##_end_export(PyObject *op, Py_buffer *Py_UNUSED(buffer)) { kind##_give_back(op); }

#define LENDING_SLOTS(kind) \
    {Py_sq_item, kind##_item}, {Py_mp_subscript, kind##_get}, {Py_mp_ass_subscript, kind##_set}, \
    {Py_bf_getbuffer, kind##_export}, {Py_bf_releasebuffer, kind##_end_export}
