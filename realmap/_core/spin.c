/* Looking for a message for a moment before sleeping: a wake-up across CPUs costs more than most answers take. No
 * Python in here. */
#include "core.h"

static inline void pause_cpu(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* The index of a pair that has a message, looked for from `start` on; -1: none has. */
static ptrdiff_t find_ready(Duplex **pairs, ptrdiff_t count, ptrdiff_t start)
{
    for (ptrdiff_t i = 0; i < count; i++) {
        ptrdiff_t at = start + i < count ? start + i : start + i - count;
        if (queue_ready(pairs[at]))
            return at;
    }
    return -1;
}

/* Between two looks at the clock lie a few microseconds. Where it has gone on for this long, somebody else had
 * this CPU: more processes want to run than there are. */
#define TAKEN 60000
#define OVERLOADED (-2)
#define SAME_CPU (-3)

/* Looks for a message for so many nanoseconds; its index, -1, OVERLOADED, or SAME_CPU: who was heard last runs on
 * this very CPU, and cannot say anything while we look. Without the GIL. */
static ptrdiff_t spin_for(Duplex **pairs, ptrdiff_t count, ptrdiff_t start, int64_t budget)
{
    const Duplex *last = pairs[start ? start - 1 : count - 1];
    if (atomic_load_explicit(&last->in->cpu, memory_order_relaxed) == (uint32_t)sched_getcpu())
        return SAME_CPU;
    int64_t now = nanoseconds(), end = now + budget, taken = TAKEN + 500 * (int64_t)count;
    int turns = count < 32 ? 32 / (int)count : 1;
    while (now < end) {
        for (int turn = 0; turn < turns; turn++) {
            pause_cpu();
            ptrdiff_t found = find_ready(pairs, count, start);
            if (found >= 0)
                return found;
        }
        int64_t before = now;
        now = nanoseconds();
        if (now - before > taken) {
            ptrdiff_t found = find_ready(pairs, count, start);
            return found >= 0 ? found : OVERLOADED;
        }
    }
    return -1;
}

/* Nobody needs to wake us any more. */
static void wake_up(Duplex **pairs, ptrdiff_t count)
{
    for (ptrdiff_t i = 0; i < count; i++)
        queue_say(pairs[i], AWAKE);
}

/* Says to every producer that it has to wake us, and how. 0: a message is there already, and nobody has been told. */
static int fall_asleep(Duplex **pairs, ptrdiff_t count, uint32_t how)
{
    for (ptrdiff_t i = 0; i < count; i++)
        queue_say(pairs[i], how);
    atomic_thread_fence(memory_order_seq_cst);
    if (find_ready(pairs, count, 0) < 0)
        return 1;
    wake_up(pairs, count);
    return 0;
}

/* ---- for how many ------------------------------------------------------------------------- */

/* Of so many messages it is counted how many clients they came from; these are said to each of them, with its answer:
 * where they and the kernel are more than there are CPUs, who spins keeps somebody from working. */
#define CROWD_OF 32

static uint32_t crowd, crowd_now, crowd_turn = 1, crowd_left = CROWD_OF;

/* A message of this client is about to be taken. */
static void count_into_crowd(Duplex *self)
{
    if (self->counted != crowd_turn) {
        self->counted = crowd_turn;
        crowd_now++;
    }
    if (crowd_now > crowd)
        crowd = crowd_now;
    if (!--crowd_left) {
        crowd = crowd_now;
        crowd_now = 0;
        crowd_turn++;
        crowd_left = CROWD_OF;
    }
}

/* ---- how long ----------------------------------------------------------------------------- */

/* As long as it has paid off lately, and CPUs are free. Where it did not pay off the budget halves, down to nothing; a
 * short sleep (it would have paid off) brings it back. Where somebody else took the CPU meanwhile there is no spinning
 * for a while, and for twice as long each time. Times in nanoseconds. */

/* A sleep of up to so many times the budget would not have been one, had both sides been spinning. */
#define PAYS 4
#define PAUSE 10000000
#define LONGEST_PAUSE 1280000000

static void budget_set(Budget *self, uint64_t asked, int cpus)
{
    int64_t most = asked < INT64_MAX / 8 ? (int64_t)asked : INT64_MAX / 8;
    *self = (Budget){.most = most, .now = cpus > 1 ? most : 0, .cpus = (uint32_t)cpus, .pause = PAUSE};
}

/* `crowd`: for how many others the kernel is at work. */
static int64_t budget_now(Budget *self, int64_t clock, uint32_t crowd)
{
    if (crowd > self->cpus)
        return 0;
    if (self->busy_until && clock < self->busy_until)
        return 0;
    self->busy_until = 0;
    return self->now;
}

/* What spinning for all of it has come to, as spin_for says it. */
static void budget_spun(Budget *self, ptrdiff_t found, int64_t clock)
{
    if (found >= 0) {
        self->now = self->most;
    } else if (found == OVERLOADED) {
        int64_t longer = 2 * self->pause < LONGEST_PAUSE ? 2 * self->pause : LONGEST_PAUSE;
        self->pause = clock - self->seen_busy > 8 * self->pause ? PAUSE : longer;
        self->seen_busy = clock;
        self->busy_until = clock + self->pause;
    } else if (found != SAME_CPU) {
        self->now = self->now > 2000 ? self->now / 2 : 0;
    }
}

/* It came after a sleep of this length, which is one wake-up more than until it came. */
static void budget_slept(Budget *self, int64_t length)
{
    if (length < PAYS * self->most && self->cpus > 1)
        self->now = self->most;
}
