/* The guard in bare threads, for the sanitizers: the very file of the C core, without Python.
 *
 *      users ×4     map a window, or take the view of one, touch it anywhere, give it back, unmap it; truncate any file
 *      changer      puts handlers of its own over the guard, which pass on what is not theirs
 *      stranger     touches what is gone outside of any window: for those handlers, by way of the guard
 *
 * A mutex stands for the GIL: maps, counts and guards are changed under it, memory is touched without. What holds:
 * nobody dies, what is there is read as it was written, and who reads zeros finds them told of. At last, in a process
 * with no map left, a window gives way. Usage: guard_threads [ROUNDS]: of each user. Exit status 0: all of it held. */
#define REALMAP_NO_PYTHON
#include "../../../realmap/_core/guard.c"

#include <stdio.h>
#include <sys/wait.h>

#define USERS 4
#define WINDOWS 24
#define PAGES 8
#define SLOT ((PAGES + 1) * page_size)
#define MARK 0x5a
#ifdef __SANITIZE_THREAD__
#define LIMITS 1 /* as many maps as Linux allows are dear there, and one thread has no races */
#else
#define LIMITS 4
#endif

#define require(what) ((what) ? (void)0 : fail(#what, __LINE__))

typedef struct {
    int fd;
    uintptr_t base;
    int exports;
    Guarded *guarded; /* while it is mapped */
} Slot;

static pthread_mutex_t gil = PTHREAD_MUTEX_INITIALIZER;
static Slot slots[WINDOWS];
static long rounds;
static _Atomic int users_left = USERS;
static _Atomic long begun; /* rounds, of all users */
static _Atomic long healed; /* by the stranger's handlers */
static uintptr_t strange;   /* two pages of a file that is gone: at one and the same address, time and again, the
                             * guard would lose patience with handlers that do not help */
static struct sigaction below[2];

static void fail(const char *what, int line)
{
    fprintf(stderr, "line %d: not so: %s\n", line, what);
    abort();
}

/* What is touched may be mapped anew by another thread this moment: that is the point, and no race of the guard's. */
__attribute__((no_sanitize("thread"), noinline)) static unsigned char look(uintptr_t at)
{
    return *(volatile unsigned char *)at;
}

__attribute__((no_sanitize("thread"), noinline)) static void mark(uintptr_t base)
{
    for (size_t i = 0; i < PAGES; i++)
        *(volatile unsigned char *)(base + i * page_size) = MARK;
}

