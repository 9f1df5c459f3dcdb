/* The C core: only what Python cannot do safely by itself.
 *
 *   Window   a range of this address space that maps pieces of files (or private memory) at an
 *            address that the caller chose. Exports its bytes through the buffer protocol and
 *            counts the exports, so that it is never unmapped under a live view.
 *   Land     what is mapped where in a range of addresses, and the windows kept there for their next use.
 *   Frames, Mapping   what a mirror has to know of those of memory/, and their counts.
 *   Mirror   a window in a land, of frames that it holds a reference to; Lent: one that shows no byte beside its range.
 *   Events   what happened, in a ring of bounded size, for whoever asked to be told.
 *   Durations how long something took, each time: percentiles.
 *   Account  what is in use of a budget; Charge: a part of it, in use for as long as that lives.
 *   Ring     two queues of messages in sealed shared memory, one each way, and how to sleep and be
 *            woken without losing a wake-up.
 *   Endpoint a user's connection to its kernel: socket, ring, whose turn it is to read; Answer: a request on its way,
 *            and then what it brought; Bell: how an event loop is told.
 *   View     a part of one window, or of several that lie side by side; exporting it counts as
 *            an export of every window it covers.
 *   Lock     an RLock that no signal handler leaves taken; Turn: what its `with` drops.
 *   Shared   what processes synchronize with, in 64 bytes of a buffer: SharedLock, SharedEvent, …
 *   guard    a handler of SIGBUS: where a segment under a window was truncated, zero pages take the place
 *            of what is gone, and the window says so from then on.
 *
 * A window's life: not ready (being mapped) -> alive -> dead. Dead is for good.
 *
 *      base          base + lead                     base + lead + length     base + span
 *       |---- lead ----|=========== what is exported ==========|------ rest -----|
 *       '----------------------- whole pages, mapped ----------------------------'
 *
 * Everything here runs with the GIL held, except long copies, mmap and munmap of long ranges, and waiting. errno becomes
 * an OSError here and an error of ours in realmap/host/, nowhere else.
 */
#include "core.h"

#include "arguments.c"
#include "pages.c"
#include "file.c"
#include "guard.c"
#include "edges.c"
#include "queue.c"
#include "spin.c"
#include "sleep.c"
#include "post.c"
#include "packed.c"
#include "bytes.c"
#include "bell.c"
#include "plain.c"
#include "answer.c"
#include "farewell.c"
#include "window.c"
#include "view.c"
#include "events.c"
#include "table.c"
#include "space.c"
#include "kept.c"
#include "land.c"
#include "frames.c"
#include "mapping.c"
#include "mirror.c"
#include "lent.c"
#include "places.c"
#include "ring.c"
#include "mail.c"
#include "turn.c"
#include "stock.c"
#include "request.c"
#include "endpoint.c"
#include "account.c"
#include "lock.c"
#include "durations.c"
#include "spot.c"
#include "shared_lock.c"
#include "shared_words.c"
#include "shared_condition.c"
#include "shared_queue.c"

