/* Stock: small windows that were unmapped, parked where they are, without rights, for their next use.
 *
 * What is in a place is mapped without rights, and is nobody's but the endpoint's. Whoever takes it out unmaps it, or makes
 * a window of it, in the same call. All of it goes with the connection, and before a fork. */
#include "connection.h"

#define NOWHERE 1 /* a base: there is no window, nor can there be one */

/* The words; NULL: there is no ring, and nothing is ever parked. */
static _Atomic uint32_t *places_of(Endpoint *self)
{
    return self->ring && self->epoch == fork_epoch && !self->end ? self->ring->duplex.out->places : NULL;
}

static void empty_place(Parked *parked)
{
    if (parked->base <= NOWHERE)
        return;
    if (!parked->used && munmap((void *)parked->base, parked->span))
        munmap((void *)parked->base, parked->span); /* Linux may have had no memory that moment */
    Py_CLEAR(parked->told);
    Py_CLEAR(parked->farewell);
    parked->base = 0;
}

static void unmap_stock(Endpoint *self)
{
    for (int i = 0; i < PLACES; i++)
        empty_place(&self->stock[i]);
}

/* Unmaps what is not kept, and gives places free. */
static void sweep_stock(Endpoint *self)
{
    _Atomic uint32_t *places = places_of(self);
    for (int i = 0; places && i < PLACES; i++) {
        uint32_t now = self->stock[i].base ? atomic_load_explicit(&places[i], memory_order_acquire) : FREE;
        if (now == GONE || now == SEEN) {
            empty_place(&self->stock[i]);
            self->stock[i].base = 0;
            atomic_store_explicit(&places[i], FREE, memory_order_release);
        }
    }
}

/* messages.Unmap: [5, number, address, length, place]. */
static PyObject *unmap_message(uint64_t number, const Window *window, int place)
{
    unsigned char data[30] = {0x95, 5};
    uint64_t numbers[] = {number, window->base, window->span};
    for (int i = 0; i < 3; i++) {
        data[2 + 9 * i] = 0xcf;
        for (int j = 0; j < 8; j++)
            data[3 + 9 * i + j] = (unsigned char)(numbers[i] >> (56 - 8 * j));
    }
    data[29] = (unsigned char)place;
    return PyBytes_FromStringAndSize((const char *)data, sizeof data);
}

/* The window has no rights any more: it is in that place from now on. */
static void move_in(Endpoint *self, Window *window, int place, uint64_t kind)
{
    self->stock[place] = (Parked){window->base,  window->span, kind,         window->serial,   ++self->parked, 0,
                                  window->forks, window->told, window->farewell, window->prot};
    window->told = window->farewell = NULL;
}

static int free_place(const Endpoint *self)
{
    int place = 0;
    while (place < PLACES && self->stock[place].base)
        place++;
    return place;
}

/* The place of what was parked first, of a kind or (but for this kind) of any other, and is kept: it is used from here on.
 * PLACES: there is none. */
static int claim_place(Endpoint *self, uint64_t kind, size_t span, int same)
{
    _Atomic uint32_t *places = places_of(self);
    int found = PLACES;
    for (int i = 0; places && i < PLACES; i++) {
        const Parked *at = &self->stock[i];
        if (at->base > NOWHERE && !at->used && (at->kind == kind && at->span == span) == same &&
            (found == PLACES || at->since < self->stock[found].since) && atomic_load(&places[i]) == KEPT)
            found = i;
    }
    return found < PLACES && change_place(&places[found], KEPT, USED) ? found : PLACES; /* the kernel may be quicker */
}

/* Unmaps what was parked first of another kind, and tells the kernel: then there is room for this one. */
static void make_place(Endpoint *self, uint64_t kind, size_t span)
{
    int place = claim_place(self, kind, span, 0);
    PyObject *farewell = place < PLACES ? Py_XNewRef(self->stock[place].farewell) : NULL;
    if (!farewell)
        return;
    munmap((void *)self->stock[place].base, self->stock[place].span);
    self->stock[place].used = ++self->parked; /* by nobody: so the place is free once the kernel has seen that */
    endpoint_notice((PyObject *)self, farewell);
    Py_DECREF(farewell);
}

/* Parks a window without rights in a free place, and asks the kernel whether it keeps it; None instead of a number: nobody
 * waits for that, and it is True. NULL with an exception set: a signal handler's, or there is no memory, and nothing is
 * parked. */
