/* A small file: read in one step, or its first page watched; a directory from which names go; one map of a process. */
#include "core.h"

#define MOST 4096

/* read_file(path, most) -> bytes: what a file begins with, so many at most; a pipe is not waited for. In one step: so a
 * signal handler that raises leaves no descriptor behind. */
static PyObject *host_read_file(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    char *path, data[MOST];
    uint64_t most;
    if (wants(nargs, 2, "read_file") || PyBytes_AsStringAndSize(args[0], &path, NULL) || as_u64(args[1], &most))
        return NULL;
    ssize_t got = -1;
    int fd, error;
    Py_BEGIN_ALLOW_THREADS
    fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd >= 0)
        got = read(fd, data, most < MOST ? (size_t)most : MOST);
    error = errno;
    if (fd >= 0)
        close(fd);
    Py_END_ALLOW_THREADS
    return got < 0 ? os_error(error) : PyBytes_FromStringAndSize(data, got);
}

/* struct procmap_query and PROCMAP_QUERY of linux/fs.h, as headers before Linux 6.11 have neither. */
struct map_query {
    uint64_t size, flags, address;
    uint64_t found[7]; /* start, end, flags, page size, offset, inode; major and minor number of the device */
    uint32_t name_size, build_id_size;
    uint64_t name, build_id;
};
#define MAP_QUERY _IOWR('f', 17, struct map_query)

/* map_at(fd, address) -> the map that an address falls in, as Linux notes it, of an open /proc/PID/maps. None: nothing is
 * mapped there, the process runs another program by now or none, or Linux cannot tell (before 6.11). */
static PyObject *host_map_at(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    struct map_query query = {.size = sizeof query};
    int fd, failed;
    if (wants(nargs, 2, "map_at") || as_int(args[0], &fd) || as_u64(args[1], &query.address))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = ioctl(fd, MAP_QUERY, &query);
    Py_END_ALLOW_THREADS
    if (failed)
        Py_RETURN_NONE;
    return PyBytes_FromStringAndSize((const char *)query.found, sizeof query.found);
}

/* watch_directory(path) -> fd: to be read from once a name in it has gone, or it has gone elsewhere. */
static PyObject *host_watch_directory(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    char *path;
    if (wants(nargs, 1, "watch_directory") || PyBytes_AsStringAndSize(args[0], &path, NULL))
        return NULL;
    int fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC), error = errno;
    if (fd >= 0 && inotify_add_watch(fd, path, IN_DELETE | IN_MOVED_FROM | IN_MOVE_SELF | IN_ONLYDIR) < 0) {
        error = errno;
        close(fd);
        fd = -1;
    }
    return fd < 0 ? os_error(error) : PyLong_FromLong(fd);
}

static void unwatch(PyObject *capsule) { munmap(PyCapsule_GetPointer(capsule, NULL), page_size); }

/* watch_file(path) -> the first page of a file, mapped, for `word_of`; no descriptor stays open. OSError: EPERM where
 * somebody could cut the file short, so that to look at it would be a SIGBUS. */
static PyObject *host_watch_file(PyObject *Py_UNUSED(module), PyObject *path)
{
    void *page = MAP_FAILED;
    int fd = PyBytes_Check(path) ? open(PyBytes_AsString(path), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY) : -1;
    int error = errno, seals = fd >= 0 ? fcntl(fd, F_GET_SEALS) : 0;
    struct stat status;
    if (fd >= 0) {
        error = seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(fd, &status) || (size_t)status.st_size < page_size
                    ? EPERM
                    : 0;
        if (!error && (page = mmap(NULL, page_size, PROT_READ, MAP_SHARED, fd, 0)) == MAP_FAILED)
            error = errno;
        close(fd);
    }
    if (page == MAP_FAILED)
        return os_error(error);
    PyObject *capsule = PyCapsule_New(page, NULL, unwatch);
    if (!capsule)
        munmap(page, page_size);
    return capsule;
}

/* word_of(page, number) -> which 8 bytes are there now. */
static PyObject *host_word_of(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t number;
    if (wants(nargs, 2, "word_of") || as_u64(args[1], &number))
        return NULL;
    _Atomic uint64_t *page = PyCapsule_GetPointer(args[0], NULL);
    if (!page)
        return NULL;
    if (number >= page_size / sizeof *page)
        return PyErr_Format(PyExc_IndexError, "a page has no word %llu", (unsigned long long)number);
    return PyLong_FromUnsignedLongLong(atomic_load_explicit(page + number, memory_order_acquire));
}
