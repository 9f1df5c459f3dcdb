/* MessagePack, looked over before anything is made of it: what a peer says costs a pass over its bytes, and no more than
 * PACKED_COST bytes of objects afterwards. No recursion, no memory, no Python.
 *
 *      array, map ──▶ left[depth]: how many items are still to come; a map has two for each entry, every other one a key
 *
 * Sound is: what MessagePack allows and a decoder accepts; keys of maps are text (a dict of chosen numbers takes
 * quadratic time); the only extension is a buffer. The costs are those of CPython on 64 bits, and rather above. */
#include "core.h"

/* Containers within one another, the message itself being the first. */
#define PACKED_DEPTH 64
/* Bytes that the objects made of a message may take (wire/messages.py). */
#define PACKED_COST ((uint64_t)4 * MESSAGE_BYTES)
#define BUFFER_EXT 1 /* wire/messages.py */
#define BUFFER_BYTES 16

/* 8 for each place in a list are counted with the list. */
enum cost { COST_NUMBER = 48, COST_BYTES = 48, COST_TEXT = 96, COST_LIST = 80, COST_DICT = 256, COST_ENTRY = 80, COST_BUFFER = 512 };

enum flaw { SOUND, BROKEN, TOO_DEEP, KEY_NO_TEXT, FOREIGN, TOO_MUCH, TOO_LONG };

/* Told of each buffer, in order. 0; else the scan ends with that. */
typedef int (*PackedBuffer)(void *to, const unsigned char *place);

static uint64_t big_endian(const unsigned char *at, size_t width)
{
    uint64_t number = 0;
    for (size_t i = 0; i < width; i++)
        number = number << 8 | at[i];
    return number;
}

/* How many times these bytes a str takes while it is made of them; 0: they are no UTF-8. What is not ASCII is begun as
 * that, and goes on, as long as there are bytes, in characters of 1, 2 or 4. */
static size_t cost_of_text(const unsigned char *at, const unsigned char *end)
{
    size_t cost = 1;
    while (at < end) {
        uint64_t eight;
        while (end - at >= 8 && (memcpy(&eight, at, 8), !(eight & 0x8080808080808080u)))
            at += 8;
        if (at == end)
            break;
        unsigned char first = *at++;
        if (first < 0x80)
            continue;
        size_t more = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : 1;
        if (first < 0xc2 || first > 0xf4 || (size_t)(end - at) < more)
            return 0;
        /* Too long for what it says, half of a pair, or beyond the last character. */
        if ((first == 0xe0 && at[0] < 0xa0) || (first == 0xed && at[0] > 0x9f) || (first == 0xf0 && at[0] < 0x90) ||
            (first == 0xf4 && at[0] > 0x8f))
            return 0;
        for (; more; more--)
            if ((*at++ & 0xc0) != 0x80)
                return 0;
        size_t wide = first >= 0xf0 ? 5 : first >= 0xc4 ? 3 : 2;
        cost = wide > cost ? wide : cost;
    }
    return cost;
}

