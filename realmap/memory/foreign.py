"""`ForeignProcess`: any process of the machine, by the contract of `CrossProcessMapping`.

For `foreign.mirror(0x7f12_3456_7003, 5)`:

    address 0x7f12_3456_7003
      → Stranger          what it has mapped there; a descriptor of that file, checked  (realmap/host/stranger.py)
      → Mapping           that range of its addresses, of SharedFrames made of the descriptor; known from now on
      → CrossProcessMapping   as of anybody's

A known one is used again for as long as Linux says that the process has the very same there. Its descriptor keeps the
inode from becoming another file's, so the same range, device, inode and offset are the same bytes.
"""

from __future__ import annotations

import operator
import os
import weakref
from typing import Any, NamedTuple, Self, SupportsIndex

import msgspec

from realmap._core import Lock, map_at
from realmap.errors import (
    AccessDenied,
    InvalidAddress,
    InvalidHandle,
    InvalidMemState,
    InvalidSize,
    KernelError,
    MemoryFault,
    PhysicalMemoryExhaustion,
)
from realmap.host import SHM, procfs
from realmap.host.procfs import Map
from realmap.host.signals import pass_on
from realmap.host.stranger import Stranger
from realmap.memory.cross_process import CrossProcessMapping, Part, mirror_parts, mirror_prot
from realmap.memory.frames import SharedFrames
from realmap.memory.kernel_memory import KernelMemory
from realmap.memory.lands import FOREIGN_LAND
from realmap.memory.mapping import Mapping
from realmap.pages import USIZE_MAX, address_of, usize
from realmap.rights import MappingAccessRights, MemoryType, allows, k_r, k_w, rights_of, user_rights

#: So many mappings of a process are known at a time, each with a descriptor.
KNOWN = 256
#: So often it is looked again where the process has changed what it has mapped meanwhile.
TRIES = 100
#: By how the name of a shared one begins.
_KINDS = {
    "/memfd:": "memfd",
    "/SYSV": "sysv",
    "/dev/zero (deleted)": "anonymous",
    "/anon_hugepage (deleted)": "anonymous",
    f"{SHM}/": "posix",
    "/dev/": "device",
    "/": "file",
}
#: Where strangers are mirrored in this process, one for all: there while somebody has any of them.
_lands: weakref.WeakValueDictionary[str, KernelMemory] = weakref.WeakValueDictionary()


class ForeignMapping(msgspec.Struct, frozen=True):
    """What a process has mapped at [address, address + length); all in bytes.

    `rights`: its own. `kind`: "posix", "memfd", "sysv", "anonymous" (shared), "file" (mapped shared), "private" (of a
    file or not), "special" (of Linux, [vdso] say), "device"; of a kernel's user the name of its `MemoryType`. `name`:
    as /proc/PID/maps has it. `device`, `inode`: of the file; `offset`: where in it the mapping starts. `resident`: how
    much of it the process has touched; None where that is not asked. `why_not`: why it cannot be mirrored; "": it can.
    """

    address: int
    length: int
    rights: MappingAccessRights
    kind: str
    name: str
    device: int
    inode: int
    offset: int
    resident: int | None
    why_not: str = ""


class _Known(NamedTuple):
    """A mapping that was mirrored, and whether its frames can be written to."""

    mapping: Mapping
    writable: bool


