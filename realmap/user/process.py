"""`Process`: this process as a user of a kernel."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

import msgspec

from realmap._core import BARE, Answer, Lock
from realmap.errors import InvalidAddress, InvalidHandle, InvalidSize, UnknownSyscall, VirtualMemoryExhaustion
from realmap.host.segment import checked_name
from realmap.host.signals import pass_on
from realmap.memory.frames import whole_pages
from realmap.memory.lands import USER_LAND, require_address_space
from realmap.memory.userspace_ptr import user_windows
from realmap.pages import HUGE_SIZE, PAGE_SIZE, address_of, align_up, usize
from realmap.rights import MappingAccessRights, MemoryType, allows, k_w, rights_of, type_of, u_rw
from realmap.user import inheritance, shown
from realmap.user.arguments import call_of
from realmap.user.attached import Attached
from realmap.user.buffer import Buffer, UserWindow, buffers_in, encode_buffer, part_of
from realmap.user.handle import Handle, as_handle, new_handle
from realmap.user.sessions import Route, Routes, Session, arun, run, waiters
from realmap.user.windows import describe, fault_in, map_window
from realmap.wire import messages
from realmap.wire.client import Client
from realmap.wire.messages import MemoryInfo
from realmap.wire.status import LATE

if TYPE_CHECKING:
    from realmap.user.service import Service

#: How often it is asked again whether somebody serves by now, in seconds.
SOON = 0.01


class Process:
    """A user process: memory in UserLand, and syscalls. May be used from many threads. A context manager.

    A forked child that uses it is a process of its own from then on: it connects anew, and what it inherited is in
    the kernel's books as its own, at the same addresses. One that never does costs nothing.

    Connecting is bounded, as `realmap.connect` says. Everything else waits for its answer as long as the kernel lives,
    as one waits for malloc or a file: half done, memory would be of no use to anybody. Ctrl-C, or any signal handler
    that raises, ends that, and whatever the kernel answers late is given back. Only a call may take long by its nature:
    so `call` has a `timeout`.
    """

    def __init__(self, path: str, *, timeout: float | None = None) -> None:
        """Connects to the kernel at `path` (its socket). Errors as `realmap.connect`.

        SyscallTimeout: it does not answer within `timeout` seconds (by default: as there).
        """
        require_address_space()
        #: What must live as long as this does: the handle of a kernel that it was made by.
        self.keeper: object = None
        self._client = self._connect(path, timeout)
        #: Whether a small block that is made is parked at first, where none is: not for those that others attach.
        self._stocks_up = True
        self._attached = Attached()
        self._lock = Lock()
        self._routes = Routes(self)
        self._known = self._routes.known  # looked into at every call
        inheritance.add(self)

    def _connect(self, path: str, timeout: float | None = None) -> Client:
        return Client(path, timeout=timeout, encoder=msgspec.msgpack.Encoder(enc_hook=partial(encode_buffer, self)))

    @property
    def _own_client(self) -> Client:
        """The connection. In a forked child: one of its own, made now."""
        client = self._client
        if client.lost_in_child:  # for every call: so without another property
            self._become_another()
            return self._client
        return client

    @property
    def has_ended(self) -> bool:
        """Whether it was closed, or its kernel has ended."""
        return self._client.has_ended

    @property
    def pid(self) -> int:
        """This process's pid."""
        return os.getpid() if self._client.lost_in_child else self._client.pid

    @property
    def path(self) -> str:
        """The path of the kernel's socket."""
        return self._client.path

    def _become_another(self) -> None:
        """In a forked child: connects, and takes over what was inherited. Errors as `connect`."""
        with self._lock:
            before = self._client
            if not before.lost_in_child:  # another thread was quicker
                return
            if before.has_ended:  # closed before the fork
                before.check()
            client = self._connect(before.path)
            inheritance.adopt(self, before, client)
            self._client = client

    def _after_fork_in_child(self) -> None:
        """In a forked child: another thread of the parent may have held the lock; the sessions are the parent's."""
        self._lock = Lock()
        self._known.clear()

    # ---- memory -----------------------------------------------------------------------------

    def map(
        self,
        length: SupportsIndex,
        *,
        type: MemoryType = MemoryType.HEAP,
        rights: MappingAccessRights = u_rw,
        fragment: SupportsIndex | None = None,
        name: str | None = None,
        commit: bool = True,
        huge: bool = False,
    ) -> Buffer:
        """Memory of `length` bytes, zeroed, in whole pages of its own.

        `fragment`: bytes a segment, whole pages (by default one segment); the buffer is contiguous
        all the same. `name`: other programs can open the segment by it (`shm_open`). `commit=False`:
        space is taken at first touch only, and a full /dev/shm is a SIGBUS then. `huge`: in huge pages, as
        far as Linux has any free (the frames are then a multiple of 2 MiB, and committed in any case);
        `Buffer.huge` says for how many bytes it had. Touching all of a mirror costs a fraction then.

        InvalidSize: the length is zero, negative or overflows; the fragment is no whole pages (with `huge`:
        no multiple of 2 MiB), or goes with a name. InvalidMemState: a type without frames, or private
        memory with a fragment, a name, or `huge`. AccessDenied: rights that no process has
        (k_...), or executable ones where /dev/shm is noexec. InvalidRights: none, or no combination.
        InvalidHandle: the name is unusable, or taken. PhysicalMemoryExhaustion: /dev/shm, a limit, or
        the descriptors do not allow it. VirtualMemoryExhaustion: no space in UserLand, or Linux's limit
        of mappings. TypeError: an argument of the wrong kind. KernelDied, ProcessKilled: no kernel.
        """
        size = usize(length, "length")
        if not size:
            raise InvalidSize(0, why="a buffer has at least one byte")
        kind, allowed = type_of(type), rights_of(rights)
        client, recycles = self._own_client, 0
        if size <= messages.RECYCLED and fragment is None and name is None and not huge:
            if kind.is_counted and allows(allowed, k_w):
                recycles = kind << 8 | int(allowed) | (0 if commit else BARE)
                if (again := self._map_again(size, allowed, recycles)) is not None:
                    return again
        if align_up(size, HUGE_SIZE if huge else PAGE_SIZE) > USER_LAND.length:
            raise VirtualMemoryExhaustion(size, why=f"UserLand has {USER_LAND.length} bytes in all")
        step = None if fragment is None else whole_pages(fragment, "fragment")
        request = messages.Map(
            client.next_id(),
            size,
            int(kind),
            int(allowed),
            step,
            None if name is None else checked_name(name),
            bool(commit),
            bool(huge),
        )
        place, answer = client.request(request, name="map", late=self._unmap_late)
        span, piece = place[1], step or place[1]
        window = map_window(self, place, lambda index: (0, min(piece, span - index * piece)), answer, allowed)
        if commit:
            fault_in(window)
        window.recycles = recycles
        return part_of(window, window._base, size)

    def _map_again(self, size: int, allowed: MappingAccessRights, recycles: int) -> Buffer | None:
        """What was parked, of that kind and length, if anything was."""
        window = self._own_client.endpoint.unpark(UserWindow, recycles, align_up(size))
        if window is None:
            return None
        describe(window, self, allowed, 0, recycles)
        return part_of(window, window._base, size)

    def share(
        self,
        buffer: Buffer,
        rights: MappingAccessRights | None = None,
        *,
        uses: SupportsIndex | None = None,
        seconds: float | None = None,
        keep: bool | float = False,
    ) -> Handle:
        """A handle by which any process of this kernel can attach these bytes: the same memory, not a copy.

        `rights`: what others may do at most, by default what this process may. What may only be read comes with
        a read-only descriptor and page protection: against accident for the same uid, which can open again what it
        may write, and against another uid for real. Memory is protected by pages: who attaches a part of a page
        maps all of it. `uses`: how often it can be attached, `seconds`: how long; by default without such an end.

        The handle holds the memory, as a mapping does. It ends with this process, or, with `keep`, outlives it (where
        `keep` is a number, by so many seconds after this process has ended or unmapped the buffer); then `revoke`, its
        uses, its time or the kernel's end are what ends it. What is attached by then stays.

        InvalidAddress: the buffer is unmapped, or another Process's. AccessDenied: more rights than this process
        has. InvalidSize: uses or seconds below 1 or 0. InvalidMemState: private memory. LimitReached: too many
        handles. TypeError: no buffer. MemoryFault, KernelDied, ProcessKilled: as `call`.
        """
        if not isinstance(buffer, Buffer):
            raise TypeError(f"what is shared is a Buffer, not {buffer!r}")
        buffer.check()
        if buffer.process is not self:
            raise InvalidAddress(buffer.address, why="the buffer belongs to another Process: buffer.process.share(…)")
        allowed = buffer.rights if rights is None else rights_of(rights)
        return new_handle(self, buffer, allowed, uses, seconds, keep)

    def attach(
        self,
        handle: Handle | str,
        offset: SupportsIndex = 0,
        length: SupportsIndex | None = None,
        rights: MappingAccessRights | None = None,
    ) -> Buffer:
        """The memory that a handle stands for, mapped in this process, at an address of its own.

        [offset, offset + length), bytes, of what was shared; by default to its end. `rights`: by default those of
        the handle. The pages around them are mapped, the buffer is just the bytes.

        InvalidHandle: forged, spent, revoked, expired, its maker has ended, or of another kernel. InvalidSize: no
        bytes, or beyond what was shared. AccessDenied: more rights than the handle gives. VirtualMemoryExhaustion,
        PhysicalMemoryExhaustion: no space, or no descriptors. TypeError: no handle. KernelDied, ProcessKilled.
        """
        handle = as_handle(handle)
        if handle.path != self.path:
            why = f"the handle is of the kernel at {handle.path!r}, this process is connected to {self.path!r}"
            raise InvalidHandle(handle.token[:8] + "…", why=why)
        first, size = usize(offset, "offset"), None if length is None else usize(length, "length")
        return self._attached.attach(self, handle.token, first, size, rights)

    def revoke(self, handle: Handle | str) -> None:
        """Ends a handle that this process made (or one that was made to outlive its maker). What is attached stays.

        InvalidHandle: it has ended. AccessDenied: it is another process's. TypeError: no handle. KernelDied,
        ProcessKilled: no kernel.
        """
        request = messages.Revoke(self._own_client.next_id(), as_handle(handle).token)
        self._own_client.request(request)

    def _unmap_late(self, place: Any) -> bytes:
        """Of a mapping that nobody waited for."""
        return self._farewell(place[0], place[1])

    def _farewell(self, address: int, span: int, number: int = 0) -> bytes:
        """What the kernel is told of a window that is unmapped. `number`: of a request for its answer."""
        return self._client.encode(messages.Unmap(number, address, span))

    def _windows(self) -> list[UserWindow]:
        """What it has mapped."""
        found = [window for window in user_windows() if isinstance(window, UserWindow)]
        return [window for window in found if window.process is self and window.alive]

    def query(self, address: SupportsIndex) -> MemoryInfo:
        """What is at `address` of this process: the mapping, or the hole (type UNMAPPED), that it lies in.

        InvalidAddress: outside of UserLand, or negative. TypeError: no integer.
        """
        number = address_of(address)
        value, _ = self._own_client.request(messages.Query(self._own_client.next_id(), number))
        return msgspec.convert(value, MemoryInfo)

    # ---- syscalls ---------------------------------------------------------------------------

    def call(self, name: str, /, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        """Calls the handler `name`, and returns what it returns: the kernel's, or one that another process serves.

        Arguments are plain values (numbers, text, bytes, lists, dicts, None; numpy's numbers arrive as plain ones,
        tuples as lists) and buffers of this process, which travel as address and length; those by keyword arrive so.
        Where they are all of another `Process` that this process has of the kernel, as one that came by a pickle may
        be, that one calls.
        `timeout` in seconds: a call given up, by a timeout or Ctrl-C, goes on where it is, and its buffers are held
        until its handler ends. Of several processes that serve the name, one that is free takes it.

        UnknownSyscall: neither the kernel nor any process has one of this name. ServerDied: the process that had taken
        it has ended; where nothing was done (`began` is False), there is no other one. WrongArguments (a TypeError): it
        does not take these. SyscallFailed: the handler raised (its type, text and traceback are in the error); a
        KernelError it raised comes as itself. SyscallTimeout: no answer in time. InvalidAddress: a buffer that is
        unmapped, or those of several Processes. MemoryFault: bytes of a buffer were gone when the handler, or this
        process, touched them. InvalidSize: arguments beyond 1 MiB in all, or 4 MiB as objects. TypeError: an argument
        that cannot travel, a dict whose keys are no text, or lists and dicts more than 60 deep. LimitReached: as many
        calls wait as its server lets, or it would wait for itself; or more sessions, or buffers lent, than a process
        or its server may have. KernelDied, ProcessKilled: no kernel.
        """
        refusal, got, client = None, NotImplemented, self._client
        if timeout is None and not kwargs:  # most calls are of a few plain values, and made in one go
            got = client.endpoint.call(name, args, self._known)
            if type(got) is Route:
                got = self._routes.plain(got, name, args)
            if got is not NotImplemented and type(got) is not Answer:
                return got
        try:
            try:
                if got is not NotImplemented:
                    return client.value(got)
                client = self._own_client
                request = call_of(client, name, args, timeout, kwargs)
                if name not in self._known:
                    return client.request(request, timeout=timeout, name=name, holds=request.args)[0]
            except UnknownSyscall as error:
                request, refusal = call_of(self._client, name, args, timeout, kwargs), error.with_traceback(None)
            if refusal is None:
                return self._routes.call(request, timeout)
            return run(self._routes.steps(request, refusal), name, timeout)
        except InvalidAddress:
            if (owner := self._owner_of(args, kwargs)) is None:
                raise
        return owner.call(name, *args, timeout=timeout, **kwargs)

    async def acall(self, name: str, /, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        """`call`, for asyncio: `await me.acall("sha256", buffer)`. Other tasks go on meanwhile, and may call as well.

        A task that is cancelled, or whose `timeout` is over, gives its call up, as there. RuntimeError: no event loop
        runs. LimitReached: more calls at a time than the kernel lets a process have. Else as `call`.
        """
        client = self._own_client
        holds: Any = args
        sent = client.endpoint.plain(name, args, self._known) if timeout is None and not kwargs else None
        try:
            if sent is None:
                request = call_of(client, name, args, timeout, kwargs)
                if name in self._known:
                    return await arun(self._routes.steps(request), name, timeout)
                sent, holds = (request.id, client.encode(request)), request.args
            number, data = sent  # not `*sent`: before 3.12 a handler could come between that call and its await
            try:
                return (await waiters()(client).request(number, data, timeout=timeout, name=name, holds=holds))[0]
            except UnknownSyscall as error:
                refusal = error.with_traceback(None)
            request = call_of(client, name, args, timeout, kwargs)
            return await arun(self._routes.steps(request, refusal), name, timeout)
        except InvalidAddress:
            if (owner := self._owner_of(args, kwargs)) is None:
                raise
        return await owner.acall(name, *args, timeout=timeout, **kwargs)

    def _owner_of(self, *values: Any) -> Process | None:
        """Whose call this is by its buffers: another `Process` that this process has of the same kernel. Else None."""
        owners = {buffer.process for buffer in buffers_in(values)}
        owner = owners.pop() if len(owners) == 1 else self
        return None if owner is self or owner.path != self.path or self.has_ended else owner

    def session(self, name: str, *, timeout: float | None = None) -> Session:
        """One server of `name`, the least busy one, for all calls that are made by the `Session`.

        `timeout`: so many seconds it waits for one to come; None: not at all. UnknownSyscall: no process serves this.
        LimitReached: more sessions than a process may have. PhysicalMemoryExhaustion: no descriptors. SyscallTimeout:
        the kernel does not answer. TypeError: the name is no str. KernelDied, ProcessKilled: no kernel.
        """
        if not isinstance(name, str):
            raise TypeError(f"the name of a service is a str, not {type(name).__name__}")
        end = time.monotonic() + (timeout or 0.0)
        while True:
            left = None if timeout is None else max(LATE, end - time.monotonic())
            try:
                return Session(self, run(self._routes.open(name, []), name, left))
            except UnknownSyscall:
                if time.monotonic() >= end:
                    raise
            time.sleep(SOON)

    def serve(
        self,
        *handlers: Callable[..., Any],
        threads: SupportsIndex = 1,
        queue: SupportsIndex = 64,
        lazy_unmap: SupportsIndex = 0,
    ) -> Service:
        """Runs `handlers` here, for every process that calls them by their names, until the service is closed.

        They are the same functions that a kernel runs. Several processes may serve one name. `threads`: so many calls
        are at work at a time, and `queue` wait at most; who comes then is told LimitReached. A handler that is not
        `blocking` is moved to a thread of its own once it takes long (2 to 3 ms where there are several threads, 20 to
        30 with one). `async` handlers take no thread, and run together, `threads` + `queue` at most, in an event loop
        of the service's own: one that blocks keeps the others, and what belongs to another loop is not for them.
        `lazy_unmap`: bytes of lent pages that are kept mapped for their next use.

        What a caller lends is mapped here by whole pages; the rest of its first and last page is copied, both ways.
        Each segment of it takes a descriptor: a caller has a quarter at most of what this process may open as it begins
        to serve, and who lends more is told LimitReached.
        Whoever serves could keep pages that it was lent: Linux cannot take them back.

        KernelError: the kernel has a handler of that name. TypeError, ValueError: as `syscall`; or no threads.
        LimitReached: too many services. PhysicalMemoryExhaustion: no descriptors, or no thread. KernelDied,
        ProcessKilled: no kernel.
        """
        from realmap.user.service import Service  # most programs serve nobody

        return Service(self, handlers, threads, queue, lazy_unmap)

    # ---- the end ----------------------------------------------------------------------------

    def close(self) -> None:
        """Leaves the kernel: every buffer is unmapped, its frames given back. Again: nothing.

        A buffer of which a view still lives stays mapped until that view is gone; its bytes stay valid.
        """
        try:
            # First: whoever has something mapped when its connection ends is taken for a forked child that wants it.
            # Without a word: a child may come for it, and for all else the kernel gives it back.
            for window in self._windows():
                window._farewell(None, None, None)
                try:
                    window._unmap()
                except BufferError:  # a view lives
                    pass
                except OSError as error:
                    pass_on(error)
        finally:
            self._routes.close()
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        why = f"a spawned function has its own, me; others connect: realmap.connect({self.path!r})"
        raise TypeError(f"a Process is this process's own connection and cannot be pickled; {why}")

    def _repr_html_(self) -> str:
        return shown.of_process(self, [] if self.has_ended else self._windows())

    def __repr__(self) -> str:
        which = (
            "inherited by a fork" if self._client.lost_in_child else str(self._client.number)
        )  # nothing connects to be printed
        ended = ", ended" if self.has_ended else ""
        return f"<Process {which} (pid {self.pid}) of the kernel at {self.path!r}{ended}>"
