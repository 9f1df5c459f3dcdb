/* Mirror: a window in a land, of frames that it holds a reference to. */
#include "core.h"

static Mirror *new_mirror(PyObject *cls, PyObject *mapping, PyObject *frames, int prot)
{
    Mirror *self = as_mirror((PyObject *)new_window(as_type(cls), 0, prot, 0));
    if (self) {
        self->mapping = Py_NewRef(mapping);
        self->frames = Py_NewRef(frames);
    }
    return self;
}

/* Whether nothing beside its range is mapped (lent.c). */
static int is_lent(PyObject *cls) { return PyType_IsSubtype(as_type(cls), lent_type); }

static void count_made(Land *land, uint64_t length)
{
    land->made++;
    land->made_bytes += length;
}

static PyObject *frames_of(const Mirror *self, Py_ssize_t i)
{
    return self->mappings ? PyTuple_GetItem(self->frames, i) : self->frames;
}

static Py_ssize_t count_frames(const Mirror *self) { return self->mappings ? PyTuple_Size(self->frames) : 1; }

/* Notes its reference with each of its frames: {id: ("mirror", address)}. -1 with an exception set: with some of them
 * it may have; `let_go` undoes it. */
static int hold(Mirror *self)
{
    self->holds = 1;
    for (Py_ssize_t i = 0; i < count_frames(self); i++) {
        Frames *frames = as_frames(frames_of(self, i));
        PyObject *address = PyLong_FromUnsignedLongLong(self->window.base + self->window.lead);
        PyObject *who = address ? PyTuple_Pack(2, word_mirror, address) : NULL;
        Py_XDECREF(address);
        if (frames_hold(frames, self, who))
            return -1;
    }
    return 0;
}

/* Gives up its references, all of them; frames whose last one it was go. Again: nothing. What fails first is raised. */
static int let_go(Mirror *self)
{
    PyObject *first[3] = {NULL};
    Py_ssize_t count = self->holds ? count_frames(self) : 0;
    self->holds = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        Frames *frames = as_frames(frames_of(self, i));
        if (frames_let_go(frames, self))
            put_aside(first);
    }
    return raise_first(first);
}

/* Where bytes from `at` on were gone, the call that it was made in has to end in that; it may be the only one to know. */
static void tell_caller(Mirror *self, uintptr_t at)
{
    if (!at || !self->caller)
        return;
    PyObject *caller = Py_NewRef(self->caller); /* it may have itself replaced */
    PyObject *told = PyObject_CallMethod(caller, "_note_fault", "OK", self, (unsigned long long)at);
    if (!told)
        PyErr_Clear();
    Py_XDECREF(told);
    Py_DECREF(caller);
}

/* What the flags of MIRROR and DROP say besides its rights. */
#define WAS_KEPT 4
#define FAULTED 8

/* Tells of a mirror that has come, or goes. `user`: where in its process its first byte is; 0 where nobody knows. */
COLD static void tell_mirror(Events *events, enum kind kind, const Mirror *self, int flags, size_t live, uint64_t user)
{
    const Window *window = &self->window;
    put_event(events, (Event){.kind = (uint16_t)kind, .flags = (uint16_t)(window->prot | flags),
              .process = (uint32_t)live,
              .facts = {window->base + window->lead, (uint64_t)window->length, user, self->serial,
                        self->start + window->lead, PyThread_get_thread_ident()}});
}

/* Tells of a mirror that has just been made. */
COLD static void tell_made(const Land *land, const Mirror *self, int flags)
{
    const Mapping *mapping = as_mapping(self->mapping);
    uint64_t user = mapping->address + self->start + self->window.lead - mapping->phys_offset;
    tell_mirror(land->events, MIRROR, self, flags, land->live.count, user);
}

/* Unmaps it (or has it kept), gives back its place and its references. Again: nothing.
 * -1 with an exception set and nothing changed: a view lives, or Linux did not unmap it. */
