"""Handles: how frames get from one process to another. A handle is a reference, and may be limited, or taken back.

    share   ──▶ a token that nobody can guess; the handle holds the frames from now on
    attach  ──▶ a mapping of the same frames in whichever process of this kernel shows the token
    gone    ◀── its maker ended (unless it was made to outlive it), revoked, spent, expired, the kernel ended

Rights only ever narrow: buffer ≥ handle ≥ attached mapping.

A handle with a name is attached by that, and unlinked by anybody. It outlives a maker that ended in good order; one
that was killed it outlives for as long as a process lives that has attached it by name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from weakref import WeakSet

from realmap.errors import AccessDenied, InvalidAddress, InvalidHandle, InvalidMemState, InvalidSize
from realmap.kernel.budgets import Peer
from realmap.kernel.processes import UserProcess
from realmap.memory.frames import SharedFrames
from realmap.memory.mapping import Mapping
from realmap.memory.stock import Name, Parked
from realmap.pages import HUGE_SIZE, PAGE_SIZE, align_down, align_up
from realmap.rights import MappingAccessRights, MemoryType, allows, prot_of, rights_of
from realmap.wire import messages
from realmap.wire.messages import NAMED

#: Seconds; more is no limit: leave it out.
FOR_EVER = 1e9
#: Bytes of a token; it is written in hex.
TOKEN = 16


@dataclass(eq=False, slots=True)
class Shared:
    """What a handle stands for: `length` bytes from byte `start` of `frames` on, and what may be done there."""

    name: str
    frames: SharedFrames
    start: int
    length: int
    kind: MemoryType
    rights: MappingAccessRights
    #: Whose end is its end, `keep` seconds later; None: it has ended.
    maker: UserProcess | None
    keep: float
    #: How often it can still be attached; None: as often as anybody likes.
    uses: int | None
    #: When it ends, in seconds of the monotonic clock; None: never.
    until: float | None
    #: Whether it may be given more uses.
    more: bool
    uid: int = field(init=False)
    #: Where it is counted, and as what: its maker's; once that has ended, its uid's.
    account: Peer = field(init=False)
    counted: str = "handles"
    #: Of one with a name: who has attached it.
    holders: set[UserProcess] = field(default_factory=set)
    #: Whether it can be attached as often as anybody likes, until it is revoked or its maker ends; and who may have
    #: parked what was attached by it.
    stays: bool = field(init=False)
    stocks: WeakSet[UserProcess] | None = None

    def __post_init__(self) -> None:
        maker = self.maker
        assert maker is not None
        self.uid, self.account = maker.uid, maker.peer
        self.stays = self.uses is None and self.until is None
        self.frames.hold(self, "handle", self.label, f"of process {maker.number}")

    @property
    def is_named(self) -> bool:
        return self.name.startswith(NAMED)

    @property
    def label(self) -> str:
        """What the books show. Not a token itself: who may look at them may not attach by that alone."""
        return self.name if self.is_named else self.name[:8] + "…"


class Handles:
    """The handles of a kernel. `now`: seconds of the monotonic clock, as whoever asks reads it."""

    def __init__(self) -> None:
        self._by_name: dict[str, Shared] = {}
        #: Those of the same frames.
        self._of: dict[int, set[Shared]] = {}
        #: Called with a name that is not known: a process may have given it without a message, which is `enter`ed then.
        self.look_for: Callable[[str], None] = lambda _: None
        #: Why those that went are no more: a late user is told that, rather than that it made one up.
        self._gone: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Shared]:
        return iter(list(self._by_name.values()))

    @property
    def timed(self) -> bool:
        """Whether any of them ends by itself."""
        return any(shared.until is not None for shared in self._by_name.values())

    def share(self, process: UserProcess, request: messages.Share, now: float) -> str:
        """Makes a handle for a range of a process's own memory; its token.

        InvalidAddress, InvalidSize: it is not in one mapping of the process. InvalidMemState: private memory.
        AccessDenied: more rights than the process has. LimitReached: it has as many handles as it may.
        InvalidHandle: one of this name exists.
        """
        if request.name is not None:
            self.require_free(request.name)
        mapping = process.memory.mapping_at(request.address)
        if mapping is None:
            raise InvalidAddress(request.address, why="nothing is mapped there")
        if not isinstance(mapping.frames, SharedFrames):
            raise InvalidMemState(request.address, mapping.type, why="private memory cannot be shared")
        offset = request.address - mapping.address
        if not 0 < request.length <= mapping.length - offset:
            raise InvalidSize(request.length, why=f"from there on the mapping has {mapping.length - offset} bytes")
        rights = rights_of(request.rights)
        if not allows(mapping.rights, rights):
            raise AccessDenied(rights, mapping.rights, request.address, why="a handle gives no more than its maker has")
        if not prot_of(rights):
            raise AccessDenied(rights, mapping.rights, why="a handle that lets nobody read or write is of no use")
        if request.uses is not None and request.uses < 1:
            raise InvalidSize(request.uses, why="a handle can be used once, at least")
        if request.seconds is not None and not 0 < request.seconds < FOR_EVER:
            raise InvalidSize(0, why=f"a handle is good for some time: above 0 and below {FOR_EVER:g} seconds")
        if not request.keep >= 0:
            raise InvalidSize(0, why="a handle outlives its maker by no less than 0 seconds")
        start = mapping.phys_offset + offset
        alike = self._alike(process, mapping.frames, start, request) if request.more else None
        if alike is not None and alike.uses is not None:
            alike.uses += 1
            return alike.name
        stock = process.memory.stock
        if process.peer.would_refuse("handles", 1 + stock.count):  # what is parked may have names without asking
            len(process.memory)  # which have come by now
            stock.give_up()
        process.peer.take("handles")
        until = None if request.seconds is None else now + request.seconds
        name = os.urandom(TOKEN).hex() if request.name is None else NAMED + request.name
        shared = Shared(
            name,
            mapping.frames,
            start,
            request.length,
            mapping.type,
            rights,
            process,
            request.keep,
            request.uses,
            until,
            request.more,
        )
        self._add(process, shared)
        return name

    def enter(self, process: UserProcess, window: Parked, frames: SharedFrames, name: Name) -> None:
        """A process has given a name to what it had parked; where another has that name, it is none."""
        full, keep = NAMED + name.text, math.inf if name.lasts else 0.0
        if full not in self._by_name:
            process.peer.used["handles"] += 1  # there is room: `share`
            kind, rights = window.type, window.rights
            self._add(process, Shared(full, frames, 0, name.length, kind, rights, process, keep, None, None, False))

    def _add(self, process: UserProcess, shared: Shared) -> None:
        self._by_name[shared.name] = shared
        self._of.setdefault(shared.frames.serial, set()).add(shared)
        process.handles[shared] = None

    def _alike(self, process: UserProcess, frames: SharedFrames, start: int, request: messages.Share) -> Shared | None:
        wanted = process, start, request.length, request.rights, request.keep, True
        for each in self._of.get(frames.serial, ()):
            if (
                wanted == (each.maker, each.start, each.length, each.rights, each.keep, each.more)
                and each.until is None
            ):
                return each
        return None

    def require_free(self, name: str) -> None:
        """InvalidHandle: memory of this name exists."""
        if self._known(NAMED + name) is not None:
            raise InvalidHandle(name, why=f"memory named {name!r} exists already")

    def _known(self, name: str) -> Shared | None:
        if name.startswith(NAMED) and name not in self._by_name:
            self.look_for(name.removeprefix(NAMED))
        return self._by_name.get(name)

    def find(self, name: str, now: float) -> Shared:
        """The one that a token names. InvalidHandle: there is none, or no more, and why."""
        shared = self._known(name)
        if shared is not None and shared.until is not None and shared.until <= now:
            self._end(shared, "it has expired")
            shared = None
        if shared is None and name.startswith(NAMED):
            raise InvalidHandle(name, why=f"no memory is named {name[len(NAMED) :]!r}")
        if shared is None:
            why = self._gone.get(name, "the kernel knows no such handle: it is forged, of another kernel, or long gone")
            raise InvalidHandle(name[:8] + "…", why=why)
        return shared

    def attach(
        self, process: UserProcess, request: messages.Attach, now: float
    ) -> tuple[Mapping, int, int, Callable[[], None]]:
        """Enters a mapping of its frames for a process: the pages of [offset, offset + length).

        The mapping, where in it the first byte is, how many there are, and what counts this as a use.

        InvalidHandle: as `find`. InvalidSize: no bytes, or beyond what is shared. AccessDenied: more rights than
        the handle gives. VirtualMemoryExhaustion: no space in UserLand.
        """
        shared = self.find(request.token, now)
        length = shared.length - request.offset if request.length is None else request.length
        if request.offset < 0 or length <= 0 or request.offset + length > shared.length:
            why = f"offset {request.offset} + length {length} is no part of the {shared.length} bytes that are shared"
            raise InvalidSize(length, why=why)
        rights = shared.rights if request.rights is None else rights_of(request.rights)
        if not allows(shared.rights, rights) or not prot_of(rights):
            raise AccessDenied(rights, shared.rights, why="attaching gives no more rights than the handle has")
        at = shared.start + request.offset
        unit = HUGE_SIZE if shared.frames.huge else PAGE_SIZE
        start, end = align_down(at, unit), min(align_up(at + length, unit), shared.frames.length)
        alignment = unit if unit > PAGE_SIZE else 1
        mapping = process.memory.enter_anywhere(shared.frames, end - start, shared.kind, rights, alignment, start)
        if shared.stays and len(shared.frames.segments) == 1:
            mapping.handle = shared
            shared.stocks = shared.stocks or WeakSet()
            shared.stocks.add(process)
        return mapping, at - start, length, lambda: self._spend(shared, process)

    def _spend(self, shared: Shared, process: UserProcess) -> None:
        if shared.is_named:
            shared.holders.add(process)
            process.handles[shared] = None
        if shared.uses is not None:
            shared.uses -= 1
            if not shared.uses:
                self._end(shared, "it is spent: it was attached as often as it may be")

    def revoke(self, process: UserProcess, name: str, now: float) -> None:
        """Ends one. What is attached stays. InvalidHandle: as `find`. AccessDenied: another process made it."""
        shared = self.find(name, now)
        if shared.maker is not process and not shared.keep and not shared.is_named:
            assert shared.maker is not None
            raise AccessDenied(why=f"process {shared.maker.number} made this handle, and may revoke it")
        self._end(shared, "it was revoked")

    def reap(self, process: UserProcess, now: float) -> None:
        """The process has ended: its handles go, at once or after the time that they were made to outlive it."""
        for shared in list(process.handles):
            shared.holders.discard(process)
            if shared.maker is process:
                shared.maker = None
                if (shared.keep or shared.holders) and not self._leave_to_uid(shared, process):
                    continue
            if shared.maker is not None or shared.holders:
                continue
            if not shared.keep:
                self._end(shared, f"its maker, process {process.number}, has ended")
            elif shared.keep < FOR_EVER:
                self._set_end(shared, now)

    def _leave_to_uid(self, shared: Shared, process: UserProcess) -> bool:
        """It outlives its maker, on the account of the uid; False: that has too many, and it ends."""
        refusal = process.user.would_refuse("orphans")
        if refusal is not None:
            self._end(shared, f"its maker has ended, and {refusal}")
            return False
        process.user.take("orphans")
        shared.account.give_back("handles")
        shared.account, shared.counted = process.user, "orphans"
        return True

    def revoke_orphans(self, start: str) -> int:
        """Ends those whose makers have ended, have no name, and whose token begins so; how many there were."""
        found = [each for each in self._by_name.values() if each.maker is None and each.name.startswith(start)]
        for shared in found:
            self._end(shared, "it was revoked")
        return len(found)

    def unmapped(self, process: UserProcess, frames: object, now: float) -> None:
        """The process has unmapped a part of these frames. Once it has none, what it made for a time lasts as long."""
        if not isinstance(frames, SharedFrames) or frames.serial not in self._of:
            return
        ending = [each for each in self._of[frames.serial] if each.maker is process and 0 < each.keep < FOR_EVER]
        if not ending or any(mapping.frames is frames for mapping in process.memory):
            return
        for shared in ending:
            self._set_end(shared, now)

    def look(self, frames: SharedFrames) -> None:
        """Enters in the books what others have attached of these frames without a message."""
        for shared in tuple(self._of.get(frames.serial, ())):
            for process in shared.stocks or ():
                len(process.memory)

    def _set_end(self, shared: Shared, now: float) -> None:
        shared.until = min(now + shared.keep, shared.until or now + shared.keep)
        self._retire(shared)

    def _retire(self, shared: Shared) -> None:
        """From here on it is not attached without asking."""
        shared.stays = False
        for process in shared.stocks or ():
            process.memory.retire(shared)
        shared.stocks = None

    def leave(self, process: UserProcess) -> None:
        """The process is about to end in good order: what it gave a name stays."""
        len(process.memory)  # so all that it gave is known
        for shared in process.handles:
            if shared.maker is process and shared.is_named:
                shared.keep = math.inf

    def expire(self, now: float) -> None:
        """Ends those whose time is over."""
        for shared in [each for each in self._by_name.values() if each.until is not None and each.until <= now]:
            self._end(shared, "it has expired")

    def clear(self) -> None:
        """Ends all of them, with the kernel."""
        for shared in list(self._by_name.values()):
            self._end(shared, "the kernel has ended")

    def _end(self, shared: Shared, why: str) -> None:
        del self._by_name[shared.name]
        self._retire(shared)
        for process in (*shared.holders, *([shared.maker] if shared.maker else [])):
            process.handles.pop(shared, None)
        shared.account.give_back(shared.counted)
        same = self._of[shared.frames.serial]
        same.remove(shared)
        if not same:
            del self._of[shared.frames.serial]
        for segment in shared.frames.segments if shared.is_named else ():
            if segment.name == shared.name.removeprefix(NAMED):  # it goes by that in /dev/shm as well
                segment.unlink()
        shared.frames.let_go(shared)
        if shared.is_named:  # another may get that name
            return
        while len(self._gone) >= 1000:  # told of for a while, not for ever
            del self._gone[next(iter(self._gone))]
        self._gone[shared.name] = f"the handle is of no use any more: {why}"
