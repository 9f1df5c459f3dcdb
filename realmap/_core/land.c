/* Land: what is mapped where in a range of addresses. */
#include "core.h"

/* Where lands lie: Linux never hands these addresses out by itself (memory/lands.py). */
#define LANDS_START ((uint64_t)0x2000 << 32)
#define LANDS_END ((uint64_t)0x4000 << 32)

/* What is mapped in a land: the mirrors that live, and the windows kept for their next use. Under
 * the GIL each of these functions happens as a whole, so no lock is needed, in a destructor either.
 *
 *      Land.live   ── by base ─────────────▶ Mirror ⇄ its Python object
 *      Land.exact  ── frames, range, rights ▶ Kept     no object: nobody uses it
 *      Land.of     ── frames ──────────────▶ Kept
 *      oldest … newest ────────────────────▶ Kept     in the order they were kept in
 *
 * Space is taken by moving the cursor through the current hole. The ordered tree of what is where
 * is Python's (memory/bookkeeping.py): it learns of what came and went (_news) when the hole is used
 * up, which is when it is needed. It may be thrown away at any moment: all that is in it is here, too. */

/* Land._prepare(start, end, budget, most): nothing is there, and nothing kept; at most so many maps will be. Also in a
 * forked child, which has lost whatever was there. */
static PyObject *land_prepare(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    Land *land = as_land(op);
    uint64_t start, end, budget, most;
    if (wants(nargs, 4, "Land._prepare") || as_u64(args[0], &start) || as_u64(args[1], &end) ||
        as_u64(args[2], &budget) || as_u64(args[3], &most))
        return NULL;
    if (start % page_size || end % page_size || start < LANDS_START || end <= start || end > LANDS_END)
        return PyErr_Format(PyExc_ValueError, "a land is whole pages of where lands lie");
    PyObject *gone = PyList_New(0);
    if (!gone)
        return NULL;
    pull_anchors(land);
    Py_XDECREF((PyObject *)land->events);
    land->events = NULL;
    clear_kept(land); /* first: the GIL may go away meanwhile, and what comes then is lost below, too */
    for (size_t i = 0; i <= land->live.mask; i++)
        for (Node *at = land->live.buckets[i]; at; at = at->next) {
            OWNER(Mirror, node, at)->land = NULL;
            Py_DECREF(op); /* the caller has one more */
        }
    table_reset(&land->live);
    table_reset(&land->exact);
    table_reset(&land->of);
    land->oldest = land->newest = NULL;
    land->cursor = land->start = start;
    land->hole_end = land->end = end;
    land->anchored = 0;
    land->budget = budget;
    land->most = most;
    land->maps = land->kept_bytes = land->hits = land->misses = land->evictions = land->made = land->made_bytes = 0;
    land->epoch = fork_epoch;
    PyObject *before = land->gone;
    land->gone = gone;
    Py_XDECREF(before);
    land->edition++;
    Py_RETURN_NONE;
}

/* _lose(): in a forked child what its parent has mapped there goes, whatever it is. */
static PyObject *land_lose(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Land *land = as_land(op);
    if (land->epoch == fork_epoch)
        return PyErr_Format(PyExc_ValueError, "a land is lost in a forked child only");
    int error = unmap_range(land->start, land->end - land->start);
    if (error)
        return os_error(error);
    Py_RETURN_NONE;
}

static PyObject *land_new(PyTypeObject *type, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(keywords))
{
    Land *self = as_land(new_object(type));
    if (self) {
        table_reset(&self->live);
        table_reset(&self->exact);
        table_reset(&self->of);
        self->epoch = fork_epoch;
        self->other = all_lands;
        all_lands = self;
    }
    return (PyObject *)self;
}

static void land_dealloc(PyObject *op)
{
    Land *land = as_land(op);
    for (Land **at = &all_lands; *at; at = &(*at)->other)
        if (*at == land) {
            *at = land->other;
            break;
        }
    clear_kept(land);
    pull_anchors(land);
    table_reset(&land->live);
    table_reset(&land->exact);
    table_reset(&land->of);
    Py_XDECREF(land->gone);
    Py_XDECREF((PyObject *)land->events);
    free_object(op);
}

/* What is copied out of the tables before any object is made of it: making one may collect garbage, and a mirror in it. */
typedef struct {
    uint64_t fields[5];
} Row;

/* Rows as a list of tuples, as `format` says of the first of their numbers; frees the rows. */
static PyObject *listed(Row *rows, size_t count, const char *format)
{
    PyObject *found = PyList_New(0);
    for (size_t i = 0; found && i < count; i++) {
        const uint64_t *row = rows[i].fields;
        append_new(&found, Py_BuildValue(format, row[0], row[1], row[2], row[3], row[4]));
    }
    PyMem_Free(rows);
    return found;
}

