"""Runs users against a kernel, replaces those that are killed, watches the kernel, and draws up the report."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import msgspec
import psutil

from realmap.errors import KernelDied, KernelError, UnknownSyscall
from realmap.host import forks, procfs, runtime, signals
from realmap.lab.stress import handlers
from realmap.lab.stress.actor import PATIENCE, join
from realmap.lab.stress.antagonists import chosen
from realmap.lab.stress.antagonists.antagonist import Target
from realmap.lab.stress.antagonists.crew import Crew
from realmap.lab.stress.board import Board
from realmap.lab.stress.operations import load
from realmap.lab.stress.report import FORM, Operation, Options, Report, Slope, Tally, kind_of, slope, summed
from realmap.lab.stress.worker import Worker
from realmap.memory import KERNEL_LAND
from realmap.observe.control import Control
from realmap.system import boot
from realmap.wire.messages import VERSION

SAMPLE = 0.5
AUDIT = 5.0


@contextmanager
def _held_back() -> Iterator[None]:
    """Ctrl-C waits: a hook of a fork would swallow it, and before its pid is noted a child would be lost.

    By a handler, not by a mask: where another thread (of a status line) takes the signal, Python still runs the
    handler on this one, in the midst of the hooks.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler runs
        yield
        return
    caught: list[int] = []
    with signals.handled(lambda number, _: caught.append(number), signal.SIGINT):
        yield
    if caught:
        signal.raise_signal(signal.SIGINT)


