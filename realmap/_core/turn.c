/* Turn: of those that wait for an answer one reads, for all; and what happens in between.
 *
 * What holds: a signal handler, a destructor, the waking of a loop, that is: Python code, runs in `settle` and at
 * `PyErr_CheckSignals` alone. The turn has been given back then, the next one been woken (in one step, on every way out),
 * and the state is whole. So it may call, raise, fork or never come back; who waits looks for its answer afterwards. */
#include "connection.h"

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

/* Tells a loop. Where it is closed, whoever waited there has given up, and somebody else is to read. */
static void tell_loop(Endpoint *self, PyObject *bell, PyObject *own)
{
    if (bell == own || ring_the_loop(bell))
        return;
    for (Answer *at = self->waiting, *after; at; at = after) {
        after = at->next;
        if (at->bell == bell)
            abandon(self, at);
    }
    wake_next(self, own);
}

/* Has the kernel told of an answer that nobody took; 0 where a signal handler raised, and it is to be tried again. */
static int say_late(Endpoint *self, Late *late)
{
    late->busy = 1;
    PyObject *message = PyObject_CallFunctionObjArgs(late->function, late->data, NULL);
    late->busy = 0;
    if (!message && ++late->tries < 3)
        return 0;
    Late **at = &self->late; /* not the first one any more, perhaps */
    while (*at != late)
        at = &(*at)->next;
    *at = late->next;
    if (message && PyBytes_Check(message))
        post_message(self, message, NULL);
    Py_DECREF(late->function);
    Py_DECREF(late->data);
    free(late);
    Py_XDECREF(message);
    return message != NULL;
}

/* Runs what had to wait until the turn was given back: objects that go, loops that are told, what is said to the
 * kernel of answers that nobody took. -1 with an exception set: a signal handler's. */
static int settle(Endpoint *self, PyObject *own)
{
    PyObject *first[3] = {NULL};
    while (self->over || self->bell) {
        Answer *answer = self->over;
        PyObject *bell = answer ? Py_XNewRef(answer->bell) : self->bell;
        if (answer)
            self->over = answer->after;
        else
            self->bell = NULL;
        if (answer && bell)
            bell_add(bell, answer);
        else
            Py_XDECREF((PyObject *)answer);
        if (bell)
            tell_loop(self, bell, own);
        put_aside(first);
        Py_XDECREF(bell);
    }
    while (self->late && !self->late->busy && !self->end && say_late(self, self->late))
        ;
    put_aside(first);
    return raise_first(first);
}

static void endpoint_leave_late(Endpoint *self, PyObject *function, PyObject *data)
{
    Late *late = self->end ? NULL : malloc(sizeof *late);
    if (late) {
        *late = (Late){.next = self->late, .function = Py_NewRef(function), .data = Py_NewRef(data)};
        self->late = late;
    }
}

/* ---- waiting ---------------------------------------------------------------------------------- */

/* Signal handlers run in the main thread alone. */
static int is_main_thread(void)
{
    static _Thread_local unsigned long asked; /* one more than how many forks there were when Linux was asked */
    static _Thread_local int is_main;
    if (asked != fork_epoch + 1)
        is_main = syscall(SYS_gettid) == getpid();
    asked = fork_epoch + 1;
    return is_main;
}

/* Looks for a message while that is worth it, and until `until`; whether one is there. */
static int look(Endpoint *self, int64_t until)
{
    int64_t clock = nanoseconds(), patience = self->ring ? budget_now(&self->budget, clock, crowd_of(&self->ring->duplex)) : 0;
    if (patience > until - clock)
        patience = until - clock;
    if (patience <= 0)
        return 0;
    Duplex *pair = &self->ring->duplex; /* which stays as long as this connection does */
    ptrdiff_t found;
    Py_BEGIN_ALLOW_THREADS
    found = spin_for(&pair, 1, 0, patience);
    Py_END_ALLOW_THREADS
    budget_spun(&self->budget, found, nanoseconds());
    return found >= 0;
}

static void receive_all(Endpoint *self)
{
    if (self->ring)
        queue_note_mail(&self->ring->duplex); /* what has come by now is taken here */
    while (receive_one(self))
        ;
}

/* How it sleeps: on the ring's word, for one system call; where something is to be sent, or there is no ring, by the
 * socket. */
static uint32_t way_to_sleep(const Endpoint *self) { return self->ring && !self->letters ? ON_WORD : ON_SOCKET; }

/* Sleeps until there may be a message, or the socket takes something, or `until`, for a slice at most: then others may
 * have left letters, or the kernel has died. 0: a signal, or the time, ended it. */
