/* Segments: made, mapped at a chosen address, read through their descriptor; and the work on their bytes. */
#include "floor.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define HUGE ((size_t)2 << 20)

/* Linux searches for free addresses from the top: nothing of its own choice lands here. The segments' own mappings stay
 * below the windows, which come round again and again. */
#define FIRST_KEPT ((uintptr_t)0x280000000000)
#define LAST_KEPT ((uintptr_t)0x300000000000)
#define FIRST_WINDOW ((uintptr_t)0x300000000000)
#define LAST_WINDOW ((uintptr_t)0x400000000000)

/* Prepared segments, kept from request to request. */
#define SEGMENTS 16
static struct segment {
    size_t span; /* bytes, whole pages; 0: a free slot */
    bool huge;
    int fd;
    unsigned char *bytes; /* a mapping with every page present */
} segments[SEGMENTS];

static unsigned char *warm;
static size_t warm_span;

/* ---- the work ---- */

static volatile uint64_t kept; /* keeps alive what was read */

/* Four sums side by side: one alone waits for itself at every word. */
static inline __attribute__((always_inline)) uint64_t sum_words(const uint64_t *words, size_t count) {
    uint64_t a = 0, b = 0, c = 0, d = 0;
    size_t i = 0;
    for (; i + 4 <= count; i += 4) {
        a += words[i];
        b += words[i + 1];
        c += words[i + 2];
        d += words[i + 3];
    }
    for (; i < count; i++) a += words[i];
    return a + b + c + d;
}

#ifdef __x86_64__
/* numpy chooses by the processor too: without this, the floor would lie above Python. */
__attribute__((target("avx2"))) static uint64_t sum_words_avx2(const uint64_t *words, size_t count) {
    return sum_words(words, count);
}
#endif

static uint64_t sum(const unsigned char *bytes, size_t length) {
    const uint64_t *words = (const void *)bytes;
    size_t count = length / sizeof *words;
    uint64_t total = 0;
    for (size_t i = count * sizeof *words; i < length; i++) total += bytes[i];
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2")) return total + sum_words_avx2(words, count);
#endif
    return total + sum_words(words, count);
}

static uint64_t touch(const unsigned char *bytes, size_t length) {
    const uint64_t *words = (const void *)bytes;
    size_t count = length / sizeof *words;
    if (count < 8) return sum(bytes, length);
    uint64_t total = 0;
    for (size_t i = 0; i < 8; i++) total += words[i * (count / 8)];
    return total;
}

__attribute__((noinline)) void do_work(enum work work, unsigned char *bytes, size_t length) {
    static unsigned char value;
    if (work == WORK_TOUCH) kept = touch(bytes, length);
    if (work == WORK_READ) kept = sum(bytes, length);
    if (work == WORK_WRITE) memset(bytes, ++value, length);
    if (work == WORK_PAGES) {
        value++;
        for (size_t at = 0; at < length; at += page) bytes[at] = value;
    }
    __asm__ volatile("" ::"r"(bytes) : "memory"); /* what was written counts as seen */
}

/* ---- preparation ---- */

/* Writes zeroes: enough to have the page, and it changes nothing. */
static void write_pages(unsigned char *bytes, size_t span) {
    for (size_t i = 0; i < span; i += page) *(volatile unsigned char *)(bytes + i) = 0;
}

unsigned char *anonymous(size_t length, int sharing) {
    unsigned char *bytes = mmap(NULL, round_up(length, page), PROT_READ | PROT_WRITE, sharing | MAP_ANONYMOUS, -1, 0);
    if (bytes == MAP_FAILED) {
        fail_errno("mmap of anonymous memory");
        return NULL;
    }
    write_pages(bytes, round_up(length, page));
    return bytes;
}

unsigned char *warm_buffer(size_t length) {
    if (length > warm_span) {
        unsigned char *larger = anonymous(length, MAP_PRIVATE);
        if (!larger) return NULL;
        if (warm) munmap(warm, warm_span);
        warm = larger;
        warm_span = round_up(length, page);
    }
    return warm;
}