/* _news(edition) -> (edition, [start] or None, [(start, end)]): what is free again and what was taken since that edition of
 * the news. Where it was not the last one, so that a tree made by it cannot be mended: None, and all that is taken. */
static PyObject *land_news(PyObject *op, PyObject *number)
{
    Land *land = as_land(op);
    uint64_t edition;
    PyObject *empty = as_u64(number, &edition) ? NULL : PyList_New(0);
    if (!empty)
        return NULL;
    int all = edition != land->edition || !land->gone;
    size_t count = 0;
    Row *rows = PyMem_Calloc(land->live.count + land->exact.count + 1, sizeof *rows);
    if (!rows) {
        Py_DECREF(empty);
        return PyErr_NoMemory();
    }
    for (size_t i = 0; i <= land->live.mask; i++)
        for (Node *at = land->live.buckets[i]; at; at = at->next) {
            Mirror *mirror = OWNER(Mirror, node, at);
            if (all || !mirror->in_tree) {
                mirror->in_tree = 1;
                rows[count++] = (Row){{mirror->window.base, mirror->window.base + mirror->window.span}};
            }
        }
    for (Kept *kept = land->oldest; kept; kept = kept->newer)
        if (all || !kept->in_tree) {
            kept->in_tree = 1;
            rows[count++] = (Row){{kept->base, kept->base + kept->span}};
        }
    /* Both at the same moment, before any object is made: what goes from here on is news for the next time. */
    PyObject *gone = land->gone;
    land->gone = empty;
    edition = ++land->edition;
    if (all) {
        Py_XDECREF(gone);
        gone = Py_NewRef(Py_None);
    }
    PyObject *taken = listed(rows, count, "(KK)"), *last = PyLong_FromUnsignedLongLong(edition);
    PyObject *news = taken && last ? PyTuple_Pack(3, last, gone, taken) : NULL;
    Py_XDECREF(taken);
    Py_XDECREF(last);
    Py_DECREF(gone);
    return news;
}

/* _move(seen, cursor, end) -> bool: the hole is [cursor, end) from now on; False, and nothing has changed, where the cursor
 * is not where it was `seen`: somebody has taken space meanwhile. */
static PyObject *land_move(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    Land *land = as_land(op);
    uint64_t seen, cursor, end;
    if (wants(nargs, 3, "Land._move") || as_u64(args[0], &seen) || as_u64(args[1], &cursor) || as_u64(args[2], &end))
        return NULL;
    if (cursor % page_size || cursor < land->start || cursor > land->end + page_size)
        return PyErr_Format(PyExc_ValueError, "a search goes on in whole pages of the land");
    if (land->cursor != seen)
        Py_RETURN_FALSE;
    if (end > land->end)
        end = land->end;
    land->cursor = cursor;
    land->hole_end = end;
    Py_RETURN_TRUE;
}

static PyObject *land_reserve(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t span, residue;
    uintptr_t base;
    if (wants(nargs, 2, "Land._reserve") || as_u64(args[0], &span) || as_u64(args[1], &residue) ||
        check_range(0, span))
        return NULL;
    if (!reserve(as_land(op), span, residue, &base))
        Py_RETURN_NONE;
    return PyLong_FromUnsignedLongLong(base);
}

/* _mirrors() -> [Mirror]: those that live. One that is being collected this moment is none any more. */
static PyObject *land_mirrors(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Land *land = as_land(op);
    PyObject *found = PyList_New(0);
    for (size_t i = 0; found && i <= land->live.mask; i++)
        for (Node *at = land->live.buckets[i]; at; at = at->next) {
            Mirror *mirror = OWNER(Mirror, node, at);
            if (Py_REFCNT((PyObject *)mirror) && is_alive(&mirror->window) &&
                PyList_Append(found, (PyObject *)mirror)) {
                Py_DECREF(found); /* with which a mirror may go, and the chain change */
                return NULL;
            }
        }
    return found;
}

/* _anchors() -> [address]: single pages without rights, where anchors stand. */
static PyObject *land_anchors(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Land *land = as_land(op);
    PyObject *found = PyList_New(0);
    for (size_t i = 0; found && i < land->anchor_count; i++)
        append_new(&found, PyLong_FromUnsignedLongLong(land->anchors[i]));
    return found;
}

