"""One hostile process: attack.py PATH NOTES SEED messages|states COUNT. Its result comes out as a line of JSON."""

from __future__ import annotations

import ctypes
import hashlib
import json
import marshal
import mmap
import os
import random
import signal
import struct
import sys
import time
from collections import Counter, deque
from typing import Any

from mutations import Mutator, Shot, is_request, signed
from peer import BOUND, Notes, Peer, Tally, Wrong
from states import (
    ANSWERS,
    ASLEEP,
    CALLS,
    HEAD,
    HEAD_BYTES,
    HEADS,
    QUEUE_BYTES,
    SLOT_BYTES,
    SLOT_COUNT,
    SLOTS,
    TAIL,
    Scribbler,
    State,
    bytes_of,
    head_of,
)

from realmap.host import procfs
from realmap.wire import channel

#: Messages of one connection at most: what it has mapped by then goes.
LONGEST = 2000
#: Connections that wait for their end while the next one is at work.
WAITING = 16
#: Rings that are scribbled into in turn, and connections that are made ahead: nobody waits for the kernel then.
RINGS = 4
#: States between two looks at what the kernel has made of them.
BATCH = 20
WORDS = {"tail": TAIL, "head": HEAD, "asleep": ASLEEP}
PR_SET_PDEATHSIG = 1
_WORD = struct.Struct("=I")
_pid, _start = os.getpid(), procfs.start_time(os.getpid())


