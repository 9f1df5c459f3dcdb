"""The runner's side of antagonists: each in a process of its own, until the runner ends it, or ends.

runner ──fork──▶ antagonist: step, step, … ──Antagonism──▶ runner
       ──its end of the socket is shut, or it dies──▶ antagonist restores everything, and ends
"""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from realmap.host import files, forks
from realmap.lab.stress.actor import PATIENCE, WrongBytes
from realmap.lab.stress.antagonists.antagonist import Antagonist, Target
from realmap.lab.stress.report import Antagonism

#: It rests so many times as long as its last step was on a CPU, for so many seconds at most: users have to get on, too.
SHARE, LONGEST_REST = 3, 0.25
TELL = 0.25


class Member:
    """One antagonist, and what is known of it."""

    def __init__(self, antagonist: Antagonist) -> None:
        self.antagonist = antagonist
        self.now = Antagonism()
        self.pid = 0
        self.sock: socket.socket | None = None


class Crew:
    """The antagonists of a run."""

    def __init__(self, kinds: Sequence[type[Antagonist]], target: Target, seed: int) -> None:
        self._members = [Member(kind(target)) for kind in kinds]
        self._seed = seed
        self._decoder = msgspec.msgpack.Decoder(Antagonism)

    @property
    def found(self) -> dict[str, Antagonism]:
        """What each did so far, or why it does not."""
        return {member.antagonist.name: member.now for member in self._members}

    @property
    def failures(self) -> list[str]:
        """The wrong bytes that they found."""
        return [f"antagonist {name}: {each.wrong}" for name, each in self.found.items() if each.wrong]

    def start(self) -> None:
        """Starts those that the machine allows."""
        runner = os.pidfd_open(os.getpid())
        for member in self._members:
            why = member.antagonist.available()
            if why is not None:
                member.now.why = f"not here: {why}"
                continue
            rng = random.Random(f"{self._seed}/antagonist/{member.antagonist.name}")
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                pid = forks.fork()
            except OSError as error:
                member.now.why = f"not here: {error.strerror}"
                ours.close()
                theirs.close()
                continue
            if not pid:
                try:
                    ours.close()
                    _run(member.antagonist, rng, theirs, runner)
                finally:
                    os._exit(0)
            theirs.close()
            member.pid, member.sock = pid, ours
        files.close(runner)

    def hear(self) -> None:
        """Takes in what they have reported since."""
        for member in self._members:
            while member.sock is not None and select.select([member.sock], [], [], 0)[0]:
                self._hear(member)

    def _hear(self, member: Member) -> None:
        assert member.sock is not None
        data = b""
        with suppress(ConnectionError):
            data = member.sock.recv(1 << 16)
        if data:
            member.now = self._decoder.decode(data)
            return
        member.sock.close()
        member.sock = None
        code = os.waitstatus_to_exitcode(os.waitpid(member.pid, 0)[1])
        if code:
            member.now.why = f"ended midway: it died ({signal.Signals(-code).name if code < 0 else f'status {code}'})"
        self._restore(member)

    def end(self) -> None:
        """Ends them, and waits until everything is as it was."""
        for member in self._members:
            if member.sock is not None:
                member.sock.shutdown(socket.SHUT_WR)
        end = time.monotonic() + PATIENCE
        for member in self._members:
            while member.sock is not None:
                if not select.select([member.sock], [], [], max(0.0, end - time.monotonic()))[0]:
                    os.kill(member.pid, signal.SIGKILL)
                self._hear(member)
            self._restore(member)

    def _restore(self, member: Member) -> None:
        try:
            member.antagonist.close()
        except OSError as error:
            member.now.why = f"not everything is as it was before: {error}"


def _run(antagonist: Antagonist, rng: random.Random, sock: socket.socket, runner: int) -> None:
    """A whole life, in a process of its own. Ctrl-C is the runner's, whose end (`runner`: its pidfd) ends this, too."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    now = Antagonism()
    try:
        try:
            antagonist.begin(rng)
            _steps(antagonist, rng, sock, runner, now)
        finally:
            antagonist.close()
    except BrokenPipeError:  # the runner has gone
        pass
    except WrongBytes as error:
        now.wrong = str(error)
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        now.why = f"ended midway: {type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})"
    with suppress(OSError):
        sock.send(msgspec.msgpack.encode(now))


def _steps(antagonist: Antagonist, rng: random.Random, sock: socket.socket, runner: int, now: Antagonism) -> None:
    told = 0.0
    ends, over = [sock.fileno(), runner], False
    while not over:  # once at least, however short the run
        began = time.process_time()
        now.count += antagonist.step(rng)
        took = time.process_time() - began
        if time.monotonic() - told > TELL:
            told = time.monotonic()
            sock.send(msgspec.msgpack.encode(now))
        over = bool(select.select(ends, [], [], max(antagonist.rest, min(LONGEST_REST, SHARE * took)))[0])