static PyObject *ask_for_place(Endpoint *self, Window *window, PyObject *number, uint64_t kind)
{
    uint64_t id = 0;
    int place = free_place(self), waits = number != Py_None;
    PyObject *message = waits && as_u64(number, &id) ? NULL : unmap_message(id, window, place);
    if (!message)
        return NULL;
    PyObject *farewell = Py_NewRef(window->farewell);
    move_in(self, window, place, kind);
    uint64_t since = self->stock[place].since;
    atomic_store_explicit(&places_of(self)[place], ASKED, memory_order_release);
    PyObject *answer = waits ? tell_of_end(self, number, message, farewell) : Py_NewRef(Py_True);
    if (!waits)
        endpoint_notice((PyObject *)self, message);
    else if (answer && as_answer(answer)->outcome == FAILED && self->stock[place].since == since)
        empty_place(&self->stock[place]); /* the kernel knows of no place */
    sweep_stock(self);
    Py_DECREF(message);
    Py_DECREF(farewell);
    return answer;
}

/* The place of which a window is used again; PLACES: of none. */
static int place_of_window(const Endpoint *self, const Window *window)
{
    int own = 0;
    while (own < PLACES && (!window->used || self->stock[own].used != window->used || !self->stock[own].base))
        own++;
    return own;
}

/* park(window, number, kind) -> False: it cannot be, and is as it was; True: it is, and there is nothing to ask; or the
 * Answer of the kernel to this number, who has been told; None instead: nobody waits for that, and but for what is ATTACHED
 * the kernel is not asked at all. A child may have what was there at a fork; what cannot be written cannot be zeroed; and
 * zero pages are no shared memory. BufferError: a view lives. */
static PyObject *endpoint_park(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    Endpoint *self = as_endpoint(op);
    uint64_t kind;
    if (wants(nargs, 3, "Endpoint.park") || as_u64(args[2], &kind))
        return NULL;
    if (!PyObject_TypeCheck(args[0], window_type) || PyObject_TypeCheck(args[0], mirror_type))
        return PyErr_Format(PyExc_TypeError, "what is parked is a Window");
    Window *window = as_window(args[0]);
    if (!is_alive(window))
        Py_RETURN_TRUE;
    if (window->exports)
        return still_viewed("unmap", window->exports);
    _Atomic uint32_t *places = places_of(self);
    sweep_stock(self);
    int own = place_of_window(self, window), asks = args[1] != Py_None || kind & ATTACHED;
    /* Not while anything is on its way: it may name these bytes, and the kernel is to hear of that first. */
    int silent = own < PLACES && !self->table.count;
    int crowded = !silent && asks && free_place(self) == PLACES;
    if (crowded)
        make_place(self, kind, window->span);
    if (!places || crowded || !(silent || asks) || window->forks != atomic_load(&forks) || !window->farewell ||
        !(window->prot & PROT_WRITE || kind & ATTACHED))
        Py_RETURN_FALSE;
    window->state = DEAD; /* for good: what is made of it is another window */
    disarm(window);
    if (zeros_of(window) || (kind & BARE && madvise((void *)window->base, window->span, MADV_REMOVE)) ||
        mprotect((void *)window->base, window->span, PROT_NONE)) {
        window->state = ALIVE;
        arm(window);
        Py_RETURN_FALSE;
    }
    unguard(window);
    if (silent) {
        Parked before = self->stock[own];
        move_in(self, window, own, kind); /* first: the kernel may have it given up at once */
        if (change_place(&places[own], USED, KEPT) || change_place(&places[own], NAMED, LEFT))
            Py_RETURN_TRUE;
        window->told = self->stock[own].told; /* it has looked this very moment: the place is free */
        window->farewell = self->stock[own].farewell;
        self->stock[own] = before;
        sweep_stock(self);
    }
    if (!asks || free_place(self) == PLACES) { /* the kernel has looked this moment */
        munmap((void *)window->base, window->span);
        window_tell(window);
        Py_RETURN_TRUE;
    }
    PyObject *answer = ask_for_place(self, window, args[1], kind);
    if (!answer && window->farewell) { /* no memory to ask: it goes */
        munmap((void *)window->base, window->span);
        window_tell(window);
    }
    return answer;
}

/* unpark(type, kind, span) -> a Window of that type over what was parked first of that kind, all zeros unless it is ATTACHED,
 * with the farewell that it had; None: nothing is. */
