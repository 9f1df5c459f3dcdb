/* The windows of dropped mirrors, kept in a land for their next use. */
#include "core.h"

static uint64_t exact_key(uint64_t serial, uint64_t start, size_t span, int prot)
{
    return serial * 0x9e3779b97f4a7c15u + (start / page_size) * 0xc2b2ae3d27d4eb4fu + span + (uint64_t)prot;
}

static Kept *find_exact(Land *land, uint64_t serial, uint64_t start, size_t span, int prot)
{
    uint64_t key = exact_key(serial, start, span, prot);
    for (Node *at = table_find(&land->exact, key); at; at = same_key(at->next, key)) {
        Kept *kept = OWNER(Kept, exact, at);
        if (kept->serial == serial && kept->start == start && kept->span == span && kept->prot == prot)
            return kept;
    }
    return NULL;
}

static void forget_kept(Land *land, Kept *kept)
{
    table_remove(&land->exact, &kept->exact);
    table_remove(&land->of, &kept->of);
    *(kept->older ? &kept->older->newer : &land->oldest) = kept->newer;
    *(kept->newer ? &kept->newer->older : &land->newest) = kept->older;
    land->kept_bytes -= kept->span;
    land->maps -= kept->maps;
}

static void evict(Land *land, Kept *kept)
{
    forget_kept(land, kept);
    land->evictions++;
    if (land->events)
        put_event(land->events, (Event){.kind = EVICT, .flags = (uint16_t)kept->prot,
                  .facts = {kept->base, kept->span, 0, kept->serial, kept->start, PyThread_get_thread_ident()}});
    /* It cannot fail: it takes whole mappings away, never a part of one. */
    if (land->epoch == fork_epoch)
        unmap_range(kept->base, kept->span);
    give_place_back(land, kept->base, kept->in_tree);
    PyMem_Free(kept);
}

/* Leaves the window of a mirror that is being dropped to its land. 0: it must be unmapped. */
static int keep(Mirror *self)
{
    Land *land = self->land;
    Window *window = &self->window;
    if (!land || !self->serial || window->span > land->budget || zeros_of(window))
        return 0;
    if (!as_mapping(self->mapping)->held)
        return 0; /* nothing survives the unmapping by its process */
    if (find_exact(land, self->serial, self->start, window->span, window->prot))
        return 0; /* two mirrors of one range: one window is enough */
    Kept *kept = PyMem_Calloc(1, sizeof *kept);
    if (!kept)
        return 0;
    kept->exact.key = exact_key(self->serial, self->start, window->span, window->prot);
    kept->of.key = kept->serial = self->serial;
    kept->base = window->base;
    kept->span = window->span;
    kept->start = self->start;
    kept->prot = window->prot;
    kept->in_tree = self->in_tree;
    kept->maps = self->maps;
    kept->older = land->newest;
    *(land->newest ? &land->newest->newer : &land->oldest) = kept;
    land->newest = kept;
    table_add(&land->exact, &kept->exact);
    table_add(&land->of, &kept->of);
    land->kept_bytes += kept->span;
    land->maps += kept->maps;
    unguard(window); /* nobody touches it before it is a mirror's again */
    Py_INCREF((PyObject *)land); /* the GIL may go away in between */
    leave(self, 0);
    while (land->kept_bytes > land->budget && land->oldest)
        evict(land, land->oldest);
    Py_DECREF((PyObject *)land);
    return 1;
}

/* Whether so many maps more may be taken, now that windows kept for longest have gone where they had to. */
static int make_room(Land *land, uint64_t maps)
{
    while (land->oldest && land->maps + maps > land->most) /* the GIL may go away in between */
        evict(land, land->oldest);
    return land->maps + maps <= land->most;
}

/* A larger window is looked for among so many of the same frames, the ones kept last. */
#define STEPS 32

/* A kept window that shows [start, start + span) of these frames with these rights: that one, or a larger one. */
static Kept *find_kept(Land *land, uint64_t serial, uint64_t start, size_t span, int prot)
{
    Kept *found = find_exact(land, serial, start, span, prot);
    if (found)
        return found;
    int steps = STEPS;
    for (Node *at = table_find(&land->of, serial); at && steps--; at = same_key(at->next, serial)) {
        Kept *kept = OWNER(Kept, of, at);
        if (kept->prot == prot && kept->start <= start && start + span <= kept->start + kept->span)
            return kept;
    }
    return NULL;
}

static int clear_kept(Land *land)
{
    int had = land->oldest != NULL;
    while (land->oldest) /* looked up anew: the GIL may go away in between */
        evict(land, land->oldest);
    return had;
}

/* The first land from `at` on that is not being collected, held: the GIL may go away while it is at work. */
static Land *living(Land *at)
{
    while (at && !Py_REFCNT((PyObject *)at))
        at = at->other;
    Py_XINCREF((PyObject *)at);
    return at;
}

/* Unmaps every kept window of these frames, in every land. */
static void unkeep(uint64_t serial)
{
    for (Land *land = living(all_lands), *next; land; land = next) {
        Node *at;
        while ((at = table_find(&land->of, serial)))
            evict(land, OWNER(Kept, of, at));
        next = living(land->other);
        Py_DECREF((PyObject *)land);
    }
}
