/* A process that knows nothing of realmap, and does what it is told by lines on its standard input; it answers each.
 *
 * map KIND PAGES ADDRESS FLAGS   posix, memfd, sysv, anonymous, file, private, huge, ring; at ADDRESS, 0: anywhere. FLAGS: k keeps the
 *                                descriptor, u unlinks the name, r maps it read-only, l leaves a page of the file before it
 *                                → address, descriptor (-1), name
 * fill ADDRESS LENGTH SEED · get ADDRESS · put ADDRESS BYTE · unmap ADDRESS LENGTH · protect ADDRESS LENGTH PROT
 * truncate DESCRIPTOR LENGTH · exec · vfork · leave · race SEED (maps, unmaps, truncates, execs without end; started by `race SEED` as well) */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <signal.h>
#include <unistd.h>

#define PAGE 4096UL
#define SLOTS 8
#define SLOT_PAGES 4
#define SLOT(n) ((char *)(0x500000000000UL + (unsigned long)(n) * SLOT_PAGES * PAGE))

static char name[256];

static void die(const char *what)
{
    perror(what);
    _exit(3);
}

static int open_kind(const char *kind, const char *flags)
{
    static int count;
    int fd;
    snprintf(name, sizeof name, "-");
    if (!strcmp(kind, "memfd"))
        return memfd_create("stranger \n\\012's", MFD_CLOEXEC);
    if (!strcmp(kind, "posix")) {
        snprintf(name, sizeof name, "/stranger.%d.%d", getpid(), count++);
        fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
        if (strchr(flags, 'u'))
            shm_unlink(name);
        return fd;
    }
    snprintf(name, sizeof name, "%s/stranger.%d.%d", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp", getpid(), count++);
    fd = open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (strchr(flags, 'u'))
        unlink(name);
    return fd;
}

static char *map(const char *kind, size_t length, char *at, const char *flags, int *fd)
{
    int prot = strchr(flags, 'r') ? PROT_READ : PROT_READ | PROT_WRITE, fixed = at ? MAP_FIXED : 0;
    size_t lead = strchr(flags, 'l') ? PAGE : 0;
    void *made;
    *fd = -1;
    snprintf(name, sizeof name, "-");
    if (!strcmp(kind, "huge")) {
        *fd = memfd_create("huge", MFD_HUGETLB);
        if (ftruncate(*fd, (off_t)length))
            die(kind);
        made = mmap(at, length, prot, MAP_SHARED, *fd, 0);
    } else if (!strcmp(kind, "ring")) { /* of asynchronous I/O: shared, and no memory of anybody's */
        unsigned long ring = 0;
        if (syscall(SYS_io_setup, 8, &ring))
            die(kind);
        made = (void *)ring;
    } else if (!strcmp(kind, "sysv")) {
        int id = shmget(IPC_PRIVATE, length, 0600);
        made = shmat(id, at, (prot & PROT_WRITE ? 0 : SHM_RDONLY) | (at ? SHM_REMAP : 0));
        shmctl(id, IPC_RMID, NULL);
    } else if (!strcmp(kind, "anonymous") || !strcmp(kind, "private")) {
        made = mmap(at, length, prot, (*kind == 'a' ? MAP_SHARED : MAP_PRIVATE) | MAP_ANONYMOUS | fixed, -1, 0);
    } else {
        if ((*fd = open_kind(kind, flags)) < 0 || ftruncate(*fd, (off_t)(lead + length)))
            die(kind);
        made = mmap(at, length, prot, MAP_SHARED | fixed, *fd, (off_t)lead);
        if (!strchr(flags, 'k')) {
            close(*fd);
            *fd = -1;
        }
    }
    if (made == MAP_FAILED)
        die("map");
    return made;
}

static void fill(unsigned char *at, size_t length, unsigned seed)
{
    for (size_t i = 0; i < length; i++)
        at[i] = (unsigned char)(i * 7 + (i >> 8) * 13 + seed);
}

/* Each word of a page in a slot says whose it is, and which. */
static void race(unsigned seed)
{
    static const char *kinds[] = {"memfd", "posix", "anonymous", "file", "memfd"};
    int fds[SLOTS];
    size_t pages[SLOTS]; /* it only ever shrinks: what grew again would be zeros that are right */
    memset(fds, -1, sizeof fds);
    puts("racing");
    for (unsigned round = 1;; round++) {
        int slot = rand_r(&seed) % SLOTS, what = rand_r(&seed) % 100;
        if (what < 50) {
            int fd;
            char *made = map(kinds[rand_r(&seed) % 5], SLOT_PAGES * PAGE, NULL, "ku", &fd);
            for (size_t i = 0; i < SLOT_PAGES * PAGE / 8; i++)
                ((uint64_t *)(void *)made)[i] = (uint64_t)getpid() << 32 | (uint64_t)slot << 16 | (i * 8 / PAGE + 1);
            if (mremap(made, SLOT_PAGES * PAGE, SLOT_PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, SLOT(slot)) == MAP_FAILED)
                die("mremap");
            if (fds[slot] >= 0)
                close(fds[slot]);
            fds[slot] = fd;
            pages[slot] = SLOT_PAGES;
        } else if (what < 80) {
            munmap(SLOT(slot), (size_t)(1 + rand_r(&seed) % SLOT_PAGES) * PAGE);
        } else if (what < 99) {
            if (fds[slot] >= 0 && ftruncate(fds[slot], (off_t)((pages[slot] = (size_t)rand_r(&seed) % (pages[slot] + 1)) * PAGE)))
                die("ftruncate");
        } else {
            char text[16];
            snprintf(text, sizeof text, "%u", seed);
            execl("/proc/self/exe", "stranger", "race", text, NULL);
            die("exec");
        }
    }
}

static void *serve(void *);

static void *go_on(void *first)
{
    pthread_join((pthread_t)first, NULL);
    puts("0");
    return serve(NULL);
}

static void *serve(void *unused)
{
    char line[512], verb[32], kind[32], flags[32];
    unsigned long a, b, c;
    while (fgets(line, sizeof line, stdin)) {
        a = b = c = 0;
        strcpy(flags, "");
        if (sscanf(line, "map %31s %lu %lu %31s", kind, &a, &b, flags) >= 3) {
            int fd;
            char *made = map(kind, a * PAGE, (char *)b, flags, &fd);
            printf("%lu %d %s\n", (unsigned long)made, fd, name);
            continue;
        }
        if (sscanf(line, "%31s %lu %lu %lu", verb, &a, &b, &c) < 1)
            die("what?");
        int failed = 0;
        if (!strcmp(verb, "fill"))
            fill((unsigned char *)a, b, (unsigned)c);
        else if (!strcmp(verb, "get"))
            failed = *(unsigned char *)a;
        else if (!strcmp(verb, "put"))
            *(unsigned char *)a = (unsigned char)b;
        else if (!strcmp(verb, "unmap"))
            failed = munmap((void *)a, b);
        else if (!strcmp(verb, "protect"))
            failed = mprotect((void *)a, b, (int)c);
        else if (!strcmp(verb, "truncate"))
            failed = ftruncate((int)a, (off_t)b);
        else if (!strcmp(verb, "exec"))
            execl("/proc/self/exe", "stranger", NULL);
        else if (!strcmp(verb, "vfork")) { /* a child with its memory, until a line comes; this one does nothing more */
            if (!vfork()) {
                dprintf(1, "%d\n", getpid());
                if (read(0, line, sizeof line) > 0)
                    execl("/proc/self/exe", "stranger", NULL);
                _exit(3);
            }
            for (;;)
                pause();
        } else if (!strcmp(verb, "leave")) { /* its first thread ends, another one goes on */
            pthread_t other;
            if (pthread_create(&other, NULL, go_on, (void *)pthread_self()))
                die("pthread_create");
            pthread_exit(NULL);
        } else if (!strcmp(verb, "race"))
            race((unsigned)a);
        printf("%d\n", failed);
    }
    return unused;
}

int main(int argc, char **argv)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc == 3)
        race((unsigned)strtoul(argv[2], NULL, 10));
    puts("ready");
    serve(NULL);
    return 0;
}
