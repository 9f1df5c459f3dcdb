/* Post: a socket of datagrams, known by what it is, and threads that are parked until somebody has news for them. No
 * Python in here.
 *
 * A descriptor is a number, and somebody else in this program may close it and get the same number for a file of
 * theirs (os.closerange in a daemonizer). So the socket is known by device and inode, and looked at before it is
 * written to, read from or closed.
 *
 * One datagram carries a flag and up to 64 KiB; longer messages go in several (wire/channel.py). */
#include "core.h"

/* Whether the descriptor is still the socket that it was. */
static int post_is_ours(const Post *self)
{
    struct stat status;
    if (self->fd < 0)
        return 0;
    int failed = fstat(self->fd, &status);
    if (failed && errno != EBADF) /* Linux had no memory that moment: that says nothing of the descriptor */
        failed = fstat(self->fd, &status);
    return !failed && status.st_dev == self->device && status.st_ino == self->inode;
}

/* Takes over a socket; 0, or an errno. `fd`: below 0 where there is none, and errno says why. */
static int post_take(Post *self, int fd)
{
    struct stat status;
    self->fd = fd;
    if (fd < 0)
        return errno;
    if (fstat(fd, &status)) {
        int error = errno;
        close(fd);
        self->fd = -1;
        return error;
    }
    self->device = status.st_dev;
    self->inode = status.st_ino;
    return 0;
}

static void post_close(Post *self)
{
    if (post_is_ours(self))
        close(self->fd);
    self->fd = -1;
}

/* Connects, and waits at most so many nanoseconds to be let in; 0, or an errno: EAGAIN where nobody was let in by
 * then, EINTR. After both it may be called again: a socket of this kind is connected at once or not at all. */
static int post_connect(const Post *self, const char *path, size_t length, int64_t wait)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval limit = {.tv_sec = wait / 1000000000, .tv_usec = wait % 1000000000 / 1000 + 1};
    int held = -1, error = 0;
    if (setsockopt(self->fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit))
        return errno;
    if (length < sizeof address.sun_path)
        memcpy(address.sun_path, path, length);
    else if ((held = open(path, O_PATH | O_CLOEXEC)) >= 0) /* too long: by a descriptor of the socket */
        snprintf(address.sun_path, sizeof address.sun_path, "/proc/self/fd/%d", held);
    else
        return errno;
    if (connect(self->fd, (struct sockaddr *)&address, sizeof address))
        error = errno;
    if (held >= 0)
        close(held);
    return error;
}

/* Sends a datagram, now or not at all; 0, or an errno. */
static int post_send(const Post *self, unsigned char flag, const char *data, size_t size)
{
    struct iovec parts[] = {{&flag, 1}, {(void *)data, size}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t sent;
    do
        sent = sendmsg(self->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? errno : 0;
}

/* Takes a datagram that is there: how long it was (0: the other side has closed), or minus an errno. The descriptors
 * that came with it are the caller's. */
static ssize_t post_receive(const Post *self, char *into, size_t room, int *fds, int *count)
{
    char control[CMSG_SPACE(MAX_DESCRIPTORS * sizeof(int))] __attribute__((aligned(8)));
    struct iovec part = {into, room};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    ssize_t got;
    do
        got = recvmsg(self->fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    *count = 0;
    if (got < 0)
        return -errno;
    for (struct cmsghdr *at = CMSG_FIRSTHDR(&message); at; at = CMSG_NXTHDR(&message, at))
        if (at->cmsg_level == SOL_SOCKET && at->cmsg_type == SCM_RIGHTS) {
            int more = (int)((at->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            memcpy(fds + *count, CMSG_DATA(at), (size_t)more * sizeof(int));
            *count += more;
        }
    return got;
}

/* Waits until there is something to read (or room to write), or until `until`. 0: not by then, or a signal came. */
static int post_wait(const Post *self, short events, int64_t until)
{
    struct pollfd poll = {.fd = self->fd, .events = events};
    int64_t left = until - nanoseconds();
    struct timespec limit = {.tv_sec = 0};
    if (left > 0)
        limit = (struct timespec){.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};
    return ppoll(&poll, 1, &limit, NULL) > 0 ? poll.revents : 0;
}

/* ---- parking -------------------------------------------------------------------------------- */

/* Waits until somebody unparks it (at once where that was before), a signal comes, or `until` (monotonic clock). */
static void park(_Atomic uint32_t *word, int64_t until)
{
    struct timespec limit = {.tv_sec = until / 1000000000, .tv_nsec = until % 1000000000};
    if (!atomic_load_explicit(word, memory_order_acquire))
        futex(word, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, 0, &limit);
}

static void unpark(_Atomic uint32_t *word)
{
    atomic_store_explicit(word, 1, memory_order_release);
    futex(word, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1, NULL);
}
