/* A user's connection to its kernel: its endpoint, requests on their way, what waits to be sent, and what is parked. */
#ifndef REALMAP_CONNECTION_H
#define REALMAP_CONNECTION_H

#include "core.h"

struct Endpoint;

/* What a message of the kernel's is: its second byte (wire/messages.py). */
enum tag { OTHER, DONE, REFUSED, BYE, CARRIER };

/* What has become of a request. */
enum outcome { ON_ITS_WAY, ANSWERED, TIMED_OUT, ENDED, FAILED };

/* A request on its way, and then its answer: answer.c. */
typedef struct Answer {
    PyObject_HEAD
    Node node; /* of its endpoint's table, while it is on its way */
    struct Endpoint *endpoint;
    PyObject *holds; /* kept until the kernel has answered */
    PyObject *late;  /* what is said to the kernel where nobody took the answer: a function of its bytes */
    PyObject *bell;  /* what wakes the loop it is awaited in; NULL: a thread waits */
    PyObject *data;  /* the answer's bytes */
    struct Answer *next, **at; /* among those that wait; NULL: it does not */
    struct Answer *after;      /* among those that are over */
    int *fds;        /* that came along; this object's */
    int count;
    _Atomic uint32_t word; /* of the thread that is parked for it */
    uint32_t turn;   /* of the messages in the ring: which one it is, where it went there */
    int error;       /* an errno, where it FAILED */
    char outcome;
    char pending;    /* in the table */
    char sent;
    char by_ring;
    char unread;     /* it ENDED, and nobody can have read the request */
    char carried;    /* its descriptors have come, by the socket */
    char ordered;    /* what is said later is heard later */
    char abandoned;  /* nobody waits any more */
    char taken;      /* what it brought is somebody's */
} Answer;

/* A message that waits to be sent. */
typedef struct Letter {
    struct Letter *next;
    PyObject *message;
    size_t at;      /* so many bytes of it went */
    Answer *answer; /* NULL: none is wanted */
} Letter;

/* A window that was unmapped, and is parked: stock.c. */
typedef struct {
    uintptr_t base; /* 0: there is none; NOWHERE: nor can there be, until the kernel says GONE */
    size_t span;
    uint64_t kind;  /* what it can be used for again */
    uint64_t serial;
    uint64_t since; /* the last one has the highest; */
    uint64_t used;  /* of the window that it is used as again; 0: it is not */
    unsigned long forks;
    PyObject *told; /* its farewell, while it is not */
    PyObject *farewell;
    int prot;
} Parked;

/* Of a kind. */
#define BARE 0x10000     /* no space was taken for it, and none is kept while it is parked */
#define ATTACHED 0x20000 /* others have it as well: its bytes stay */

/* An answer that nobody took: what is said to the kernel then. */
typedef struct Late {
    struct Late *next;
    PyObject *function;
    PyObject *data;
    int busy;
    int tries;
} Late;

/* Why a connection is of no use any more; above these, an errno. */
enum end { OPEN, CLOSED, DIED, SAID_BYE, NONSENSE, STOLEN, LOST_IN_CHILD, ERRNO };

typedef struct Endpoint {
    PyObject_HEAD
    Post post;
    Ring *ring;
    Budget budget;
    Budget moment;   /* of a loop that looks */
    uint64_t number; /* of the last request */
    Table table;     /* requests on their way, by number */
    Letter *letters; /* in the order in which they are sent */
    Letter **last;
    Answer *waiting; /* who waits for an answer and does not read; first come, first served */
    Answer *over;    /* answered, or ended; let go once the turn is given back */
    Late *late;
    Parked stock[PLACES];
    uint64_t parked; /* how often a window was, or was used again */
    PyObject *bell;  /* of the loop that is to read from now on; called once the turn is given back */
    PyObject *bye;
    char *datagram;
    char *message;   /* a long one, as far as it has come */
    size_t size, room;
    unsigned long reader; /* the thread whose turn it is; 0: nobody's */
    unsigned long epoch;
    PyObject *weakrefs;
    int busy;        /* threads that use the socket without the GIL */
    int end;
    int closed;      /* by this side: who uses the socket last closes it */
    int armed;       /* what comes is seen by who watches the socket: nobody has read since its loop did */
    int stalled;     /* Linux had no memory to send: not at once again */
} Endpoint;

ACCESSOR(Answer, as_answer)
ACCESSOR(Endpoint, as_endpoint)

static void endpoint_notice(PyObject *endpoint, PyObject *message);
static PyObject *endpoint_send_notice(PyObject *endpoint, PyObject *message);
static PyObject *tell_of_end(Endpoint *self, PyObject *number, PyObject *message, PyObject *farewell);
static void unmap_stock(Endpoint *self);
static int settle(Endpoint *self, PyObject *own);
static void endpoint_leave_late(Endpoint *self, PyObject *function, PyObject *data);

#endif
