/* Table: a hash table of nodes that are parts of what they find. No Python. */
#include "core.h"

static size_t bucket_of(const Table *table, uint64_t key)
{
    key ^= key >> 32;
    key *= 0xd6e8feb86659fd93u;
    key ^= key >> 32;
    return (size_t)key & table->mask;
}

static void table_reset(Table *table)
{
    if (table->buckets != table->few)
        free(table->buckets);
    memset(table, 0, sizeof *table);
    table->buckets = table->few;
    table->mask = FEW - 1;
}

static void table_put(Table *table, Node *node)
{
    Node **bucket = &table->buckets[bucket_of(table, node->key)];
    node->next = *bucket;
    node->at = bucket;
    if (node->next)
        node->next->at = &node->next;
    *bucket = node;
}

static void table_add(Table *table, Node *node)
{
    size_t size = table->mask + 1;
    Node **wider = table->count < size ? NULL : calloc(2 * size, sizeof(Node *));
    if (wider) { /* without memory for it the chains only get longer */
        Node **old = table->buckets;
        table->buckets = wider;
        table->mask = 2 * size - 1;
        for (size_t i = 0; i < size; i++)
            for (Node *at = old[i], *next; at; at = next) {
                next = at->next;
                table_put(table, at);
            }
        if (old != table->few)
            free(old);
    }
    table_put(table, node);
    table->count++;
}

static void table_remove(Table *table, Node *node)
{
    *node->at = node->next;
    if (node->next)
        node->next->at = node->at;
    table->count--;
}

static Node *same_key(Node *node, uint64_t key)
{
    while (node && node->key != key)
        node = node->next;
    return node;
}

static Node *table_find(const Table *table, uint64_t key)
{
    return same_key(table->buckets[bucket_of(table, key)], key);
}
