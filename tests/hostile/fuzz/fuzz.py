"""Lets hostile clients loose on a kernel, and sees whether anybody but themselves is hurt. Run it by tools/fuzz.

    this process ─ boots ─▶ kernel ◀─ calls, checked and timed ── bystander.py
                              ▲ ▲
       mutated messages ──────┘ └────── states of rings                attack.py, one or several

It fails where the kernel dies or logs a failure of its own, where the bystander gets a wrong answer or none, and where
anything of the hostile clients is left: in the books, descriptors, threads, memory, or names.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import handlers
import psutil
from bystander import PHASES
from mutations import name_of
from peer import Notes

import realmap
from realmap.errors import InvalidHandle
from realmap.host import procfs, runtime
from realmap.user import names
from realmap.wire import messages

HERE = Path(__file__).parent
#: What clients of the kernel may have together, and each: hostile ones ask for all of it. Bytes.
MEMORY, EACH = 64 << 20, 8 << 20
#: How long the kernel may take to be as before, once its clients have left. Seconds.
BOUND = 60.0
#: How long the bystander calls the idle kernel. Seconds.
IDLE = 0.5
#: How much the kernel's memory may grow from the third to the last quarter of an attack, the least of each compared:
#: what clients have meanwhile comes and goes, so the least is what stays. Whatever Python object is kept for a message
#: takes 64 bytes or more with its place in a container; half of that for each message is too much. The allocators keep
#: what the longest message took (one for each hostile process), and 8 MiB of arenas and of threads' stacks. Bytes.
KEPT, NOISE = 32, 8 << 20
LOOK, REPORT = 0.1, 5.0


def left_names(kernel: int, seed: int) -> list[str]:
    """Names in /dev/shm that this run left: of the kernel's own, and those that clients asked for."""
    own = f"{runtime.SEGMENT_PREFIX}{procfs.pid_namespace()}.{kernel}."
    return [name for name in os.listdir("/dev/shm") if name.startswith((own, name_of(seed)))]


def growth(samples: list[tuple[float, int]]) -> int:
    """By how much memory grew from the third to the last quarter: (how far the attack was, bytes) each."""
    third = [size for done, size in samples if 0.5 <= done < 0.75]
    last = [size for done, size in samples if done >= 0.75]
    return min(last) - min(third) if third and last else 0


