/* What the files of the C core share: the types, and what each of them knows of the others. Those of a connection are in
 * connection.h.
 *
 * The core is one translation unit: module.c includes the others in the order in which they build on each other.
 * Some need no Python (guard.c, table.c, queue.c, spin.c, sleep.c, post.c, packed.c): with REALMAP_NO_PYTHON a plain C
 * program can include these by themselves, and the drivers of tools/races do.
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

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

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

/* Counts the forks of this process itself, each twice, before and after: what was mapped at one number and is there at
 * another may be in a child as well. */
static _Atomic unsigned long forks;

static void note_fork(void) { atomic_fetch_add(&forks, 1); }

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

#define PLACES 16 /* memory/stock.py */
#define NAME_BYTES 48

/* The name of what is in a place: written before the word there says that it has one. */
typedef struct {
    uint64_t length; /* bytes, as they were asked for */
    uint64_t lasts;  /* whether it outlives its maker */
    char text[NAME_BYTES]; /* UTF-8, and NULs to the end */
} Name;

#define RING_SLOTS 32u
#define RING_MESSAGE 2048u /* bytes that a message has at most */
#define LINE 64
#define SHORT_MESSAGE (LINE - sizeof(uint32_t))

/* The length of a message, and the message itself where it is short. */
typedef struct {
    _Alignas(LINE) uint32_t size;
    unsigned char bytes[SHORT_MESSAGE];
} Head;

/* Whoever takes a short message touches one page: of many processes each wakes without any in the TLB. */
typedef struct {
    _Alignas(LINE) _Atomic uint32_t tail;
    _Atomic uint32_t cpu; /* where the producer ran when it last had something to say */
    _Atomic uint32_t mailed;
    _Atomic uint32_t crowd; /* how many others the producer is at work for */
    _Alignas(LINE) _Atomic uint32_t head;
    _Alignas(LINE) _Atomic uint32_t asleep;
    _Alignas(LINE) _Atomic uint32_t places[PLACES]; /* of windows that the producer has parked: places.c */
    _Alignas(LINE) Name names[PLACES];
    Head heads[RING_SLOTS];
    _Alignas(4096) unsigned char slots[RING_SLOTS][RING_MESSAGE];
} Queue;

/* Two queues, one each way, as one side sees them. */
typedef struct {
    Queue *in;
    Queue *out;
    uint32_t in_head;
    uint32_t out_tail;
    uint32_t in_mailed; /* as far as the socket was read */
    uint32_t counted;   /* when it was last counted into the crowd */
} Duplex;

/* What the consumer of a queue says in `asleep`: it looks by itself, sleeps on that very word, or waits for its socket. */
enum { AWAKE, ON_WORD, ON_SOCKET };

/* How long to look for the next message: spin.c. Nanoseconds. */
typedef struct {
    int64_t most;
    int64_t now;
    int64_t busy_until; /* 0: nobody else wants the CPU */
    int64_t seen_busy;
    int64_t pause;
    uint32_t cpus;
} Budget;

#define MAX_DESCRIPTORS 64  /* that one message brings: wire/messages.py */
#define MESSAGE_BYTES (1 << 20) /* that a message has at most: wire/messages.py */

/* A socket, known by what it is: post.c. */
typedef struct {
    int fd;
    dev_t device;
    ino_t inode;
} Post;

/* Where something to synchronize with lies in shared memory. All zeros are one that nobody has made yet; whoever comes
 * first writes the first eight bytes in one step. What else is there needs no making, but for one word of a mutex. */
#define SPOT 64
typedef struct {
    _Atomic uint32_t kind;
    _Atomic uint32_t argument;
    _Atomic uint32_t word;     /* what is slept on: it changes when something has happened, */
    _Atomic uint32_t sleepers; /* and so many are to be woken then, those included that died asleep */
    union {
        pthread_mutex_t mutex;
        _Atomic int64_t count;
        _Atomic uint64_t stage;
        char rest[SPOT - 16];
    };
} Spot;

_Static_assert(sizeof(Spot) == SPOT, "a mutex fits into a spot");

static int64_t nanoseconds(void);

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
    PyObject *told;   /* a weak reference to the endpoint that is told of its end, in these bytes; NULL: nobody is */
    PyObject *farewell;
    unsigned long epoch;
    unsigned long forks;
    unsigned long long serial; /* whoever made it knows it by that */
    uint64_t used; /* of a parked window that is used again: which one */
    int prot;
    char inherited;
    char state;
} Window;

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

typedef struct {
    PyObject_HEAD
    uint64_t count;
    uint64_t longest;      /* nanoseconds */
    uint64_t buckets[496]; /* by duration_bucket, of any 64 bits */
} Durations;

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

#define ANCHORS 64 /* as many as there are 512 GiB in all lands (land.c) */

