/* A small file, read in one step; a directory from which names go; what a process has mapped, and has open. */
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
#define NEXT_FILE 0x30 /* the map at the address, or the next one; only those of files */

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

/* The next map from query->address on of a file on one of `count` devices, and its name. 0: there is none, or errno. */
static int next_map(int fd, struct map_query *query, const char *devices, size_t count, uint64_t *device, char *name)
{
    while (!ioctl(fd, MAP_QUERY, query)) {
        const struct map_query map = *query;
        struct map_query named = {.size = sizeof named, .address = map.found[0], .name = (uintptr_t)name, .name_size = MOST};
        uint32_t numbers[2];
        memcpy(numbers, &map.found[6], sizeof numbers);
        *device = makedev(numbers[0], numbers[1]);
        query->address = map.found[1];
        for (size_t i = 0; i < count; i++) {
            if (memcmp(devices + i * sizeof *device, device, sizeof *device))
                continue;
            name[0] = 0; /* and so it stays where it is longer than Linux shows */
            int error = ioctl(fd, MAP_QUERY, &named) ? errno : 0;
            if (error == ENAMETOOLONG || (!error && !memcmp(named.found, map.found, sizeof map.found)))
                return 1;
            if (error && error != ENOENT)
                return 0;
            query->address = map.found[0]; /* it has changed, or gone, meanwhile: once more */
        }
    }
    return 0;
}

/* device_maps(path, devices) -> [(start, end, flags, offset, device, inode, name)] of a /proc/PID/maps: its maps of files
 * on one of the devices, of 8 bytes each. None: Linux cannot be asked about single maps (before 6.11). */
static PyObject *host_device_maps(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    char *path, *devices, name[MOST];
    Py_ssize_t bytes;
    if (wants(nargs, 2, "device_maps") || PyBytes_AsStringAndSize(args[0], &path, NULL) ||
        PyBytes_AsStringAndSize(args[1], &devices, &bytes))
        return NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC), error = errno;
    if (fd < 0)
        return os_error(error);
    struct map_query query = {.size = sizeof query, .flags = NEXT_FILE};
    PyObject *found = PyList_New(0);
    while (found) {
        uint64_t device, *map = query.found;
        int there;
        Py_BEGIN_ALLOW_THREADS
        there = next_map(fd, &query, devices, (size_t)bytes / sizeof device, &device, name);
        error = errno;
        Py_END_ALLOW_THREADS
        if (!there)
            break;
        append_new(&found, Py_BuildValue("(KKKKKKy)", map[0], map[1], map[2], map[4], device, map[5], name));
    }
    close(fd);
    if (!found || error == ENOENT || error == ESRCH) /* no more; no memory at all, as threads of Linux */
        return found;
    Py_DECREF(found);
    if (error == ENOTTY || error == EINVAL)
        Py_RETURN_NONE;
    return os_error(error);
}

/* The next descriptor that is a regular file, and whose link begins with one of `starts`, each with a NUL after it. */
static int next_file(DIR *folder, const char *starts, const char *end, char *link, struct stat *status)
{
    for (struct dirent *entry; errno = 0, (entry = readdir(folder));) {
        ssize_t length = readlinkat(dirfd(folder), entry->d_name, link, MOST - 1);
        link[length > 0 ? length : 0] = 0;
        for (const char *start = starts; start < end; start += strlen(start) + 1)
            if (length > 0 && !strncmp(link, start, strlen(start))) /* what else there is may not answer: a FUSE, an NFS */
                if (!fstatat(dirfd(folder), entry->d_name, status, 0) && S_ISREG(status->st_mode))
                    return 1;
    }
    return 0;
}

static double seconds(struct timespec time)
{
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* open_files(path, starts) -> [(device, inode, link, size, blocks, uid, touched)] of a /proc/PID/fd: the regular files
 * that are open there and whose links begin with one of `starts`, each with a NUL after it; touched in seconds. */
static PyObject *host_open_files(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    char *path, *starts, link[MOST];
    Py_ssize_t bytes;
    if (wants(nargs, 2, "open_files") || PyBytes_AsStringAndSize(args[0], &path, NULL) ||
        PyBytes_AsStringAndSize(args[1], &starts, &bytes))
        return NULL;
    DIR *folder = opendir(path);
    int error = errno;
    if (!folder)
        return os_error(error);
    PyObject *found = PyList_New(0);
    while (found) {
        struct stat at;
        int there;
        Py_BEGIN_ALLOW_THREADS
        there = next_file(folder, starts, starts + bytes, link, &at);
        error = errno;
        Py_END_ALLOW_THREADS
        if (!there)
            break;
        double touched = seconds(at.st_atim), changed = seconds(at.st_ctim); /* Linux notes a change of bytes there, too */
        if (changed > touched)
            touched = changed;
        append_new(&found, Py_BuildValue("(KKyLLId)", (unsigned long long)at.st_dev, (unsigned long long)at.st_ino, link,
                                         (long long)at.st_size, (long long)at.st_blocks * 512, at.st_uid, touched));
    }
    closedir(folder);
    if (found && error) {
        Py_DECREF(found);
        return os_error(error);
    }
    return found;
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
