/* What the files of the floor share: a request, the clock, what went wrong, the work on bytes. */
#ifndef FLOOR_H
#define FLOOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum work { WORK_NONE, WORK_TOUCH, WORK_READ, WORK_WRITE, WORK_PAGES };
enum how { HOW_PLAIN, HOW_POPULATE, HOW_HUGE };

struct request {
    size_t length; /* bytes */
    uint64_t count;
    enum work work;
    enum how how;
    bool pin;
};

/* An operation: times `count` of itself (*ns in nanoseconds), or says with fail() why it cannot. */
typedef bool operation(const struct request *request, uint64_t *ns);

/* floor.c */
uint64_t now(void); /* nanoseconds of CLOCK_MONOTONIC */
size_t round_up(size_t length, size_t unit);
bool fail(const char *format, ...) __attribute__((format(printf, 1, 2))); /* always false */
bool fail_errno(const char *what);                                        /* always false */
extern char segment_path[64]; /* the one name of this process: made and unlinked again at once */
extern size_t page;           /* bytes */

/* memory.c: segments and what is done to their bytes */
operation map, own, copy, make, make_commit;
void do_work(enum work work, unsigned char *bytes, size_t length);
unsigned char *anonymous(size_t length, int sharing); /* every page written; NULL after fail() */
unsigned char *warm_buffer(size_t length);            /* one for all operations, never returned */
void free_memory(void);

/* partner.c: operations between two processes */
operation copy_remote, stream, spin, exchange;
void stop_partners(void); /* safe in a signal handler */

#endif
