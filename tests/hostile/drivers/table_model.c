/* The table against a plain model of it, for the sanitizers: the very file of the C core, without Python.
 *
 * Operations at random: add a node, remove one, find all of a key; keys of few kinds, so that many nodes have the same.
 * The model counts how many nodes have each key. Memory for a wider table is refused now and then. Usage:
 * table_model [OPERATIONS]. Exit status 0: the table always said what the model says. */
#define REALMAP_NO_PYTHON
#include "../../../realmap/_core/core.h"

#include <stdio.h>

static int scarce; /* no memory this moment */
static void *calloc_or_not(size_t count, size_t size) { return scarce ? NULL : calloc(count, size); }
#define calloc calloc_or_not
#include "../../../realmap/_core/table.c"
#undef calloc

#define NODES 4096u
#define KEYS 1500u

#define require(what) ((what) ? (void)0 : fail(#what, __LINE__))

static void fail(const char *what, int line)
{
    fprintf(stderr, "line %d: not so: %s\n", line, what);
    abort();
}

static uint64_t next(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

/* Small numbers, addresses of pages, and whatever has all of its bits in use. */
static uint64_t key_of(size_t kind)
{
    return kind % 3 == 0 ? kind : kind % 3 == 1 ? 0x300000000000u + kind * 4096 : kind * 0x9e3779b97f4a7c15u;
}

/* Every node of the key is found once, and no other. */
static void check(const Table *table, const Node *nodes, const int *there, size_t kind, const unsigned *model)
{
    unsigned found = 0;
    for (Node *at = table_find(table, key_of(kind)); at; at = same_key(at->next, key_of(kind))) {
        require(at->key == key_of(kind) && there[at - nodes]);
        require(++found <= model[kind]);
    }
    require(found == model[kind]);
}

int main(int count, char **arguments)
{
    long operations = count > 1 ? atol(arguments[1]) : 3000000;
    static Node nodes[NODES];
    static int there[NODES];
    static size_t kinds[NODES];
    static unsigned model[KEYS];
    uint64_t seed = 12;
    size_t total = 0, widest = 0;
    Table table = {0};
    table_reset(&table);
    for (long i = 0; i < operations; i++) {
        size_t which = next(&seed) % NODES;
        /* It fills, empties and fills again. Some keys have one node in four. */
        int filling = i / 20000 % 2 == 0;
        scarce = next(&seed) % 8 == 0;
        if (there[which] && !(filling && next(&seed) % 4)) {
            table_remove(&table, &nodes[which]);
            model[kinds[which]]--;
            there[which] = 0;
            total--;
        } else if (!there[which] && (filling || next(&seed) % 4 == 0)) {
            kinds[which] = next(&seed) % 4 ? next(&seed) % KEYS : next(&seed) % 3;
            nodes[which].key = key_of(kinds[which]);
            table_add(&table, &nodes[which]);
            model[kinds[which]]++;
            there[which] = 1;
            total++;
        }
        require(table.count == total);
        check(&table, nodes, there, next(&seed) % 16 ? 3 + next(&seed) % (KEYS - 3) : next(&seed) % 3, model);
        widest = table.mask > widest ? table.mask : widest;
        if (next(&seed) % 100000 == 0) { /* as a land that is prepared anew */
            table_reset(&table);
            memset(there, 0, sizeof there);
            memset(model, 0, sizeof model);
            total = 0;
        }
    }
    for (size_t kind = 0; kind < KEYS; kind++)
        check(&table, nodes, there, kind, model);
    require(operations < 20000 || widest >= NODES / 2); /* it did grow */
    table_reset(&table);
    printf("%ld operations, %zu nodes at the end, as the model says\n", operations, total);
    return 0;
}
