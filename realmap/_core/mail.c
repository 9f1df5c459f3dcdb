/* What an endpoint sends and receives: letters on their way out, answers handed to who asked.
 *
 *      request ──▶ ring, where it fits and the kernel is awake ──▶ kernel
 *           └────▶ letters ──▶ socket, in parts where it is long ──┘
 *      kernel ──▶ ring, socket ──▶ the table finds its Answer ──▶ who waits for it is woken
 *
 * Letters are sent in order, and a long one as a whole before the next: the parts of two never mix, whoever comes in
 * between. Nothing here runs Python code: what would (an object that goes, a loop that is woken) is left in `over` and
 * `bell`, for `settle` (turn.c), when the turn has been given back. */
#include "connection.h"

#define CHUNK_BYTES 65536 /* that one datagram carries: wire/channel.py */

/* How long a thread waits in one system call, in nanoseconds: a signal that comes right before the call is seen then. */
#define SLICE 50000000

enum flag { WHOLE, FIRST, MIDDLE, LAST, BELL_FLAG }; /* wire/channel.py */

/* ---- who waits ------------------------------------------------------------------------------ */

static void line_up(Endpoint *self, Answer *answer)
{
    Answer **at = &self->waiting;
    while (*at)
        at = &(*at)->next;
    answer->at = at;
    answer->next = NULL;
    *at = answer;
}

static void step_out(Answer *answer)
{
    if (!answer->at)
        return;
    *answer->at = answer->next;
    if (answer->next)
        answer->next->at = answer->at;
    answer->at = NULL;
}

/* It is over, as `outcome` says: whoever waits for it is woken, and the table's reference let go later. */
static void finish(Endpoint *self, Answer *answer, enum outcome outcome)
{
    if (answer->outcome == ON_ITS_WAY)
        answer->outcome = (char)outcome;
    if (answer->at && !answer->bell)
        unpark(&answer->word);
    step_out(answer);
    for (Letter *at = self->letters; at; at = at->next)
        if (at->answer == answer) /* answered before it was sent as a whole */
            at->answer = NULL;
    if (answer->pending) {
        answer->pending = 0;
        table_remove(&self->table, &answer->node);
        answer->after = self->over;
        self->over = answer;
    }
}

static void drop_letter(Endpoint *self, Letter **at)
{
    Letter *letter = *at;
    *at = letter->next;
    if (!*at)
        self->last = at;
    Py_DECREF(letter->message);
    free(letter);
}

/* Whether nobody can have read a request: not all of it was sent, or it is in the ring still. */
static int is_unread(const Endpoint *self, const Answer *answer)
{
    if (!answer->sent || answer->unread)
        return 1;
    return answer->by_ring && self->epoch == fork_epoch && !queue_took(&self->ring->duplex, answer->turn);
}

/* The connection is of no use any more, as `end` says: everybody who waits is told. Again: nothing. */
static void end_connection(Endpoint *self, int end)
{
    if (self->end)
        return;
    self->end = end;
    if (self->ring && self->epoch == fork_epoch)
        queue_stir(&self->ring->duplex); /* who reads, on another thread */
    while (self->letters)
        drop_letter(self, &self->letters);
    for (size_t i = 0; i <= self->table.mask; i++)
        while (self->table.buckets[i]) {
            Answer *answer = OWNER(Answer, node, self->table.buckets[i]);
            answer->unread = (char)is_unread(self, answer);
            finish(self, answer, ENDED);
        }
    unmap_stock(self);
}

/* Whether it has not ended, and this is no forked child. */
static int is_here(Endpoint *self)
{
    if (!self->end && self->epoch != fork_epoch)
        end_connection(self, LOST_IN_CHILD);
    return !self->end;
}

/* Whether the socket may be used: it is this connection's, here, and nobody has taken its number. */
static int is_open(Endpoint *self)
{
    if (is_here(self) && !post_is_ours(&self->post))
        end_connection(self, STOLEN);
    return !self->end;
}

/* ---- sending -------------------------------------------------------------------------------- */

static int receive_one(Endpoint *self);
static int take_from_ring(Endpoint *self);

