/* Places: what the two sides of a ring say of windows that the user has parked: one word for each.
 *
 * Whose one is says a word beside the ring, for each place. The user parks a window by a message, for the kernel has to look
 * whether others have its frames. From then on it may use it, and park it again, without one: nobody but the user has those
 * frames until the kernel looks at what this process has mapped, and whatever it is used again for, it says so there.
 *
 *      FREE ── user: Unmap ──▶ ASKED ── kernel ──▶ KEPT ◀── user: park, unpark ──▶ USED ── kernel looks ──▶ SEEN ──▶ FREE
 *                                │                  │ kernel needs the memory                (a mapping as any other)
 *                                └─────────────────▶ GONE ── user: unmapped ──▶ FREE */
#include "core.h"

enum place { FREE, ASKED, KEPT, USED, SEEN, GONE };

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

/* _see() -> the places whose windows are used again, as bits; from here on they are mappings as any other. */
static PyObject *ring_see(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    const Ring *self = as_ring(op);
    long seen = 0;
    for (int i = 0; self->queues && self->epoch == fork_epoch && i < PLACES; i++) {
        _Atomic uint32_t *place = &self->duplex.in->places[i];
        if (atomic_load_explicit(place, memory_order_acquire) == USED && change_place(place, USED, SEEN))
            seen |= 1L << i;
    }
    return PyLong_FromLong(seen);
}
