"""Threads for what takes long. As many as are needed at once; an idle one is used again, or ends.

Not concurrent.futures: its threads are joined at interpreter exit, and a handler that never
returns would then keep the kernel from ending.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread, get_native_id

from realmap._core import Lock
from realmap.serving.loop import Lost

#: How much more modest a worker is than the kernel's own thread, in steps of niceness.
NICE = 10
Job = Callable[[], None]
#: How long an idle thread waits for its next job, in seconds: what many calls at once needed is not kept for ever.
IDLE = 1.0


class Workers:
    """Runs jobs, each on a daemon thread of its own while it lasts. A job must not raise."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._lock = Lock()
        self._idle = 0
        #: How many threads there are, idle ones included.
        self.threads = 0
        self._closed = False

    def submit(self, job: Job) -> None:
        """Has `job` run soon. RuntimeError: no thread could be started; the job will not run."""
        with self._lock:
            promised = self._idle > 0
            if promised:
                self._idle -= 1
            else:
                self.threads += 1
        if promised:
            self._queue.put(job)
            return
        try:
            Thread(target=self._work, args=(job,), name="realmap-worker", daemon=True).start()
        except BaseException:
            with self._lock:
                self.threads -= 1
            raise

    def _work(self, job: Job | None) -> None:
        # Who waits for the kernel's own thread is served first. On Linux niceness is a thread's own.
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + NICE)
        pid = os.getpid()
        while job is not None:
            try:
                job()
            except Lost:
                assert os.getpid() != pid
                os._exit(0)  # a handler forked, and returned in the child too: that is no kernel
            del job  # an idle thread must not keep what the last job referred to
            with self._lock:
                if self._closed:
                    break
                self._idle += 1
            job = self._next()
        with self._lock:
            self.threads -= 1

    def _next(self) -> Job | None:
        """The next job of an idle thread; None: it is to end."""
        while True:
            try:
                return self._queue.get(timeout=IDLE)
            except Empty:
                with self._lock:
                    if self._idle:  # one of the idle threads may go: this one
                        self._idle -= 1
                        return None
            # Each of them was promised a job this very moment; it waits, or another has just taken it.

    def close(self) -> None:
        """Ends the idle threads; the others end with their job."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, 0
        for _ in range(idle):
            self._queue.put(None)


class Share:
    """One connection's part of the workers: its jobs wait in order, and nobody waits for another process's.

    Only on the kernel's thread; whose job has run says `ended` there.
    """

    def __init__(self, workers: Workers, limit: int, beside: list[Share]) -> None:
        """`beside`: those of its process's other connections; `limit` of their jobs run at once, of all together."""
        self._workers = workers
        self._limit = limit
        self._beside = beside
        beside.append(self)
        #: How many of its jobs are at work.
        self.running = 0
        self._held = self._over = False
        self._waiting: deque[tuple[Job, Callable[[BaseException], None]]] = deque()

    def submit(self, job: Job, failed: Callable[[BaseException], None]) -> None:
        """Has `job` run in its turn. Where it never will (no thread, or `cancel`), `failed` is called with why."""
        self._waiting.append((job, failed))
        self._start()

    def ended(self) -> None:
        """A job has ended: the next one may run, of whoever has the fewest at work."""
        self.running -= 1
        for share in sorted(self._beside, key=lambda each: each.running):
            share._start()
        self._leave()

    def hold(self, held: bool) -> None:
        """Begins no job from now on, or does again."""
        if held != self._held:  # else a job that fails, whose client is told so, would begin the next within itself
            self._held = held
            self._start()

    def _start(self) -> None:
        while self._waiting and not self._held and sum(each.running for each in self._beside) < self._limit:
            job, failed = self._waiting.popleft()
            self.running += 1
            try:
                self._workers.submit(job)
            except RuntimeError as error:
                self.running -= 1
                failed(error)

    def cancel(self) -> None:
        """What waits will not run, and nothing more will come."""
        while self._waiting:
            self._waiting.popleft()[1](RuntimeError("its process has ended"))
        self._over = True
        self._leave()

    def _leave(self) -> None:
        if self._over and not self.running and self in self._beside:
            self._beside.remove(self)
