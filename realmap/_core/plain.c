/* Plain: a call of a few plain values, and an answer that is one, as messages: what most of them are. Written and read
 * here, on both sides, for of many processes each wakes with cold caches: every object and every function that a
 * call takes is fetched anew. Whatever is less plain is the encoder's and the decoder's (wire/client/requester.py). */
#include "connection.h"

/* A message that the ring takes, as far as it is written. */
typedef struct {
    size_t size;
    char bytes[RING_MESSAGE];
} Written;

/* Each of these: -1 where it does not fit, or is not so plain. No exception is set. */
static int write_bytes(Written *to, const void *data, size_t size)
{
    if (size > sizeof to->bytes - to->size)
        return -1;
    memcpy(to->bytes + to->size, data, size);
    to->size += size;
    return 0;
}

/* A byte that says what follows, and a number of so many bytes. */
static int write_head(Written *to, unsigned char head, uint64_t number, size_t width)
{
    unsigned char bytes[9] = {head};
    for (size_t i = width; i; number >>= 8)
        bytes[i--] = (unsigned char)number;
    return write_bytes(to, bytes, 1 + width);
}

static int write_unsigned(Written *to, uint64_t number)
{
    if (number < 0x80)
        return write_head(to, (unsigned char)number, 0, 0);
    int power = number > UINT8_MAX ? number > UINT16_MAX ? number > UINT32_MAX ? 3 : 2 : 1 : 0;
    return write_head(to, (unsigned char)(0xcc + power), number, (size_t)1 << power);
}

static int write_text(Written *to, PyObject *text)
{
    Py_ssize_t size;
    const char *data = PyUnicode_AsUTF8AndSize(text, &size);
    if (!data) {
        PyErr_Clear();
        return -1;
    }
    int failed = size < 32 ? write_head(to, (unsigned char)(0xa0 + size), 0, 0) : write_head(to, 0xda, (uint64_t)size, 2);
    return failed || write_bytes(to, data, (size_t)size) ? -1 : 0;
}

static int write_value(Written *to, PyObject *value)
{
    PyTypeObject *type = Py_TYPE(value);
    if (Py_IsNone(value))
        return write_head(to, 0xc0, 0, 0);
    if (type == &PyBool_Type)
        return write_head(to, Py_IsTrue(value) ? 0xc3 : 0xc2, 0, 0);
    if (type == &PyLong_Type) {
        int beyond;
        long number = PyLong_AsLongAndOverflow(value, &beyond);
        if (beyond)
            return -1;
        return number >= 0 ? write_unsigned(to, (uint64_t)number) : write_head(to, 0xd3, (uint64_t)number, 8);
    }
    if (type == &PyFloat_Type) {
        double number = PyFloat_AsDouble(value);
        uint64_t bits;
        memcpy(&bits, &number, sizeof bits);
        return write_head(to, 0xcb, bits, 8);
    }
    if (type == &PyUnicode_Type)
        return write_text(to, value);
    if (type != &PyBytes_Type)
        return -1;
    size_t size = (size_t)PyBytes_Size(value);
    return write_head(to, 0xc5, size, 2) || write_bytes(to, PyBytes_AsString(value), size) ? -1 : 0;
}

/* A Call (wire/messages.py): its tag, its number, its name, its arguments. NULL where it is not so plain, without an
 * exception; or with one. */
static PyObject *plain_call(uint64_t number, PyObject *name, PyObject *args)
{
    Written to;
    to.size = 0; /* and of the rest no byte is touched that is not written */
    Py_ssize_t count = PyTuple_Size(args);
    if (count < 0 || count > 15 || write_head(&to, 0x94, 0, 0) || write_unsigned(&to, 1) || write_unsigned(&to, number) ||
        write_text(&to, name) || write_head(&to, (unsigned char)(0x90 + count), 0, 0))
        return NULL;
    for (Py_ssize_t i = 0; i < count; i++)
        if (write_value(&to, PyTuple_GetItem(args, i)))
            return NULL;
    return PyBytes_FromStringAndSize(to.bytes, (Py_ssize_t)to.size);
}

/* A number of so many bytes, the highest of which has the sign. */
static int64_t signed_big_endian(const unsigned char *at, size_t width)
{
    int unused = (int)(64 - 8 * width);
    return (int64_t)(big_endian(at, width) << unused) >> unused;
}

/* A plain value of just so many bytes, the first one of which says what it is. NULL where it is none; whatever exception
 * is set then is the caller's. */
