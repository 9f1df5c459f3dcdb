/* The places of a land: how the next one is taken, and given back. */
#include "core.h"

static Land *all_lands;

/* An anchor is a page without rights at the top of the 512 GiB that one entry of the top page table covers. With a
 * mapping above it, Linux gives up no page tables when a mirror goes, and does not flush the TLB for it: measured,
 * that is half the cost of mapping and unmapping an untouched page. Where it cannot be had, it is only slower. */
static void anchor(Land *land, uint64_t at)
{
    uint64_t slot = (uint64_t)1 << 39;
    land->anchored = page_size == 4096 ? (at / slot + 1) * slot : UINT64_MAX;
    uintptr_t address = (uintptr_t)(land->anchored - page_size);
    /* In a small land, or right below it, every page counts. */
    if (land->anchored > land->end || address - at < (uint64_t)1 << 30)
        return;
    if (land->anchor_count == ANCHORS || map_piece(address, page_size, PROT_NONE, -1, 0))
        return;
    land->anchors[land->anchor_count++] = address;
    if (land->hole_end > address)
        land->hole_end = address;
}

static void pull_anchors(Land *land)
{
    for (size_t i = 0; i < land->anchor_count && land->epoch == fork_epoch; i++)
        munmap((void *)land->anchors[i], page_size);
    land->anchor_count = 0;
}

/* A place in the current hole, with a free page behind it; 0 where it has none. */
static int reserve(Land *land, size_t span, uint64_t residue, uintptr_t *base)
{
    uint64_t at = land->cursor;
    if (span >= huge_size)
        at += (residue - at) & (huge_size - 1);
    if (at >= land->anchored && at < land->hole_end)
        anchor(land, at);
    if (at > land->hole_end || span > land->hole_end - at)
        return 0;
    land->cursor = at + span + page_size;
    *base = (uintptr_t)at;
    return 1;
}

/* A place is free again. Without memory for the note, the tree has it as taken for ever. */
static void give_place_back(Land *land, uintptr_t base, int in_tree)
{
    if (!in_tree || !land->gone)
        return;
    PyObject *address = PyLong_FromUnsignedLongLong(base);
    if (!address || PyList_Append(land->gone, address))
        PyErr_Clear();
    Py_XDECREF(address);
}

/* A mirror is in a land from now on, at a place that was taken for it. */
static void enter(Land *land, Mirror *self, uintptr_t base, size_t span, int in_tree, uint64_t maps)
{
    self->window.base = base;
    self->window.span = span;
    self->node.key = base;
    self->in_tree = (char)in_tree;
    self->maps = maps;
    Py_INCREF((PyObject *)land);
    self->land = land;
    land->maps += maps;
    table_add(&land->live, &self->node);
}

/* Takes a mirror out of its land; its place is given back, or somebody else's from now on. */
static void leave(Mirror *self, int give_back)
{
    Land *land = self->land;
    if (!land)
        return;
    self->land = NULL;
    land->maps -= self->maps;
    table_remove(&land->live, &self->node);
    if (give_back)
        give_place_back(land, self->window.base, self->in_tree);
    Py_DECREF((PyObject *)land);
}