/* The next place in a range: at a multiple of `unit`, and with a gap before it, so that two never merge. */
static void *next_place(uintptr_t *next, uintptr_t first, uintptr_t last, size_t span, size_t unit) {
    uintptr_t place = round_up(*next, unit);
    if (place < first || place + span > last) place = first;
    *next = place + span + unit;
    return (void *)place;
}

/* Maps it there, for reading and writing; never on top of something else. */
static unsigned char *map_at(void *place, size_t span, int fd, int more_flags) {
    return mmap(place, span, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE | more_flags, fd, 0);
}

static int open_unlinked(void) {
    const char *name = strrchr(segment_path, '/');
    int fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) {
        fail_errno("shm_open");
        return -1;
    }
    if (shm_unlink(name)) {
        fail_errno("shm_unlink");
        close(fd);
        return -1;
    }
    return fd;
}

/* How many bytes of the mapping at `bytes` are mapped by huge pages, as /proc/self/smaps has it. */
static size_t huge_bytes(const unsigned char *bytes) {
    FILE *smaps = fopen("/proc/self/smaps", "re");
    if (!smaps) return 0;
    char line[512];
    unsigned long long start, end, kilobytes = 0;
    bool inside = false;
    while (fgets(line, sizeof line, smaps)) {
        if (sscanf(line, "%llx-%llx ", &start, &end) == 2)
            inside = (uintptr_t)bytes >= start && (uintptr_t)bytes < end;
        else if (inside && sscanf(line, "ShmemPmdMapped: %llu", &kilobytes) == 1)
            break;
    }
    fclose(smaps);
    return (size_t)kilobytes << 10;
}

/* The call may fail for a part of the range and have done the others: what counts is what is huge after it. */
static bool collapse(unsigned char *bytes, size_t span) {
    size_t have = 0;
    for (int tries = 0; tries < 3 && have != span; tries++) { /* a busy page is EAGAIN */
        int error = madvise(bytes, span, MADV_COLLAPSE) ? errno : 0;
        write_pages(bytes, span);
        have = huge_bytes(bytes);
        if (error && !have) return fail("MADV_COLLAPSE: %s", strerror(error));
    }
    if (have != span) return fail("huge pages for %zu of %zu bytes only", have, span);
    return true;
}

static void close_segment(struct segment *segment) {
    if (!segment->span) return;
    munmap(segment->bytes, segment->span);
    close(segment->fd);
    segment->span = 0;
}

static bool fill_segment(struct segment *segment, size_t span, bool huge) {
    int fd = open_unlinked();
    if (fd < 0) return false;
    int error = posix_fallocate(fd, 0, (off_t)span);
    if (error) {
        close(fd);
        return fail("posix_fallocate: %s", strerror(error));
    }
    static uintptr_t next;
    void *place = next_place(&next, FIRST_KEPT, LAST_KEPT, span, huge ? HUGE : page);
    unsigned char *bytes = map_at(place, span, fd, 0);
    if (bytes == MAP_FAILED) {
        fail_errno("mmap of the segment");
        close(fd);
        return false;
    }
    write_pages(bytes, span);
    *segment = (struct segment){.span = span, .huge = huge, .fd = fd, .bytes = bytes};
    if (huge && !collapse(bytes, span)) {
        close_segment(segment);
        return false;
    }
    return true;
}

static struct segment *prepare(size_t length, bool huge) {
    static unsigned next;
    size_t span = round_up(length, huge ? HUGE : page);
    for (struct segment *segment = segments; segment < segments + SEGMENTS; segment++)
        if (segment->span == span && segment->huge == huge) return segment;
    struct segment *segment = &segments[next++ % SEGMENTS];
    close_segment(segment);
    return fill_segment(segment, span, huge) ? segment : NULL;
}