static int packed_flaw(const unsigned char *data, size_t size, PackedBuffer found, void *to)
{
    const unsigned char *at = data, *end = data + size;
    uint64_t left[PACKED_DEPTH], cost = 0;
    char is_map[PACKED_DEPTH];
    size_t depth = 0;
    if (size > MESSAGE_BYTES)
        return TOO_LONG;
    do {
        if (at == end)
            return BROKEN;
        int is_key = depth && is_map[depth - 1] && !(left[depth - 1] & 1);
        if (depth)
            left[depth - 1]--;
        unsigned char first = *at++;
        /* What follows: so many bytes that say a length, so many bytes or items, and what they are. */
        enum { PLAIN, TEXT, BYTES, EXT, LIST, DICT } kind = PLAIN;
        size_t prefix = 0;
        uint64_t length = 0;
        if (first < 0x80 || first == 0xc0 || first == 0xc2 || first == 0xc3) {
            ; /* a small number, nil, false, true: there already */
        } else if (first < 0x90) {
            kind = DICT, length = first & 0xf;
        } else if (first < 0xa0) {
            kind = LIST, length = first & 0xf;
        } else if (first < 0xc0) {
            kind = TEXT, length = first & 0x1f;
        } else if (first == 0xc1) {
            return BROKEN;
        } else if (first < 0xc7) {
            kind = BYTES, prefix = (size_t)1 << (first - 0xc4);
        } else if (first < 0xca) {
            kind = EXT, prefix = (size_t)1 << (first - 0xc7);
        } else if (first < 0xcc) {
            length = first == 0xca ? 4 : 8;
        } else if (first < 0xd4) {
            length = (uint64_t)1 << (first & 3);
        } else if (first < 0xd9) {
            kind = EXT, length = (uint64_t)1 << (first - 0xd4);
        } else if (first < 0xdc) {
            kind = TEXT, prefix = (size_t)1 << (first - 0xd9);
        } else if (first < 0xde) {
            kind = LIST, prefix = (size_t)2 << (first - 0xdc);
        } else if (first < 0xe0) {
            kind = DICT, prefix = (size_t)2 << (first - 0xde);
        }
        if (prefix) {
            if ((size_t)(end - at) < prefix)
                return BROKEN;
            length = big_endian(at, prefix);
            at += prefix;
        }
        if (kind == EXT && at == end)
            return BROKEN;
        unsigned char code = kind == EXT ? *at++ : 0;
        if (kind < LIST && (uint64_t)(end - at) < length)
            return BROKEN;
        if (is_key && kind != TEXT)
            return KEY_NO_TEXT;
        if (kind == TEXT) {
            size_t times = cost_of_text(at, at + length);
            if (!times)
                return BROKEN;
            cost += COST_TEXT + times * length;
        } else if (kind == BYTES) {
            cost += COST_BYTES + length;
        } else if (kind == EXT) {
            if (code != BUFFER_EXT || length != BUFFER_BYTES)
                return FOREIGN;
            cost += COST_BUFFER;
            if (found && found(to, at))
                return BROKEN;
        } else if (kind == LIST) {
            cost += COST_LIST + 8 * length;
        } else if (kind == DICT) {
            cost += COST_DICT + COST_ENTRY * length;
        } else if (first >= 0xc4) {
            cost += COST_NUMBER;
        }
        if (cost > PACKED_COST)
            return TOO_MUCH;
        if (kind < LIST) {
            at += length;
        } else {
            if (depth == PACKED_DEPTH)
                return TOO_DEEP;
            is_map[depth] = kind == DICT;
            left[depth++] = kind == DICT ? 2 * length : length;
        }
        while (depth && !left[depth - 1])
            depth--;
    } while (depth);
    return at == end ? SOUND : BROKEN;
}

#ifndef REALMAP_NO_PYTHON

/* flaw_of(message) -> SOUND, or what is wrong with it. */
static PyObject *core_flaw_of(PyObject *Py_UNUSED(module), PyObject *message)
{
    char *data;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(message, &data, &size))
        return NULL;
    return PyLong_FromLong(packed_flaw((unsigned char *)data, (size_t)size, NULL, NULL));
}

static int note_buffer(void *to, const unsigned char *place)
{
    PyObject **list = to;
    uint64_t address, length;
    memcpy(&address, place, sizeof address);
    memcpy(&length, place + sizeof address, sizeof length);
    if (*list || (*list = PyList_New(0)))
        append_new(list, Py_BuildValue("(KK)", (unsigned long long)address, (unsigned long long)length));
    return !*list;
}

/* look_over(message) -> [(address, length), …] of the buffers in it, None where there are none; or what is wrong. */
static PyObject *core_look_over(PyObject *Py_UNUSED(module), PyObject *message)
{
    char *data;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(message, &data, &size))
        return NULL;
    PyObject *buffers = NULL;
    int flaw = packed_flaw((unsigned char *)data, (size_t)size, note_buffer, &buffers);
    if (!flaw && buffers)
        return buffers;
    Py_XDECREF(buffers);
    if (PyErr_Occurred())
        return NULL;
    return flaw ? PyLong_FromLong(flaw) : Py_NewRef(Py_None);
}

#endif
