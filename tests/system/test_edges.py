"""Rare moments: errors that cannot be told, calls within calls, interrupts, ends before the beginning."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import syscalls
from conftest import BOUND, PAGE, in_threads, land_maps, wait_until

import realmap
from realmap import InvalidSize, KernelHandle, PhysicalMemoryExhaustion, Process, SyscallFailed
from realmap.host import procfs, runtime
from realmap.host.segment import Segment
from realmap.memory import CrossProcessMapping, FrameAllocator, KernelMemory, Mapping, MemoryType
from realmap.rights import u_rw
from realmap.serving import workers

CARRIERS = ("ring", "socket")


@pytest.mark.parametrize("name", ["odd_error", "slow_odd_error"])
@pytest.mark.parametrize("kind", ["surrogate", "our surrogate", "huge fact", "unspeakable"])
def test_errors_that_cannot_be_encoded_as_they_are(me: Process, kernel: KernelHandle, name: str, kind: str) -> None:
    with pytest.raises((SyscallFailed, InvalidSize, realmap.InvalidHandle)):
        me.call(name, kind, timeout=BOUND)
    wait_until(lambda: kernel.stats()["running"] == 0)


def test_offsets_far_beyond_64_bits_are_only_wrong(me: Process) -> None:
    buffer = me.map(100)
    with pytest.raises(InvalidSize):
        me.call("peek", buffer, 8, (1 << 64) - 1)


def test_a_call_within_a_call_of_the_same_thread(me: Process) -> None:
    """From a signal handler, or from a destructor that the collector runs."""
    answers = []
    before = signal.signal(signal.SIGALRM, lambda *_: answers.append(me.call("echo", "nested", timeout=BOUND)))
    try:
        for _ in range(5):
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            assert me.call("sleep", 0.06) == 0.06
    finally:
        signal.signal(signal.SIGALRM, before)
    assert answers == [["nested"]] * 5


def test_what_was_never_sent_is_forgotten(me: Process) -> None:
    with pytest.raises(realmap.SyscallTimeout):
        for _ in range(100_000):
            me.call("echo", "x" * 60_000, timeout=0)
    wait_until(lambda: me.call("nop") is None and not me._own_client.endpoint.pending)


def test_an_account_is_charged_as_a_whole_or_not_at_all() -> None:
    parent = FrameAllocator(5 * PAGE)
    child = FrameAllocator(4 * PAGE, parent=parent, segments=3)
    other = FrameAllocator(parent=parent)
    taken = other.allocate(2 * PAGE)
    for pages, fragment, whose in ((5, None, 4 * PAGE), (4, None, 5 * PAGE), (4, 1, 3)):
        with pytest.raises(PhysicalMemoryExhaustion, match=f"the limit of {whose} "):
            child.allocate(pages * PAGE, fragment and fragment * PAGE)
        assert (child.used, child.segments, parent.used, parent.segments) == (0, 0, 2 * PAGE, 1)
    mine = child.allocate(3 * PAGE, PAGE)
    assert (child.used, child.segments, parent.used, parent.segments) == (3 * PAGE, 3, 5 * PAGE, 4)
    del mine, taken
    assert (child.used, child.segments, parent.used, parent.segments) == (0, 0, 0, 0)
    for nonsense in (None, "an allocator"):
        with pytest.raises((TypeError, ValueError)):
            child._prepare(0, 0, nonsense)  # type: ignore[arg-type]


def test_a_drop_that_was_interrupted_is_made_good(kernel_memory: KernelMemory) -> None:
    frames = FrameAllocator().allocate(PAGE)
    mapping = Mapping(0x2000_0000_0000, frames, 0, PAGE, MemoryType.HEAP, u_rw)
    for finish in ("drop", "collect"):
        mirror = CrossProcessMapping.mirror_mapping(mapping, 0, 1, kernel=kernel_memory)
        mirror._unmap()  # and here came the interrupt
        assert frames.refcount == 2
        if finish == "drop":
            mirror.drop()
            mirror.drop()
        del mirror
        gc.collect()
        assert (frames.refcount, kernel_memory.live) == (1, 0)
    mapping.release()


def test_unmapping_that_was_interrupted_is_told_in_the_end(me: Process, kernel: KernelHandle) -> None:
    buffer = me.map(PAGE)
    buffer._window._unmap()
    del buffer
    gc.collect()
    wait_until(lambda: kernel.stats()["mappings"] == 0)


def test_an_exception_on_its_way_out_is_not_replaced(me: Process, kernel_memory: KernelMemory) -> None:
    frames = FrameAllocator().allocate(PAGE)
    mapping = Mapping(0x2000_0000_0000, frames, 0, PAGE, MemoryType.HEAP, u_rw)
    for some in (me.map(5), CrossProcessMapping.mirror_mapping(mapping, 0, 5, kernel=kernel_memory)):
        with pytest.raises(ZeroDivisionError), some as bytes_of:
            view = np.asarray(bytes_of)
            view[0] // 0 if False else 1 // 0
        del view
        assert some.alive
    del some, bytes_of
    gc.collect()
    assert land_maps() == []
    mapping.release()


def test_cycles_through_buffers_are_collected(kernel: KernelHandle) -> None:
    process = kernel.connect()
    process.best = process.map(100)  # type: ignore[attr-defined]
    gone = weakref.ref(process)
    del process
    gc.collect()
    assert gone() is None
    wait_until(lambda: kernel.stats()["processes"] == 0)
    assert land_maps() == []


def test_what_a_handle_made_keeps_it() -> None:
    me = realmap.boot(syscalls=syscalls.ALL).connect()
    gc.collect()
    assert me.call("echo", 1) == [1]
    pid = me._own_client.kernel_pid
    me.close()
    del me
    gc.collect()
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"))


def test_a_forked_child_does_not_unlink_a_named_segment() -> None:
    made = Segment(PAGE, name=f"forked-{os.getpid()}")
    child = os.fork()
    if not child:
        made.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.path.exists(f"/dev/shm/forked-{os.getpid()}")
    made.close()


def test_a_kernel_that_cannot_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = realmap.Kernel()

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(realmap.PhysicalMemoryExhaustion, match="no thread for the kernel"):
        kernel.start()
    assert not os.path.exists(kernel.path)
    monkeypatch.undo()
    with pytest.raises(realmap.KernelError, match="was stopped"):
        kernel.start()
    other = realmap.Kernel()

    def refuse() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        other.serve(ready=refuse)
    assert not os.path.exists(other.path)


def test_no_thread_for_a_long_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    with realmap.Kernel() as kernel, realmap.connect(kernel.path) as me:

        def fail(job: object) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(kernel.workers, "submit", fail)
        with pytest.raises(realmap.PhysicalMemoryExhaustion, match="thread"):
            me.map(32 << 20)
        monkeypatch.undo()
        assert len(me.map(32 << 20)) == 32 << 20


def test_threads_that_many_calls_at_once_needed_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "IDLE", 0.05)
    pool, gate, done = workers.Workers(), threading.Event(), threading.Semaphore(0)

    def job() -> None:
        gate.wait(BOUND)
        done.release()

    for _ in range(20):
        pool.submit(job)
    assert pool.threads == 20
    gate.set()
    for _ in range(20):
        assert done.acquire(timeout=BOUND)
    wait_until(lambda: not pool.threads, "the idle threads to end")
    for _ in range(60):  # some come right when the last idle thread has waited for long enough
        pool.submit(job)
        assert done.acquire(timeout=BOUND)
        threading.Event().wait(random.choice((0, 0, 0.049, 0.0505)))
    pool.close()
    wait_until(lambda: not pool.threads, "the end of the last thread")


def test_a_bug_of_ours_ends_nobody_but_its_caller(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from realmap.kernel import services
    from realmap.wire import messages

    def broken(*_: object) -> None:
        raise AttributeError("a bug")

    monkeypatch.setitem(services.SERVICES, messages.Query, broken)
    with realmap.Kernel() as kernel, realmap.connect(kernel.path) as me, realmap.connect(kernel.path) as other:
        with pytest.raises(SyscallFailed, match="a bug"):
            me.query(0x2000_0000_0000)
        with caplog.at_level(logging.ERROR, "realmap"):
            kernel.loop.post(lambda: broken())
            assert other.map(5)[:] == bytes(5)
            wait_until(lambda: "failed at something" in caplog.text)


def test_stop_before_and_after() -> None:
    kernel = realmap.Kernel()
    kernel.stop()
    done = []
    with realmap.Kernel() as served:
        pass
    served.loop.post(lambda: done.append(1))
    assert done == [1]


def test_parallel_boots_do_not_disturb_one_another() -> None:
    kernels: list[KernelHandle] = []
    in_threads(4, lambda _: kernels.append(realmap.boot()))
    assert len({kernel.path for kernel in kernels}) == 4
    for kernel in kernels:
        kernel.shutdown()


def test_names_of_files_that_are_no_text(tmp_path: Path) -> None:
    import mmap

    path = os.fsencode(tmp_path) + b"/\xff\xfe name"
    with open(path, "wb+") as file:
        file.write(bytes(PAGE))
        file.flush()
        with mmap.mmap(file.fileno(), PAGE):
            assert procfs.maps("self")


def test_a_lock_file_of_one_that_lives_is_not_swept() -> None:
    lock = runtime.directory() / f"{runtime.stamp()}.77.sock.lock"
    lock.touch()  # made, and not locked yet
    runtime.sweep()
    assert lock.exists()
    lock.unlink()
