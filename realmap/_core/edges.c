/* Edges: of what is lent, the bytes of a page that is not lent as a whole. They are copied into a page of zeros, and back.
 *
 *                 first byte          last byte
 *      file    ──┤▒▒▒▒▓▓▓▓│▓▓▓▓▓▓▓▓│▓▓▓▓▓▓▓▓│▓▓▒▒▒▒▒▒├──   ▓ the range   ▒ its neighbours
 *                   copied    lent     lent  copied
 *      window  ──┤0000▓▓▓▓│▓▓▓▓▓▓▓▓│▓▓▓▓▓▓▓▓│▓▓000000├──   congruent modulo the page
 *
 * Parts of a range follow each other between pages, so that a window has two at most. */
#include "core.h"

typedef struct {
    unsigned char *copy; /* in its page */
    size_t length;
    int fd; /* of this file, from here on */
    off_t offset;
    unsigned char *before; /* as it was, and as it is now; NULL: it is only read, and nothing is copied back */
} Edge;

typedef struct Edges {
    int count;
    int error;      /* an errno, of the first byte that could not be copied back; ENODATA: the file ends before it */
    uintptr_t lost; /* where that is in the window */
    Edge each[2];
} Edges;

/* Copies `length` bytes of a file, within one of its pages, to `address`, in a page that it maps there. 0, or an errno with
 * nothing mapped; ENODATA: the file ends before. */
static int copy_edge(Edges *edges, uintptr_t address, size_t length, int prot, int fd, off_t offset)
{
    uintptr_t page = page_of(address);
    Edge edge = {.copy = (unsigned char *)address, .length = length, .fd = fd, .offset = offset};
    int error = map_piece(page, page_size, PROT_READ | PROT_WRITE, -1, 0);
    if (error)
        return error;
    ssize_t got = pread(fd, edge.copy, length, offset);
    if (got != (ssize_t)length)
        error = got < 0 ? errno : ENODATA;
    else if (!(prot & PROT_WRITE))
        error = mprotect((void *)page, page_size, prot) ? errno : 0;
    else if ((edge.before = malloc(2 * length)))
        memcpy(edge.before, edge.copy, length);
    else
        error = ENOMEM;
    if (error)
        munmap((void *)page, page_size);
    else
        edges->each[edges->count++] = edge;
    return error;
}

/* Maps [offset, offset + length) of a file from `address` on: whole pages in place, what is left as copies. 0, or an errno
 * with nothing mapped. */
static int lend_piece(Edges *edges, uintptr_t address, size_t length, int prot, int fd, off_t offset)
{
    size_t lead = -(size_t)offset % page_size;
    lead = lead < length ? lead : length;
    size_t rest = (length - lead) % page_size, whole = length - lead - rest, done = 0;
    int error = lead ? copy_edge(edges, address, lead, prot, fd, offset) : 0;
    if (!error) {
        done = lead;
        error = whole ? map_piece(address + done, whole, prot, fd, offset + (off_t)done) : 0;
    }
    if (!error) {
        done += whole;
        error = rest ? copy_edge(edges, address + done, rest, prot, fd, offset + (off_t)done) : 0;
    }
    if (error && done)
        munmap((void *)page_of(address), address + done - page_of(address));
    return error;
}

/* Writes [from, to) of an edge, as it is `now`, into its file; 0, or an errno. */
static int write_edge(const Edge *edge, const unsigned char *now, size_t from, size_t to)
{
    struct stat file;
    if (fstat(edge->fd, &file))
        return errno;
    if (file.st_size < edge->offset + (off_t)to)
        return ENODATA;
    while (from < to) {
        ssize_t wrote = pwrite(edge->fd, now + from, to - from, edge->offset + (off_t)from);
        if (wrote < 0)
            return errno;
        from += (size_t)wrote;
    }
    return 0;
}

/* Copies back what was changed, from the first changed byte of an edge to the last, as far as it was not already. `zeros`:
 * from where on its bytes are gone, 0: they are all there. */
static void copy_edges_back(Edges *edges, uintptr_t zeros)
{
    for (int i = 0; i < edges->count; i++) {
        Edge *edge = &edges->each[i];
        size_t from = 0, to = edge->length;
        if (!edge->before || (zeros && (uintptr_t)edge->copy + to > zeros))
            continue;
        unsigned char *now = edge->before + edge->length;
        memcpy(now, edge->copy, to); /* once: another thread may be writing there */
        if (!memcmp(edge->before, now, to))
            continue;
        while (from < to && edge->before[from] == now[from])
            from++;
        while (from < to && edge->before[to - 1] == now[to - 1])
            to--;
        int error = write_edge(edge, now, from, to);
        if (!error)
            memcpy(edge->before + from, now + from, to - from);
        else if (!edges->error) {
            edges->error = error;
            edges->lost = (uintptr_t)edge->copy + from;
        }
    }
}

/* Their pages are not there any more. */
static void forget_edges(Edges *edges)
{
    while (edges->count)
        free(edges->each[--edges->count].before);
}
