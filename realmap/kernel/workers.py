"""Threads for what takes long. As many as are needed at once; an idle one is used again.

Not concurrent.futures: its threads are joined at interpreter exit, and a handler that never
returns would then keep the kernel from ending.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from threading import Lock, Thread

Job = Callable[[], None]


class Workers:
    """Runs jobs, each on a daemon thread of its own while it lasts. A job must not raise."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._lock = Lock()
        self._idle = 0
        self._threads = 0
        self._closed = False

    @property
    def threads(self) -> int:
        """How many threads there are, idle ones included."""
        return self._threads

    def submit(self, job: Job) -> None:
        """Has `job` run soon. RuntimeError: no thread could be started; the job will not run."""
        with self._lock:
            if self._idle:
                self._idle -= 1
            else:
                Thread(target=self._work, args=(job,), name="realmap-worker", daemon=True).start()
                self._threads += 1
                return
        self._queue.put(job)

    def _work(self, job: Job | None) -> None:
        while job is not None:
            job()
            del job  # an idle thread must not keep what the last job referred to
            with self._lock:
                if self._closed:
                    break
                self._idle += 1
            job = self._queue.get()
        with self._lock:
            self._threads -= 1

    def close(self) -> None:
        """Ends the idle threads; the others end with their job."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, 0
        for _ in range(idle):
            self._queue.put(None)
