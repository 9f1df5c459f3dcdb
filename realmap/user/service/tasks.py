"""`Tasks`: the event loop of a service's `async` handlers, on a thread of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec

from realmap.serving import nesting
from realmap.serving.loop import Lost
from realmap.serving.registry import Syscall
from realmap.serving.signature import Signature
from realmap.serving.syscalls import Call, failed, run
from realmap.serving.user_buffer import UserBuffer
from realmap.wire import messages

#: No arguments, packed.
_NONE = b"\x90"


class Tasks:
    """Runs handlers as tasks. From any thread."""

    def __init__(self) -> None:
        """RuntimeError: no thread could be started."""
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[Call, asyncio.Task[bytes]] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="realmap-tasks", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._loop.close()
            raise

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            while not self._closed:
                with suppress(SystemExit, KeyboardInterrupt):  # of a task that a handler has started
                    self._loop.run_forever()
            for task in self._tasks.values():
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*self._tasks.values(), return_exceptions=True))
        finally:
            self._loop.close()

    def submit(
        self,
        syscall: Syscall,
        call: Call,
        request: messages.Call,
        buffers: Sequence[UserBuffer],
        place: nesting.Place,
        done: Callable[[bytes], object],
    ) -> None:
        """Runs a handler; `done` gets its answer, on the loop's thread. `place`: where it is at work, as are the tasks
        that it starts, which may go on when nobody waits any more.
        """

        async def work() -> bytes:
            place.enter(asyncio.current_task())
            return await _answer(syscall, call, request, buffers)

        def end(task: asyncio.Task[bytes]) -> None:
            del self._tasks[call]
            place.seats = ()
            try:
                done(failed(request.id, asyncio.CancelledError()) if task.cancelled() else task.result())
            except Lost:
                os._exit(0)  # a handler forked, and returned in the child too: that serves nobody

        def start() -> None:
            self._tasks[call] = task = self._loop.create_task(work())
            task.add_done_callback(end)  # of one that is cancelled before it begins, too

        self._loop.call_soon_threadsafe(start)

    def cancel(self, call: Call) -> None:

        def cancel() -> None:
            if (task := self._tasks.get(call)) is not None:
                task.cancel()

        self._loop.call_soon_threadsafe(cancel)

    def close(self) -> None:
        """Cancels what still runs, and ends the loop."""
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)


async def _answer(syscall: Syscall, call: Call, request: messages.Call, buffers: Sequence[UserBuffer]) -> bytes:
    """What `run` makes of a call whose handler is `async`: its arguments are looked at first, its value at the end."""
    made: list[Any] = []

    def begin(call: Call, *args: Any, **kwargs: Any) -> None:
        made.append(syscall.function(call, *args, **kwargs))

    answer = run(_with(syscall, begin, syscall.signature), call, request, buffers)
    if not made:
        return answer
    error: BaseException | None = None
    value = None
    try:
        value = await made[0]
    except BaseException as raised:
        error = raised

    def end(call: Call) -> Any:
        if error is not None:
            raise error
        return value

    last = messages.Call(request.id, request.name, msgspec.Raw(_NONE))
    return run(_with(syscall, end, Signature(syscall.name, end, UserBuffer)), call, last, buffers)


def _with(syscall: Syscall, function: Callable[..., Any], signature: Signature) -> Syscall:
    return replace(syscall, function=function, signature=signature)
