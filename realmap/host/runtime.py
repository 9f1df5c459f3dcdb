"""The directory of realmap's sockets and locks, the names of segments, and sweeping what the dead left of either.

/dev/shm/realmap-UID/  or  $REALMAP_DIR    0700, owned by this user
    PIDNS.PID.START.N.sock       a kernel's socket
    PIDNS.PID.START.N.sock.lock  held (flock) by that kernel for as long as it lives; says who it is (`kernel_at`)

/dev/shm/
    realmap.PIDNS.PID.START.N       a segment that is just being made
    realmap.PIDNS.PID.START.N.HASH  one that has another name besides, of this hash: a link to the same inode

The sockets are where the segments are: whoever could share them finds the kernel, too. TMPDIR and XDG_RUNTIME_DIR
differ between a login, a batch job and a cron job of one user, may be longer than a socket's path, and are cleaned by
others.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import resource
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from realmap._core import read_file
from realmap.errors import AccessDenied, InvalidHandle
from realmap.host import SHM, files, forks, liveness, procfs
from realmap.host.signals import pass_on

#: Another place for the directory; only programs that have the same find each other.
VARIABLE = "REALMAP_DIR"
#: sun_path of unix(7) holds 108 bytes with the final NUL.
LONGEST_PATH = 107
#: What the name of a socket ends with until it can be connected to.
NEW = ".lock.new"
#: Of the name of a socket in its directory: a longer path is reached by way of /proc/self/fd/N/NAME.
LONGEST_NAME = LONGEST_PATH - len("/proc/self/fd/2147483647/" + NEW)
SEGMENT_PREFIX = "realmap."
#: A directory changed so long ago (ns) that the next change has another time: Linux counts in ticks.
SETTLED = 100_000_000
#: The directory (its inode, and when it was changed), and the sockets that were in it then.
_listed: tuple[tuple[int, int], list[str]] = ((-1, -1), [])
_serial = itertools.count()
_stamp: tuple[int, str] = (0, "")


def stamp(pid: int = 0) -> str:
    """PIDNS.PID.START of this process, or of `pid`: names made from it can be swept once it has died."""
    pid = pid or os.getpid()
    return f"{procfs.pid_namespace()}.{pid}.{procfs.start_time(pid)}"


def own_name(name: str | None = None) -> str:
    """A name for a segment that nobody else makes, which tells its maker, and the `name` that it is to have besides."""
    global _stamp
    if _stamp[0] != os.getpid():  # the first time, and after a fork
        _stamp = (os.getpid(), stamp())
    own = f"{SEGMENT_PREFIX}{_stamp[1]}.{next(_serial)}"
    return own if name is None else f"{own}.{_hash(name)}"


def _hash(name: str) -> str:
    import hashlib  # loads OpenSSL: a tenth of what a kernel takes to start

    return hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()


def stamp_in(text: str) -> tuple[int, int, int]:
    """(pid namespace, pid, start time) in a name, or the path of a socket, made from a stamp. ValueError: in none."""
    namespace, pid, start = (int(part) for part in os.path.basename(text).split(".")[:3])
    return namespace, pid, start


def is_mine(text: str) -> bool:
    """Whether this very process made a name with this stamp."""
    return os.path.basename(text).startswith(stamp() + ".")


def is_here(text: str) -> bool:
    """Whether a name has a stamp, of this pid namespace: elsewhere its pid means nothing."""
    try:
        return stamp_in(text)[0] == procfs.pid_namespace()
    except ValueError:
        return False


def maker_lives(text: str) -> bool:
    """Whether who made a name with this stamp may still live; one of another pid namespace always may."""
    try:
        namespace, pid, start = stamp_in(text)
    except ValueError:
        return True  # not a stamp of ours: not ours to judge
    return namespace != procfs.pid_namespace() or liveness.same_process_lives(pid, start)


def _place() -> str:
    return os.environ.get(VARIABLE) or f"{SHM}/realmap-{os.geteuid()}"


def directory() -> Path:
    """The private directory, made if it is not there.

    AccessDenied: it cannot be made, belongs to somebody else, or others may enter it.
    """
    place = _place()
    try:
        path = Path(place).absolute()
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        seen = path.lstat()
        if stat.S_ISDIR(seen.st_mode) and seen.st_uid == os.geteuid() and not seen.st_mode & 0o077:
            if seen.st_mode & 0o700 != 0o700:
                path.chmod(0o700)  # whatever the umask has taken away
            return path
        why = "it must be a directory of yours that nobody else may enter (chmod 700)"
    except OSError as error:
        pass_on(error)
        why = error.strerror or str(error)
    raise AccessDenied(why=f"no place for sockets at {place!r}: {why}; or set ${VARIABLE} to another path")


def new_socket_path() -> str:
    """A path for the socket of a kernel in this process that nothing else uses."""
    return str(directory() / f"{stamp()}.{next(_serial)}.sock")


def tree_path(root: int) -> str:
    """The path for the socket of the kernel of the process tree of that pid. ProcessLookupError: it has ended."""
    return str(directory() / f"{stamp(root)}.tree.sock")


@contextlib.contextmanager
def in_short(path: str) -> Iterator[str]:
    """A path of the same socket that fits into sun_path, for as long as the block lasts. OSError: no such directory."""
    if len(os.fsencode(path)) <= LONGEST_PATH:
        yield path
        return
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        files.close(fd)


def raise_descriptor_limit() -> None:
    """Raises this process's limit of open descriptors to what it may be: a segment takes one each."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class SocketLock:
    """Holds a socket path for one kernel: locked while it lives, whatever way it dies."""

    def __init__(self, path: str) -> None:
        """Takes the path, and unlinks the socket that a dead kernel left on it.

        InvalidHandle: its name is too long, or not UTF-8, its directory is missing, a living kernel holds it, or
        something that is no socket lies there. AccessDenied: it is not ours.
        """
        self.path = path
        self._lock = path + ".lock"
        name = os.path.basename(path)
        if len(os.fsencode(path + NEW)) > LONGEST_PATH and len(os.fsencode(name)) > LONGEST_NAME:
            most = f"at most {LONGEST_PATH - len(NEW)} bytes, or else its name alone {LONGEST_NAME}"
            raise InvalidHandle(path, why=f"a socket's path has {most}; shorten {name!r}")
        if os.fsencode(path) != path.encode(errors="replace"):
            raise InvalidHandle(path, why=f"socket path {path!r} is not UTF-8, and is sent as text; use another path")
        try:
            self._fd = self._take()
        except BlockingIOError:
            raise InvalidHandle(
                path, why=f"a kernel serves {path!r} already; connect to it, or use another path"
            ) from None
        except (FileNotFoundError, NotADirectoryError):
            raise InvalidHandle(path, why=f"no directory to put the socket {path!r} in; make it first") from None
        except PermissionError as error:
            raise AccessDenied(why=f"cannot put a socket at {path!r}: {error.strerror}") from None
        try:
            self._clear()
        except BaseException:
            self.release()
            raise
        forks.lose_in_child(self)

    def _take(self) -> int:
        while True:
            fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.fchmod(fd, 0o600)  # whatever the umask says
                # Whoever swept the file meanwhile took it from under us: then what we locked has no name.
                if self._is_at(fd):
                    return fd
            except BaseException:
                files.close(fd)
                raise
            files.close(fd)

    def _is_at(self, fd: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(fd), os.stat(self._lock))
        return False

    @property
    def is_there(self) -> bool:
        """Whether socket and lock still have their names: somebody may have removed them."""
        return self._fd >= 0 and self._is_at(self._fd) and os.path.lexists(self.path)

    def _clear(self) -> None:
        self._unlink_new()
        try:
            mode = os.lstat(self.path)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode.st_mode):
            raise InvalidHandle(self.path, why=f"{self.path!r} exists and is no socket; remove it or use another path")
        if mode.st_uid != os.geteuid():
            raise AccessDenied(why=f"the socket {self.path!r} belongs to uid {mode.st_uid}, not to this one")
        self._require_dead()
        os.unlink(self.path)

    def _unlink_new(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(self.path + NEW).st_mode):
                os.unlink(self.path + NEW)

    def _require_dead(self) -> None:
        """InvalidHandle: somebody listens on the socket, who has never heard of our locks."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            probe.setblocking(False)
            try:
                with in_short(self.path) as short:
                    probe.connect(short)
            except (ConnectionRefusedError, FileNotFoundError):
                return
            except OSError:  # of another type, or too busy: alive
                pass
        raise InvalidHandle(
            self.path, why=f"somebody who is no kernel of ours listens at {self.path!r}; use another path"
        )

    def note(self, descriptor: int) -> None:
        """Writes down who holds it, and by which of its descriptors it says what it is at. OSError: it cannot."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{stamp()}.{descriptor}".encode(), 0)

    def _after_fork_in_child(self) -> None:
        """In a forked child: a lock belongs to the open file, which the child must not keep open."""
        if self._fd >= 0:
            files.close(self._fd)
            self._fd = -1

    def release(self) -> None:
        """Unlinks socket and lock, and gives the path free. Again: nothing."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):  # where the socket stays, so does the lock: it is swept by that
                if self._is_at(self._fd):  # else the path is another's by now
                    self._unlink_new()
                    with contextlib.suppress(FileNotFoundError):
                        if stat.S_ISSOCK(os.lstat(self.path).st_mode):
                            os.unlink(self.path)
                    os.unlink(self._lock)
            files.close(self._fd)
            self._fd = -1


def kernel_at(path: str) -> tuple[int, int]:
    """(pid, descriptor) that the kernel which lives at `path` has noted in its lock. ValueError, OSError: none has."""
    text = read_file(os.fsencode(os.path.realpath(path) + ".lock"), 128).decode("ascii")
    namespace, pid, start, descriptor = (int(part) for part in text.split("."))
    if namespace != procfs.pid_namespace() or not liveness.same_process_lives(pid, start):
        raise ProcessLookupError(f"no kernel lives at {path!r}")
    return pid, descriptor


def sweep() -> list[str]:
    """Removes what dead kernels left: sockets, empty names, named segments. The names of what went.

    Never what a living process owns: a socket goes only under its lock, a segment only when its
    maker (pid and start time, in this pid namespace) is dead, and only the one that this made.
    """
    gone = [name for own in _orphans() for name in _sweep_segment(own)]
    for lock in directory().glob("*.sock.lock"):
        if not maker_lives(lock.name):  # else it may have made its lock file, and not locked it yet
            with contextlib.suppress(InvalidHandle, AccessDenied):
                gone += sweep_socket(str(lock)[: -len(".lock")])
    return gone


def _sweep_segment(own: str) -> list[str]:
    """Removes the names of a dead maker's segment; those that went."""
    mark = own[len(SEGMENT_PREFIX) :].split(".")[4:]
    # Ours from here on, by a rename: only one of those who sweep at the same time can do it. It holds the inode, too.
    taken = ".".join([own_name(), *mark])
    try:
        os.rename(f"{SHM}/{own}", f"{SHM}/{taken}")
    except OSError:  # another was quicker, or it is another user's
        return []
    inode = os.stat(f"{SHM}/{taken}").st_ino
    names = [name for name in (os.listdir(SHM) if mark else ()) if [_hash(name)] == mark]
    gone = [name for name in names if _inode_of(name) == inode and _remove(f"{SHM}/{name}")]
    _remove(f"{SHM}/{taken}")
    return gone or [own]