static int end_mirror(Mirror *self)
{
    Window *window = &self->window;
    if (is_alive(window)) {
        if (window->exports) {
            still_viewed("unmap", window->exports);
            return -1;
        }
        window->state = DEAD; /* first: while the GIL is away nobody may take an export */
        Events *events = self->land ? self->land->events : NULL;
        size_t live = self->land ? self->land->live.count - 1 : 0;
        Py_XINCREF((PyObject *)events);
        if (self->edges)
            copy_edges_back(self->edges, zeros_of(window));
        int kept = keep(self);
        if (!kept) {
            disarm(window);
            int error = unmap_range(window->base, window->span);
            if (error) {
                window->state = ALIVE;
                arm(window);
                Py_XDECREF((PyObject *)events);
                os_error(error);
                return -1;
            }
        }
        if (events) {
            tell_mirror(events, DROP, self, (kept ? WAS_KEPT : 0) | (zeros_of(window) ? FAULTED : 0), live, 0);
            Py_DECREF((PyObject *)events);
        }
        unguard(window);
        tell_caller(self, window_fault_at(window));
    }
    window->state = DEAD;
    if (self->edges)
        forget_edges(self->edges);
    leave(self, 1);
    return let_go(self);
}

/* Mirror._open(land, mapping, offset, length, rights, caller): a mirror of [offset, offset + length) of a mapping,
 * by a window that was kept, or in the current hole of the land; for a `caller` (else None) only where the mapping's
 * own rights allow `rights`. None: not this way, and nothing has changed; memory/cross_process.py finds out why not, and knows
 * the others. */
static PyObject *mirror_open(PyObject *cls, PyObject *const *args, Py_ssize_t nargs)
{
    if (wants(nargs, 6, "Mirror._open"))
        return NULL;
    int exact = is_lent(cls);
    PyObject *caller = Py_IsNone(args[5]) ? NULL : args[5];
    int64_t asked = PyLong_Check(args[4]) ? PyLong_AsLongLong(args[4]) : 0;
    if (asked == -1 && PyErr_Occurred())
        PyErr_Clear();
    int rights = asked >= 1 && asked <= 3 ? (int)asked : 0;
    if (!PyObject_TypeCheck(args[0], land_type) || !PyObject_TypeCheck(args[1], mapping_type))
        return PyErr_Format(PyExc_TypeError, "a mirror is opened in a land, of a mapping");
    Land *land = as_land(args[0]);
    Mapping *mapping = as_mapping(args[1]);
    uint64_t at;
    int64_t offset = plain(args[2]), size = plain(args[3]);
    Frames *frames = plain_range(mapping, offset, size, &at);
    if (!frames || !rights || (caller && !owner_allows(mapping, rights)))
        Py_RETURN_NONE;
    uint64_t length = (uint64_t)size, serial = frames->serial;
    uint64_t start = at - at % page_size, end = at + length + page_size - 1;
    end -= end % page_size;
    if (frames->huge && !exact) { /* whole huge pages, as far as the mapping goes */
        uint64_t last = mapping->phys_offset + mapping->length;
        start -= start % huge_size;
        start = start < mapping->phys_offset ? mapping->phys_offset : start;
        end = (end + huge_size - 1) / huge_size * huge_size;
        end = end > last ? last : end;
    }
    size_t span = (size_t)(end - start);
    uint64_t lead = at - start;
    int prot = rights;
    Mirror *self = new_mirror(cls, (PyObject *)mapping, (PyObject *)frames, prot);
    if (!self)
        return NULL;
    Py_XINCREF(caller);
    self->caller = caller;
    int copies = exact && (at % page_size || (at + length) % page_size);
    if (copies && !(self->edges = PyMem_Calloc(1, sizeof *self->edges))) {
        Py_DECREF((PyObject *)self);
        return PyErr_NoMemory();
    }
    Kept *kept = land->budget && !copies ? find_kept(land, serial, start, span, prot) : NULL;
    int was_kept = kept != NULL;
    if (was_kept) {
        land->hits++;
        forget_kept(land, kept);
        enter(land, self, kept->base, kept->span, kept->in_tree, kept->maps);
        lead += start - kept->start;
        start = kept->start;
        PyMem_Free(kept);
    } else {
        uintptr_t base;
        land->misses += land->budget != 0;
        if (frames->fd < 0 || !reserve(land, span, start, &base)) {
            Py_DECREF((PyObject *)self);
            Py_RETURN_NONE;
        }
        enter(land, self, base, span, 0, copies ? 3 : 1);
    }
    self->serial = copies ? 0 : serial;
    self->start = start;
    self->window.lead = lead;
    self->window.length = (Py_ssize_t)length;
    /* Its place and its reference are taken before it is mapped: the GIL may go away meanwhile, and the frames
     * must not. */
    self->window.state = was_kept ? ALIVE : NOT_READY;
    Window *window = &self->window;
    window->guarded = guard_take(window->base, prot, 0);
    if (!window->guarded || hold(self)) {
        Py_DECREF((PyObject *)self);
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    }
    int error = was_kept || make_room(land, 0) ? 0 : ENOMEM;
    if (!error && copies)
        error = lend_piece(self->edges, window->base + lead, length, prot, frames->fd, (off_t)at);
    else if (!error && !was_kept)
        error = map_piece(window->base, span, prot, frames->fd, (off_t)start);
    if (error) {
        Py_DECREF((PyObject *)self);
        Py_RETURN_NONE;
    }
    self->window.state = ALIVE;
    arm(&self->window);
    count_made(land, length);
    if (land->events)
        tell_made(land, self, was_kept ? WAS_KEPT : 0);
    return (PyObject *)self;
}

