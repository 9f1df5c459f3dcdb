/* Account: what is in use of a budget of bytes and segments. Charge: a part of that, in use for as long as it lives.
 *
 *      Account of a process ──parent──▶ Account of the kernel
 *              ▲
 *      Charge ─┘  its dealloc gives back, all the way up
 *
 * Looking at the limits and taking are one call, and giving back is none at all: so there is no lock that a destructor
 * or a signal handler could find taken, and no moment at which something is charged that nobody will give back. */
#include "core.h"

typedef struct Account {
    PyObject_HEAD
    unsigned long long used;
    unsigned long long segments;
    unsigned long long limit;
    unsigned long long segment_limit;
    struct Account *parent;
} Account;

typedef struct {
    PyObject_HEAD
    Account *account;
    unsigned long long bytes;
    unsigned long long segments;
} Charge;

ACCESSOR(Account, as_account)
ACCESSOR(Charge, as_charge)

/* Account._prepare(bytes, segments, parent): how much there may be of either; an Account to be charged as well, or None. */
static PyObject *account_prepare(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    Account *self = as_account(op);
    uint64_t bytes, segments;
    if (wants(nargs, 3, "Account._prepare") || as_u64(args[0], &bytes) || as_u64(args[1], &segments))
        return NULL;
    if (!Py_IsNone(args[2]) && !PyObject_TypeCheck(args[2], account_type))
        return PyErr_Format(PyExc_TypeError, "the parent of an account is an Account, or None");
    if (self->parent || self->used || self->segments) { /* what is charged would be given back elsewhere */
        return PyErr_Format(PyExc_ValueError, "this account is in use");
    }
    self->limit = bytes;
    self->segment_limit = segments;
    self->parent = Py_IsNone(args[2]) ? NULL : (Account *)Py_NewRef(args[2]);
    Py_RETURN_NONE;
}

/* Account._charge(bytes, segments) -> a Charge; or the account, of this one and its parents, that does not allow it. */
static PyObject *account_charge(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t bytes, segments;
    if (wants(nargs, 2, "Account._charge") || as_u64(args[0], &bytes) || as_u64(args[1], &segments))
        return NULL;
    /* Made first: making an object may collect garbage, which gives back, or runs anything. */
    Charge *charge = as_charge(new_object(charge_type));
    if (!charge)
        return NULL;
    for (Account *at = as_account(op); at; at = at->parent)
        if (at->used > at->limit || bytes > at->limit - at->used || at->segments > at->segment_limit ||
            segments > at->segment_limit - at->segments) {
            Py_DECREF((PyObject *)charge);
            return Py_NewRef((PyObject *)at);
        }
    charge->account = as_account(Py_NewRef(op));
    charge->bytes = bytes;
    charge->segments = segments;
    for (Account *at = as_account(op); at; at = at->parent) {
        at->used += bytes;
        at->segments += segments;
    }
    return (PyObject *)charge;
}

static void charge_dealloc(PyObject *op)
{
    Charge *self = as_charge(op);
    for (Account *at = self->account; at; at = at->parent) {
        at->used -= self->bytes;
        at->segments -= self->segments;
    }
    Py_XDECREF((PyObject *)self->account);
    free_object(op);
}

static void account_dealloc(PyObject *op)
{
    Py_XDECREF((PyObject *)as_account(op)->parent);
    free_object(op);
}

static PyMethodDef account_methods[] = {
    {"_prepare", FASTCALL(account_prepare), METH_FASTCALL, NULL},
    {"_charge", FASTCALL(account_charge), METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef account_members[] = {
    {"used", T_ULONGLONG, offsetof(Account, used), READONLY, "Bytes of frames that live."},
    {"segments", T_ULONGLONG, offsetof(Account, segments), READONLY, "Segments that live: one descriptor each."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot account_slots[] = {
    {Py_tp_doc, "What is in use of a budget of bytes and segments."},
    {Py_tp_dealloc, account_dealloc},
    {Py_tp_methods, account_methods},
    {Py_tp_members, account_members},
    {0, NULL},
};

static PyType_Spec account_spec = {"realmap._core.Account", sizeof(Account), 0,
                                   Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, account_slots};

static PyType_Slot charge_slots[] = {
    {Py_tp_doc, "What is in use of an account for as long as this lives."},
    {Py_tp_dealloc, charge_dealloc},
    {0, NULL},
};

static PyType_Spec charge_spec = {"realmap._core.Charge", sizeof(Charge), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, charge_slots};