static PyMethodDef host_methods[] = {
    {"faults", host_faults, METH_NOARGS, NULL},
    {"collapse", FASTCALL(host_collapse), METH_FASTCALL, NULL},
    {"read_file", FASTCALL(host_read_file), METH_FASTCALL, NULL},
    {"map_at", FASTCALL(host_map_at), METH_FASTCALL, NULL},
    {"device_maps", FASTCALL(host_device_maps), METH_FASTCALL, NULL},
    {"open_files", FASTCALL(host_open_files), METH_FASTCALL, NULL},
    {"watch_directory", FASTCALL(host_watch_directory), METH_FASTCALL, NULL},
    {"copy_in", FASTCALL(host_copy_in), METH_FASTCALL, NULL},
    {"holders_of", core_holders_of, METH_O, NULL},
    {"gather", FASTCALL(core_gather), METH_FASTCALL, NULL},
    {"wake_owed", core_wake_owed, METH_NOARGS, NULL},
    {"fall_asleep", core_fall_asleep, METH_O, NULL},
    {"wake_up", core_wake_up, METH_O, NULL},
    {"flaw_of", core_flaw_of, METH_O, NULL},
    {"look_over", core_look_over, METH_O, NULL},
    {"read_call", core_read_call, METH_O, NULL},
    {"write_done", FASTCALL(core_write_done), METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static const struct {
    const char *name;
    long value;
} constants[] = {
#define CONSTANT(name) {#name, name}
    CONSTANT(ON_ITS_WAY), CONSTANT(ANSWERED),   CONSTANT(TIMED_OUT), CONSTANT(ENDED),  CONSTANT(FAILED),
    CONSTANT(OPEN),       CONSTANT(CLOSED),     CONSTANT(DIED),      CONSTANT(SAID_BYE), CONSTANT(NONSENSE),
    CONSTANT(STOLEN),     CONSTANT(LOST_IN_CHILD), CONSTANT(ERRNO),  CONSTANT(OVERLOADED), CONSTANT(SAME_CPU),
    CONSTANT(BROKEN),     CONSTANT(TOO_DEEP),   CONSTANT(KEY_NO_TEXT), CONSTANT(FOREIGN), CONSTANT(TOO_MUCH),
    CONSTANT(TOO_LONG),   {"DEEPEST", PACKED_DEPTH},
    CONSTANT(AWAKE),      CONSTANT(ON_WORD),    CONSTANT(ON_SOCKET),
    CONSTANT(BARE),       CONSTANT(ATTACHED),   {"RING_BYTES", 2 * sizeof(Queue)},
    CONSTANT(RING_MESSAGE),
};

/* In the order in which they are made: a base before what builds on it. */
static const struct {
    PyTypeObject **type;
    PyType_Spec *spec;
    PyTypeObject **base;
} types[] = {
    {&window_type, &window_spec, NULL},
    {&view_type, &view_spec, NULL},
    {&events_type, &events_spec, NULL},
    {&durations_type, &durations_spec, NULL},
    {&land_type, &land_spec, NULL},
    {&mirror_type, &mirror_spec, &window_type},
    {&lent_type, &lent_spec, &mirror_type},
    {&frames_type, &frames_spec, NULL},
    {&mapping_type, &mapping_spec, NULL},
    {&account_type, &account_spec, NULL},
    {&charge_type, &charge_spec, NULL},
    {&ring_type, &ring_spec, NULL},
    {&budget_type, &spin_budget_spec, NULL},
    {&bell_type, &bell_spec, NULL},
    {&answer_type, &answer_spec, NULL},
    {&endpoint_type, &endpoint_spec, NULL},
    {&turn_type, &turn_spec, NULL},
    {&lock_type, &lock_spec, &rlock_type},
    {&shared_type, &shared_spec, NULL},
    {&shared_lock_type, &shared_lock_spec, &shared_type},
    {&shared_counter_type, &counter_spec, &shared_type},
    {&shared_event_type, &event_spec, &shared_type},
    {&shared_semaphore_type, &semaphore_spec, &shared_type},
    {&shared_barrier_type, &barrier_spec, &shared_type},
    {&shared_condition_type, &condition_spec, &shared_type},
    {&shared_queue_type, &shared_queue_spec, &shared_type},
};

/* What there is once a process. -1 with an exception set; what was made by then is found the next time. */
static int set_up(void)
{
    static int counts_forks;
    page_size = (size_t)sysconf(_SC_PAGESIZE);
    huge_size = page_size * (page_size / sizeof(uint64_t));
    if (!word_mirror && !(word_mirror = PyUnicode_InternFromString("mirror")))
        return -1;
    PyObject *threads = PyImport_ImportModule("_thread");
    if (threads && !rlock_type)
        rlock_type = as_type(PyObject_GetAttrString(threads, "RLock"));
    Py_XDECREF(threads);
    if (!rlock_type)
        return -1;
    int unknown = mutex_made ? 0 : learn_mutex();
    if (unknown) {
        os_error(unknown);
        return -1;
    }
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        PyObject *base = types[i].base ? (PyObject *)*types[i].base : NULL;
        if (!*types[i].type && !(*types[i].type = as_type(PyType_FromSpecWithBases(types[i].spec, base))))
            return -1;
    }
    int error = counts_forks ? 0 : pthread_atfork(note_fork, note_fork, count_fork);
    if (error) {
        os_error(error);
        return -1;
    }
    counts_forks = 1;
    return 0;
}

/* Called again when it is imported again: sys.modules had lost it. */
static int host_exec(PyObject *module)
{
    if (PyInterpreterState_GetID(PyInterpreterState_Get())) {
        PyErr_SetString(PyExc_ImportError, "realmap works in the main interpreter of a process only: there is one "
                                           "SIGBUS handler and one table of windows a process");
        return -1;
    }
    if (set_up())
        return -1;
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (PyModule_AddType(module, *types[i].type))
            return -1;
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value))
            return -1;
    return 0;
}

static PyModuleDef_Slot host_slots[] = {
    {Py_mod_exec, host_exec},
#ifdef Py_GIL_DISABLED /* a build of its own, without the limited API */
    {Py_mod_gil, Py_MOD_GIL_USED}, /* what is shared here is guarded by that lock: it is put on */
#endif
    {0, NULL},
};

static struct PyModuleDef host_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "realmap._core",
    .m_doc = "Windows at chosen addresses, with counted exports.",
    .m_methods = host_methods,
    .m_slots = host_slots,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&host_module); }
