/* Answer: a request on its way, and then what came of it. It owns the descriptors that the answer brought from the
 * moment that Linux gave them, and closes them when it goes. Where it brought something that has to be given back (a
 * mapping, a handle) and nobody took it, the kernel is told so. */
#include "connection.h"

static void close_all(int *fds, int count)
{
    for (int i = 0; i < count; i++)
        close(fds[i]);
}

static Answer *new_answer(Endpoint *endpoint, uint64_t number, PyObject *holds, PyObject *late, PyObject *bell)
{
    Answer *self = as_answer(new_object(answer_type));
    if (!self)
        return NULL;
    self->node.key = number;
    self->endpoint = as_endpoint(Py_NewRef((PyObject *)endpoint));
    self->holds = Py_XNewRef(holds);
    self->late = Py_IsNone(late) ? NULL : Py_NewRef(late);
    self->bell = Py_XNewRef(bell);
    return self;
}

/* Takes over descriptors; where it has some already, or there is no memory, they are closed. */
static void answer_take_descriptors(Answer *self, const int *fds, int count)
{
    if (!count)
        return;
    int *own = self->fds ? NULL : malloc((size_t)count * sizeof *fds);
    if (!own) {
        close_all((int *)fds, count);
        return;
    }
    memcpy(own, fds, (size_t)count * sizeof *fds);
    self->fds = own;
    self->count = count;
}

/* Done is an array whose second byte is 1; of these alone something may have to be given back. */
static int is_done(const char *data, Py_ssize_t size) { return size > 1 && (data[0] & 0xf0) == 0x90 && data[1] == DONE; }

static void answer_drop_late(Answer *self)
{
    PyObject *late = self->late, *data = self->data;
    char *bytes;
    Py_ssize_t size;
    self->late = NULL;
    if (late && data && !self->taken && !PyBytes_AsStringAndSize(data, &bytes, &size) && is_done(bytes, size))
        endpoint_leave_late(self->endpoint, late, data);
    Py_XDECREF(late);
}

/* The collector asks before it clears anything: what is left with the endpoint must be whole. */
static void answer_finalize(PyObject *op) { answer_drop_late(as_answer(op)); }

static int answer_traverse(PyObject *op, visitproc visit, void *arg)
{
    Answer *self = as_answer(op);
    Py_VISIT(Py_TYPE(op));
    Py_VISIT((PyObject *)self->endpoint);
    Py_VISIT(self->holds);
    Py_VISIT(self->late);
    Py_VISIT(self->bell);
    return 0;
}

static int answer_clear(PyObject *op)
{
    Answer *self = as_answer(op);
    Py_CLEAR(self->holds);
    Py_CLEAR(self->bell);
    return 0;
}

static void answer_dealloc(PyObject *op)
{
    Answer *self = as_answer(op);
    PyObject_GC_UnTrack(op);
    close_all(self->fds, self->count);
    free(self->fds);
    answer_drop_late(self);
    answer_clear(op);
    Py_XDECREF(self->data);
    Py_XDECREF((PyObject *)self->endpoint);
    free_object(op);
}

/* take(): what the answer brought is somebody's from now on. */
static PyObject *answer_take(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    as_answer(op)->taken = 1;
    Py_RETURN_NONE;
}

static PyObject *answer_descriptors(PyObject *op, void *Py_UNUSED(closure))
{
    Answer *self = as_answer(op);
    PyObject *found = PyList_New(0);
    for (int i = 0; found && i < self->count; i++)
        append_new(&found, PyLong_FromLong(self->fds[i]));
    return found;
}

static PyObject *answer_value(PyObject *op, void *Py_UNUSED(closure))
{
    PyObject *value = plain_value(as_answer(op));
    return value ? value : Py_NewRef(Py_NotImplemented);
}

/* refuse(): nobody takes it, and nobody will: what it brought is given back now. */
static PyObject *answer_refuse(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    Answer *self = as_answer(op);
    answer_drop_late(self);
    return none_unless(settle(self->endpoint, NULL));
}

static PyMethodDef answer_methods[] = {
    {"refuse", answer_refuse, METH_NOARGS, "Nobody takes it: what it brought is given back now."},
    {"take", answer_take, METH_NOARGS, "What it brought is somebody's from now on: nobody has to give it back."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef answer_members[] = {
    {"data", T_OBJECT, offsetof(Answer, data), READONLY, "The answer's bytes, or None."},
    {"outcome", T_BYTE, offsetof(Answer, outcome), READONLY, "ON_ITS_WAY, ANSWERED, TIMED_OUT, ENDED or FAILED."},
    {"error", T_INT, offsetof(Answer, error), READONLY, "Why it failed: an errno."},
    {"unread", T_BOOL, offsetof(Answer, unread), READONLY, "Whether it ended before anybody can have read the request."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef answer_getset[] = {
    {"value", answer_value, NULL, "Its value, where that is a plain one and nothing came along, or NotImplemented.", NULL},
    {"descriptors", answer_descriptors, NULL, "That came along. They are closed with this object.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot answer_slots[] = {
    {Py_tp_doc, "A request on its way, and then what came of it."},
    {Py_tp_dealloc, answer_dealloc},
    {Py_tp_finalize, answer_finalize},
    {Py_tp_traverse, answer_traverse},
    {Py_tp_clear, answer_clear},
    {Py_tp_methods, answer_methods},
    {Py_tp_members, answer_members},
    {Py_tp_getset, answer_getset},
    {0, NULL},
};

static PyType_Spec answer_spec = {"realmap._core.Answer", sizeof(Answer), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                  answer_slots};
