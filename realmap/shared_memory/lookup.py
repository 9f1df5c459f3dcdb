"""Blocks by their names: of the ambient kernel, of another one of this user, and of none (in /dev/shm)."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
from collections.abc import Callable
from multiprocessing import util
from typing import TypeVar

from realmap import ambient
from realmap.errors import AccessDenied, InvalidHandle, KernelDied, SyscallTimeout, VersionMismatch
from realmap.host import SHM, runtime
from realmap.host.segment import checked_name
from realmap.host.signals import Living
from realmap.rights import u_r
from realmap.user import names, travel
from realmap.user.buffer import Buffer
from realmap.user.process import Process

#: The longest name, in bytes (NAME_MAX of limits.h, as for the standard library's names).
LONGEST_NAME = 255
#: How long another kernel of this user may take to let us in and look for a name, in seconds.
PATIENCE = 5.0
#: How long a kernel that did not answer is not asked again, in seconds; and those, with the end of that.
SILENCE = 60.0
_silent: dict[str, float] = {}
_SHM_NAME_PREFIX = "/psm_"
#: A name that `_make_filename` has made: so random that nobody else has it.
_FRESH = re.compile(_SHM_NAME_PREFIX + "[0-9a-f]{24}")
T = TypeVar("T")

#: The connections by which this process gave names.
_makers: Living[Process] = Living()


def checked(name: str) -> str:
    """The name, as it is known to kernels: without slashes before it, as Linux's names are."""
    if not isinstance(name, str):
        raise TypeError(f"a name is a str, not {type(name).__name__}")
    if "\0" in name:
        raise ValueError("embedded null character in the name of a block")
    bare = name.lstrip("/")
    if bare in ("", ".", "..") or "/" in bare:
        raise OSError(errno.EINVAL, "the name of a block has at least one character, and no slash", name)
    if len(os.fsencode(bare)) > LONGEST_NAME:
        raise OSError(errno.ENAMETOOLONG, f"the name of a block has at most {LONGEST_NAME} bytes", name)
    return bare


def _make_filename() -> str:
    return _SHM_NAME_PREFIX + secrets.token_hex(12)


def create(name: str | None, size: int, *, keep: bool, visible: bool, commit: bool) -> tuple[str, Buffer]:
    """A new block, with a name that nobody has."""

    def make(process: Process) -> tuple[str, Buffer]:
        if name is not None and _is_taken_elsewhere(checked(name), process.path):
            raise FileExistsError(errno.EEXIST, "shared memory of this name exists", name)
        _makers.add(process)
        while True:
            chosen = _make_filename() if name is None else name
            bare = checked(chosen)
            try:
                # In the tree's kernel it ends soon enough.
                lasting = keep or ambient.is_of_the_tree(process.path)
                segment = _checked_visible(bare) if visible else None
                fresh = name is None and _FRESH.fullmatch(chosen) is not None
                made = names.make(process, size, bare, keep=lasting, segment=segment, commit=commit, fresh=fresh)
                return chosen, made
            except InvalidHandle:
                if name is not None:
                    raise FileExistsError(errno.EEXIST, "shared memory of this name exists", name) from None

    return ambient.using(make)


def _checked_visible(bare: str) -> str:
    try:
        return checked_name(bare)
    except InvalidHandle as error:
        raise OSError(errno.EINVAL, str(error), bare) from None


def _is_taken_elsewhere(bare: str, mine: str) -> bool:
    """Whether it is a name of another kernel than the one at `mine`, or of none."""
    found = _look_elsewhere(mine, lambda process, timeout: names.attach(process, bare, u_r, timeout=timeout))
    return found is not None or _is_outside(bare)


def attach(name: str, readonly: bool) -> Buffer | int | None:
    """The block of that name, or a descriptor of what others have put into /dev/shm; None: there is none.

    OSError: it may not be opened.
    """
    bare, rights = checked(name), u_r if readonly else None
    found = _look(lambda process, timeout: names.attach(process, bare, rights, timeout=timeout))
    if found is None and _is_outside(bare):
        flags = os.O_RDONLY if readonly else os.O_RDWR
        with contextlib.suppress(FileNotFoundError):
            return os.open(f"{SHM}/{bare}", flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    return found


def _is_outside(bare: str) -> bool:
    """Whether others have put memory of this name into /dev/shm. What a killed kernel left there is swept."""
    there = os.path.lexists(f"{SHM}/{bare}")
    if there:
        runtime.sweep()
    return there and os.path.lexists(f"{SHM}/{bare}")


def unlink(name: str) -> bool:
    """Whether a kernel had that name, which has ended now."""
    bare = checked(name)

    def end(process: Process, timeout: float | None) -> bool:
        names.unlink(process, bare, timeout=timeout)
        return True

    return bool(_look(end))


def _look(ask: Callable[[Process, float | None], T]) -> T | None:
    """What a kernel answers that has the name: the ambient one, or else another of this user's; None: none has it."""
    mine = ambient.running()
    if mine is not None:
        with contextlib.suppress(InvalidHandle, KernelDied):
            return ask(travel.own_process_of(mine), None)
    return _look_elsewhere(mine, ask)


def _look_elsewhere(mine: str | None, ask: Callable[[Process, float | None], T]) -> T | None:
    for path in runtime.sockets():
        if path != mine and _silent.get(path, 0.0) < time.monotonic():
            with contextlib.suppress(InvalidHandle, KernelDied):
                return _ask_another(path, ask)
    return None


def _ask_another(path: str, ask: Callable[[Process, float | None], T]) -> T:
    """InvalidHandle, KernelDied: it has no such name, or does not answer, or not to us."""
    process = travel.made(path)
    known = process is not None
    try:
        if process is None:
            process = Process(path, timeout=PATIENCE)
        found = ask(process, PATIENCE)
        travel.keep(process)
        known = True
        return found
    except (SyscallTimeout, VersionMismatch, AccessDenied) as error:
        _silent[path] = time.monotonic() + SILENCE
        raise InvalidHandle(path, why=str(error)) from None
    finally:
        if process is not None and not known:
            process.close()


# ---- the end in good order ----------------------------------------------------------------------


def _leave() -> None:
    for process in _makers.all():
        names.leave(process)


def _leave_at_exit(_: object = None) -> None:
    # Run at exit like an atexit function, and in multiprocessing's children, which run none of those.
    util.Finalize(None, _leave, exitpriority=0)


_leave_at_exit()
util.register_after_fork(_leave_at_exit, _leave_at_exit)
os.register_at_fork(after_in_child=_leave_at_exit)