static PyObject *endpoint_unpark(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    Endpoint *self = as_endpoint(op);
    uint64_t kind, span;
    if (wants(nargs, 3, "Endpoint.unpark") || as_u64(args[1], &kind) || as_u64(args[2], &span))
        return NULL;
    if (!PyType_Check(args[0]) || !PyType_IsSubtype(as_type(args[0]), window_type))
        return PyErr_Format(PyExc_TypeError, "what is unparked is a Window");
    if (!is_no_mirror(args[0]))
        return NULL;
    sweep_stock(self);
    if (kind & ATTACHED && post_wait(&self->post, POLLIN, 0)) /* there may be no kernel any more */
        Py_RETURN_NONE;
    Window *window = new_window(as_type(args[0]), 0, 0, 1); /* first: that may collect garbage, which may run anything */
    int place = window ? claim_place(self, kind, span, 1) : PLACES;
    if (place == PLACES) {
        Py_XDECREF((PyObject *)window);
        return none_unless(!window);
    }
    Parked *parked = &self->stock[place];
    int same = parked->forks == window->forks;
    parked->used = window->used = ++self->parked;
    window->base = parked->base;
    window->span = parked->span;
    window->prot = parked->prot;
    window->serial = parked->serial;
    window->length = (Py_ssize_t)parked->span;
    window->told = parked->told; /* from here on the window's end is told, whatever it comes to */
    window->farewell = parked->farewell;
    parked->told = parked->farewell = NULL;
    window->state = ALIVE;
    stand_guard();
    window->guarded = guard_take(window->base, window->prot, 1);
    int whole = window->guarded && same && !mprotect((void *)window->base, window->span, window->prot);
    if (whole) {
        arm(window);
        if (!(kind & (BARE | ATTACHED)))
            memset((void *)window->base, 0, window->span);
        whole = !zeros_of(window); /* else its segment was truncated */
    }
    if (whole)
        return (PyObject *)window;
    Py_DECREF((PyObject *)window);
    Py_RETURN_NONE;
}

/* name(window, text, length, lasts) -> bool: what was parked, and is used again, has a name from here on, for whoever asks
 * the kernel, which is not told. False: it has looked this moment, or has something to say, or has ended; or the name is too long. */
static PyObject *endpoint_name(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    Endpoint *self = as_endpoint(op);
    Name name;
    int lasts;
    if (wants(nargs, 4, "Endpoint.name") || as_name(args[1], name.text) || as_u64(args[2], &name.length) ||
        as_int(args[3], &lasts))
        return NULL;
    if (!PyObject_TypeCheck(args[0], window_type))
        return PyErr_Format(PyExc_TypeError, "what has a name is a Window");
    name.lasts = (uint64_t)lasts;
    _Atomic uint32_t *places = places_of(self);
    int own = place_of_window(self, as_window(args[0]));
    if (!places || own == PLACES || name.text[NAME_BYTES - 1] || post_wait(&self->post, POLLIN, 0) ||
        atomic_load(&places[own]) != USED)
        Py_RETURN_FALSE;
    self->ring->duplex.out->names[own] = name;
    return PyBool_FromLong(change_place(&places[own], USED, NAMED));
}

/* end_name(text) -> bool: nobody finds it by that name any more; False: that is to be asked of the kernel. */
static PyObject *endpoint_end_name(PyObject *op, PyObject *text)
{
    Endpoint *self = as_endpoint(op);
    char name[NAME_BYTES];
    if (as_name(text, name))
        return NULL;
    _Atomic uint32_t *places = places_of(self);
    for (int i = 0; places && i < PLACES; i++)
        if (has_name(self->ring->duplex.out, i, name) &&
            (change_place(&places[i], NAMED, USED) || change_place(&places[i], LEFT, KEPT)))
            Py_RETURN_TRUE;
    sweep_stock(self); /* what others have found was seen: a parked window of it is of no use any more */
    Py_RETURN_FALSE;
}

/* empty_stock(message): unmaps all that is parked, and says so, as `notice`: before a fork. A place of which the kernel has
 * not said yet is not used again until it says, after that, that the window is gone. What has a name keeps it. */
static PyObject *endpoint_empty_stock(PyObject *op, PyObject *message)
{
    Endpoint *self = as_endpoint(op);
    _Atomic uint32_t *places = places_of(self);
    sweep_stock(self);
    for (int i = 0; places && i < PLACES; i++)
        if (self->stock[i].base > NOWHERE && !self->stock[i].used) {
            if (atomic_load(&places[i]) == LEFT) {
                munmap((void *)self->stock[i].base, self->stock[i].span);
                self->stock[i].used = ++self->parked; /* by nobody; its place is free once the kernel has seen that */
                continue;
            }
            empty_place(&self->stock[i]);
            if (atomic_exchange(&places[i], FREE) == ASKED)
                self->stock[i].base = NOWHERE;
        }
    return endpoint_send_notice(op, message);
}

static PyObject *endpoint_has_stock(PyObject *op, void *Py_UNUSED(closure))
{
    int found = 0;
    for (int i = 0; i < PLACES; i++)
        found |= as_endpoint(op)->stock[i].base > NOWHERE && !as_endpoint(op)->stock[i].used;
    return PyBool_FromLong(found);
}
