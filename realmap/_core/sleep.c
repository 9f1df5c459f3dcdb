/* Sleeping on words and mutexes of shared memory, and how a mutex is made there. No Python in here:
 * tests/hostile/drivers/sleep_threads.c runs it by itself. */
#include "core.h"

/* ---- waiting ----------------------------------------------------------------------------------- */

/* What is waited for: until `ready`, which is asked without the GIL. */
typedef struct Wait {
    int (*ready)(struct Wait *self);
    void (*sleep)(struct Wait *self, const struct timespec *until);
    _Atomic uint32_t *word; /* it has another value than `seen`, */
    _Atomic uint32_t *sleepers;
    uint32_t seen;
    pthread_mutex_t *mutex; /* or this is taken: what came of it */
    int outcome;
} Wait;

static int has_changed(Wait *self)
{
    return atomic_load_explicit(self->word, memory_order_acquire) != self->seen;
}

/* Who changes the word looks for sleepers afterwards, as we look at the word after we are one: with a sequentially
 * consistent fence on both sides, one of the two sees the other. */
static void sleep_on_word(Wait *self, const struct timespec *until)
{
    atomic_fetch_add(self->sleepers, 1);
    atomic_thread_fence(memory_order_seq_cst);
    syscall(SYS_futex, self->word, FUTEX_WAIT_BITSET, self->seen, until, NULL, FUTEX_BITSET_MATCH_ANY);
    atomic_fetch_sub(self->sleepers, 1);
}

/* After the word has changed. */
static void wake_sleepers(_Atomic uint32_t *word, const _Atomic uint32_t *sleepers, int most)
{
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(sleepers, memory_order_relaxed))
        syscall(SYS_futex, word, FUTEX_WAKE, most, NULL, NULL, 0);
}

/* 0: it is ready; OVERLOADED: others want this CPU; -1: not within so many nanoseconds. Without the GIL. */
static ptrdiff_t look_for(Wait *wait, int64_t budget)
{
    int64_t now = nanoseconds(), end = now + budget;
    while (now < end) {
        for (int turn = 0; turn < 32; turn++) {
            pause_cpu();
            if (wait->ready(wait))
                return 0;
        }
        int64_t before = now;
        now = nanoseconds();
        if (now - before > TAKEN)
            return OVERLOADED;
    }
    return -1;
}

static int mutex_tried(Wait *self)
{
    if (self->outcome == EBUSY)
        self->outcome = pthread_mutex_trylock(self->mutex);
    return self->outcome != EBUSY;
}

static void sleep_on_mutex(Wait *self, const struct timespec *until)
{
#ifdef __GLIBC__
    /* It aborts the process where Linux says EFAULT, of a segment that was cut short. So its word, which the robust list
     * makes known to Linux, is slept on by hand. */
    _Static_assert(!offsetof(pthread_mutex_t, __data.__lock), "the word of a mutex is its first");
    _Atomic uint32_t *word = (_Atomic uint32_t *)(void *)self->mutex;
    uint32_t seen = atomic_load(word);
    if (!mutex_tried(self) && seen & FUTEX_TID_MASK && !(seen & FUTEX_OWNER_DIED) &&
        (seen & FUTEX_WAITERS || atomic_compare_exchange_strong(word, &seen, seen | FUTEX_WAITERS)))
        syscall(SYS_futex, word, FUTEX_WAIT_BITSET, seen | FUTEX_WAITERS, until, NULL, FUTEX_BITSET_MATCH_ANY);
    if (mutex_tried(self) && (self->outcome == 0 || self->outcome == EOWNERDEAD))
        atomic_fetch_or(word, FUTEX_WAITERS); /* others may sleep as well */
#else /* a step of the system's clock may lengthen a slice */
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    int64_t then = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec - nanoseconds() +
                   (int64_t)until->tv_sec * 1000000000 + until->tv_nsec;
    now = (struct timespec){.tv_sec = then / 1000000000, .tv_nsec = then % 1000000000};
    self->outcome = pthread_mutex_timedlock(self->mutex, &now);
    if (self->outcome == ETIMEDOUT)
        self->outcome = EBUSY;
#endif
}

/* ---- mutexes ----------------------------------------------------------------------------------- */

/* Of a mutex that pthread_mutex_init has just made, all is zero but for one word: which one, and what it is then. So to
 * make one in shared memory is a single store, which any number of processes may do, and die at. */
static size_t mutex_word;
static uint32_t mutex_made;

/* 0, or an errno: ENOTSUP where this C library makes them otherwise. */
static int learn_mutex(void)
{
    union {
        pthread_mutex_t mutex;
        uint32_t words[sizeof(pthread_mutex_t) / sizeof(uint32_t)];
    } made = {.words = {0}};
    pthread_mutexattr_t how;
    int error = pthread_mutexattr_init(&how), found = 0;
    if (!error)
        error = pthread_mutexattr_setpshared(&how, PTHREAD_PROCESS_SHARED);
    if (!error)
        error = pthread_mutexattr_setrobust(&how, PTHREAD_MUTEX_ROBUST);
    if (!error)
        error = pthread_mutexattr_settype(&how, PTHREAD_MUTEX_ERRORCHECK);
    if (!error)
        error = pthread_mutex_init(&made.mutex, &how);
    if (error)
        return error;
    pthread_mutexattr_destroy(&how);
    for (size_t i = 0; i < sizeof made.words / sizeof *made.words; i++)
        if (made.words[i]) {
            mutex_word = i;
            mutex_made = made.words[i];
            found++;
        }
    pthread_mutex_destroy(&made.mutex);
    return found == 1 ? 0 : ENOTSUP;
}

static void make_mutex(Spot *spot)
{
    _Atomic uint32_t *words = (_Atomic uint32_t *)(void *)&spot->mutex;
    uint32_t none = 0;
    atomic_compare_exchange_strong(&words[mutex_word], &none, mutex_made);
}