/* Mirror._open_at(land, base, mappings, frames, pieces, start, lead, length, prot): any number of pieces at a place that
 * was reserved, with a reference to each of `frames`, a tuple. OSError: nothing stays. */
static PyObject *mirror_open_at(PyObject *cls, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t base, start, lead, length;
    int prot, exact = is_lent(cls);
    if (wants(nargs, 9, "Mirror._open_at") || as_u64(args[1], &base) || as_u64(args[5], &start) ||
        as_u64(args[6], &lead) || as_u64(args[7], &length) || as_int(args[8], &prot))
        return NULL;
    if (!PyObject_TypeCheck(args[0], land_type) || !is_tuple_of(args[2], mapping_type) ||
        !is_tuple_of(args[3], frames_type))
        return PyErr_Format(PyExc_TypeError, "a mirror is opened in a land, of tuples of mappings and frames");
    Land *land = as_land(args[0]);
    Py_ssize_t maps = PyObject_Size(args[4]);
    if (maps < 0)
        return NULL;
    Mirror *self = new_mirror(cls, PyTuple_GetItem(args[2], 0), args[3], prot);
    if (!self)
        return NULL;
    Window *window = &self->window;
    window->base = base;
    self->mappings = Py_NewRef(args[2]);
    self->start = start;
    if (exact && !(self->edges = PyMem_Calloc(1, sizeof *self->edges))) {
        Py_DECREF((PyObject *)self);
        return PyErr_NoMemory();
    }
    int failed = map_window(window, args[4], exact ? lead : 0, self->edges);
    int copies = self->edges ? self->edges->count : 0;
    if (window->state != NOT_READY)
        enter(land, self, base, window->span, 0, (uint64_t)(maps + copies));
    if (failed || set_exported(window, lead, length) || hold(self)) {
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    if (PyTuple_Size(args[2]) == 1 && PyTuple_Size(args[3]) == 1 && !copies)
        self->serial = as_frames(PyTuple_GetItem(args[3], 0))->serial;
    count_made(land, length);
    if (land->events && is_alive(window))
        tell_made(land, self, 0);
    return (PyObject *)self;
}

/* _populate(): faults in every page. OSError: one cannot be had. */
static PyObject *mirror_populate(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Window *self = as_window(op);
    if (!is_alive(self)) {
        raise_unmapped();
        return NULL;
    }
    int error = populate_range(self->base, self->span, self->prot);
    if (error)
        return os_error(error);
    Py_RETURN_NONE;
}

/* _end() -> bool: what `drop` does; whether bytes of it were gone meanwhile. False again once it is dropped.
 * BufferError: a view lives. OSError: Linux did not unmap it. */
static PyObject *mirror_end(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    int lived = is_alive(as_window(op));
    if (end_mirror(as_mirror(op)))
        return NULL;
    return PyBool_FromLong(lived && window_fault_at(as_window(op)));
}

/* Collection is a drop; no view can live then. What fails here has nobody to be told to. */
static void mirror_finalize(PyObject *op)
{
    PyObject *first[3] = {NULL};
    put_aside(first);
    if (end_mirror(as_mirror(op)))
        PyErr_Clear();
    if (as_mirror(op)->edges && as_mirror(op)->edges->error)
        tell_caller(as_mirror(op), as_mirror(op)->edges->lost);
    raise_first(first);
}

static void mirror_dealloc(PyObject *op)
{
    Mirror *self = as_mirror(op);
    PyObject *refs[] = {self->mapping, self->mappings, self->frames, self->caller};
    if (self->holds) { /* a base type's own objects are not finalized */
        self->caller = NULL; /* nobody is told: it cannot be shown to anybody any more */
        mirror_finalize(op);
    }
    if (self->weakrefs)
        PyObject_ClearWeakRefs(op);
    if (self->edges)
        forget_edges(self->edges);
    PyMem_Free(self->edges);
    leave(self, 0); /* where it could not be unmapped before: its place stays taken, or is an obstacle */
    for (size_t i = 0; i < sizeof refs / sizeof *refs; i++)
        Py_XDECREF(refs[i]);
    window_dealloc(op);
}

/* _tell(caller): whose `_note_fault` is called where bytes of it are gone when it is dropped; None: nobody's. */
static PyObject *mirror_tell(PyObject *op, PyObject *caller)
{
    PyObject *before = as_mirror(op)->caller;
    as_mirror(op)->caller = Py_IsNone(caller) ? NULL : Py_NewRef(caller);
    Py_XDECREF(before);
    Py_RETURN_NONE;
}

static PyObject *mirror_mappings(PyObject *op, void *Py_UNUSED(closure))
{
    Mirror *self = as_mirror(op);
    return self->mappings ? Py_NewRef(self->mappings) : PyTuple_Pack(1, self->mapping);
}

static PyMethodDef mirror_methods[] = {
    {"_open", FASTCALL(mirror_open), METH_FASTCALL | METH_CLASS, NULL},
    {"_open_at", FASTCALL(mirror_open_at), METH_FASTCALL | METH_CLASS, NULL},
    {"_populate", mirror_populate, METH_NOARGS, NULL},
    {"_end", mirror_end, METH_NOARGS, NULL},
    {"_tell", mirror_tell, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef mirror_members[] = {
    {"mapping", T_OBJECT_EX, offsetof(Mirror, mapping), READONLY, "The mapping that its first byte belongs to."},
    {"_start", T_ULONGLONG, offsetof(Mirror, start), READONLY, NULL},
    {"_caller", T_OBJECT, offsetof(Mirror, caller), READONLY, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Mirror, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef mirror_getset[] = {
    {"mappings", mirror_mappings, NULL, "All mappings that it shows, in order.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot mirror_slots[] = {
    {Py_tp_doc, "A window in a land, of frames that it holds a reference to."},
    {Py_tp_dealloc, mirror_dealloc},
    {Py_tp_finalize, mirror_finalize},
    {Py_tp_methods, mirror_methods},
    {Py_tp_members, mirror_members},
    {Py_tp_getset, mirror_getset},
    {0, NULL},
};

static PyType_Spec mirror_spec = {"realmap._core.Mirror", sizeof(Mirror), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                  mirror_slots};
