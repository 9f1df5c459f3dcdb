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