void free_memory(void) {
    for (struct segment *segment = segments; segment < segments + SEGMENTS; segment++) close_segment(segment);
    if (warm) munmap(warm, warm_span);
    warm = NULL;
    warm_span = 0;
}

/* ---- operations ---- */

static bool map_many(const struct request *request, const struct segment *segment, uint64_t count) {
    static uintptr_t next;
    int flags = request->how == HOW_POPULATE ? MAP_POPULATE : 0;
    size_t unit = segment->huge ? HUGE : page;
    for (uint64_t i = 0; i < count; i++) {
        void *place = next_place(&next, FIRST_WINDOW, LAST_WINDOW, segment->span, unit);
        unsigned char *window = map_at(place, segment->span, segment->fd, flags);
        if (window == MAP_FAILED) return fail_errno("mmap at a chosen address");
        do_work(request->work, window, request->length);
        if (munmap(window, segment->span)) return fail_errno("munmap");
    }
    return true;
}

bool map(const struct request *request, uint64_t *ns) {
    struct segment *segment = prepare(request->length, request->how == HOW_HUGE);
    if (!segment || !map_many(request, segment, 1)) return false;
    uint64_t start = now();
    if (!map_many(request, segment, request->count)) return false;
    *ns = now() - start;
    return true;
}

bool own(const struct request *request, uint64_t *ns) {
    struct segment *segment = prepare(request->length, false);
    if (!segment) return false;
    do_work(request->work, segment->bytes, request->length);
    uint64_t start = now();
    for (uint64_t i = 0; i < request->count; i++) do_work(request->work, segment->bytes, request->length);
    *ns = now() - start;
    return true;
}

static bool copy_many(const struct request *request, int fd, unsigned char *buffer, uint64_t count) {
    bool write = request->work == WORK_WRITE;
    for (uint64_t i = 0; i < count; i++) {
        if (write) do_work(WORK_WRITE, buffer, request->length);
        for (size_t done = 0; done < request->length;) {
            size_t rest = request->length - done;
            ssize_t n = write ? pwrite(fd, buffer + done, rest, (off_t)done)
                              : pread(fd, buffer + done, rest, (off_t)done);
            if (n < 0) return fail_errno(write ? "pwrite" : "pread");
            if (n == 0) return fail("the segment ended at %zu bytes", done);
            done += (size_t)n;
        }
        if (!write) do_work(request->work, buffer, request->length);
    }
    return true;
}

bool copy(const struct request *request, uint64_t *ns) {
    struct segment *segment = prepare(request->length, false);
    unsigned char *buffer = warm_buffer(request->length);
    if (!segment || !buffer || !copy_many(request, segment->fd, buffer, 1)) return false;
    uint64_t start = now();
    if (!copy_many(request, segment->fd, buffer, request->count)) return false;
    *ns = now() - start;
    return true;
}

static bool make_one(size_t length, bool commit) {
    int fd = open_unlinked();
    if (fd < 0) return false;
    int error = commit ? posix_fallocate(fd, 0, (off_t)length) : ftruncate(fd, (off_t)length) ? errno : 0;
    if (error) {
        close(fd);
        return fail("%s: %s", commit ? "posix_fallocate" : "ftruncate", strerror(error));
    }
    void *bytes = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (bytes == MAP_FAILED) {
        fail_errno("mmap");
        close(fd);
        return false;
    }
    bool good = munmap(bytes, length) == 0 || fail_errno("munmap");
    return (close(fd) == 0 || fail_errno("close")) && good;
}

static bool make_many(const struct request *request, bool commit, uint64_t *ns) {
    if (!make_one(request->length, commit)) return false;
    uint64_t start = now();
    for (uint64_t i = 0; i < request->count; i++)
        if (!make_one(request->length, commit)) return false;
    *ns = now() - start;
    return true;
}

bool make(const struct request *request, uint64_t *ns) { return make_many(request, false, ns); }

bool make_commit(const struct request *request, uint64_t *ns) { return make_many(request, true, ns); }