class ForeignProcess:
    """Process `pid`, any that Linux lets this one look into: what it shares with others is mirrored, in place; what is
    its own can be copied. It need know nothing of realmap, and does not notice.

    It is this process or none: once it has ended everything here is ProcessKilled, whoever has its pid then. Mirrors
    stay good, whatever it does: end, unmap, run another program. What is known of it (256 mappings at most, each with
    a descriptor, which keeps the memory) is kept until it is closed. For many threads; `with` closes it.
    A kernel's user may use a small buffer again, zeroed, for its next one: a mirror of it shows that then; none that
    its kernel has made does (`ProcessView`).

    >>> import mmap, os
    >>> fd = os.memfd_create("letters")
    >>> os.write(fd, b"hello")
    5
    >>> shown = mmap.mmap(fd, 5)
    >>> with ForeignProcess(os.getpid()) as process:
    ...     (place,) = [each for each in process.mappings() if each.name.startswith("/memfd:letters")]
    ...     with process.mirror(place.address + 1, 3) as mirror:
    ...         place.kind, place.length, bytes(mirror)
    ('memfd', 4096, b'ell')
    >>> shown.close(); os.close(fd)
    """

    def __init__(self, pid: SupportsIndex) -> None:
        """InvalidHandle: there is no such process, it has ended (a zombie too), it is a thread, or one of Linux itself.

        AccessDenied: /proc is not mounted, or hides it. PhysicalMemoryExhaustion: no descriptors. TypeError: no
        integer.
        """
        try:
            number = operator.index(pid)
        except TypeError:
            raise TypeError(f"a pid is an integer, not {type(pid).__name__}") from None
        if not 0 < number < 1 << 31:
            raise InvalidHandle(number, why=f"there is no process {number}")
        self._lock = Lock()
        #: By what Linux says of each: where that is said again, it is the same.
        self._known: dict[bytes | tuple[Any, ...] | None, _Known] = {}
        self._stranger = Stranger(number)
        self._land = _kernel()
        self._name = ""
        self._name = self.name  # seen last, where nobody asks before its end

    @property
    def pid(self) -> int:
        return self._stranger.pid

    @property
    def name(self) -> str:
        """What its program is called: /proc/PID/comm, 15 letters at most; once it has ended, what was seen last."""
        with self._lock:
            try:
                self._name = os.fsdecode(self._stranger.read("comm").removesuffix(b"\n"))
            except KernelError:
                pass
            return self._name

    def close(self) -> None:
        """Gives up what is known of it. Its mirrors stay good. Again: nothing."""
        with self._lock:
            self._forget()
            self._stranger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_stranger"):
            self._stranger.close()

    def __repr__(self) -> str:
        return f"<ForeignProcess {self.pid}, {self._name!r}>"

    # ---- asking -----------------------------------------------------------------------------

    def mappings(self) -> list[ForeignMapping]:
        """What it has mapped, in order of address; each that is shared is tried, whether it can be opened.

        ProcessKilled: it, or its first thread, has ended. AccessDenied: it is not ours to look at; which right or
        setting is missing is said.
        InvalidHandle: this was closed. PhysicalMemoryExhaustion: no descriptors.
        """
        with self._lock:
            return [self._told(entry, resident) for entry, resident, _ in self._stranger.smaps()]

    def _told(self, entry: Map, resident: int) -> ForeignMapping:
        kind, why_not = kind_of(entry), ""
        try:
            _require_shared(entry)
            self._stranger.open(entry, False).close()
        except (InvalidMemState, AccessDenied) as error:
            why_not = error.why
        except LookupError:
            why_not = "it is mapped there no more"
        rights, device = user_rights(entry.perms), procfs.device_number(entry.device)
        file = (entry.path, device, entry.inode, entry.offset)
        return ForeignMapping(entry.start, entry.length, rights, kind, *file, resident, why_not)

    def _walk(self, start: int, size: int, asked: int) -> list[Map]:
        """Its maps that [start, start + size) goes through, each of which allows `asked` to the process itself.

        LookupError: they change as they are listed.
        """
        found = self._stranger.maps(start, start + size)
        at = start
        for entry in found:
            if entry.start > at:
                break
            if not allows(user_rights(entry.perms), asked):
                why = f"process {self.pid} may not do that there itself"
                raise AccessDenied(rights_of(asked), user_rights(entry.perms), max(start, entry.start), why=why)
            at = entry.end
        if at < start + size:
            if self._stranger.look(at):  # Linux may leave out a map that is split or merged as it lists them
                raise LookupError(at)
            why = "nothing is mapped there" if at == start else "the range runs into a hole there"
            raise InvalidAddress(at, why=f"process {self.pid}: {why}")
        return found

    # ---- mirrors ----------------------------------------------------------------------------

    def mirror(
        self, address: SupportsIndex, length: SupportsIndex, rights: MappingAccessRights = k_r
    ) -> CrossProcessMapping:
        """Maps [address, address + length) of it into KernelLand of this process: one contiguous window, also over
        several mappings without a gap. Bytes that are gone when they are touched (somebody truncated the file) read as
        zeros, and to drop it is MemoryFault then.

        InvalidAddress: nothing is mapped there, or the range runs into a hole (its first byte is named). InvalidSize:
        no bytes, negative, or it overflows 64 bits. InvalidMemState: private memory, a device, a file on FUSE, what is
        Linux's own. AccessDenied: the process may not do that there itself; `rights` beyond k_rw; or no way in is
        allowed (the missing right or setting is named). InvalidRights: none at all. ProcessKilled: it has ended.
        InvalidHandle: this was closed. VirtualMemoryExhaustion: no space, or Linux's limit of mappings.
        PhysicalMemoryExhaustion: no descriptors. TypeError: no integers.
        """
        if type(address) is int and 0 <= address <= USIZE_MAX:
            # Without the lock: whatever another thread does to the descriptor, what is known keeps its own frames.
            known = self._known.get(map_at(self._stranger.maps_fd, address))
            if known is not None:
                mapping = known.mapping
                made = CrossProcessMapping._open(self._land, mapping, address - mapping.address, length, rights, self)
                if made is not None:
                    return made
        with self._lock:
            return self._mirror(address_of(address), usize(length, "length"), rights)

    def _note_fault(self, mirror: CrossProcessMapping, address: int) -> None:
        """Nothing is kept of it: whoever drops the mirror is told."""

    def _mirror(self, start: int, size: int, rights: MappingAccessRights) -> CrossProcessMapping:
        """The long way: not known, of several mappings, or not at all."""
        _require_range(start, size)
        prot = mirror_prot(rights)
        for line, known in list(self._known.items()):  # what is mapped no more is not kept alive by us
            gone = isinstance(line, bytes) and self._stranger.look(known.mapping.address) != line
            if gone or len(self._known) > KNOWN:
                self._known.pop(line, known).mapping.release()
        forgotten = False
        for _ in range(TRIES):
            try:
                return self._mirror_now(start, size, rights, prot)
            except LookupError:
                pass  # and once more
            except PhysicalMemoryExhaustion:
                if forgotten:
                    raise
                self._forget()  # there may be descriptors then
                forgotten = True
        raise InvalidAddress(start, why=f"process {self.pid} changes what it has mapped there all the time")

    def _mirror_now(self, start: int, size: int, rights: MappingAccessRights, prot: int) -> CrossProcessMapping:
        """LookupError: the process has changed what it has there meanwhile."""
        entries = self._walk(start, size, prot)
        for entry in entries:
            _require_shared(entry)
        mappings = [self._mapping(entry, bool(prot & k_w)) for entry in entries]
        if not self._stranger.still_has(entries):
            raise LookupError(start)
        parts: list[Part] = []
        for mapping in mappings:
            low, high = max(start, mapping.address), min(start + size, mapping.end)
            parts.append((mapping, low - mapping.address, high - low))
        return mirror_parts(parts, kernel=self._land, rights=rights)

    def _mapping(self, entry: Map, writable: bool) -> Mapping:
        """It as a mapping, with frames. LookupError: it is there no more. Errors as `Stranger.open`."""
        known = self._known.get(self._line(entry))
        if known is not None and (known.writable or not writable):
            return known.mapping
        frames = SharedFrames([self._stranger.open(entry, writable)])
        kind, owner = MemoryType.SHARED_MEMORY, f"of process {self.pid}"
        mapping = Mapping(entry.start, frames, entry.offset, entry.length, kind, user_rights(entry.perms), owner=owner)
        line = self._line(entry)
        before = self._known.get(line)  # which could only be read
        self._known[line] = _Known(mapping, writable)
        if before is not None:
            before.mapping.release()
        return mapping

    def _line(self, entry: Map) -> bytes | tuple[Any, ...]:
        """What Linux says of it now. LookupError: it is there no more."""
        found = self._stranger.look(entry.start)
        if found and not procfs.is_that(found, entry):
            raise LookupError(entry)
        return found or entry[:6]

    def _forget(self) -> None:
        """All that is known."""
        known, self._known = self._known, {}
        for each in known.values():
            each.mapping.release()

    # ---- copies -----------------------------------------------------------------------------

    def copy_in(self, address: SupportsIndex, length: SupportsIndex) -> bytes:
        """A copy of [address, address + length) of it: of shared memory through its frames, where a way in is allowed,
        of all other through /proc/PID/mem.

        Errors as `mirror`. MemoryFault: the file there was truncated. AccessDenied: private memory takes more than
        shared (kernel.yama.ptrace_scope); what is missing is named. InvalidMemState: Linux shows it to nobody ([vvar]).
        """
        start, size = address_of(address), usize(length, "length")
        _require_range(start, size)
        try:
            with self.mirror(start, size, k_r) as mirror:
                return bytes(mirror)
        except (InvalidMemState, AccessDenied):  # private, or no way in; what the process may not do is denied again
            return self._through_memory(start, size, None)

    def copy_out(self, address: SupportsIndex, data: bytes | bytearray | memoryview) -> None:
        """Copies `data` into it from `address` on. Errors as `copy_in`, of writing.

        Bytes before the one that an error names may have been written.
        """
        with memoryview(data) as view, view.cast("B") as flat:
            start, size = address_of(address), len(flat)
            _require_range(start, size)
            try:
                with self.mirror(start, size, k_w) as mirror:
                    mirror[:] = flat
            except (InvalidMemState, AccessDenied):
                self._through_memory(start, size, flat)

    def _through_memory(self, start: int, size: int, data: memoryview | None) -> bytes:
        for _ in range(TRIES):
            # Opened first: of the program whose maps are looked at then, or of an earlier one, and empty.
            with self._lock, self._stranger.memory(data is not None) as fd:
                try:
                    return self._copy(fd, start, size, data)
                except LookupError:
                    pass  # it runs another program: once more
        raise InvalidAddress(start, why=f"process {self.pid} runs another program all the time")

    def _copy(self, fd: int, start: int, size: int, data: memoryview | None) -> bytes:
        self._walk(start, size, k_r if data is None else k_w)
        parts: list[bytes] = []
        done = 0
        while done < size:
            try:
                if data is None:
                    parts.append(os.pread(fd, size - done, start + done))
                    moved = len(parts[-1])
                else:
                    moved = os.pwrite(fd, data[done:], start + done)
            except OSError as error:
                pass_on(error)
                raise self._untouchable(start + done, error) from None
            if not moved:
                raise LookupError(start)
            done += moved
        return b"".join(parts)

    def _untouchable(self, at: int, error: OSError) -> KernelError:
        """Why not even Linux reads or writes there; InvalidAddress is raised where nothing is mapped any more."""
        (entry,) = self._walk(at, 1, 0)
        if kind_of(entry) in ("private", "special", "device"):
            return InvalidMemState(at, MemoryType.IO, why=f"{entry.path or 'that'} cannot be copied: {error.strerror}")
        return MemoryFault(at, why=f"the file under it ({entry.path}) was truncated")


