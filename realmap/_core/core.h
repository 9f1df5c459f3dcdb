/* What the files of the C core share: the types, and what each of them knows of the others.
 *
 * The core is one translation unit: module.c includes the others in the order in which they build on each other.
 * Some need no Python (guard.c, table.c): with REALMAP_NO_PYTHON a plain C program can include these by themselves,
 * and the drivers of tools/races do.
 */
#ifndef REALMAP_CORE_H
#define REALMAP_CORE_H

#define _GNU_SOURCE
#ifndef REALMAP_NO_PYTHON
#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* With the headers of 3.12 and later these count no reference, since there None and the like are immortal. Built with
 * them this module runs on 3.11 as well, where they are not. */
#undef Py_RETURN_NONE
#undef Py_RETURN_TRUE
#undef Py_RETURN_FALSE
#define Py_RETURN_NONE return Py_NewRef(Py_None)
#define Py_RETURN_TRUE return Py_NewRef(Py_True)
#define Py_RETURN_FALSE return Py_NewRef(Py_False)

#include <structmember.h>
#endif

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

/* Below this a map or unmap is a few microseconds, and giving the GIL away would let another
 * thread keep it for a whole switch interval (5 ms); above it, others should not wait for us. */
#define LONG_RANGE ((size_t)1 << 20)


/* Where nobody listens this is never run: it must not stand in the way of what is. */
#define COLD __attribute__((noinline, cold))

static size_t page_size;

/* Counts the forks this process descends from: a window that a fork does not inherit knows by
 * it that it was lost, and must not unmap what may now be somebody else's at its address. */
static unsigned long fork_epoch;

static void count_fork(void) { fork_epoch++; }


/* What the guard knows of a window. Written by whoever has the GIL, read by a signal handler on any thread. */
typedef struct {
    _Atomic uintptr_t base;
    _Atomic uintptr_t end;   /* 0: not armed */
    _Atomic uintptr_t zeros; /* from here to the end are zero pages; NO_ZEROS where there are none */
    _Atomic unsigned long epoch;
    _Atomic long thread; /* that ran into it last */
    _Atomic int sparse;  /* not all of them are there: page by page, where Linux gave no more at once */
    _Atomic int prot;
    _Atomic int inherited;
    uint32_t index;
    uint32_t next; /* of those without a window: one more than its index, or 0 */
} Guarded;

#define NO_ZEROS UINTPTR_MAX


typedef struct Node {
    struct Node *next;
    struct Node **at; /* what points to it: so that it can be taken out of a long chain */
    uint64_t key;
} Node;

#define FEW 64

typedef struct {
    Node **buckets;
    size_t mask;
    size_t count;
    Node *few[FEW];
} Table;


#ifndef REALMAP_NO_PYTHON

/* How a function with METH_FASTCALL is put into a table. */
#define FASTCALL(function) ((PyCFunction)(void (*)(void))(function))


enum state { NOT_READY, ALIVE, DEAD };

typedef struct {
    PyObject_HEAD
    uintptr_t base;
    size_t span;
    size_t lead;
    Py_ssize_t length;
    Py_ssize_t exports;
    Guarded *guarded; /* while it is mapped */
    uintptr_t zeros;  /* where its zero pages began, once it is not; 0: there were none */
    long thread;      /* and who ran into them */
    unsigned long epoch;
    int prot;
    char inherited;
    char state;
} Window;


typedef struct {
    PyObject_HEAD
    PyObject *windows; /* a tuple of Window, side by side, in order */
    uintptr_t start;
    Py_ssize_t length;
    Py_ssize_t exports;
    int writable;
    int dropped;
} View;


#define FACTS 6

enum kind { GAP, MIRROR, DROP, EVICT };

typedef struct {
    int64_t time; /* of the monotonic clock, in nanoseconds */
    uint16_t kind;
    uint16_t flags;
    uint32_t process; /* its number; of MIRROR, DROP: how many mirrors live */
    uint64_t facts[FACTS];
} Event;

typedef struct {
    PyObject_HEAD
    Event *ring;
    size_t capacity;
    size_t first;
    size_t count;
    unsigned long long lost;
    uint64_t told; /* how many of those lost a GAP has told of */
} Events;


