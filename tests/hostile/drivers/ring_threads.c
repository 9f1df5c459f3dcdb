/* The ring's queues in two bare threads, for ThreadSanitizer: the very functions of the C core, without Python.
 *
 *      main thread ── numbered messages ──▶ echo thread ── the same ──▶ main thread
 *
 * Each side sleeps on its word where it finds nothing, and is woken as in the core: what is lost shows as an alarm.
 * Usage: ring_threads [MESSAGES]. Exit status 0: all of them came back, in order and whole. */
#define REALMAP_NO_PYTHON
#include "../../../realmap/_core/queue.c"
#include "../../../realmap/_core/spin.c"

#include <stdio.h>
#include <stdlib.h>

typedef struct {
    Duplex ring;
} Side;

static Queue queues[2];
static Side sides[2];
static long messages;

static size_t make(unsigned char *message, uint64_t number)
{
    size_t size = sizeof number + number % 1500;
    memcpy(message, &number, sizeof number);
    for (size_t i = sizeof number; i < size; i++)
        message[i] = (unsigned char)(number * 31 + i);
    return size;
}

static void put(Side *side, const unsigned char *message, size_t size)
{
    int asleep;
    while ((asleep = queue_push(&side->ring, (const char *)message, size)) < 0)
        sched_yield();
    queue_wake(&side->ring, (uint32_t)asleep, -1);
}

static uint32_t take(Side *side, unsigned char *message)
{
    const char *data;
    uint32_t size;
    Duplex *ring = &side->ring;
    for (int spins = 0;; spins++) {
        int64_t there = queue_peek(ring, &data, &size);
        if (there < 0)
            abort();
        if (there)
            break;
        if (spins < 50) {
            pause_cpu();
            continue;
        }
        queue_say(ring, ON_WORD);
        atomic_thread_fence(memory_order_seq_cst);
        if (!queue_ready(ring))
            queue_sleep(ring, nanoseconds() + 1000000000000);
        queue_say(ring, AWAKE);
        spins = 0;
    }
    memcpy(message, data, size);
    queue_done(ring);
    return size;
}

static void *echo(void *ignored)
{
    unsigned char message[RING_MESSAGE];
    (void)ignored;
    for (long i = 0; i < messages; i++) {
        uint32_t size = take(&sides[1], message);
        put(&sides[1], message, size);
    }
    return NULL;
}

int main(int count, char **arguments)
{
    messages = count > 1 ? atol(arguments[1]) : 100000;
    for (int i = 0; i < 2; i++) {
        sides[i].ring.in = &queues[1 - i];
        sides[i].ring.out = &queues[i];
    }
    alarm(600);
    pthread_t thread;
    if (pthread_create(&thread, NULL, echo, NULL))
        return 2;
    unsigned char sent[RING_MESSAGE], got[RING_MESSAGE];
    for (long done = 0, begun = 0; done < messages;) {
        long ahead = 1 + begun % (RING_SLOTS - 1); /* bursts of every size: the queues run full and empty */
        for (; begun < messages && begun < done + ahead; begun++)
            put(&sides[0], sent, make(sent, (uint64_t)begun));
        for (; done < begun; done++) {
            size_t size = make(sent, (uint64_t)done);
            if (take(&sides[0], got) != size || memcmp(sent, got, size)) {
                fprintf(stderr, "message %ld came back otherwise\n", done);
                return 1;
            }
        }
    }
    pthread_join(thread, NULL);
    printf("%ld messages there and back, in order and whole\n", messages);
    return 0;
}