static int doze(Endpoint *self, uint32_t how, int64_t until)
{
    int64_t before = nanoseconds();
    if (before + SLICE < until)
        until = before + SLICE;
    short events = self->letters && !self->stalled ? POLLIN | POLLOUT : POLLIN;
    Post post = self->post;
    Duplex *pair = how == ON_WORD ? &self->ring->duplex : NULL;
    int got;
    self->busy++;
    Py_BEGIN_ALLOW_THREADS
    got = !pair ? post_wait(&post, events, until) : queue_has_mail(pair) || queue_sleep(pair, until);
    Py_END_ALLOW_THREADS
    self->busy--;
    if (self->ring) {
        queue_say(&self->ring->duplex, AWAKE);
        budget_slept(&self->budget, nanoseconds() - before);
    }
    if (self->closed && !self->busy)
        post_close(&self->post);
    return got;
}

/* Takes the turn and reads for all, until its own answer is there, a signal comes, or `until`. `ask`: looks for a moment
 * before it sleeps, and comes back then, so that signals are asked for before. Whether it did. */
static int lead(Endpoint *self, Answer *answer, int64_t until, int ask)
{
    int asked = 0;
    self->reader = PyThread_get_thread_ident();
    if (self->armed && self->ring)
        queue_say(&self->ring->duplex, AWAKE);
    self->armed = 0;
    while (answer->outcome == ON_ITS_WAY && !self->end) {
        if (self->ring && queue_has_mail(&self->ring->duplex)) { /* first: others may keep the ring busy for ever */
            receive_all(self);
            continue;
        }
        if (take_from_ring(self))
            continue;
        if (ask) {
            ask = look(self, until);
            if (ask || !is_main_thread())
                continue;
            asked = 1;
            break;
        }
        Duplex *pair = self->ring ? &self->ring->duplex : NULL;
        uint32_t how = way_to_sleep(self);
        if ((how == ON_SOCKET && !is_open(self)) || (pair && !fall_asleep(&pair, 1, how)))
            continue;
        int got = doze(self, how, until);
        flush(self);
        if (how == ON_WORD && got && queue_ready(pair))
            continue;
        if (how == ON_WORD) /* there is mail, or the kernel may have died */
            receive_all(self);
        if (self->end || !got || (how == ON_SOCKET && (got & ~POLLOUT) && !receive_one(self)))
            break;
    }
    give_turn_back(self, NULL);
    return asked;
}

/* Waits while another thread reads, until it is answered, or woken to lead; or a signal comes, or `until`. While its
 * message has not gone it waits for room to send: who reads may sleep. Whether it was woken. */
static int stand_by(Endpoint *self, Answer *answer, int64_t until)
{
    if (nanoseconds() + SLICE < until)
        until = nanoseconds() + SLICE;
    atomic_store_explicit(&answer->word, 0, memory_order_relaxed);
    line_up(self, answer);
    if (self->letters && !answer->sent && !self->stalled) {
        Post post = self->post;
        self->busy++;
        Py_BEGIN_ALLOW_THREADS
        post_wait(&post, POLLOUT, until);
        Py_END_ALLOW_THREADS
        self->busy--;
        if (self->closed && !self->busy)
            post_close(&self->post);
        flush(self);
    } else {
        Py_BEGIN_ALLOW_THREADS
        park(&answer->word, until);
        Py_END_ALLOW_THREADS
    }
    step_out(answer);
    return (int)atomic_load_explicit(&answer->word, memory_order_relaxed);
}

/* Whether the interpreter ends: its other threads never come back. */
static int is_ending(void)
{
    PyObject *ask = PySys_GetObject("is_finalizing"), *answer = ask ? PyObject_CallNoArgs(ask) : NULL;
    int ending = answer && PyObject_IsTrue(answer) == 1;
    Py_XDECREF(answer);
    PyErr_Clear();
    return ending;
}

/* Until it is over. -1 with an exception set: a signal handler's. */
static int wait_for(Endpoint *self, Answer *answer, int64_t until)
{
    int ask = 1;
    while (answer->outcome == ON_ITS_WAY) {
        if (self->reader) {
            ask = 1;
            if (stand_by(self, answer, until)) {
                if (!self->reader && answer->outcome == ON_ITS_WAY)
                    continue; /* it leads, before any Python code runs: nobody else was woken */
            } else if (self->reader && is_main_thread() && is_ending()) {
                self->reader = 0;
            }
        } else {
            ask = !lead(self, answer, until, ask);
        }
        if (settle(self, NULL) || (answer->outcome == ON_ITS_WAY && PyErr_CheckSignals()))
            return -1;
        if (answer->outcome == ON_ITS_WAY && is_here(self) && nanoseconds() >= until)
            answer->outcome = TIMED_OUT;
    }
    return 0;
}