static PyObject *read_value(const unsigned char *at, size_t size)
{
    unsigned char head = *at++;
    size--;
    if (!size && head != 0xa0) {
        if (head < 0x80 || head >= 0xe0)
            return PyLong_FromLong((signed char)head);
        return head == 0xc0 ? Py_NewRef(Py_None) : head == 0xc2 ? Py_NewRef(Py_False) : head == 0xc3 ? Py_NewRef(Py_True) : NULL;
    }
    if (head >= 0xcc && head <= 0xcf && size == (size_t)1 << (head - 0xcc))
        return PyLong_FromUnsignedLong(big_endian(at, size));
    if (head >= 0xd0 && head <= 0xd3 && size == (size_t)1 << (head - 0xd0))
        return PyLong_FromLong(signed_big_endian(at, size));
    if (head == 0xcb && size == sizeof(double)) {
        uint64_t bits = big_endian(at, size);
        double number;
        memcpy(&number, &bits, sizeof number);
        return PyFloat_FromDouble(number);
    }
    int is_text = (head & 0xe0) == 0xa0 || head == 0xd9 || head == 0xda;
    size_t prefix = head == 0xc4 || head == 0xd9 ? 1 : head == 0xc5 || head == 0xda ? 2 : 0;
    if ((!is_text && !prefix) || size < prefix)
        return NULL;
    size_t length = prefix ? big_endian(at, prefix) : head & 0x1f;
    if (size - prefix != length)
        return NULL;
    const char *data = (const char *)at + prefix;
    return is_text ? PyUnicode_DecodeUTF8(data, (Py_ssize_t)length, NULL) : PyBytes_FromStringAndSize(data, (Py_ssize_t)length);
}

/* The value of an answer: of a Done that has a plain one, and no descriptors. NULL where it is anything else; no exception
 * is set. */
static PyObject *plain_value(const Answer *answer)
{
    if (answer->outcome != ANSWERED)
        return NULL;
    const unsigned char *data = (const unsigned char *)PyBytes_AsString(answer->data);
    size_t size = (size_t)PyBytes_Size(answer->data);
    if (size < 5 || data[0] != 0x94 || data[1] != DONE || data[size - 1])
        return NULL;
    size_t at = data[2] < 0x80 ? 3 : data[2] >= 0xcc && data[2] <= 0xcf ? 3 + ((size_t)1 << (data[2] - 0xcc)) : size;
    PyObject *value = at < size - 1 ? read_value(data + at, size - 1 - at) : NULL;
    if (!value)
        PyErr_Clear();
    return value;
}

/* ---- who answers ------------------------------------------------------------------------------ */

enum { CALL = 1 }; /* its tag: wire/messages.py */

/* So many of these bytes are a plain value, if the first one begins one; 0: more than there are. */
static size_t plain_size(const unsigned char *at, size_t left)
{
    if (!left)
        return 0;
    unsigned char head = *at;
    size_t size = 1, prefix = head == 0xc4 || head == 0xd9 ? 1 : head == 0xc5 || head == 0xda ? 2 : 0;
    if (head >= 0xcc && head <= 0xd3)
        size += (size_t)1 << (head & 3);
    else if (head == 0xcb)
        size += sizeof(double);
    else if ((head & 0xe0) == 0xa0)
        size += head & 0x1f;
    else if (prefix)
        size += left > prefix ? prefix + big_endian(at + 1, prefix) : left;
    return size <= left ? size : 0;
}

/* The plain value that the next bytes are: they are taken. NULL: they are none; whatever exception is set then is the
 * caller's. */
static PyObject *take_value(const unsigned char **at, size_t *left)
{
    size_t size = plain_size(*at, *left);
    PyObject *value = size ? read_value(*at, size) : NULL;
    *at += size;
    *left -= size;
    return value;
}

/* read_call(message) -> (number, name, arguments) of a Call of a few plain values; None: it is anything else. */
static PyObject *core_read_call(PyObject *Py_UNUSED(module), PyObject *message)
{
    char *data;
    Py_ssize_t length, count;
    if (PyBytes_AsStringAndSize(message, &data, &length))
        return NULL;
    const unsigned char *at = (const unsigned char *)data + 2;
    size_t left = (size_t)length - 2;
    if (length < 5 || length > RING_MESSAGE || at[-2] != 0x94 || at[-1] != CALL || (*at >= 0x80 && *at < 0xcc) || *at > 0xcf)
        Py_RETURN_NONE;
    PyObject *number = take_value(&at, &left), *name = take_value(&at, &left), *args = NULL, *found = NULL;
    if (number && name && PyUnicode_Check(name) && left && (*at & 0xf0) == 0x90) {
        count = *at++ & 0x0f;
        left--;
        args = PyList_New(count);
        for (Py_ssize_t i = 0; args && i < count; i++) {
            PyObject *value = take_value(&at, &left);
            if (!value || PyList_SetItem(args, i, value))
                Py_CLEAR(args);
        }
        found = args && !left ? PyTuple_Pack(3, number, name, args) : NULL;
    }
    Py_XDECREF(number);
    Py_XDECREF(name);
    Py_XDECREF(args);
    if (found)
        return found;
    PyErr_Clear();
    Py_RETURN_NONE;
}

/* write_done(number, value) -> a Done without descriptors, or None: the value is not so plain. */
static PyObject *core_write_done(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t number;
    Written to;
    if (wants(nargs, 2, "write_done") || as_u64(args[0], &number))
        return NULL;
    to.size = 0;
    if (write_head(&to, 0x94, 0, 0) || write_unsigned(&to, DONE) || write_unsigned(&to, number) ||
        write_value(&to, args[1]) || write_unsigned(&to, 0))
        Py_RETURN_NONE;
    return PyBytes_FromStringAndSize(to.bytes, (Py_ssize_t)to.size);
}