/* Sends what waits, as far as the socket takes it now. */
static void flush(Endpoint *self)
{
    while (self->letters && is_open(self)) {
        Letter *letter = self->letters;
        Answer *answer = letter->answer;
        char *data = PyBytes_AsString(letter->message);
        size_t all = (size_t)PyBytes_Size(letter->message), size = all - letter->at;
        enum flag flag = all <= CHUNK_BYTES ? WHOLE : !letter->at ? FIRST : size > CHUNK_BYTES ? MIDDLE : LAST;
        size = size > CHUNK_BYTES ? CHUNK_BYTES : size;
        int error = post_send(&self->post, (unsigned char)flag, data + letter->at, size);
        self->stalled = error == ENOBUFS || error == ENOMEM;
        if (!error) {
            letter->at += size;
            if (letter->at < all)
                continue;
            if (answer)
                answer->sent = 1;
            if (self->ring && (!answer || answer->ordered))
                queue_mailed(&self->ring->duplex); /* a request that goes by the ring later does not come before it */
            drop_letter(self, &self->letters);
        } else if (self->stalled && answer) { /* its sender may know what to do */
            drop_letter(self, &self->letters);
            answer->error = error;
            finish(self, answer, FAILED);
        } else if (error == EPIPE || error == ECONNRESET) {
            /* The kernel may have said why before it closed: whoever reads finds out, and that there is no more. */
            for (; self->letters; drop_letter(self, &self->letters))
                if (self->letters->answer)
                    self->letters->answer->sent = self->letters->answer->unread = 1;
            if (self->reader && self->reader != PyThread_get_thread_ident())
                return;
            while (receive_one(self))
                ;
            end_connection(self, DIED);
            return;
        } else {
            if (error != EAGAIN && !self->stalled)
                end_connection(self, ERRNO + error);
            return;
        }
    }
}

/* Sends a message, by the ring or after the letters that wait; later what cannot be sent now. -1: no memory. */
static int post_message(Endpoint *self, PyObject *message, Answer *answer)
{
    size_t size = (size_t)PyBytes_Size(message);
    if (self->end || self->epoch != fork_epoch)
        return 0; /* nobody is there to be told */
    if (!self->letters && self->ring && size <= queue_room(&self->ring->duplex) &&
        !peer_sleeps(&self->ring->duplex)) {
        int asleep = queue_push(&self->ring->duplex, PyBytes_AsString(message), size);
        if (asleep != AWAKE && is_open(self)) /* it fell asleep this moment */
            queue_wake(&self->ring->duplex, ON_SOCKET, self->post.fd);
        if (answer) {
            answer->sent = answer->by_ring = 1;
            answer->turn = self->ring->duplex.out_tail;
        }
        return 0;
    }
    Letter *letter = calloc(1, sizeof *letter);
    if (!letter)
        return -1;
    letter->message = Py_NewRef(message);
    letter->answer = answer;
    *self->last = letter;
    self->last = &letter->next;
    flush(self);
    return 0;
}

/* Nobody waits for it any more. What was not sent as a whole is not sent at all; else the answer is still to come. */
static void abandon(Endpoint *self, Answer *answer)
{
    answer->abandoned = 1;
    step_out(answer);
    if (!answer->pending || answer->sent)
        return;
    for (Letter **at = &self->letters; *at; at = &(*at)->next)
        if ((*at)->answer == answer) {
            drop_letter(self, at);
            break;
        }
    finish(self, answer, ENDED);
}

/* ---- receiving ------------------------------------------------------------------------------ */

/* The number of a message: its third byte on, as MessagePack writes unsigned integers. 0 where it has none. */
static uint64_t number_of(const unsigned char *data, size_t size)
{
    size_t width = size < 3 ? 0 : data[2] == 0xcc ? 1 : data[2] == 0xcd ? 2 : data[2] == 0xce ? 4 : data[2] == 0xcf ? 8 : 0;
    uint64_t number = size > 2 && data[2] < 0x80 ? data[2] : 0;
    for (size_t i = 0; i < width && 3 + i < size; i++)
        number = number << 8 | data[3 + i];
    return number;
}

/* The descriptors of an answer were sent by the socket before it came by the ring: they are there. */
static void await_carrier(Endpoint *self, Answer *answer)
{
    int64_t until = nanoseconds() + 2 * (int64_t)SLICE;
    while (!answer->carried && !self->end)
        if (!receive_one(self) && !post_wait(&self->post, POLLIN, until) && nanoseconds() >= until)
            end_connection(self, NONSENSE);
}

