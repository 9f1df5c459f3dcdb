/* Turn: of those that wait for an answer one reads, for all; and what happens in between.
 *
 * What holds: a signal handler, a destructor, the waking of a loop, that is: Python code, runs in `settle` and at
 * `PyErr_CheckSignals` alone. The turn has been given back then, the next one been woken (in one step, on every way out),
 * and the state is whole. So it may call, raise, fork or never come back; who waits looks for its answer afterwards. */
#include "core.h"

/* Where nobody reads, the next one does: a thread that waits, or else a loop. `own`: the bell of a loop that looks by
 * itself. */
static void wake_next(Endpoint *self, PyObject *own)
{
    Answer *next = NULL, *after;
    for (Answer *at = self->reader ? NULL : self->waiting; at; at = after) {
        after = at->next;
        if (Py_REFCNT((PyObject *)at) == 1) { /* the table's: a handler has kept its task from ever waiting */
            abandon(self, at);
            continue;
        }
        if (!at->bell && atomic_load_explicit(&at->word, memory_order_relaxed))
            return; /* it has been woken already */
        if (!next || (next->bell && (!at->bell || at->bell == own)))
            next = at;
    }
    if (next && !next->bell)
        unpark(&next->word);
    else if (next && next->bell != own && !self->bell)
        self->bell = Py_NewRef(next->bell);
}

static void give_turn_back(Endpoint *self, PyObject *own)
{
    self->reader = 0;
    wake_next(self, own);
}

/* Runs what had to wait until the turn was given back: objects that go, loops that are woken, what is said to the
 * kernel of answers that nobody took. -1 with an exception set: a signal handler's; the rest is done next time. */
static int settle(Endpoint *self, PyObject *own)
{
    Answer *answer;
    while ((answer = self->over)) {
        self->over = answer->after;
        int failed = answer->bell && answer->bell != own ? ring(answer->bell) : 0;
        Py_DECREF((PyObject *)answer);
        if (failed)
            return -1;
    }
    if (self->bell) {
        PyObject *bell = self->bell;
        self->bell = NULL;
        int failed = ring(bell);
        Py_DECREF(bell);
        if (failed)
            return -1;
    }
    for (Late *late = self->late; late && !self->end; late = self->late) {
        if (late->busy)
            break; /* a handler within this very call of it */
        late->busy = 1;
        PyObject *message = PyObject_CallFunctionObjArgs(late->function, late->data, NULL);
        late->busy = 0;
        if (!message)
            return -1;
        Late **at = &self->late; /* not the first one any more, perhaps */
        while (*at != late)
            at = &(*at)->next;
        *at = late->next;
        if (PyBytes_Check(message))
            post_message(self, message, NULL);
        Py_DECREF(late->function);
        Py_DECREF(late->data);
        free(late);
        Py_DECREF(message);
    }
    return 0;
}

static void endpoint_leave_late(Endpoint *self, PyObject *function, PyObject *data)
{
    Late *late = self->end ? NULL : malloc(sizeof *late);
    if (late) {
        *late = (Late){self->late, Py_NewRef(function), Py_NewRef(data), 0};
        self->late = late;
    }
}

/* ---- waiting ---------------------------------------------------------------------------------- */

/* Signal handlers run in the main thread alone. */
static int is_main_thread(void) { return syscall(SYS_gettid) == getpid(); }

/* Looks for a message while that is worth it, and until `until`; whether one is there. */
static int look(Endpoint *self, int64_t until)
{
    Ring *ring = self->ring;
    int64_t clock = nanoseconds(), patience = budget_now(&self->budget, clock);
    if (patience > until - clock)
        patience = until - clock;
    if (patience <= 0)
        return 0;
    Duplex *pair = &ring->duplex;
    ptrdiff_t found;
    Py_INCREF((PyObject *)ring); /* whoever closes the connection meanwhile leaves us our ring */
    Py_BEGIN_ALLOW_THREADS
    found = spin_for(&pair, 1, 0, patience);
    Py_END_ALLOW_THREADS
    budget_spun(&self->budget, found, nanoseconds());
    Py_DECREF((PyObject *)ring);
    return found >= 0;
}

/* Sleeps until the socket has something, or takes something, or `until`; 0: a signal, or the time, ended it. */
static int doze(Endpoint *self, int64_t until)
{
    int64_t before = nanoseconds();
    if ((self->stalled || is_main_thread()) && before + SLICE < until)
        until = before + SLICE;
    short events = self->letters && !self->stalled ? POLLIN | POLLOUT : POLLIN, got;
    Post post = self->post;
    self->busy++;
    Py_BEGIN_ALLOW_THREADS
    got = (short)post_wait(&post, events, until);
    Py_END_ALLOW_THREADS
    self->busy--;
    if (self->ring) {
        queue_say(&self->ring->duplex, 0);
        budget_slept(&self->budget, nanoseconds() - before);
    }
    if (self->end == CLOSED && !self->busy)
        post_close(&self->post);
    return got;
}

/* Takes the turn and reads for all, until its own answer is there, a signal comes, or `until`. `spin`: looks for a moment
 * before it sleeps. Whether it comes back before it sleeps, so that signals are asked for. */
static int lead(Endpoint *self, Answer *answer, int64_t until, int spin)
{
    int before_sleep = 0;
    self->reader = PyThread_get_thread_ident();
    while (answer->outcome == ON_ITS_WAY && !self->end) {
        if (take_from_ring(self))
            continue;
        if (spin && self->ring) {
            spin = look(self, until);
            if (spin || !is_main_thread())
                continue;
            before_sleep = 1;
            break;
        }
        Duplex *pair = self->ring ? &self->ring->duplex : NULL;
        if (!is_open(self) || (pair && !fall_asleep(&pair, 1)))
            continue;
        int got = doze(self, until);
        if (!got || self->end)
            break;
        if (got & POLLOUT)
            flush(self);
        if (got & ~POLLOUT)
            receive_one(self);
    }
    give_turn_back(self, NULL);
    return before_sleep;
}

/* Waits while another thread reads, until it is answered, or woken to lead; or a signal comes, or `until`. */
static void stand_by(Endpoint *self, Answer *answer, int64_t until)
{
    atomic_store_explicit(&answer->word, 0, memory_order_relaxed);
    line_up(self, answer);
    Py_BEGIN_ALLOW_THREADS
    park(&answer->word, until);
    Py_END_ALLOW_THREADS
    step_out(answer);
}

/* Until it is over. -1 with an exception set: a signal handler's. */
static int wait_for(Endpoint *self, Answer *answer, int64_t until)
{
    int spin = 1;
    while (answer->outcome == ON_ITS_WAY) {
        int64_t slice = until;
        if (self->reader) {
            if (nanoseconds() + SLICE < until && is_main_thread())
                slice = nanoseconds() + SLICE;
            stand_by(self, answer, slice);
        } else {
            spin = !lead(self, answer, until, spin);
        }
        if (settle(self, NULL) || (answer->outcome == ON_ITS_WAY && PyErr_CheckSignals()))
            return -1;
        if (answer->outcome == ON_ITS_WAY && is_open(self) && nanoseconds() >= until)
            answer->outcome = TIMED_OUT;
    }
    return 0;
}
