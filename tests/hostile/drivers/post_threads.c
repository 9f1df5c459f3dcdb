/* Parking and datagrams in bare threads, for the sanitizers: the very functions of the C core, without Python.
 *
 *      news:   one thread hands numbers to others, which are parked until each is there; none may miss its own
 *      stolen: the socket's number is taken by a file of somebody else's; nothing of that is written, read or closed
 *
 * Usage: post_threads [NUMBERS]. Exit status 0: all of them came, and in time. */
#define REALMAP_NO_PYTHON
#include "../../../realmap/_core/queue.c"
#include "../../../realmap/_core/post.c"

#include <stdio.h>

#define THREADS 4

typedef struct {
    _Atomic uint32_t word;
    long given; /* written before it is unparked */
    long taken;
} Parked;

static Parked parked[THREADS];
static Post ends[2];
static long numbers;

static void fail(const char *what)
{
    fprintf(stderr, "%s\n", what);
    abort();
}

/* Takes its numbers, and answers each by a datagram. */
static void *take(void *which)
{
    Parked *self = which;
    for (long number = 1; number <= numbers; number++) {
        while (!atomic_load_explicit(&self->word, memory_order_acquire))
            park(&self->word, nanoseconds() + 10000000000);
        if (self->given != number)
            fail("a number was missed, or came twice");
        atomic_store_explicit(&self->word, 0, memory_order_relaxed);
        int error;
        while ((error = post_send(&ends[1], 0, (const char *)&number, sizeof number)) == EAGAIN)
            sched_yield();
        if (error)
            fail("a datagram was not sent");
    }
    return NULL;
}

static void hand_out(void)
{
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, take, &parked[i]))
            fail("no thread");
    for (long number = 1; number <= numbers; number++) {
        for (int i = 0; i < THREADS; i++) {
            parked[i].given = number;
            unpark(&parked[i].word);
        }
        for (int i = 0; i < THREADS;) {
            char datagram[64];
            int fds[MAX_DESCRIPTORS], count;
            if (!post_wait(&ends[0], POLLIN, nanoseconds() + 10000000000))
                fail("no answer within 10 s");
            if (post_receive(&ends[0], datagram, sizeof datagram, fds, &count) == 1 + sizeof number)
                i++;
        }
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
}

static void know(Post *self, int fd)
{
    struct stat status;
    fstat(fd, &status);
    *self = (Post){fd, status.st_dev, status.st_ino};
}

int main(int count, char **arguments)
{
    int pair[2], other[2];
    numbers = count > 1 ? atol(arguments[1]) : 20000;
    alarm(600);
    if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) || pipe(other))
        return 2;
    know(&ends[0], pair[0]);
    know(&ends[1], pair[1]);
    hand_out();
    if (!post_is_ours(&ends[0]) || dup2(other[1], pair[0]) < 0 || post_is_ours(&ends[0]))
        fail("a file of somebody else's is taken for the socket");
    post_close(&ends[0]);
    if (write(pair[0], "!", 1) != 1)
        fail("a file of somebody else's was closed");
    printf("%ld numbers to each of %d threads\n", numbers, THREADS);
    return 0;
}
