/* Places: what the two sides of a ring say of windows that the user has parked: one word for each.
 *
 * Whose one is says a word beside the ring, for each place. The user parks a window by a message, for the kernel has to look
 * whether others have its frames. From then on it may use it, and park it again, without one: nobody but the user has those
 * frames until the kernel looks at what this process has mapped, and whatever it is used again for, it says so there.
 *
 *      FREE ── user: Unmap ──▶ ASKED ── kernel ──▶ KEPT ◀── user: park, unpark ──▶ USED ── kernel looks ──▶ SEEN ──▶ FREE
 *                                │                  │ kernel needs the memory                (a mapping as any other)
 *                                └─────────────────▶ GONE ── user: unmapped ──▶ FREE
 *
 * What is used again may have a name, by which others find it (shared memory). The user gives it, and ends it, here; so the
 * kernel looks here for a name that it does not know.
 *
 *      USED ◀── user: name, its end ──▶ NAMED ── kernel looks ──▶ SEEN   (a mapping, and a handle with that name)
 *                                         │ user: park
 *      KEPT ◀── user: its end ─────────── LEFT ── kernel looks ──▶ GONE  (a handle alone) */
#include "core.h"

enum place { FREE, ASKED, KEPT, USED, SEEN, GONE, NAMED, LEFT };

#define LOOKS 1000 /* a word is looked at, at most, where its user changes it all the time */

static int change_place(_Atomic uint32_t *place, uint32_t from, uint32_t to)
{
    return atomic_compare_exchange_strong(place, &from, to);
}

/* The word of a place; NULL: the ring is closed, or another process's. -1 with an exception set: no number. */
static int place_of(PyObject *op, PyObject *number, _Atomic uint32_t **place)
{
    int at;
    if (as_int(number, &at))
        return -1;
    const Ring *self = as_ring(op);
    *place = self->queues && self->epoch == fork_epoch ? &self->duplex.in->places[(unsigned)at % PLACES] : NULL;
    return 0;
}

/* _say(place, keeps): whether the frames of what is parked there are kept. */
static PyObject *ring_say(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    _Atomic uint32_t *place;
    int keeps;
    if (wants(nargs, 2, "Ring._say") || place_of(op, args[0], &place) || as_int(args[1], &keeps))
        return NULL;
    if (place)
        atomic_store(place, keeps ? KEPT : GONE);
    Py_RETURN_NONE;
}

/* _reclaim(place) -> bool: nobody uses its frames, and its window is to be unmapped; False: the user uses them again. */
static PyObject *ring_reclaim(PyObject *op, PyObject *number)
{
    _Atomic uint32_t *place;
    return place_of(op, number, &place) ? NULL : PyBool_FromLong(!place || change_place(place, KEPT, GONE));
}

/* _is_gone(place) -> bool: whether a window that is to be unmapped is there still. */
static PyObject *ring_is_gone(PyObject *op, PyObject *number)
{
    _Atomic uint32_t *place;
    return place_of(op, number, &place) ? NULL : PyBool_FromLong(place && atomic_load(place) == GONE);
}

/* A name, cut where it is too long for a place, where each ends with a NUL; -1 with an exception set: it is no bytes. */
static int as_name(PyObject *bytes, char text[NAME_BYTES])
{
    Py_ssize_t size;
    char *data;
    if (PyBytes_AsStringAndSize(bytes, &data, &size))
        return -1;
    memset(text, 0, NAME_BYTES);
    memcpy(text, data, size < NAME_BYTES ? (size_t)size : NAME_BYTES);
    return 0;
}

static int has_name(const Queue *queue, int place, const char text[NAME_BYTES])
{
    return !memcmp(queue->names[place].text, text, NAME_BYTES);
}

/* Takes what is used again in a place from its user, where it has that name (NULL: in any case); what it was. */
static uint32_t see_place(Queue *in, int place, const char *name)
{
    for (int i = 0; i < LOOKS; i++) {
        uint32_t now = atomic_load(&in->places[place]);
        if (now != NAMED && now != LEFT && (name || now != USED))
            break;
        if (name && !has_name(in, place, name))
            break;
        if (change_place(&in->places[place], now, now == LEFT ? GONE : SEEN))
            return now;
    }
    return FREE;
}

/* _see([name]) -> the places whose windows are used again, as bits, and, PLACES bits above, those of which there is a name
 * (`_named`); from here on they are mappings and handles as any other. By a name: that one alone. */
static PyObject *ring_see(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    const Ring *self = as_ring(op);
    char name[NAME_BYTES];
    long seen = 0;
    if (nargs && as_name(args[0], name))
        return NULL;
    for (int i = 0; self->queues && self->epoch == fork_epoch && i < PLACES; i++) {
        uint32_t was = see_place(self->duplex.in, i, nargs ? name : NULL);
        seen |= (long)(was == USED || was == NAMED) << i | (long)(was == NAMED || was == LEFT) << (i + PLACES);
    }
    return PyLong_FromLong(seen);
}

/* _named(place) -> (name, length, whether it lasts), as its user says. */
static PyObject *ring_named(PyObject *op, PyObject *number)
{
    _Atomic uint32_t *place;
    Name name = {0};
    if (place_of(op, number, &place))
        return NULL;
    if (place)
        name = as_ring(op)->duplex.in->names[place - as_ring(op)->duplex.in->places];
    return Py_BuildValue("(NKN)", PyBytes_FromStringAndSize(name.text, (Py_ssize_t)strnlen(name.text, NAME_BYTES)),
                         (unsigned long long)name.length, PyBool_FromLong(name.lasts != 0));
}