@contextlib.contextmanager
def stderr_in(path: Path) -> Iterator[None]:
    """What processes that are started here say on stderr goes into a file; a crash says where."""
    before, file = os.dup(2), os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.environ["PYTHONFAULTHANDLER"] = "1"
    try:
        os.dup2(file, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(file)


class Run:
    """One run: a kernel, a bystander, and the attacks on it."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.failures: list[str] = []
        self.result: dict[str, Any] = {"seed": options.seed, "clients": options.clients}
        self._log = folder / "kernel.log"
        self._phase_file = folder / "phase"
        self._phase_file.write_bytes(b"\1")
        with stderr_in(self._log):
            # Windows that are kept are another way through the kernel: every other seed takes it.
            kept = MEMORY if options.seed % 2 else 0
            self.kernel = realmap.boot(syscalls=handlers.ALL, memory_limit=MEMORY, process_limit=EACH, lazy_unmap=kept)
        self._process = psutil.Process(self.kernel.pid)

    def fail(self, what: str) -> None:
        """Notes and says what is wrong."""
        self.failures.append(what)
        print(f"FAILED: {what}", flush=True)

    def alive(self) -> bool:
        """Whether the kernel's process runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return bool(self._process.status() != psutil.STATUS_ZOMBIE)
        return False

    def facts(self) -> dict[str, int]:
        """What the kernel has open, by Linux."""
        return {"descriptors": self._process.num_fds(), "threads": self._process.num_threads()}

    def run(self) -> None:
        """All of it."""
        with self.kernel.connect() as me:
            buffer = me.map(1)
            me.call("sha256", buffer)
            del buffer
        self._wait(lambda: self.kernel.stats()["processes"] == 0, "the first client to leave")
        before, size = self.facts(), self._process.memory_info().rss
        command = [sys.executable, str(HERE / "bystander.py"), self.kernel.path, str(self._phase_file)]
        bystander = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with open(self._phase_file, "r+b") as file, mmap.mmap(file.fileno(), 1) as phase:
            try:
                self._wait(lambda: self.kernel.stats()["mappings"] == 1, "the bystander")
                time.sleep(IDLE)
                for what, count in (("messages", self.options.messages), ("states", self.options.states)):
                    if count and self.alive():
                        phase[0] = PHASES.index(what)
                        self._attack(what, count)
                if self.alive():
                    self._audit("with the bystander there")
            finally:
                phase[0] = 0
                said, _ = bystander.communicate(timeout=2 * BOUND)
        watched = json.loads(said) if said else {"problems": ["the bystander died"], "times": {}}
        self.result["bystander"] = watched["times"]
        for problem in watched["problems"]:
            self.fail(f"the bystander: {problem}")
        self._afterwards(before, size)

    def _wait(self, holds: Callable[[], bool], what: str, bound: float = BOUND) -> bool:
        end = time.monotonic() + bound
        while not holds():
            if time.monotonic() > end:
                self.fail(f"waited {bound:.0f} s in vain for {what}")
                return False
            time.sleep(0.02)
        return True

    # ---- attacks ----------------------------------------------------------------------------

    def _attack(self, what: str, count: int) -> None:
        clients = self.options.clients
        notes, attackers = [], []
        for index in range(clients):
            path = self.folder / f"{what}-{index}"
            notes.append(Notes(str(path)))
            share = count // clients + (index < count % clients)
            seed = f"{self.options.seed}/{what}/{index}"
            command = [sys.executable, str(HERE / "attack.py"), self.kernel.path, str(path), seed, what, str(share)]
            attackers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        samples: list[tuple[float, int]] = []
        began = said = time.monotonic()
        while any(attacker.poll() is None for attacker in attackers) and self.alive():
            time.sleep(LOOK)
            done = sum(note.counts()[0] for note in notes)
            with contextlib.suppress(psutil.NoSuchProcess):
                samples.append((done / count, self._process.memory_info().rss))
            if time.monotonic() - said > REPORT:
                said = time.monotonic()
                rate, size = done / (said - began), samples[-1][1] >> 20
                print(f"{what}: {done} of {count}, {rate:.0f}/s, the kernel has {size} MiB", flush=True)
        results = []
        for index, attacker in enumerate(attackers):
            text, _ = attacker.communicate()
            found = json.loads(text) if text else {"problem": f"it died ({attacker.returncode})"}
            results.append(found)
            if found["problem"] or not self.alive():
                self.fail(f"hostile client {index}, {what}: {found['problem']}; the last it sent:")
                print("\n".join(notes[index].last(8)), flush=True)
        if not self.alive():
            self.fail(f"the kernel died: {self.kernel!r}")
        seconds, more = time.monotonic() - began, growth(samples)
        self.result[what] = {"seconds": seconds, "rate": count / seconds, "growth": more, "clients": results}
        print(f"{what}: {count} in {seconds:.1f} s, {count / seconds:.0f}/s", flush=True)
        if more > max(NOISE + clients * messages.MAX_MESSAGE, count // 4 * KEPT):
            self.fail(f"the kernel's memory grew by {more} bytes in the last quarter of {count} {what}")

    # ---- afterwards -------------------------------------------------------------------------

    def _audit(self, when: str) -> None:
        report = self.kernel.audit()
        if not report:
            self.fail(f"the books are wrong, {when}: {report}")

    def _end_names(self) -> None:
        """Who has said that it ends in good order leaves its names to all others; any of them may end one."""
        with self.kernel.connect() as me:
            for handle in self.kernel.snapshot().handles:
                if handle.is_named:
                    with contextlib.suppress(InvalidHandle):  # its maker has ended meanwhile
                        names.unlink(me, handle.name.removeprefix(messages.NAMED))

    def _afterwards(self, before: dict[str, int], size: int) -> None:
        log = self._log.read_text(errors="replace")
        if log:
            self.fail("the kernel said on stderr:")
            print(log[-8000:], flush=True)
        if not self.alive():
            return
        empty = ("processes", "mappings", "mirrors", "segments", "bytes", "running", "kept_windows")

        def gone() -> bool:
            stats = self.kernel.stats()
            return not any(stats[name] for name in empty)

        self._wait(lambda: not self.kernel.stats()["processes"], "all of the clients to be gone")
        self._end_names()
        if not self._wait(gone, "all that they had to be gone from the books"):
            self.fail(str(self.kernel.stats()))
        if not self._wait(lambda: self.facts() == before, "the kernel's descriptors and threads to be as before"):
            self.fail(f"before {before}, after {self.facts()}")
        self._audit("afterwards")
        sizes = [size, self._process.memory_info().rss]
        self.result["kernel"] = {"before": before, "after": self.facts(), "rss": sizes}
        self.result["stats"] = self.kernel.stats()
        # Waited for: another run of the same seed uses the same ones.
        if not self._wait(lambda: not left_names(self.kernel.pid, self.options.seed), "names to be gone"):
            self.fail(f"names that are left: {left_names(self.kernel.pid, self.options.seed)}")


def report(result: dict[str, Any]) -> None:
    """The numbers in words."""
    for phase, calls in result.get("bystander", {}).items():
        for name, found in calls.items():
            if found["calls"]:
                times = ", ".join(f"{what} {found[what]:.0f}" for what in ("p50", "p99", "max"))
                print(f"bystander, {phase}: {found['calls']} calls of {name}, µs: {times}")
    if "kernel" in result:
        first, last = result["kernel"]["rss"]
        print(f"kernel: {first / 2**20:.1f} MiB before, {last / 2**20:.1f} MiB after, {result['kernel']['after']}")


def options_of(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools/fuzz", description="Hostile clients against a kernel of their own.")
    parser.add_argument("--messages", type=int, default=20_000, help="mutated messages, in all (default 20000)")
    parser.add_argument("--states", type=int, default=20_000, help="states of rings, in all (default 20000)")
    parser.add_argument("--seed", type=int, default=None, help="the same one makes the same sequence (default: random)")
    parser.add_argument("--clients", type=int, default=1, help="hostile processes (default 1)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="everything that was counted")
    options = parser.parse_args(arguments)
    if options.seed is None:
        options.seed = secrets.randbelow(1 << 32)
    if options.clients < 1 or options.messages < 0 or options.states < 0:
        parser.error("counts are not negative, and there is one hostile process at least")
    return options


def main() -> int:
    """0: nobody was hurt."""
    options = options_of(sys.argv[1:])
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="realmap-fuzz-") as folder:
        os.environ["REALMAP_DIR"] = folder  # names and sockets of this run lie there alone
        run = Run(options, Path(folder))
        with run.kernel:
            run.run()
    report(run.result)
    run.result["failures"] = run.failures
    if options.json:
        options.json.write_text(json.dumps(run.result, indent=1))
    if run.failures:
        again = f"--messages {options.messages} --states {options.states} --clients {options.clients}"
        print(f"{len(run.failures)} failures; again: tools/fuzz {again} --seed {options.seed}")
        return 1
    print("nobody was hurt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