typedef struct Land {
    PyObject_HEAD
    unsigned long long cursor;
    unsigned long long hole_end;
    unsigned long long start;
    unsigned long long end;
    unsigned long long anchored; /* up to where anchors have been seen to */
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
    unsigned long long edition; /* of the news that the tree was last told; from 1 on */
    Events *events; /* NULL while nobody listens */
    size_t anchor_count;
    uintptr_t anchors[ANCHORS]; /* a page each */
    struct Land *other; /* the next of all lands */
    unsigned long epoch;
} Land;

typedef struct {
    Window window;
    Node node;
    Land *land; /* while its place is taken there */
    PyObject *mapping; /* a Mapping: what its first byte is of */
    PyObject *mappings; /* a tuple of all of them; NULL where that is the only one */
    PyObject *frames; /* Frames, or a tuple of them where there are `mappings` */
    PyObject *caller; /* the UserBuffer of the call that it was made in, or NULL */
    PyObject *weakrefs;
    struct Edges *edges; /* NULL: it shows whole pages */
    uint64_t serial; /* of its frames; 0 where it shows several, or copies */
    uint64_t start; /* what its first page shows: an offset in the frames */
    char holds; /* whether it has references to its frames */
    uint64_t maps; /* one for each piece of it */
    char in_tree;
} Mirror;

#define OWNER(type, member, pointer) ((type *)(void *)((char *)(pointer) - offsetof(type, member)))

typedef struct {
    PyObject_HEAD
    struct Mapping *mappings; /* those that hold them, in a chain */
    Py_ssize_t mapped;        /* how many these are */
    PyObject *others; /* {id: who}: one entry for each other reference; NULL: there never was one */
    unsigned long long serial; /* 0: not set yet */
    unsigned long long huge; /* bytes that huge pages back */
    int fd;                  /* of the one segment; -1 where there are several, or none any more */
    char freed;              /* nobody may hold them: their last reference went, or they are not set yet */
} Frames;

typedef struct Mapping {
    PyObject_HEAD
    struct Mapping *next, **at; /* among those of its frames, while it has a reference to them */
    PyObject *frames; /* Frames, or something that a mirror knows nothing of; NULL: it is not set yet */
    PyObject *who;    /* it, as a holder of frames */
    PyObject *rights; /* as they were given; and as a number: */
    int allowed;
    char held; /* from when it is set until it is released */
    Py_ssize_t pins;
    unsigned long long address;
    unsigned long long phys_offset;
    unsigned long long length;
    unsigned long long serial;
} Mapping;

typedef struct Ring {
    PyObject_HEAD
    Queue *queues; /* NULL once it is closed */
    Duplex duplex;
    struct Ring *owed; /* the next of those whose wake-up is owed, where this is one of them */
    int is_owed;
    unsigned long epoch;
} Ring;

/* Something to synchronize with, as one process sees it: spot.c. */
typedef struct {
    PyObject_HEAD
    PyObject *buffer; /* a View: */
    Window *window;   /* of this one, */
    Spot *spot;       /* which lies in there, */
    size_t span;      /* and so many bytes belong to it */
    Budget budget;
    unsigned long thread; /* of a lock: who holds it by this object, */
    unsigned long epoch;  /* in which process */
    char held;            /* it counts as an export of the window meanwhile */
    char orphaned;        /* who held it before has died, and nobody has said that what it guards is whole */
} Shared;

/* The one way from an object to what it is in C, for who knows its type: the methods of that type, and who has
 * checked it. */
#define ACCESSOR(type, name) \
    static inline type *name(PyObject *op) { return (type *)(void *)op; }

ACCESSOR(Window, as_window)
ACCESSOR(Events, as_events)
ACCESSOR(Durations, as_durations)
ACCESSOR(Land, as_land)
ACCESSOR(Mirror, as_mirror)
ACCESSOR(Frames, as_frames)
ACCESSOR(Mapping, as_mapping)
ACCESSOR(Ring, as_ring)
ACCESSOR(PyTypeObject, as_type)
ACCESSOR(Shared, as_shared)

/* The types, filled once by module.c. Not in the state of the module: what the guard knows is one table a process, so
 * there is one core a process, in its main interpreter. Imported again, it has the same types. */
static PyTypeObject *window_type, *view_type, *events_type, *land_type, *mirror_type, *lent_type, *frames_type, *mapping_type;
static PyTypeObject *account_type, *charge_type, *ring_type, *budget_type, *bell_type, *answer_type, *endpoint_type;
static PyTypeObject *durations_type;
static PyTypeObject *shared_type, *shared_lock_type, *shared_condition_type, *shared_event_type;
static PyTypeObject *shared_semaphore_type, *shared_barrier_type, *shared_counter_type, *shared_queue_type;
static PyObject *word_mirror; /* "mirror" */

#endif /* REALMAP_NO_PYTHON */
#endif
