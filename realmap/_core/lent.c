/* Lent: a mirror that shows no byte beside its range; edges.c has the bytes of pages that are not lent as a whole. */
#include "core.h"

/* _copy_back() -> None, or (errno, address): copies back what was changed at its edges, where it lives; of what cannot be, or
 * could not when it was dropped, the first byte. ENODATA: the segment ends before it. */
static PyObject *lent_copy_back(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Mirror *self = as_mirror(op);
    Edges *edges = self->edges;
    if (edges && is_alive(&self->window))
        copy_edges_back(edges, zeros_of(&self->window));
    if (!edges || !edges->error)
        Py_RETURN_NONE;
    int error = edges->error;
    edges->error = 0;
    return Py_BuildValue("(iK)", error, (unsigned long long)edges->lost);
}

static PyMethodDef lent_methods[] = {
    {"_copy_back", lent_copy_back, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot lent_slots[] = {{Py_tp_methods, lent_methods}, {0, NULL}};

static PyType_Spec lent_spec = {"realmap._core.Lent", sizeof(Mirror), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                lent_slots};