/* Hands a message to who waits for it; its descriptors are taken over. Copied first: what is in the ring may change. */
static void dispatch(Endpoint *self, const char *data, size_t size, int by_ring, const int *fds, int count)
{
    PyObject *copy = PyBytes_FromStringAndSize(data, (Py_ssize_t)size);
    if (!copy) {
        PyErr_Clear();
        close_all((int *)fds, count);
        end_connection(self, ERRNO + ENOMEM);
        return;
    }
    if (by_ring)
        queue_done(&self->ring->duplex);
    const unsigned char *bytes = (const unsigned char *)PyBytes_AsString(copy);
    enum tag tag = size > 1 && (bytes[0] & 0xf0) == 0x90 ? (enum tag)bytes[1] : OTHER; /* a map: the handshake's */
    uint64_t number = tag == OTHER || tag == BYE ? 0 : number_of(bytes, size);
    Node *node = table_find(&self->table, number);
    if (!node)
        node = table_find(&self->table, 0); /* the handshake: whatever is said is the answer */
    Answer *answer = node ? OWNER(Answer, node, node) : NULL;
    if (answer)
        answer_take_descriptors(answer, fds, count);
    else
        close_all((int *)fds, count);
    if (tag == CARRIER && answer)
        answer->carried = 1;
    if (tag == CARRIER || (!answer && tag != BYE)) { /* what was given up before it was sent as a whole */
        Py_DECREF(copy);
    } else if (tag == BYE) {
        Py_XDECREF(self->bye);
        self->bye = copy;
        end_connection(self, SAID_BYE);
    } else {
        /* The last byte of Done is how many descriptors belong to it. */
        if (tag == DONE && by_ring && bytes[size - 1] && !answer->carried)
            await_carrier(self, answer);
        Py_XDECREF(answer->data);
        answer->data = copy;
        finish(self, answer, ANSWERED);
    }
}

/* Puts the parts of a long message together. */
static void assemble(Endpoint *self, enum flag flag, const char *data, size_t size, const int *fds, int count)
{
    if (flag == FIRST)
        self->size = 0; /* what came before was of a sender who was interrupted there */
    if (!size || self->size + size > MESSAGE_BYTES) {
        close_all((int *)fds, count);
        end_connection(self, NONSENSE);
        return;
    }
    if (self->size + size > self->room) {
        size_t room = 2 * (self->size + size);
        char *wider = realloc(self->message, room);
        if (!wider) {
            close_all((int *)fds, count);
            end_connection(self, ERRNO + ENOMEM);
            return;
        }
        self->message = wider;
        self->room = room;
    }
    memcpy(self->message + self->size, data, size);
    self->size += size;
    if (flag != LAST) {
        close_all((int *)fds, count); /* they come with the last part */
        return;
    }
    dispatch(self, self->message, self->size, 0, fds, count);
    free(self->message);
    self->message = NULL;
    self->size = self->room = 0;
}

/* Takes a datagram that is there, and hands on what it brings; 0: none is. Only whose turn it is. */
static int receive_one(Endpoint *self)
{
    int fds[MAX_DESCRIPTORS], count;
    if (!is_open(self))
        return 0;
    if (!self->datagram && !(self->datagram = malloc(CHUNK_BYTES + 2)))
        return 0; /* it is still there */
    ssize_t got = post_receive(&self->post, self->datagram, CHUNK_BYTES + 2, fds, &count);
    if (got == -EAGAIN || got == -ENOMEM || got == -ENOBUFS)
        return 0;
    if (got == -ECONNRESET) /* said once, and before what the other side had sent */
        return 1;
    if (got <= 0) {
        take_from_ring(self); /* its last words */
        end_connection(self, DIED);
        return 0;
    }
    enum flag flag = (enum flag)self->datagram[0];
    const char *data = self->datagram + 1;
    size_t size = (size_t)got - 1;
    if (flag == WHOLE && size <= CHUNK_BYTES) {
        dispatch(self, data, size, 0, fds, count);
    } else if (flag == FIRST || ((flag == MIDDLE || flag == LAST) && self->message)) {
        assemble(self, flag, data, size, fds, count);
    } else {
        close_all(fds, count);
        if (flag != BELL_FLAG)
            end_connection(self, NONSENSE);
    }
    return 1;
}

/* Hands on what is in the ring; whether anything was. Only whose turn it is. */
static int take_from_ring(Endpoint *self)
{
    const char *data;
    uint32_t size;
    int64_t there = 0;
    int any = 0;
    while (!self->end && self->ring && (there = queue_peek(&self->ring->duplex, &data, &size)) > 0) {
        dispatch(self, data, size, 1, NULL, 0);
        any = 1;
    }
    if (there < 0)
        end_connection(self, NONSENSE);
    return any;
}