static uint64_t next(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

static void map_slot(Slot *slot)
{
    int prot = PROT_READ | PROT_WRITE;
    slot->guarded = guard_take(slot->base, prot, 0);
    require(slot->guarded);
    require(!ftruncate(slot->fd, (off_t)(PAGES * page_size)));
    void *got = mmap((void *)slot->base, PAGES * page_size, prot, MAP_SHARED | MAP_FIXED, slot->fd, 0);
    require(got == (void *)slot->base);
    mark(slot->base); /* nobody truncates it before it is armed */
    guard_arm(slot->guarded, slot->base + PAGES * page_size);
}

static void unmap_slot(Slot *slot)
{
    guard_disarm(slot->guarded);
    void *got = mmap((void *)slot->base, PAGES * page_size, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    require(got == (void *)slot->base); /* its place stays ours, in a program where others map */
    guard_release(slot->guarded);
    slot->guarded = NULL;
}

static void *use(void *number)
{
    uint64_t seed = 0x9e3779b97f4a7c15u * ((uintptr_t)number + 1);
    sigset_t all;
    sigfillset(&all);
    for (long round = 0; round < rounds; round++) {
        Slot *slot = &slots[next(&seed) % WINDOWS];
        atomic_fetch_add(&begun, 1);
        pthread_sigmask(SIG_BLOCK, &all, NULL); /* as a program that waits for its signals by sigwait */
        pthread_mutex_lock(&gil);
        if (!slot->guarded)
            map_slot(slot);
        stand_guard();
        slot->exports++;
        Guarded *guarded = slot->guarded;
        pthread_mutex_unlock(&gil);
        if (next(&seed) % 4 == 0) /* only ever shorter: what grows again is zeros, and nobody is told */
            for (off_t size = (off_t)(next(&seed) % PAGES * page_size); size >= 0; size = -1) {
                struct stat now;
                pthread_mutex_lock(&gil);
                require(!fstat(slot->fd, &now) && (size > now.st_size || !ftruncate(slot->fd, size)));
                pthread_mutex_unlock(&gil);
            }
        for (int i = 0; i < 4; i++) {
            uintptr_t at = slot->base + next(&seed) % PAGES * page_size;
            unsigned char seen = look(at);
            uintptr_t zeros = guard_zeros(guarded);
            require(seen == MARK || (seen == 0 && zeros && zeros <= at));
            require(!zeros || (zeros >= slot->base && zeros < slot->base + PAGES * page_size));
        }
        pthread_mutex_lock(&gil);
        if (--slot->exports == 0 && (guard_zeros(slot->guarded) || next(&seed) % 2))
            unmap_slot(slot);
        pthread_mutex_unlock(&gil);
    }
    atomic_fetch_sub(&users_left, 1);
    return NULL;
}

/* Two of a kind: a handler that knows its own page, and has the rest from whoever had the signal before. */
static void handle(int which, int number, siginfo_t *info, void *context)
{
    uintptr_t at = (uintptr_t)info->si_addr;
    if (at >= strange && at < strange + 2 * page_size) {
        void *got = mmap((void *)at, page_size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        require(got == (void *)at);
        atomic_fetch_add(&healed, 1);
    } else {
        below[which].sa_sigaction(number, info, context);
    }
}

static void handle_first(int number, siginfo_t *info, void *context) { handle(0, number, info, context); }
static void handle_second(int number, siginfo_t *info, void *context) { handle(1, number, info, context); }

static void put_over(int which)
{
    struct sigaction handler = {.sa_sigaction = which ? handle_second : handle_first, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigemptyset(&handler.sa_mask);
    require(!sigaction(SIGBUS, &handler, NULL));
}

/* Lets the users begin another round: one that only maps would keep Linux's lock on the maps from them. 0: they ended. */
static int after_another_round(void)
{
    long seen = atomic_load(&begun);
    while (atomic_load(&users_left) && atomic_load(&begun) == seen)
        sched_yield();
    return atomic_load(&users_left);
}

static void *change(void *ignored)
{
    (void)ignored;
    for (int turn = 0; after_another_round(); turn++) {
        pthread_mutex_lock(&gil);
        put_over(turn % 2);
        stand_guard();
        pthread_mutex_unlock(&gil);
    }
    return NULL;
}

static void *touch_what_is_strange(void *descriptor)
{
    int fd = (int)(intptr_t)descriptor;
    do {
        for (int i = 0; i < 10; i++) {
            void *got = mmap((void *)strange, 2 * page_size, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0);
            require(got == (void *)strange);
            require(look(strange) == 0 && look(strange + page_size) == 0);
        }
    } while (after_another_round());
    return NULL;
}

/* In a process of its own with as many maps as Linux allows, or a few fewer: a window whose middle is gone. */
static void at_the_limit(Slot *slot, int fewer)
{
    map_slot(slot);
    stand_guard();
    void *got, *last = NULL;
    /* Each beside the one before, of other rights than that: so none of them merge. Where very many are allowed, it is
     * a window like any other. */
    for (int i = 0; i < 200000; i++, last = got) {
        got = mmap(NULL, page_size, i % 2 ? PROT_READ : PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (got == MAP_FAILED)
            break;
    }
    for (; fewer && last; fewer--, last = (char *)last + page_size) /* the later one is below */
        munmap(last, page_size);
    uintptr_t gone = slot->base + PAGES / 2 * page_size;
    if (ftruncate(slot->fd, (off_t)page_size) || look(gone) || look(gone + page_size))
        _exit(1);
    uintptr_t zeros = guard_zeros(slot->guarded);
    _exit(zeros != slot->base && zeros != gone ? 2 : look(slot->base) != (zeros == slot->base ? 0 : MARK) ? 3 : 0);
}

/* An empty file that Linux cuts quickly: now and then it hands out one whose every cut takes it a second (seen on 6.18).
 * Such a one stays open, or it would be the next one again. */
static int make_file(void)
{
    for (int tries = 0; tries < 100; tries++) {
        int fd = memfd_create("window", 0);
        char mark = MARK;
        struct timespec before, after;
        require(fd >= 0 && pwrite(fd, &mark, 1, (off_t)((PAGES - 1) * page_size)) == 1);
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &before);
        require(!ftruncate(fd, 0));
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &after);
        if ((after.tv_sec - before.tv_sec) * 1000000000 + after.tv_nsec - before.tv_nsec < 1000000)
            return fd;
    }
    require(!"a file that is cut quickly");
    return -1;
}

int main(int count, char **arguments)
{
    rounds = count > 1 ? atol(arguments[1]) : 20000;
    page_size = (size_t)sysconf(_SC_PAGESIZE);
    size_t room = (WINDOWS + 1) * SLOT;
    uintptr_t place = (uintptr_t)mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    require(place != (uintptr_t)MAP_FAILED);
    alarm(600);
    for (int i = 0; i < WINDOWS; i++) {
        slots[i].base = place + (size_t)i * SLOT;
        slots[i].fd = make_file();
    }
    strange = place + WINDOWS * SLOT;
    int gone = memfd_create("strange", 0);
    require(gone >= 0);
    stand_guard();
    struct sigaction guard_itself;
    require(!sigaction(SIGBUS, NULL, &guard_itself));
    below[0] = below[1] = guard_itself;
    for (int i = 0; i < 2; i++) { /* both are known before anybody needs them */
        put_over(i);
        stand_guard();
    }
    pthread_t threads[USERS + 2];
    for (uintptr_t i = 0; i < USERS; i++)
        require(!pthread_create(&threads[i], NULL, use, (void *)i));
    require(!pthread_create(&threads[USERS], NULL, change, NULL));
    require(!pthread_create(&threads[USERS + 1], NULL, touch_what_is_strange, (void *)(intptr_t)gone));
    for (int i = 0; i < USERS + 2; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < WINDOWS; i++)
        if (slots[i].guarded)
            unmap_slot(&slots[i]);
    require(atomic_load(&guarded_count) <= WINDOWS); /* entries are used again */
    require(atomic_load(&faults) && atomic_load(&healed));
    for (int fewer = 0; fewer < LIMITS; fewer++) {
        pid_t child = fork();
        int status;
        if (!child)
            at_the_limit(&slots[fewer], fewer);
        require(child > 0 && waitpid(child, &status, 0) == child);
        require(WIFEXITED(status) && !WEXITSTATUS(status));
    }
    printf("%ld rounds of %d users: %llu faults of ours, %ld of others\n", rounds, USERS,
           (unsigned long long)atomic_load(&faults), atomic_load(&healed));
    return 0;
}