def kind_of(entry: Map) -> str:
    """The `kind` of a `ForeignMapping`."""
    if entry.path.startswith("[") and entry.path not in ("[heap]", "[stack]") and not entry.path.startswith("[anon"):
        return "special"
    if entry.perms[3] == "p":
        return "private"
    return next((kind for beginning, kind in _KINDS.items() if entry.path.startswith(beginning)), "special")


def _require_range(start: int, size: int) -> None:
    if not size:
        raise InvalidSize(0, why="a range of no bytes")
    if start + size - 1 > USIZE_MAX:
        raise InvalidSize(size, why=f"address ({start:#x}) + length overflows 64 bits")


def _require_shared(entry: Map) -> None:
    kind = kind_of(entry)
    if kind == "private":
        raise InvalidMemState(entry.start, MemoryType.NORMAL, why="private memory has no shared frames; copy it")
    if kind in ("special", "device"):
        raise InvalidMemState(entry.start, MemoryType.IO, why=f"{entry.path or 'that'} is no memory with frames")


def _kernel() -> KernelMemory:
    """Where every `ForeignProcess` of this process maps its mirrors."""
    land = _lands.get("land")
    if land is None:
        land = _lands.setdefault("land", KernelMemory(FOREIGN_LAND.start, FOREIGN_LAND.length))
    return land
