"""SIGKILL at any moment: of the owner, of a reader, of the kernel, of everything."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import syscalls
from conftest import BOUND, PAGE, SCALE, SUPPORT, land_maps, left_names, scaled, wait_until

import realmap
from realmap import KernelDied, KernelHandle, Process
from realmap.host import liveness, runtime

FULL_ROUNDS = 200


def owner_of(me: Process, name: str, seed: int, length: int, syscall: str) -> None:
    """Fills a buffer with bytes that the seed tells, and passes it to a syscall; then waits for its end."""
    buffer = me.map(length, fragment=PAGE)
    buffer[:] = random.Random(seed).randbytes(length)
    me.call(syscall, name, buffer)
    signal.pause()


def digest(seed: int, length: int) -> str:
    return hashlib.sha256(random.Random(seed).randbytes(length)).hexdigest()


def test_an_owner_killed_while_its_mirror_is_kept(me: Process, kernel: KernelHandle) -> None:
    child = kernel.spawn(owner_of, "kept", 1, 3 * PAGE + 5, "keep")
    wait_until(lambda: kernel.stats()["mirrors"] == 1)
    child.kill()
    child.join()
    wait_until(lambda: kernel.stats()["processes"] == 1)
    stats = kernel.stats()
    assert (stats["mappings"], stats["segments"], stats["mirrors"]) == (0, 4, 1)
    assert kernel.snapshot().frames[0].holders[0].startswith("mirror 0x3")
    assert kernel.audit()
    assert me.call("read_kept", "kept") == [digest(1, 3 * PAGE + 5), 1]
    assert kernel.stats()["segments"] == 0


@pytest.mark.parametrize("handler", ["hold", "late_mirror"])
def test_an_owner_killed_while_its_handler_runs(me: Process, kernel: KernelHandle, handler: str) -> None:
    """A mirror in use stays valid; and a call keeps its buffers until its handler ends, whoever called."""
    child = kernel.spawn(owner_of, handler, 2, 5000, handler)
    wait_until(lambda: me.call("state", handler) == "waiting")
    child.kill()
    child.join()
    wait_until(lambda: kernel.stats()["processes"] == 1)
    assert kernel.stats()["segments"] == 2
    me.call("go")
    wait_until(lambda: me.call("state", handler) != "waiting")
    assert me.call("state", handler) == digest(2, 5000)
    wait_until(lambda: kernel.stats()["segments"] == 0)


@pytest.mark.parametrize("how", ["mapped", "inherited", "unmapped"])
def test_one_whose_first_thread_has_ended(kernel: KernelHandle, how: str) -> None:
    """It lives, and has its memory, mapped by itself or inherited, until its end; /proc/PID shows nothing of it.

    Where it has unmapped that behind our back, the audit says so.
    """
    inherited = how == "inherited"
    lives = f"""
    import ctypes, os, threading, time, realmap
    me = realmap.connect({kernel.path!r})
    buffer = me.map({PAGE})
    if {inherited} and os.fork():
        os._exit(0)
    if {how == "unmapped"}:
        ctypes.CDLL(None).munmap(ctypes.c_void_p(buffer.address), ctypes.c_size_t({PAGE}))
    threading.Thread(target=time.sleep, args=({BOUND},)).start()
    print(os.getpid(), flush=True)
    ctypes.PyDLL(None).pthread_exit(None)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(lives)], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        pid = int(running.stdout.readline())
        try:
            wait_until(
                lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z", "its first thread's end"
            )
            wait_until(lambda: kernel.stats()["inheritances"] == inherited)
            audit = kernel.audit()
            assert len(audit.differences) == (how == "unmapped")
            assert audit.unregistered == [pid] * inherited
            assert kernel.stats()["segments"] == 1
        finally:
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: kernel.stats()["segments"] == 0)


def test_a_reader_killed_does_not_touch_others(me: Process, kernel: KernelHandle) -> None:
    mine = me.map(100_000)
    mine[:] = content = os.urandom(100_000)
    children = [kernel.spawn(owner_of, f"reader {seed}", seed, 5000, "late_mirror") for seed in range(3)]
    wait_until(lambda: kernel.stats()["running"] == 3)
    for child in children:
        child.kill()
        child.join()
    wait_until(lambda: kernel.stats()["processes"] == 1)
    assert mine[:] == content
    assert me.call("sha256", mine) == hashlib.sha256(content).hexdigest()
    for _ in children:
        me.call("go")
    wait_until(lambda: kernel.stats()["segments"] == 1)


@pytest.mark.alone
def test_the_kernel_killed_in_the_middle_of_a_call() -> None:
    kernel = realmap.boot(syscalls=syscalls.ALL)
    with kernel.connect() as me:
        buffer = me.map(100_000)
        buffer[:] = content = os.urandom(100_000)
        killer = subprocess.Popen([sys.executable, "-c", f"import os; os.kill({kernel.pid}, 9)"])
        with pytest.raises(KernelDied) as caught:
            me.call("sleep", BOUND)
        assert caught.value.path == kernel.path
        killer.wait()
        for use in (lambda: me.call("nop"), lambda: me.map(1), kernel.snapshot):
            with pytest.raises(KernelDied):
                use()
        assert buffer[:] == content
        assert left_names() == []
    assert land_maps() == []
    kernel.shutdown()
    assert kernel.path in runtime.sweep()


