/* Queue: messages in shared memory, one way. No Python in here: tests/hostile/drivers/ring_threads.c runs it by itself.
 *
 * Two queues, each with one producer and one consumer, in memory that both sides may write:
 *
 *      user    ── calls ────▶  kernel        queue 0
 *      user    ◀── answers ──  kernel        queue 1
 *
 *      tail ─▶ the producer's count of messages     asleep ─▶ how the consumer sleeps, or is about to; 0: it does not
 *      head ─▶ the consumer's count                 mailed ─▶ the producer's count of what it sent by the socket
 *
 * Each side keeps its own counts where the other cannot reach them; what the other side wrote is
 * read once, then checked. A peer that scribbles here is found out, and hurts only itself.
 *
 * Publishing and the sleep flag: the producer stores tail and then looks at asleep, the consumer
 * stores asleep and then looks at tail. Both need a sequentially consistent fence in between, or
 * each can miss the other's store (on x86 too), and a wake-up is lost.
 *
 * Order: what was sent by the socket (the consumer slept, the ring was full) is counted in mailed before the next
 * tail, so whoever sees that tail reads the socket first. */
#include "core.h"

#define BELL 4 /* wire/channel.py */
#define BELL_TRIES 100

static long futex(_Atomic uint32_t *word, int what, uint32_t value, const struct timespec *until)
{
    return syscall(SYS_futex, word, what, value, until, NULL, FUTEX_BITSET_MATCH_ANY);
}

/* Whoever sees it asleep wakes it; of several, one. The word it sleeps on is not waited for any more then, so that who
 * is about to sleep on it does not; how it is to be woken. */
static uint32_t queue_rouse(Duplex *self)
{
    atomic_thread_fence(memory_order_seq_cst);
    if (!atomic_load_explicit(&self->out->asleep, memory_order_relaxed))
        return AWAKE;
    return atomic_exchange(&self->out->asleep, AWAKE);
}

/* -1: it does not fit (now, or ever); else it is there, and how the other side must be woken. */
static int queue_push(Duplex *self, const char *data, size_t length)
{
    uint32_t used = self->out_tail - atomic_load_explicit(&self->out->head, memory_order_acquire);
    if (length > RING_MESSAGE || used >= RING_SLOTS)
        return -1;
    Head *head = &self->out->heads[self->out_tail % RING_SLOTS];
    head->size = (uint32_t)length;
    memcpy(length > SHORT_MESSAGE ? self->out->slots[self->out_tail % RING_SLOTS] : head->bytes, data, length);
    self->out_tail++;
    atomic_store_explicit(&self->out->cpu, (uint32_t)sched_getcpu(), memory_order_relaxed);
    atomic_store_explicit(&self->out->tail, self->out_tail, memory_order_release);
    return (int)(queue_rouse(self) & INT_MAX);
}

/* Whether the other side sleeps: where it must be woken by the socket in any case, a message had better go there. */
static int peer_sleeps(const Duplex *self)
{
    return atomic_load_explicit(&self->out->asleep, memory_order_relaxed) != AWAKE;
}

static int queue_ready(const Duplex *self)
{
    return atomic_load_explicit(&self->in->tail, memory_order_acquire) != self->in_head;
}

/* The next message, and how many there are; -1 where the other side's indices lie. */
static int64_t queue_peek(const Duplex *self, const char **data, uint32_t *size)
{
    uint32_t there = atomic_load_explicit(&self->in->tail, memory_order_acquire) - self->in_head;
    *size = 0;
    if (!there)
        return 0;
    const Head *head = &self->in->heads[self->in_head % RING_SLOTS];
    /* Read once, then checked: the other side may be changing it this moment. */
    *size = *(const volatile uint32_t *)&head->size;
    *data = (const char *)(*size > SHORT_MESSAGE ? self->in->slots[self->in_head % RING_SLOTS] : head->bytes);
    return there > RING_SLOTS || *size > RING_MESSAGE ? -1 : (int64_t)there;
}

/* The message was copied: its slot is free. */
static void queue_done(Duplex *self)
{
    self->in_head++;
    atomic_store_explicit(&self->in->head, self->in_head, memory_order_release);
}

/* How many bytes it would take now: 0 where it is full. */
static size_t queue_room(const Duplex *self)
{
    uint32_t used = self->out_tail - atomic_load_explicit(&self->out->head, memory_order_acquire);
    return used < RING_SLOTS ? RING_MESSAGE : 0;
}

/* Whether the other side has taken so many messages, as far as it says so. */
static int queue_took(const Duplex *self, uint32_t count)
{
    return (int32_t)(atomic_load_explicit(&self->out->head, memory_order_acquire) - count) >= 0;
}

/* Something was sent by the socket, before whatever goes by the queue from now on: tail, stored later, releases it. */
static void queue_mailed(Duplex *self) { atomic_fetch_add_explicit(&self->out->mailed, 1, memory_order_relaxed); }

/* Something was sent by the socket, to one that may sleep on its word: it counts that after it has said so, as it looks
 * for messages, so either sees the other. Who waits for its socket is not touched: it may have read, and wait anew. */
static void queue_tell_of_mail(Duplex *self)
{
    uint32_t on_word = ON_WORD;
    queue_mailed(self);
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_compare_exchange_strong(&self->out->asleep, &on_word, AWAKE))
        futex(&self->out->asleep, FUTEX_WAKE, 1, NULL);
}

/* Whether something was sent by the socket since that was noted. */
static int queue_has_mail(const Duplex *self)
{
    return atomic_load_explicit(&self->in->mailed, memory_order_acquire) != self->in_mailed;
}

/* It is about to be read. */
static void queue_note_mail(Duplex *self)
{
    self->in_mailed = atomic_load_explicit(&self->in->mailed, memory_order_acquire);
}

/* For how many others the other side is at work. */
static uint32_t crowd_of(const Duplex *self) { return atomic_load_explicit(&self->in->crowd, memory_order_relaxed); }

static void queue_say(Duplex *self, uint32_t asleep)
{
    atomic_store_explicit(&self->in->asleep, asleep, memory_order_relaxed);
}

/* Sleeps on the word until the other side wakes this one, a signal comes, or `until` (monotonic clock); whether it was
 * woken. */
static int queue_sleep(Duplex *self, int64_t until)
{
    struct timespec limit = {.tv_sec = until / 1000000000, .tv_nsec = until % 1000000000};
    futex(&self->in->asleep, FUTEX_WAIT_BITSET, ON_WORD, &limit);
    return atomic_load_explicit(&self->in->asleep, memory_order_relaxed) != ON_WORD;
}

/* Wakes this side's own sleeper, from another thread. */
static void queue_stir(Duplex *self)
{
    if (atomic_exchange(&self->in->asleep, AWAKE) == ON_WORD)
        futex(&self->in->asleep, FUTEX_WAKE, 1, NULL);
}

static int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Wakes who sleeps, as it said. Where a bell cannot be sent there is unread mail, which wakes as well, or nobody any
 * more. */
static void queue_wake(Duplex *self, uint32_t asleep, int socket)
{
    if (asleep == AWAKE)
        return;
    if (asleep == ON_WORD) {
        futex(&self->out->asleep, FUTEX_WAKE, 1, NULL);
        return;
    }
    int tries = BELL_TRIES; /* Linux may have no memory this moment */
    while (send(socket, (const char[]){BELL}, 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && tries-- &&
           (errno == ENOBUFS || errno == ENOMEM || errno == EINTR))
        sched_yield();
}