typedef struct Kept {
    Node exact;
    Node of;
    struct Kept *older;
    struct Kept *newer;
    uintptr_t base;
    size_t span;
    uint64_t serial;
    uint64_t start;
    uint64_t maps;
    int prot;
    char in_tree;
} Kept;

typedef struct Land {
    PyObject_HEAD
    unsigned long long cursor;
    unsigned long long hole_end;
    unsigned long long end;
    unsigned long long staked; /* up to where stakes have been seen to */
    unsigned long long budget;
    unsigned long long kept_bytes;
    unsigned long long maps; /* that live mirrors and kept windows take, zeros that came into them not counted, */
    unsigned long long most; /* and may take: below Linux's limit, for what else needs one */
    unsigned long long hits;
    unsigned long long misses;
    unsigned long long evictions;
    unsigned long long made; /* mirrors so far, and the bytes that they showed */
    unsigned long long made_bytes;
    Table live;
    Table exact;
    Table of;
    Kept *oldest;
    Kept *newest;
    PyObject *gone; /* a list of bases that the tree still has */
    PyObject *stakes; /* a list of addresses, a page each */
    Events *events; /* NULL while nobody listens */
    struct Land *other; /* the next of all lands */
    unsigned long epoch;
} Land;

typedef struct {
    Window window;
    Node node;
    Land *land; /* while its place is taken there */
    PyObject *mapping;
    PyObject *mappings;
    PyObject *frames;
    PyObject *holders; /* the `mirrors` of its one frames, while it holds a reference to them */
    PyObject *caller; /* the UserBuffer of the call that it was made in */
    PyObject *weakrefs;
    uint64_t serial; /* of its frames; 0 where it shows several */
    uint64_t start; /* what its first page shows: an offset in the frames */
    uint64_t maps; /* one for each piece of it */
    char in_tree;
} Mirror;


#define OWNER(type, member, pointer) ((type *)(void *)((char *)(pointer) - offsetof(type, member)))


typedef struct {
    PyObject_HEAD
    PyObject *holders; /* {id: who}: one entry for each reference, */
    PyObject *mirrors; /* but those of mirrors are here: they come and go, and there may be many of the others */
    unsigned long long serial;
    unsigned long long huge; /* bytes that huge pages back */
    int fd;                  /* of the one segment; -1 where there are several, or none any more */
} Frames;

typedef struct {
    PyObject_HEAD
    PyObject *frames;
    PyObject *rights;
    unsigned long long phys_offset;
    unsigned long long length;
    Py_ssize_t pins;
    char held;
} Mapping;


#define RING_SLOTS 32u
#define RING_SLOT 2048u /* bytes a message takes, 4 of them its length */
#define LINE 64
#define BELL 4 /* wire/channel.py */
#define BELL_TRIES 100

typedef struct {
    _Alignas(LINE) _Atomic uint32_t tail;
    _Atomic uint32_t cpu; /* where the producer ran when it last had something to say */
    _Atomic uint32_t mailed;
    _Alignas(LINE) _Atomic uint32_t head;
    _Alignas(LINE) _Atomic uint32_t asleep;
    _Alignas(LINE) unsigned char slots[RING_SLOTS][RING_SLOT];
} Queue;

typedef struct {
    PyObject_HEAD
    Queue *queues;
    Queue *in;
    Queue *out;
    uint32_t in_head;
    uint32_t out_tail;
    uint32_t in_mailed; /* as far as the socket was read */
    unsigned long epoch;
} Ring;


typedef struct {
    PyObject_HEAD
    unsigned long owner;
    Py_ssize_t level;
} Turn;


static PyTypeObject *window_type;
static PyTypeObject *land_type;
static PyTypeObject *events_type;


static PyTypeObject *frames_type;
static PyTypeObject *mapping_type;
static PyObject *word_mirror; /* "mirror" */


static PyTypeObject *ring_type;


static int64_t nanoseconds(void);


static PyObject *ring_exchange(PyObject *op, PyObject *const *args, Py_ssize_t nargs);

#endif /* REALMAP_NO_PYTHON */
#endif
