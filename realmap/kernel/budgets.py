"""What each peer has of the kernel at a time, over all its connections, and what it may have. Plain counters.

A peer is a pid, as Linux says it of who connected; what that leaves when it ends is its uid's.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from weakref import WeakValueDictionary

from realmap.errors import LimitReached
from realmap.kernel.limits import Limits

#: What is counted, as `Limits` names the most of it: in words, and what to do about it. Of a pid:
OF_PROCESS = {
    "connections": ("connections", "close some"),
    "half_sent": ("bytes of messages whose last part has not come", "send the last parts"),
    "unread": ("bytes of answers that it has not read", "read them"),
    "undecoded": ("bytes of calls that wait for their handlers or are at work", "wait for some, or pass buffers"),
    "calls": ("calls that have not ended", "wait for some"),
    "handles": ("handles", "revoke some, or limit their uses and time"),
    "seats": ("services", "close some, or serve more names by one"),
    "sessions": ("sessions with services", "close some"),
    "grants": ("buffers lent, to each server that it calls with them", "unmap some, or close sessions"),
}
#: And of a uid: what its processes left that have ended.
OF_USER = {
    "orphans": ("handles that outlive their makers", "revoke some: realmap gc --orphans"),
    "inheritances": ("ended processes whose forked children may still come for what they had", "let the children end"),
}


class Peer:
    """What one of them has."""

    __slots__ = ("__weakref__", "_limits", "_name", "_words", "calls", "lent", "maps", "used")

    def __init__(self, name: str, words: dict[str, tuple[str, str]], limits: Limits) -> None:
        """`name`: as errors say it."""
        self._name = name
        self._words = words
        self._limits = limits
        #: How much of each, by name.
        self.used: Counter[str] = Counter()
        #: What runs of it on worker threads, for each connection (`workers.Share`).
        self.calls: list[Any] = []
        self.maps: list[Any] = []
        #: Descriptors that it holds of what others lend to it, by their pids.
        self.lent: Counter[int] = Counter()

    def take(self, what: str, amount: int = 1) -> None:
        """Counts so many more. LimitReached: it would have more than it may; nothing is counted then."""
        refusal = self.would_refuse(what, amount)
        if refusal is not None:
            raise LimitReached(what, getattr(self._limits, what), why=refusal)
        self.used[what] += amount

    def would_refuse(self, what: str, amount: int = 1) -> str | None:
        """Why it may not have so many more; None: it may."""
        limit, used = getattr(self._limits, what), self.used[what]
        if used + amount <= limit:
            return None
        things, remedy = self._words[what]
        return f"{self._name} has {used} {things}; the kernel's limit ({what}) is {limit}: {remedy}"

    def give_back(self, what: str, amount: int = 1) -> None:
        self.used[what] -= amount


class Peers:
    """Those that have something: each is here for as long as anybody who counts on it refers to it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._processes: WeakValueDictionary[int, Peer] = WeakValueDictionary()
        self._users: WeakValueDictionary[int, Peer] = WeakValueDictionary()

    def process(self, pid: int) -> Peer:
        found = self._processes.get(pid)
        if found is None:
            found = self._processes[pid] = Peer(f"process {pid}", OF_PROCESS, self._limits)
        return found

    def user(self, uid: int) -> Peer:
        """What is left of the ended processes of a uid."""
        found = self._users.get(uid)
        if found is None:
            found = self._users[uid] = Peer(f"uid {uid}", OF_USER, self._limits)
        return found

    def totals(self) -> dict[str, int]:
        all_used = sum((peer.used for peer in (*self._processes.values(), *self._users.values())), Counter())
        return {what: all_used[what] for what in (*OF_PROCESS, *OF_USER)}
