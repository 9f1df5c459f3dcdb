/* Sleeping on words and mutexes in bare threads, for the sanitizers: the very functions of the C core, without Python.
 *
 *      tokens   one thread gives, others take, and sleep where there is none; nobody sleeps while there is one
 *      mutexes  made of zeros by all who use them, at once; a number that they guard is right, though one of the threads
 *               ends with it each time (not under TSan, which knows nothing of that)
 *
 * Usage: sleep_threads [TOKENS]. Exit status 0: all of it held. */
#define REALMAP_NO_PYTHON
#include "../../../realmap/_core/queue.c"
#include "../../../realmap/_core/spin.c"
#include "../../../realmap/_core/sleep.c"

#include <stdio.h>

#define THREADS 4
#ifdef __SANITIZE_THREAD__
#define DYING 0
#else
#define DYING 1
#endif
#define BOUND 20 /* seconds: who sleeps so long was not woken */

static Spot spot;
static long each;   /* what a thread does */
static long number; /* guarded by the mutex */
static _Atomic int deaths;

static void fail(const char *what)
{
    fprintf(stderr, "%s\n", what);
    abort();
}

static void wait_long(Wait *wait)
{
    int64_t end = nanoseconds() + BOUND * (int64_t)1000000000;
    struct timespec until = {.tv_sec = end / 1000000000, .tv_nsec = end % 1000000000};
    if (look_for(wait, 2000) == 0)
        return;
    wait->sleep(wait, &until);
    if (nanoseconds() >= end)
        fail("nobody woke a sleeper");
}

static void *take(void *ignored)
{
    for (long taken = 0; taken < each;) {
        uint32_t word = atomic_load(&spot.word);
        Wait wait = {.ready = has_changed, .word = &spot.word, .sleepers = &spot.sleepers, .seen = word};
        if (!word)
            wait_long((wait.sleep = sleep_on_word, &wait));
        else if (atomic_compare_exchange_strong(&spot.word, &word, word - 1))
            taken++;
    }
    return ignored;
}

static void *use(void *which)
{
    make_mutex(&spot);
    for (long done = 0; done < each; done++) {
        Wait wait = {.ready = mutex_tried, .sleep = sleep_on_mutex, .mutex = &spot.mutex, .outcome = EBUSY};
        while (!mutex_tried(&wait))
            wait_long(&wait);
        if (wait.outcome == EOWNERDEAD) {
            atomic_fetch_add(&deaths, 1);
            wait.outcome = pthread_mutex_consistent(&spot.mutex);
        }
        if (wait.outcome)
            fail("a mutex was not taken");
        number++;
        if (which && done == each / 2)
            return NULL;
        pthread_mutex_unlock(&spot.mutex);
    }
    return NULL;
}

static void run(void *(*work)(void *), long count)
{
    pthread_t threads[THREADS];
    each = count / THREADS + 1;
    memset(&spot, 0, sizeof spot);
    for (int i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, work, DYING && work == use && !i ? &spot : NULL))
            fail("no thread");
    for (long given = 0; work == take && given < each * THREADS; given++) {
        while (given % 3 == 0 && atomic_load(&spot.word))
            sched_yield();
        atomic_fetch_add(&spot.word, 1);
        wake_sleepers(&spot.word, &spot.sleepers, 1);
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
}

int main(int argc, char **argv)
{
    long count = argc > 1 ? atol(argv[1]) : 100000;
    if (learn_mutex())
        fail("mutexes are made otherwise here");
    run(take, count);
    if (atomic_load(&spot.word) || atomic_load(&spot.sleepers))
        fail("something is left");
    long sum = 0;
    for (int round = 0; round < 20; round++) {
        number = 0;
        run(use, count / 20);
        if (number != THREADS * each - DYING * (each - each / 2 - 1))
            fail("two were in there at once");
        sum += number;
        pthread_mutex_destroy(&spot.mutex);
    }
    int died = atomic_load(&deaths);
    if ((died > 0) != DYING || died > 20)
        fail("who ended with a mutex did not leave it to one");
    printf("%ld tokens, %ld times a mutex, %d deaths\n", count, sum, died);
}
