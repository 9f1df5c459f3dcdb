"""The ambient kernel: the one that `connect()` without a path finds, or boots.

$REALMAP_KERNEL   a kernel that runs; whoever boots one says so to its children by it
$REALMAP_TREE     where the kernel of this process tree is to be; whoever needs it first boots it there

The second is set by what cannot know who will need a kernel first (`import realmap.shared_memory`): a worker that
was started before anybody needed one finds the same kernel as its parent. That kernel ends with the root of the
tree, the process that set the variable, and with nobody else.

Where it turns out that the ambient kernel has ended, the next one takes its place: of the tree, or of this process. A
kernel at a path of somebody's own choice is waited for by its users, and only they know what to do: KernelDied.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, TypeVar

from realmap._core import Lock
from realmap.errors import InvalidHandle, KernelDied, KernelError
from realmap.host import runtime
from realmap.serving.logs import log
from realmap.system import KernelHandle, boot, boot_for
from realmap.user import travel
from realmap.user.process import Process

if TYPE_CHECKING:
    from asyncio import Future

#: The socket of the kernel that `connect()` without a path means.
VARIABLE = "REALMAP_KERNEL"
#: Where that of the process tree is, or will be; its name tells who is the root.
TREE = "REALMAP_TREE"
#: How often it is tried to boot it, while others of the tree seem to do the same.
ATTEMPTS = 20
#: How long a kernel may take to make its socket anew, in seconds.
ANEW = 5.0
T = TypeVar("T")

_booted: KernelHandle | None = None
_lock = Lock()


def _new_lock() -> None:
    global _lock
    _lock = Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_new_lock)


def connect(path: str | os.PathLike[str] | None = None) -> Process:
    """This process as a user of the kernel at `path`.

    Without a path: of the one that $REALMAP_KERNEL names, or else of a kernel of this process tree's
    own, booted now; children find it by the same variable. It ends with this process. Where the variable was left by a
    program that had booted a kernel, and that has ended, it counts for nothing.

    KernelDied: no kernel listens there. AccessDenied: it is another user's. VersionMismatch: it is of
    another version. InvalidHandle: the path is no socket of a kernel. SyscallTimeout: it has not answered for a second
    or two, and is stopped or kept by a handler (the text says so), or for 30 seconds.
    """
    return Process(os.fspath(path)) if path is not None else _with_ambient(Process)


@contextlib.asynccontextmanager
async def aconnect(path: str | os.PathLike[str] | None = None) -> AsyncIterator[Process]:
    """`connect`, for asyncio: `async with realmap.aconnect() as me: await me.acall(…)`. Closed at the end.

    Connecting (booting a kernel takes a while) and closing are done on a thread of the loop's. Errors as `connect`.
    """
    import asyncio

    loop = asyncio.get_running_loop()
    connecting = loop.run_in_executor(None, connect, path)
    try:
        process = await asyncio.shield(connecting)
    except asyncio.CancelledError:
        connecting.add_done_callback(_close_late)
        raise
    try:
        yield process
    finally:
        await asyncio.shield(loop.run_in_executor(None, process.close))


def _close_late(connecting: Future[Process]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().close()


def process() -> Process:
    """This process as a user of its ambient kernel: one connection, however often it is asked for. As `connect`."""
    return _with_ambient(travel.own_process_of)


def using(use: Callable[[Process], T]) -> T:
    """`use(process())`; where the kernel has ended, once more with the next one's. Errors as `connect`, and its own."""
    return _with_ambient(lambda path: use(travel.own_process_of(path)))


def _with_ambient(use: Callable[[str], T]) -> T:
    path = find()
    try:
        return use(path)
    except KernelDied:
        travel.forget(path)
        if not _forget(path):
            raise
    return use(find())


def _forget(path: str) -> bool:
    """Whether another kernel may take the place of this one, which has ended: nobody has chosen its path."""
    if path != os.environ.get(VARIABLE):
        return True
    try:
        runtime.stamp_in(path)
    except ValueError:
        return False
    log.info("the kernel at %r, which $%s names, has ended; it counts for nothing", path, VARIABLE)
    del os.environ[VARIABLE]
    return True


def plant() -> None:
    """Says where the kernel of this tree will be, unless that is said already; boots nothing.

    The root is this process; in a worker of multiprocessing, whose parent did not know, that parent.
    """
    with _lock:
        if _tree() is None:
            parent = multiprocessing.parent_process()
            os.environ[TREE] = runtime.tree_path(os.getpid() if parent is None or parent.pid is None else parent.pid)


def _plant_anew() -> None:
    """Before a fork: where the root has died (a daemon's has), this process is the root of what it starts."""
    if TREE in os.environ and _tree() is None:
        with contextlib.suppress(OSError, KernelError):
            plant()


os.register_at_fork(before=_plant_anew)


def _tree() -> str | None:
    """Where the kernel of this tree is to be, if this process is in one: its root lives, and can be named here."""
    tree = os.environ.get(TREE)
    return tree if tree and runtime.is_here(tree) and runtime.maker_lives(tree) else None


def is_of_the_tree(path: str) -> bool:
    """Whether that kernel ends with this process tree."""
    return path == os.environ.get(TREE)


def _connected() -> str | None:
    """The path of the ambient kernel, where this process has a connection to it: nothing else has to be asked then."""
    path = os.environ.get(VARIABLE) or os.environ.get(TREE)
    known = travel.made(path) if path else None
    return path if known is not None and not known._client.lost_in_child else None


def running() -> str | None:
    """The path of the ambient kernel, if there may be one already."""
    connected = _connected()
    if connected is not None:
        return connected
    known = os.environ.get(VARIABLE) or _tree()
    if not known:
        return None
    until = time.monotonic() + ANEW
    while not os.path.exists(known):
        # One that this process, or its parent, is connected to makes its socket anew where somebody has removed it.
        if travel.made(known) is None or time.monotonic() > until:
            return None
        time.sleep(0.002)
    return known


def find() -> str:
    """The path of the ambient kernel, which is booted if need be. Errors as `connect`."""
    global _booted
    connected = _connected()
    if connected is not None:
        return connected
    with _lock:
        known = os.environ.get(VARIABLE)
        if known:
            return known
        tree = _tree()
        if tree is not None:
            _join(tree)
            return tree
        before, booted = _booted, boot()
        if _booted is not before and _booted is not None:  # a signal handler needed one meanwhile, and has it
            booted.shutdown()
            return _booted.path
        _booted = booted
        os.environ[VARIABLE] = booted.path
        return booted.path


def _join(tree: str) -> None:
    """Sees to it that the tree's kernel runs. KernelDied: it does not, and the root has ended. Else as `boot`."""
    global _booted
    for attempt in range(ATTEMPTS):
        try:
            travel.own_process_of(tree)
            return
        except KernelDied:
            runtime.directory()  # where somebody has removed it meanwhile
        try:
            if runtime.is_mine(tree):
                _booted = boot(path=tree)
            else:
                boot_for(tree, runtime.stamp_in(tree)[1:])
        except InvalidHandle:  # somebody else of the tree may be just doing the same
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(0.02 * (attempt + 1))
