/* Whole pages of this address space: mapped, unmapped, faulted in, backed by huge ones. */
#include "core.h"

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

/* From a huge page's size on, an address is congruent to the offset behind it, so that huge pages can serve it. */
static size_t huge_size;

/* What takes long (LONG_RANGE) is done without the GIL. errno stays as it is. */
#define WITHOUT_GIL_IF_LONG(length, what) \
    do { \
        PyThreadState *state = (length) >= LONG_RANGE ? PyEval_SaveThread() : NULL; \
        what; \
        if (state) \
            PyEval_RestoreThread(state); \
    } while (0)

static uintptr_t page_of(uintptr_t address) { return address - address % page_size; }

/* Maps one piece; fd -1 means private anonymous memory. 0, or an errno with nothing mapped. */
static int map_piece(uintptr_t address, size_t length, int prot, int fd, off_t offset)
{
    int flags = MAP_FIXED_NOREPLACE | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);
    void *got;
    WITHOUT_GIL_IF_LONG(length, got = mmap((void *)address, length, prot, flags, fd, offset));
    if (got == MAP_FAILED)
        return errno;
    if ((uintptr_t)got != address) { /* a kernel that does not know the flag took it for a hint */
        munmap(got, length);
        return EEXIST;
    }
    return 0;
}

static int unmap_range(uintptr_t address, size_t length)
{
    int failed;
    WITHOUT_GIL_IF_LONG(length, failed = munmap((void *)address, length));
    return failed ? errno : 0;
}

/* Faults in every page of [address, address + length). Unlike MAP_POPULATE it says where that fails. By reading,
 * where that is allowed: Linux then takes several pages a fault, and those of shared memory are writable at once. */
static int populate_range(uintptr_t address, size_t length, int prot)
{
    int how = prot & PROT_READ ? MADV_POPULATE_READ : MADV_POPULATE_WRITE;
    int failed;
    WITHOUT_GIL_IF_LONG(length, failed = madvise((void *)address, length, how));
    return failed ? errno : 0;
}

static PyObject *os_error(int error)
{
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* Checks that [address, address + length) is whole pages and does not wrap. */
static int check_range(uint64_t address, uint64_t length)
{
    if (address % page_size || length % page_size || !length || address + length < address ||
        length > PY_SSIZE_T_MAX) {
        PyErr_Format(PyExc_ValueError, "a window is whole pages: address %llu, length %llu",
                     (unsigned long long)address, (unsigned long long)length);
        return -1;
    }
    return 0;
}

/* collapse(fd, length) -> bytes: backs a file whose space is taken with huge pages, as far as Linux has any; how
 * many bytes it did. MADV_COLLAPSE (Linux 6.1) does not ask for shmem_enabled, but it leaves holes alone. */
static PyObject *host_collapse(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    int fd;
    uint64_t length;
    if (wants(nargs, 2, "collapse") || as_int(args[0], &fd) || as_u64(args[1], &length) ||
        check_range(0, length))
        return NULL;
    size_t got = 0, room = (size_t)length + huge_size;
    int error = 0;
    Py_BEGIN_ALLOW_THREADS
    /* A range that is large enough holds a place for it at a multiple of a huge page. */
    char *range = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *place = range;
    if (range != MAP_FAILED) {
        place += -(uintptr_t)range & (huge_size - 1);
        if (mmap(place, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED) {
            madvise(place, length, MADV_HUGEPAGE);
            for (size_t at = 0; at + huge_size <= length; at += huge_size)
                if (!madvise(place + at, huge_size, MADV_COLLAPSE))
                    got += huge_size;
        } else {
            error = errno;
        }
        munmap(range, room);
    } else {
        error = errno;
    }
    Py_END_ALLOW_THREADS
    if (error)
        return os_error(error);
    return PyLong_FromSize_t(got);
}