def _inode_of(name: str) -> int:
    """Of a name in /dev/shm; 0 where there is none."""
    try:
        return os.stat(f"{SHM}/{name}", follow_symlinks=False).st_ino
    except OSError:
        return 0


def sweep_socket(path: str) -> list[str]:
    """Removes the socket at `path`, and its lock, where no kernel serves it any more; [path] if there was one.

    InvalidHandle: a living kernel holds it, or it is no socket. AccessDenied: it is not ours.
    """
    there = os.path.lexists(path)
    if there and not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise InvalidHandle(path, why=f"{path!r} is no socket")
    if there or os.path.lexists(path + ".lock"):
        try:
            SocketLock(path).release()  # nobody else holds it: its kernel is dead
        except InvalidHandle:
            raise InvalidHandle(path, why=f"{path!r} is in use: a kernel, or another program, serves it") from None
    return [path] if there else []


def sockets() -> list[str]:
    """The sockets of this user's kernels that live, in the private directory: those that were given no path."""
    return [path for path in _sockets() if maker_lives(path)]


def _sockets() -> list[str]:
    """What sockets are there, listed again where the directory has changed."""
    global _listed
    began = time.time_ns()
    try:
        status = os.stat(_place())
        now = (status.st_ino, status.st_mtime_ns)
    except OSError:
        now = (0, 0)
    if _listed[0] == now:
        return _listed[1]
    folder = directory()
    locks = [f"{folder}/{name}" for name in sorted(os.listdir(folder)) if name.endswith(".sock.lock")]
    found = [path for lock in locks if os.path.exists(path := lock.removesuffix(".lock"))]
    if began - now[1] > SETTLED and now[0]:
        _listed = (now, found)
    return found