class Attack:
    """Sends what a seed makes, and notes it."""

    def __init__(self, path: str, notes: str, seed: str) -> None:
        self.path, self.seed = path, seed
        self.notes = Notes(notes)
        self.tally = Tally()
        self.kinds: Counter[str] = Counter()
        self.digest = hashlib.sha256()
        #: Decides how connections end, apart from what is sent on them.
        self._random = random.Random(seed + "/ends")
        self._riders = [os.open("/dev/null", os.O_RDONLY), os.memfd_create("fuzz")]

    def _count(self, done: int) -> None:
        self.notes.count(done, self.tally.connections, self.tally.answers, self.tally.byes)

    # ---- messages ---------------------------------------------------------------------------

    def messages(self, count: int) -> None:
        """Sends `count` messages, many of them in flight on several connections.

        What is a request goes by a patient connection, which so comes to have a history; what ends its
        connection, and parts, by a reckless one, after a few requests.
        """
        mutator = Mutator(self.seed)
        lines = {True: Line(LONGEST), False: Line(LONGEST)}
        waiting: deque[tuple[Peer, str]] = deque()
        for index in range(count):
            shot = mutator.shot()
            self.kinds[shot.kind] += 1
            self.digest.update(marshal.dumps(tuple(shot), 2))
            self.notes.sent(index, signed(shot.datagrams[0], _pid, _start))
            if index % 64 == 0:
                self._count(index)
            if shot.kind == "told":
                line = lines[True]
                line.peer = line.peer or Peer(self.path, self.tally)
                line.peer.drain()
                line.peer.tell(shot.datagrams[0])
            elif shot.fresh:
                stranger = Peer(self.path, self.tally, greet=False)
                self._fire(stranger, shot)
                stranger.finish()
                waiting.append((stranger, shot.kind))
            else:
                good = shot.kind == "message" and is_request(b"".join(part[1:] for part in shot.datagrams))
                line = lines[good and self._random.random() < 0.9]
                peer = line.peer = line.peer or Peer(self.path, self.tally)
                self._fire(peer, shot)
                fatal = line.takes(shot)
                if fatal or line.left <= 0:
                    self._leave(peer, shot, fatal, waiting)
                    line.renew(self._random.choice((LONGEST // 20, LONGEST)))
                elif peer.over:
                    raise Wrong(f"the kernel ended a connection after message {index} ({shot.kind}), which was one")
            while len(waiting) > WAITING:
                first, what = waiting.popleft()
                first.settle(what)
                first.close()
        for line in lines.values():
            if line.peer is not None:
                line.peer.finish()
                waiting.append((line.peer, "the last message"))
        for last, what in waiting:
            last.settle(what)
            last.close()
        self._count(count)

    def _fire(self, peer: Peer, shot: Shot) -> None:
        riders = (self._riders * shot.descriptors)[: shot.descriptors]
        if shot.descriptors == 1:
            riders = [peer.sock.fileno()]  # the socket itself: it must not keep itself alive
        for datagram in shot.datagrams:
            peer.send(signed(datagram, _pid, _start) if shot.fresh else datagram, riders)
            riders = []

    def _leave(self, peer: Peer, shot: Shot, fatal: bool, waiting: deque[tuple[Peer, str]]) -> None:
        if self._random.random() < 0.25:
            peer.close()  # at once, whatever is unread on both sides
            return
        if not fatal:
            peer.finish()
        waiting.append((peer, f"what is no message ({shot.kind}: {shot.datagrams[-1][:100].hex()})"))

    # ---- states of a ring -------------------------------------------------------------------

    def states(self, count: int) -> None:
        """Makes `count` states of rings, a few on each in turn before it looks at what the kernel has made of them."""
        scribbler = Scribbler(self.seed)
        spare = deque(Peer(self.path, self.tally, keep_ring=True) for _ in range(RINGS))
        rings: list[Ring | None] = [None] * RINGS
        turn = 0
        for index in range(count):
            state = scribbler.state()
            self.kinds[state.kind] += 1
            said = marshal.dumps(tuple(state), 2)
            self.digest.update(said)
            self.notes.sent(index, said)
            if index % 64 == 0:
                self._count(index)
            ring = rings[turn]
            # A tail that goes back over calls that were not read yet would look as if they had been: so it is settled.
            if ring is not None and (ring.due or state.kind == "tail") and not ring.settle():
                ring.peer.close()
                ring = None
            if ring is None:
                spare.append(Peer(self.path, self.tally, keep_ring=True))
                ring = rings[turn] = Ring(spare.popleft())
            ring.write(state)
            if ring.due:
                turn = (turn + 1) % RINGS
        for last in filter(None, rings):
            last.settle()
            spare.append(last.peer)
        for peer in spare:
            peer.close()
        self._count(count)


class Line:
    """A connection after the other, and what the kernel makes of what is sent on the one that stands."""

    def __init__(self, left: int) -> None:
        self.peer: Peer | None = None
        self.renew(left)

    def renew(self, left: int) -> None:
        """The next connection is for `left` messages at most."""
        self.peer, self.left = None, left
        self._model = channel.Assembler()

    def takes(self, shot: Shot) -> bool:
        """Notes that it was sent; whether the kernel, by its own rules, ends the connection for it."""
        self.left -= 1
        fatal = False
        for datagram in shot.datagrams:
            fatal = self._is_fatal(datagram) or fatal
        return fatal

    def _is_fatal(self, datagram: bytes) -> bool:
        if not datagram:
            return True  # reads as the end
        try:
            # A copy: the same object once more would not be fed again.
            message = self._model.feed(bytes(bytearray(datagram[: channel.DATAGRAM])))
        except channel.NotAMessage:
            return True
        return message is not None and not is_request(message)


class Ring:
    """A ring that is scribbled into."""

    def __init__(self, peer: Peer) -> None:
        """Waits until the ring is there."""
        self.peer = peer
        end = time.monotonic() + BOUND
        while peer.memory is None:
            peer.wait(1.0)
            peer.drain()
            if peer.over or time.monotonic() > end:
                raise Wrong("the kernel did not let a client in that said Hello as it should")
        self.memory: mmap.mmap = peer.memory
        self.next = 0
        #: States and calls since it was settled last, and whether it has to be before more.
        self.states = self.unread = 0
        self.due = False

    def _word(self, queue: int, word: int) -> int:
        return int(_WORD.unpack_from(self.memory, queue * QUEUE_BYTES + word)[0])

    def _set(self, queue: int, word: int, value: int) -> None:
        _WORD.pack_into(self.memory, queue * QUEUE_BYTES + word, value % 2**32)

    def write(self, state: State) -> None:
        """Does what the state says, and publishes its calls last."""
        lie = race = None
        for write in state.writes:
            what = write[0]
            if what == "call":
                _WORD.pack_into(self.memory, head_of(self.next), len(write[1]))
                at = bytes_of(self.next, len(write[1]))
                self.memory[at : at + len(write[1])] = write[1]
                self.next = (self.next + 1) % 2**32
                self.unread += 1
            elif what == "bytes":
                at = write[1] * QUEUE_BYTES + write[2]
                if write[1] == ANSWERS or not self._holds_calls(write[2], len(write[3])):
                    self.memory[at : at + len(write[3])] = write[3]
            elif what == "length":
                _WORD.pack_into(self.memory, head_of(self.next - 1), write[2])
            elif what == "race":
                race = write
            elif write[3] == "next":
                lie = write[4]
            elif write[3] == "tail":
                self._set(write[1], write[2], self._word(write[1], TAIL) + write[4])
            elif write[1] != CALLS or write[2] != HEAD or (write[4] - self.next) % 2**32 > 2 * SLOT_COUNT:
                self._set(write[1], write[2], write[4])  # but no head as if what comes next had been read already
        if lie is not None:
            self.next = (self.next + lie) % 2**32
        self._set(CALLS, TAIL, self.next)
        if state.bell or self._word(CALLS, ASLEEP):
            self._set(CALLS, ASLEEP, 0)
            self.peer.send(channel.BELL)
        if race is not None:
            self._change(race[1], race[2])
        self.states += 1
        self.due = state.fatal or self.states >= BATCH or self.unread > SLOT_COUNT - 8

    def _holds_calls(self, at: int, size: int) -> bool:
        """Whether calls that the kernel has not read may lie there."""
        return any(
            (self.next - 1 - slot) % SLOT_COUNT < self.unread
            for start, step in ((HEADS, HEAD_BYTES), (SLOTS, SLOT_BYTES))
            for slot in range(max(0, (at - start) // step), min(SLOT_COUNT, (at + size - 1 - start) // step + 1))
        )

    def _change(self, turns: int, data: bytes) -> None:
        at = head_of(self.next - 1)
        before = self.memory[at : at + len(data)]
        for _ in range(turns):
            self.memory[at : at + len(data)] = data
            self.memory[at : at + len(data)] = before

    def settle(self) -> bool:
        """Waits until the kernel has read all; whether it still listens. Wrong: it does neither."""
        peer, end, looks = self.peer, time.monotonic() + BOUND, 0
        while not peer.over and self._word(CALLS, HEAD) != self.next:
            looks += 1
            if looks < 100:
                os.sched_yield()
            else:
                if looks % 8 == 4:
                    peer.send(channel.BELL)  # the kernel sleeps, and the word that says so was scribbled over
                peer.wait(0.001)
                peer.drain()
                if time.monotonic() > end:
                    words = {name: self._word(CALLS, word) for name, word in WORDS.items()}
                    raise Wrong(f"the kernel has not read a ring up to {self.next} within {BOUND} s: {words}")
        peer.drain()
        self.states = self.unread = 0
        self.due = False
        return not peer.over


def main() -> None:
    """Attacks."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    path, notes, seed, what, count = sys.argv[1:]
    attack = Attack(path, notes, seed)
    began, problem = time.monotonic(), None
    try:
        (attack.messages if what == "messages" else attack.states)(int(count))
    except (Wrong, OSError) as error:
        problem = f"{type(error).__name__}: {error}"
    tally = attack.tally
    result: dict[str, Any] = {
        "what": what,
        "count": int(count),
        "seconds": time.monotonic() - began,
        "digest": attack.digest.hexdigest(),
        "kinds": dict(attack.kinds),
        "problem": problem,
        **vars(tally),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
