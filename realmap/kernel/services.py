"""What the kernel does itself for a process: map, unmap, query, and the like.

One function for each type of message (`SERVICES`): of the books, the process and the request it makes the answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from realmap.errors import (
    AccessDenied,
    InvalidAddress,
    InvalidMemState,
    InvalidSize,
    LimitReached,
    PhysicalMemoryExhaustion,
    ProcessKilled,
    VirtualMemoryExhaustion,
)
from realmap.kernel.books import Books
from realmap.kernel.processes import UserProcess
from realmap.memory.frames import OwnedFrames, SharedFrames
from realmap.memory.mapping import Mapping
from realmap.pages import HUGE_SIZE, PAGE_SIZE, USIZE_MAX, align_up
from realmap.rights import MappingAccessRights, MemoryType, allows, k_w, prot_of, rights_of, type_of, u_rw
from realmap.wire import channel, messages
from realmap.wire.messages import MAX_DESCRIPTORS, RECYCLED, MemoryInfo

#: Frames of more bytes, or of more segments, are taken on a worker thread: nobody else waits for them.
LONG_BYTES = 4 << 20
LONG_COUNT = 64
#: An answer: its value, and the descriptors to send with it, which are closed afterwards.
Answer = tuple[Any, list[int]]


#: Takes an answer, or the error that takes its place.
Reply = Callable[[Answer | BaseException], None]


class Begun(NamedTuple):
    """An answer that is made a little at a time: `begin` is handed what takes it."""

    begin: Callable[[Reply], None]


class Later(NamedTuple):
    """An answer that takes long to make: nobody else waits for it."""

    #: Anywhere but where the books are.
    work: Callable[[], SharedFrames]
    #: There, with what that returned.
    end: Callable[[SharedFrames], Answer]
    #: Bytes of frames that are to come.
    size: int

    def failed(self, error: BaseException) -> PhysicalMemoryExhaustion:
        """The error where there is no thread to do it on."""
        return PhysicalMemoryExhaustion(self.size, why=f"no thread to take so much memory on: {error}")


#: What a service makes of a request; None: it has no answer.
Served = Answer | Begun | Later | None
Service = Callable[[Books, UserProcess, Any], Served]


def map_memory(books: Books, process: UserProcess, request: messages.Map) -> Answer | Later:
    """Makes frames and a mapping of them: [address, length, segments, huge, serial].

    KernelError: as `Process.map` documents. Nothing is taken then.
    """
    kind, rights = type_of(request.kind), rights_of(request.rights)
    if not kind.has_frames:
        raise InvalidMemState(0, kind, why=f"{kind.name} is no memory that a process can map")
    if not allows(rights, MappingAccessRights.USER_ACCESSIBLE) or not prot_of(rights):
        raise AccessDenied(rights, u_rw, why="a process maps memory for itself: u_r, u_w, u_rw or u_rx")
    _require_room(books, process, request.length)
    unit = HUGE_SIZE if request.huge else PAGE_SIZE
    if request.length <= 0 or align_up(request.length, unit) > USIZE_MAX:
        raise InvalidSize(request.length, why="a mapping has at least one byte, and whole pages below 2**64")
    size = align_up(request.length, unit)
    if not kind.is_counted:
        if request.fragment is not None or request.name is not None or request.huge:
            raise InvalidMemState(0, kind, why=f"{kind.name} memory is private: no fragments, no name, no huge frames")
        return _enter(process, OwnedFrames(size), size, kind, rights)

    def allocate() -> SharedFrames:
        return process.memory.allocator.allocate(
            size,
            request.fragment,
            name=request.name,
            commit=request.commit,
            huge=request.huge,
            cancelled=lambda: not process.alive,
        )

    def enter(frames: SharedFrames) -> Answer:
        if not process.alive:  # nobody reads it; the frames go
            raise ProcessKilled(process.pid, why="the process has ended")
        frames.recycles = size <= RECYCLED and request.fragment is None and request.name is None and not request.huge
        return _enter(process, frames, size, kind, rights)

    if size <= LONG_BYTES and not request.huge and size // (request.fragment or size) <= LONG_COUNT:
        return enter(allocate())
    return Later(allocate, enter, size)


def publish(books: Books, process: UserProcess, request: messages.Publish) -> Answer | Later:
    """Memory, and a name for all of it: both or none. Errors as those of the two."""
    handles, memory = books.handles, request.memory
    handles.require_free(request.name)

    def name(answer: Answer) -> Answer:
        (address, size, *_), descriptors = answer
        share = messages.Share(0, address, memory.length, memory.rights, None, None, request.keep, request.name)
        try:
            handles.share(process, share, time.monotonic())
        except BaseException:
            channel.close_all(descriptors)
            process.memory.unmap(address, size).release()
            raise
        return answer

    got = map_memory(books, process, memory)
    return Later(got.work, lambda frames: name(got.end(frames)), got.size) if isinstance(got, Later) else name(got)


def _enter(
    process: UserProcess, frames: SharedFrames | OwnedFrames, size: int, kind: MemoryType, rights: Any
) -> Answer:
    memory = process.memory
    huge = frames.huge if isinstance(frames, SharedFrames) else 0
    mapping = memory.enter_anywhere(frames, size, kind, rights, HUGE_SIZE if huge else 1)
    address = mapping.address
    try:
        rights = descriptors(mapping, 0)
    except BaseException:
        memory.unmap(address, size).release()
        raise
    count = len(frames.segments) if isinstance(frames, SharedFrames) else 0
    return [address, size, count, huge, mapping.serial], rights


def descriptors(mapping: Mapping, first: int) -> list[int]:
    """Descriptors of its segments from its `first` on, a batch; read-only ones where the user may not write.

    Each is opened anew: of a description that the kernel uses itself, a user that sets O_APPEND on it changes where the
    kernel writes, for everybody.
    """
    frames, writable = mapping.frames, allows(mapping.rights, k_w)
    if not isinstance(frames, SharedFrames):
        return []
    if len(frames.segments) == 1 and not first:  # the common case
        return [frames.segments[0].open_anew(writable=writable)]
    begin = frames.index_of(mapping.phys_offset) + first
    end = frames.index_of(mapping.phys_offset + mapping.length - 1) + 1
    opened: list[int] = []
    try:
        for segment in frames.segments[begin : min(end, begin + MAX_DESCRIPTORS)]:
            opened.append(segment.open_anew(writable=writable))
    except BaseException:
        channel.close_all(opened)
        raise
    return opened


def attach(books: Books, process: UserProcess, request: messages.Attach) -> Answer:
    """A mapping of what a handle stands for. Errors as `Handles.attach`; nothing is taken then, and no use of it."""
    _require_room(books, process, request.length or 0)
    mapping, lead, length, spend = books.handles.attach(process, request, time.monotonic())
    frames = mapping.frames
    assert isinstance(frames, SharedFrames)
    pieces = [[offset, size] for _, offset, size in frames.pieces(mapping.phys_offset, mapping.length)]
    try:
        rights = descriptors(mapping, 0)
    except BaseException:
        process.memory.unmap(mapping.address, mapping.length).release()
        raise
    spend()
    place = [mapping.address, mapping.length, len(pieces), frames.huge, mapping.serial]
    again = mapping.handle is not None and mapping.length <= min(RECYCLED, process.memory.stock.most)
    return [*place, lead, length, int(mapping.rights), pieces, again], rights


def _require_room(books: Books, process: UserProcess, length: int) -> None:
    limit, coming, memory = books.limits.mappings, process.coming, process.memory
    if coming >= books.limits.calls:
        why = f"process {process.pid} waits for {coming} mappings already, the kernel's limit"
        raise LimitReached("calls", books.limits.calls, why=why)
    if len(memory) + memory.stock.count + coming >= limit:  # what is parked may come back without asking
        memory.stock.give_up()
    if len(memory) + memory.stock.count + coming >= limit:
        raise VirtualMemoryExhaustion(length, why=f"the process has {limit} mappings, the kernel's limit; unmap some")


def more(books: Books, process: UserProcess, request: messages.More) -> Answer:
    """The next descriptors of a mapping in many segments."""
    mapping = process.memory.starting_at(request.address)
    if not 0 <= request.first <= USIZE_MAX:
        raise InvalidSize(request.first, why="no such segment")
    if isinstance(mapping.frames, SharedFrames):
        mapping.frames.recycles = False  # its program may hand the descriptor to anybody
    return None, descriptors(mapping, request.first)


def move(books: Books, process: UserProcess, request: messages.Move) -> Answer:
    """Gives a mapping another address: its own process has something else there."""
    mapping = process.memory.starting_at(request.address)
    start, end = request.start, request.end
    if not 0 <= start <= end <= USIZE_MAX or start % PAGE_SIZE or end % PAGE_SIZE:
        raise InvalidAddress(
            start, why=f"what is in the way there is whole pages, and ends behind that, not at {end:#x}"
        )
    books.ports.unmapped(process, mapping.serial)
    moved = process.memory.move(mapping, (start, end))
    return moved.address, []


def unmap(books: Books, process: UserProcess, request: messages.Unmap) -> Answer:
    """Takes a mapping out of the books. Its frames go when the last reference does, or are kept for its next use."""
    memory, place = process.memory, request.place
    if place < 0:
        mapping = memory.unmap(request.address, request.length)
        mapping.release()
        books.ports.unmapped(process, mapping.serial)
        books.handles.unmapped(process, mapping.frames, time.monotonic())
        return None, []
    stock = memory.stock
    stock.require(place)
    mapping = memory.unmap(request.address, request.length)
    books.ports.unmapped(process, mapping.serial)
    stock.enter(place, mapping)
    stock.say(place)
    books.handles.unmapped(process, mapping.frames, time.monotonic())  # which may end that it is kept
    return None, []


def query(books: Books, process: UserProcess, request: messages.Query) -> Answer:
    mapping = process.memory.query_memory(request.address)
    refcount = 0
    if isinstance(mapping.frames, SharedFrames):
        books.handles.look(mapping.frames)
        refcount = mapping.frames.in_use
    info = MemoryInfo(mapping.address, mapping.length, mapping.type, int(mapping.rights), mapping.phys_offset, refcount)
    return info, []


def share(books: Books, process: UserProcess, request: messages.Share) -> Answer:
    """A handle for memory of the process: its token."""
    return books.handles.share(process, request, time.monotonic()), []


def revoke(books: Books, process: UserProcess, request: messages.Revoke) -> Answer:
    books.handles.revoke(process, request.token, time.monotonic())
    return None, []


def leave(books: Books, process: UserProcess, request: messages.Leave) -> Answer:
    """The process is about to end in good order."""
    books.handles.leave(process)
    return None, []


def adopt(books: Books, process: UserProcess, request: messages.Adopt) -> Answer:
    """The process is a forked child, and enters what it inherited."""
    return books.inheritance.adopt(process, request, books.processes, books.limits.mappings), []


def forked(books: Books, process: UserProcess, request: messages.Forked) -> None:
    """The process forks. There is no answer."""
    process.forked = process.forked or request.inherits
    process.memory.empty_stock()


#: The service for each type of message, but for those of ports (`seats`).
SERVICES: dict[type, Service] = {
    messages.Map: map_memory,
    messages.Unmap: unmap,
    messages.More: more,
    messages.Move: move,
    messages.Query: query,
    messages.Share: share,
    messages.Attach: attach,
    messages.Revoke: revoke,
    messages.Adopt: adopt,
    messages.Forked: forked,
    messages.Leave: leave,
    messages.Publish: publish,
}
