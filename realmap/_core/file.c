/* A small file: read in one step, or its first page watched; a directory from which names go. */
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