/* _mirror_at(base) -> the mirror whose pages start there, or None. */
static PyObject *land_mirror_at(PyObject *op, PyObject *address)
{
    uint64_t base;
    if (as_u64(address, &base))
        return NULL;
    Node *node = table_find(&as_land(op)->live, base);
    Mirror *mirror = node ? OWNER(Mirror, node, node) : NULL;
    if (!mirror || !Py_REFCNT((PyObject *)mirror) || !is_alive(&mirror->window))
        Py_RETURN_NONE;
    return Py_NewRef((PyObject *)mirror);
}

/* _kept() -> [(base, span, serial of the frames, start in them, prot)], the one kept longest first. */
static PyObject *land_kept(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Land *land = as_land(op);
    size_t count = 0;
    Row *rows = PyMem_Calloc(land->exact.count + 1, sizeof *rows);
    if (!rows)
        return PyErr_NoMemory();
    for (Kept *kept = land->oldest; kept; kept = kept->newer)
        rows[count++] = (Row){{kept->base, kept->span, kept->serial, kept->start, (uint64_t)kept->prot}};
    return listed(rows, count, "(KKKKK)");
}

/* _make_room(maps) -> bool: whether so many maps more may be taken; kept windows go for them, as far as need be. */
static PyObject *land_make_room(PyObject *op, PyObject *maps)
{
    uint64_t wanted;
    if (as_u64(maps, &wanted))
        return NULL;
    return PyBool_FromLong(make_room((Land *)op, wanted));
}

/* _clear_kept() -> bool: unmaps all of them; whether there were any. */
static PyObject *land_clear_kept(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return PyBool_FromLong(clear_kept(as_land(op)));
}

/* _listen(events): has them told of every mirror from now on; None: nobody any more. */
static PyObject *land_listen(PyObject *op, PyObject *events)
{
    Land *land = as_land(op);
    if (!Py_IsNone(events) && !PyObject_TypeCheck(events, events_type))
        return PyErr_Format(PyExc_TypeError, "a land tells Events");
    PyObject *before = (PyObject *)land->events;
    land->events = Py_IsNone(events) ? NULL : as_events(events);
    Py_XINCREF((PyObject *)land->events);
    Py_XDECREF(before);
    Py_RETURN_NONE;
}

static PyMethodDef land_methods[] = {
    {"_prepare", FASTCALL(land_prepare), METH_FASTCALL, NULL},
    {"_lose", land_lose, METH_NOARGS, NULL},
    {"_reserve", FASTCALL(land_reserve), METH_FASTCALL, NULL},
    {"_news", land_news, METH_O, NULL},
    {"_move", FASTCALL(land_move), METH_FASTCALL, NULL},
    {"_mirrors", land_mirrors, METH_NOARGS, NULL},
    {"_anchors", land_anchors, METH_NOARGS, NULL},
    {"_mirror_at", land_mirror_at, METH_O, NULL},
    {"_kept", land_kept, METH_NOARGS, NULL},
    {"_make_room", land_make_room, METH_O, NULL},
    {"_clear_kept", land_clear_kept, METH_NOARGS, NULL},
    {"_listen", land_listen, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef land_members[] = {
    {"live", T_ULONGLONG, offsetof(Land, live.count), READONLY, "How many mirrors live."},
    {"_cursor", T_ULONGLONG, offsetof(Land, cursor), READONLY, NULL},
    {"_edition", T_ULONGLONG, offsetof(Land, edition), READONLY, NULL},
    {"_budget", T_ULONGLONG, offsetof(Land, budget), READONLY, NULL},
    {"_kept_bytes", T_ULONGLONG, offsetof(Land, kept_bytes), READONLY, NULL},
    {"_maps", T_ULONGLONG, offsetof(Land, maps), READONLY, NULL},
    {"_most", T_ULONGLONG, offsetof(Land, most), READONLY, NULL},
    {"_hits", T_ULONGLONG, offsetof(Land, hits), READONLY, NULL},
    {"_misses", T_ULONGLONG, offsetof(Land, misses), READONLY, NULL},
    {"_evictions", T_ULONGLONG, offsetof(Land, evictions), READONLY, NULL},
    {"_made", T_ULONGLONG, offsetof(Land, made), READONLY, NULL},
    {"_made_bytes", T_ULONGLONG, offsetof(Land, made_bytes), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot land_slots[] = {
    {Py_tp_doc, "What is mapped where in a range of addresses."},
    {Py_tp_new, land_new},
    {Py_tp_dealloc, land_dealloc},
    {Py_tp_methods, land_methods},
    {Py_tp_members, land_members},
    {0, NULL},
};

static PyType_Spec land_spec = {"realmap._core.Land", sizeof(Land), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, land_slots};