PROGRAM = """
    import os, random, signal, sys, realmap
    sys.path.insert(0, {support!r})
    import syscalls

    def user(me, seed):
        rng = random.Random(seed)
        held = []
        while True:
            size = rng.randrange(1, 300_000)
            buffer = me.map(size, fragment=rng.choice((None, realmap.PAGE_SIZE, 16 * realmap.PAGE_SIZE)))
            buffer[:] = content = rng.randbytes(size)
            offset = rng.randrange(size)
            part = buffer.slice(offset, rng.randrange(1, size - offset + 1))
            me.call(rng.choice(("sha256", "slow_sha256", "reverse")), part)
            held = (held + [buffer])[-3:]

    kernel = realmap.boot(syscalls=syscalls.ALL)
    jobs = [kernel.spawn(user, seed) for seed in ({seed}, {seed} + 1)]
    me = kernel.connect()
    canary = me.map(50_000)
    canary[:] = content = random.Random({seed}).randbytes(50_000)
    print(kernel.pid, *(job.pid for job in jobs), flush=True)
    sys.stdin.readline()  # by now one of them was killed, unless it was this process
    ok = canary[:] == content
    alive = kernel._child.exitcode is None
    if alive:
        ok = ok and me.call("sha256", canary) == __import__("hashlib").sha256(content).hexdigest()
    else:
        try:
            me.call("nop")
            ok = False
        except realmap.KernelDied:
            pass
    for job in jobs:
        job.kill()
        job.join()
    if alive:
        while kernel.stats()["processes"] > 1:
            pass
        ok = ok and bool(kernel.audit()) and kernel.stats()["segments"] == 1
    print("ok" if ok else "WRONG", flush=True)
"""


def killed_at_random(rng: random.Random, victim: str, tmp_path: Path) -> None:
    """One round: a kernel with two busy users; one of them, or all, killed at a random moment."""
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM.format(support=str(SUPPORT), seed=rng.randrange(1 << 30))))
    child = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    kernel, *users = (int(pid) for pid in child.stdout.readline().split())
    mark = f"{runtime.SEGMENT_PREFIX}{runtime.stamp(kernel)}."
    pids = [kernel, *users, child.pid]
    pidfds = [os.pidfd_open(pid) for pid in pids]
    assert who_has(mark)
    time.sleep(rng.random() * 0.15)  # the random moment
    targets = {"owner": users[:1], "reader": users[1:], "kernel": [kernel], "all": rng.sample(pids, len(pids))}[victim]
    for pid in targets:
        os.kill(pid, signal.SIGKILL)
    for pid in targets:
        assert liveness.wait_death(pidfds[pids.index(pid)], BOUND)
    if victim != "all":
        out, _ = child.communicate("\n", timeout=BOUND)
        assert out.endswith("ok\n"), out
        assert child.returncode == 0
    else:
        child.communicate(timeout=BOUND)
    for pidfd in pidfds:
        assert liveness.wait_death(pidfd, BOUND), "a process is left"
        os.close(pidfd)
    # Every byte is back once nobody has a descriptor or a map of it.
    wait_until(lambda: not who_has(mark), "the end of all that had its segments")
    # At worst an empty name, where death fell between two system calls: the next kernel sweeps it.
    left = [Path("/dev/shm", name) for name in os.listdir("/dev/shm") if name.startswith(mark)]
    assert all(path.stat().st_size == 0 for path in left)
    runtime.sweep()
    assert not any(path.exists() for path in left)


def who_has(mark: str) -> list[str]:
    """The processes that have a descriptor or a map of a segment whose name begins so."""
    found = []
    for process in Path("/proc").glob("[1-9]*"):
        seen = []
        with suppress(OSError):  # it has ended meanwhile
            seen = [(process / "maps").read_text(errors="replace")]
            for each in (process / "fd").iterdir():
                with suppress(OSError):  # closed meanwhile
                    seen.append(os.readlink(each))
        if mark in "".join(seen):
            found.append(process.name)
    return found


def rounds(count: int, seed: int, tmp_path: Path) -> Counter[str]:
    rng = random.Random(seed)
    done: Counter[str] = Counter()
    for turn in range(count):
        victim = ("owner", "reader", "kernel", "all")[turn % 4]
        killed_at_random(rng, victim, tmp_path)
        done[victim] += 1
    return done


def test_kill_rounds(tmp_path: Path) -> None:
    assert sum(rounds(4, 1, tmp_path).values()) == 4


@pytest.mark.slow
def test_kill_rounds_full_count(tmp_path: Path) -> None:
    done = rounds(scaled(FULL_ROUNDS), int(SCALE * 100) + 7, tmp_path)
    print(f"{sum(done.values())} rounds of SIGKILL ({dict(done)}): nothing left, survivors' bytes intact")


def test_connecting_and_dying_leaves_nothing(kernel: KernelHandle) -> None:
    before = kernel.stats()
    for turn in range(20):
        child = os.fork()
        if not child:
            me = realmap.connect(kernel.path)
            buffer = me.map(5 * PAGE, fragment=PAGE)
            if turn % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            buffer[0] = 1
            os._exit(0)
        os.waitpid(child, 0)
    same = before.keys() - {"calls", "threads"}  # an idle worker thread ends by itself, a second later

    def all_gone() -> bool:
        after = kernel.stats()
        return all(after[name] == before[name] for name in same)

    wait_until(all_gone, "the end of all that they had")