def own_names(pid: int) -> dict[str, int]:
    """Names in /dev/shm that `pid` made segments under, and their inodes; those without a hash it unlinks soon."""
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(SHM) if maker_of(name) == pid and _is_ours(name)]
        return {name: _inode_of(name) for name in names}
    return {}


def _is_ours(name: str) -> bool:
    """Whether a name in /dev/shm is of this user: what others put there is theirs."""
    try:
        return os.stat(f"{SHM}/{name}", follow_symlinks=False).st_uid == os.geteuid()
    except OSError:
        return False


def maker_of(name: str) -> int:
    """The pid of who made the segment of this name in /dev/shm; 0 where it is none of ours."""
    if not name.startswith(SEGMENT_PREFIX):
        return 0
    try:
        return int(name[len(SEGMENT_PREFIX) :].split(".")[1])
    except (ValueError, IndexError):
        return 0


def _orphans() -> list[str]:
    """Names in /dev/shm between shm_open and shm_unlink of somebody who died there."""
    try:
        names = os.listdir(SHM)
    except OSError:
        return []
    ours = [name for name in names if name.startswith(SEGMENT_PREFIX)]
    return [name for name in ours if not maker_lives(name[len(SEGMENT_PREFIX) :])]


def _remove(path: str) -> bool:
    try:
        os.unlink(path)
    except OSError:
        return False
    return True