class User:
    """One user, over its lives."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.life = 0
        self.pid = 0
        self.sock: socket.socket | None = None
        #: Of the lives before this one; and of this one, as it was last told.
        self.past: list[Tally] = []
        self.now = Tally()

    @property
    def steps(self) -> int:
        """In all its lives."""
        return self.now.steps + sum(tally.steps for tally in self.past)


class Runner:
    """A run. `say` is called with a line about it now and then."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self._options = options
        self._say = say
        self._users = [User(index) for index in range(options.users)]
        self._board = Board(options.users)
        self._operations = load(options.operations) if options.operations else []
        self._failures: list[str] = []
        self._kills = self._audits = 0
        self._samples: dict[str, list[tuple[float, float]]] = {}
        self._decoder = msgspec.msgpack.Decoder(Tally)

    def run(self) -> Report:
        """All of it. KernelError: no kernel, or one without the handlers."""
        with ExitStack() as stack:
            path = self._options.kernel
            if path is None:
                path = stack.enter_context(boot(syscalls=handlers.ALL)).path
            self._control = stack.enter_context(Control(path, timeout=PATIENCE))
            self._path = path
            self._require_handlers()
            before = self._remains()
            target = Target(path, self._control.pid, self._options.kernel is None, self._board)
            self._crew = Crew(chosen(self._options.antagonists), target, self._options.seed)
            began = time.monotonic()
            self._deadline = None if self._options.seconds is None else began + self._options.seconds
            try:
                self._work(began)
            finally:
                self._end()
            self._failures += self._crew.failures
            seconds = time.monotonic() - began
            self._look_back(before)
        return self._report(seconds)

    def _require_handlers(self) -> None:
        others = self._control.stats()["processes"]
        with join(self._path) as me:
            try:
                me.call("stress_end")
            except UnknownSyscall as error:
                why = f"{error.why}; start it with: realmap kernel --syscalls realmap.lab.stress.handlers"
                raise UnknownSyscall(error.name, why=why) from None
        end = time.monotonic() + PATIENCE
        while self._control.stats()["processes"] > others and time.monotonic() < end:  # it is not one to be found again
            time.sleep(0.01)

    # ---- users ------------------------------------------------------------------------------

    def _start(self, user: User) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        left = None
        if self._options.ops is not None:
            each, rest = divmod(self._options.ops, self._options.users)
            left = each + (user.index < rest) - user.steps
        with _held_back():
            pid = forks.fork()
            if not pid:
                ours.close()
                life = Worker(theirs, self._options, self._path, self._board, user.index, user.life)
                life.run(self._deadline, left)
            theirs.close()
            user.pid, user.sock = pid, ours
            user.now = Tally()

    def _work(self, began: float) -> None:
        for user in self._users:
            self._start(user)
        with _held_back():
            self._crew.start()
        sampled = audited = began
        while not self._failures and not self._crew.failures and any(user.sock is not None for user in self._users):
            socks = {user.sock.fileno(): user for user in self._users if user.sock is not None}
            for fd in select.select(list(socks), [], [], 0.1)[0]:
                self._hear(socks[fd])
            self._watch_operations()
            self._crew.hear()
            now = time.monotonic()
            try:
                if now - sampled > SAMPLE:
                    sampled = now
                    self._sample(now - began)
                    self._say(self._progress(now - began))
                if now - audited > AUDIT:
                    audited = now
                    self._audit()
            except (psutil.Error, KernelError, OSError) as error:
                self._failures.append(_lost(error))
            if self._deadline is not None and now > self._deadline + PATIENCE:
                self._failures.append(f"users are left: {PATIENCE} s after the end some are still at work")

    def _hear(self, user: User) -> None:
        assert user.sock is not None
        try:
            data = user.sock.recv(1 << 20)
        except ConnectionError:
            data = b""
        if data:
            user.now = self._decoder.decode(data)
            return
        user.sock.close()
        user.sock = None
        number, seconds = self._board.operation(user.index)
        doomed = self._board.is_doomed(user.index, user.pid)
        self._board.leave(user.index)
        code = os.waitstatus_to_exitcode(os.waitpid(user.pid, 0)[1])
        tally = user.now
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        if tally.failure is not None and (tally.wrong or not doomed):  # one that starves may say so before it dies
            self._failures.append(f"user {user.index}, life {user.life}: {tally.failure}")
        elif tally.failure is not None or (code == -signal.SIGKILL and (tally.dying or doomed)):
            self._kills += 1
            self._start_again(user)
        elif tally.again:
            self._start_again(user)
        elif number:
            own = self._operations[number - 1]
            hung = code == -signal.SIGKILL and seconds > own.timeout
            why = f"it did not come back within {own.timeout} s" if hung else f"it ended its process ({how})"
            tally.operations.setdefault(own.name, Operation()).add(Operation(1, 1, seconds, f"{own.name}: {why}"))
            self._start_again(user)
        elif code or not tally.done:
            self._failures.append(f"user {user.index}, life {user.life} died of {how}, which was not asked for")

    def _start_again(self, user: User) -> None:
        user.past.append(user.now)
        user.life += 1
        self._start(user)

    def _watch_operations(self) -> None:
        """Kills users whose operation does not come back."""
        for user in self._users:
            number, seconds = self._board.operation(user.index)
            if number and user.sock is not None and seconds > self._operations[number - 1].timeout:
                os.kill(user.pid, signal.SIGKILL)

    def _end(self) -> None:
        self._crew.end()
        for user in self._users:
            if user.sock is not None:
                with suppress(ProcessLookupError):
                    os.kill(user.pid, signal.SIGKILL)
                os.waitpid(user.pid, 0)
                user.sock.close()
                user.sock = None

    # ---- the kernel -------------------------------------------------------------------------

    def _sample(self, at: float) -> None:
        process = psutil.Process(self._control.pid)
        with process.oneshot():
            for name, value in (
                ("rss", process.memory_info().rss),
                ("maps", len(procfs.maps(process.pid))),
                ("descriptors", process.num_fds()),
                ("threads", process.num_threads()),
            ):
                self._samples.setdefault(name, []).append((at, float(value)))

    def _audit(self) -> None:
        self._audits += 1
        report = self._control.audit()
        if not report:
            self._failures.append(f"the audit found {report}")

    def _remains(self) -> dict[str, object]:
        """What the kernel has at this moment; without users, before a run and after it, it is the same."""
        stats = self._control.stats()
        names = ("processes", "mappings", "mirrors", "segments", "bytes", "running")
        # Anchors, pages without rights that keep page tables in place, stay as long as the land does.
        maps = [
            found
            for found in procfs.maps(self._control.pid, KERNEL_LAND.start, KERNEL_LAND.end)
            if found.perms != "---p"
        ]
        descriptors = stats["descriptors"] - stats["controls"]  # who looks on may come and go
        return {
            **{name: stats[name] for name in names},
            "descriptors": descriptors,
            "maps": len(maps),
            "names": runtime.own_names(self._control.pid),
        }

    def _look_back(self, before: dict[str, object]) -> None:
        try:
            with join(self._path) as me:
                me.call("stress_end")
            end = time.monotonic() + PATIENCE
            while (after := self._remains()) != before and time.monotonic() < end:
                time.sleep(0.05)
            for name, value in after.items():
                if value != before[name]:
                    self._failures.append(f"left over in the end: {name} {value}, {before[name]} before")
            self._audit()
        except KernelError as error:
            self._failures.append(_lost(error))
        self._failures += [found.in_words(name) for name, found in self._slopes().items() if found.grows(name)]

    def _slopes(self) -> dict[str, Slope]:
        return {name: slope(values[len(values) // 2 :]) for name, values in self._samples.items()}

    # ---- what is told -----------------------------------------------------------------------

    def _tallies(self) -> list[Tally]:
        return [tally for user in self._users for tally in [*user.past, user.now]]

    def _progress(self, seconds: float) -> str:
        tallies = self._tallies()
        steps = sum(tally.steps for tally in tallies)
        return (
            f"{seconds:6.1f} s  {steps} steps ({steps / seconds:.0f}/s)  "
            f"{sum(tally.verified for tally in tallies) >> 20} MiB verified  {self._kills} killed  "
            f"{sum(tally.truncated for tally in tallies)} truncated  {sum(tally.refused for tally in tallies)} refused"
        )

    def _done(self) -> dict[str, Operation]:
        found = {own.name: Operation() for own in self._operations}
        for tally in self._tallies():
            for name, done in tally.operations.items():
                found[name].add(done)
        return found

    def _report(self, seconds: float) -> Report:
        tallies = self._tallies()
        operations = self._done()
        self._failures += [
            f"operation {name} failed {done.failures} times of {done.count}, first: {done.why}"
            for name, done in operations.items()
            if done.failures
        ]
        kinds = {}
        for kind, buckets in sorted(summed(tallies).items()):
            longest = max(tally.longest.get(kind, 0) for tally in tallies) / 1e9
            kinds[kind] = kind_of(buckets, seconds, longest)
        return Report(
            form=FORM,
            version=VERSION,
            options=self._options,
            replay=self._options.command(),
            seconds=seconds,
            kinds=kinds,
            steps=sum(tally.steps for tally in tallies),
            bytes_verified=sum(tally.verified for tally in tallies),
            injected={
                "kills": self._kills,
                "truncations": sum(tally.truncated for tally in tallies),
                "refused": sum(tally.refused for tally in tallies),
                "forks": sum(tally.forked for tally in tallies),
                "servers died": sum(tally.lost for tally in tallies),
            },
            unnoticed_truncations=sum(tally.unnoticed for tally in tallies),
            slopes=self._slopes(),
            audits=self._audits,
            choices=[" ".join(tally.choices[:16] for tally in [*user.past, user.now]) for user in self._users],
            failures=self._failures,
            antagonists=self._crew.found,
            operations=operations,
            skipped={kind: why for tally in tallies for kind, why in tally.skipped.items()},
        )


def _lost(error: Exception) -> str:
    """What came of asking the kernel, in words."""
    died = isinstance(error, KernelDied | psutil.NoSuchProcess | ProcessLookupError)
    return f"the kernel {'died' if died else 'cannot be asked'}: {error}"


def check(options: Options) -> None:
    """ValueError: options that make no sense, in words."""
    if options.users < 1 or (options.ops is None and options.seconds is None):
        raise ValueError("a run has at least one user, and an end: seconds or ops")
    if options.ops is not None and options.ops < options.users:
        raise ValueError(
            f"{options.ops} steps are not enough for {options.users} users: give each of them one, at least"
        )
    if not (0 <= options.kill <= 1 and 0 <= options.truncate <= 1):
        raise ValueError("kill and truncate are shares of the steps: from 0 to 1")
    chosen(options.antagonists)
    if options.operations is not None:
        load(options.operations)


def run(options: Options, say: Callable[[str], None] = lambda line: None) -> Report:
    """Stresses a kernel, and reports. The same seed gives each user the same choices.

    KernelError: the kernel of `options` is not there. ValueError: options that make no sense.
    """
    check(options)
    return Runner(options, say).run()
