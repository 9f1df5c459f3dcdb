/* The C core: only what Python cannot do safely by itself.
 *
 *   Window   a range of this address space that maps pieces of files (or private memory) at an
 *            address that the caller chose. Exports its bytes through the buffer protocol and
 *            counts the exports, so that it is never unmapped under a live view.
 *   Land     what is mapped where in a range of addresses, and the windows kept there for their next use.
 *   Mirror   a window in a land, of frames that it holds a reference to.
 *   Events   what happened, in a ring of bounded size, for whoever asked to be told.
 *   Account  what is in use of a budget; Charge: a part of it, in use for as long as that lives.
 *   Ring     two queues of messages in sealed shared memory, one each way, and how to sleep and be
 *            woken without losing a wake-up.
 *   View     a part of one window, or of several that lie side by side; exporting it counts as
 *            an export of every window it covers.
 *   guard    a handler of SIGBUS: where a segment under a window was truncated, zero pages take the place
 *            of what is gone, and the window says so from then on.
 *
 * A window's life: not ready (being mapped) -> alive -> dead. Dead is for good.
 *
 *      base          base + lead                     base + lead + length     base + span
 *       |---- lead ----|=========== what is exported ==========|------ rest -----|
 *       '----------------------- whole pages, mapped ----------------------------'
 *
 * Everything here runs with the GIL held, except munmap and mmap of long ranges. errno becomes
 * an OSError here and an error of ours in realmap/host/, nowhere else.
 */
#include "core.h"

#include "arguments.c"
#include "pages.c"
#include "guard.c"
#include "window.c"
#include "view.c"
#include "events.c"
#include "table.c"
#include "space.c"
#include "kept.c"
#include "land.c"
#include "frames.c"
#include "mirror.c"
#include "queue.c"
#include "ring.c"
#include "spin.c"
#include "turn.c"
#include "account.c"


static PyMethodDef host_methods[] = {
    {"faults", host_faults, METH_NOARGS, NULL},
    {"unmap_all", FASTCALL(host_unmap_all), METH_FASTCALL, NULL},
    {"collapse", FASTCALL(host_collapse), METH_FASTCALL, NULL},
    {"unkeep", host_unkeep, METH_O, NULL},
    {"copy_in", FASTCALL(host_copy_in), METH_FASTCALL, NULL},
    {"spin", FASTCALL(host_spin), METH_FASTCALL, NULL},
    {"fall_asleep", host_fall_asleep, METH_O, NULL},
    {"wake_up", host_wake_up, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef host_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "realmap._core",
    .m_doc = "Windows at chosen addresses, with counted exports.",
    .m_size = -1,
    .m_methods = host_methods,
};

PyMODINIT_FUNC PyInit__core(void)
{
    page_size = (size_t)sysconf(_SC_PAGESIZE);
    huge_size = page_size * (page_size / sizeof(uint64_t));
    word_mirror = PyUnicode_InternFromString("mirror");
    if (!word_mirror)
        return NULL;
    PyObject *module = PyModule_Create(&host_module);
    if (!module)
        return NULL;
    window_type = (PyTypeObject *)PyType_FromSpec(&window_spec);
    ring_type = (PyTypeObject *)PyType_FromSpec(&ring_spec);
    land_type = (PyTypeObject *)PyType_FromSpec(&land_spec);
    events_type = (PyTypeObject *)PyType_FromSpec(&events_spec);
    if (!events_type || PyModule_AddType(module, events_type)) {
        Py_DECREF(module);
        return NULL;
    }
    PyObject *mirror_type = window_type ? PyType_FromSpecWithBases(&mirror_spec, (PyObject *)window_type) : NULL;
    PyObject *view_type = PyType_FromSpec(&view_spec);
    PyObject *turn_type = PyType_FromSpec(&turn_spec);
    if (!turn_type || PyModule_AddType(module, (PyTypeObject *)turn_type)) {
        Py_DECREF(module);
        return NULL;
    }
    Py_DECREF(turn_type);
    account_type = (PyTypeObject *)PyType_FromSpec(&account_spec);
    charge_type = (PyTypeObject *)PyType_FromSpec(&charge_spec);
    if (!account_type || !charge_type || PyModule_AddType(module, account_type) || PyModule_AddType(module, charge_type)) {
        Py_DECREF(module);
        return NULL;
    }
    frames_type = (PyTypeObject *)PyType_FromSpec(&frames_spec);
    mapping_type = (PyTypeObject *)PyType_FromSpec(&mapping_spec);
    if (!frames_type || !mapping_type || PyModule_AddType(module, frames_type) || PyModule_AddType(module, mapping_type)) {
        Py_DECREF(module);
        return NULL;
    }
    if (!window_type || !view_type || !ring_type || !land_type || !mirror_type ||
        PyModule_AddType(module, land_type) || PyModule_AddType(module, (PyTypeObject *)mirror_type) || PyModule_AddType(module, window_type) ||
        PyModule_AddType(module, (PyTypeObject *)view_type) || PyModule_AddType(module, ring_type) ||
        PyModule_AddIntConstant(module, "RING_BYTES", 2 * sizeof(Queue)) ||
        PyModule_AddIntConstant(module, "RING_MESSAGE", RING_SLOT - sizeof(uint32_t))) {
        Py_DECREF(module);
        return NULL;
    }
    Py_DECREF(view_type);
    Py_DECREF(mirror_type);
    int error = pthread_atfork(NULL, NULL, count_fork);
    if (error) {
        Py_DECREF(module);
        return os_error(error);
    }
    return module;
}
