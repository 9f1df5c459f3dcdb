"""Which way of reaching N bytes of another process is the fastest here: by size, and by what is done with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

from realmap.errors import PhysicalMemoryExhaustion
from realmap.lab.bench.measure import Batch, Contender
from realmap.lab.bench.run import KEPT, Bench
from realmap.observe import words
from realmap.pages import HUGE_SIZE, PAGE_SIZE, align_up
from realmap.user.buffer import Buffer
from realmap.user.process import Process

SIZES = [64 << shift for shift in range(0, 23, 2)]  # 64 B to 256 MiB
QUICK_SIZES = [64, 4 << 10, 64 << 10, 1 << 20, 16 << 20]
WORKS = {"none": "nothing", "touch": "touch a little", "read": "read all", "write": "write all"}
#: In place only, and at one size: what huge pages take back.
PAGES, PAGES_SIZE = "pages", 16 << 20


class Way(NamedTuple):
    """A way of reaching bytes, what it is called in the sentence, and its twin in the C floor."""

    name: str
    words: str
    floor: str


#: In this order in every table.
WAYS = [
    Way("mirror", "mirror()", "map plain"),
    Way("mirror populated", "mirror(populate=True)", "map populate"),
    Way("mirror kept", "a kept mirror", "own"),
    Way("mirror huge", "a mirror of huge frames", "map huge"),
    Way("copy", "copy_in/copy_out", "pread"),
    Way("copy of the words", "copy_in of just the words", "pread"),
    Way("process_vm_readv", "process_vm_readv", "readv"),
    Way("pipe", "a pipe", "pipe"),
]
#: Users and their buffers: of a kernel that unmaps ("plain"), of one that keeps ("kept"), in huge pages ("huge").
Memory = dict[str, tuple[Process, Buffer]]


def measure(bench: Bench) -> None:
    winners: dict[str, list[tuple[int, str]]] = {}
    for size in QUICK_SIZES if bench.quick else SIZES:
        try:
            with _memory(bench, size) as memory:
                _race(bench, memory, size, winners)
        except PhysicalMemoryExhaustion as error:
            bench.missing(f"access to {size} bytes", str(error))
    if winners:
        bench.report.sentences.append(sentence(winners))


@contextmanager
def _memory(bench: Bench, size: int) -> Iterator[Memory]:
    _, plain = bench.kernel()
    _, keeping = bench.kernel(lazy_unmap=KEPT)
    with plain.map(size) as unmapped, keeping.map(size) as kept, plain.map(size, huge=True) as huge:
        memory = {"plain": (plain, unmapped), "kept": (keeping, kept)}
        if huge.huge < align_up(size, HUGE_SIZE):
            bench.missing("mirror huge", f"of {words.size(size)} Linux gave {words.size(huge.huge)} in huge pages")
        else:
            memory["huge"] = (plain, huge)
        for _, buffer in memory.values():
            with memoryview(buffer) as view:
                view[:] = bytes(len(view))
        yield memory


def _race(bench: Bench, memory: Memory, size: int, winners: dict[str, list[tuple[int, str]]]) -> None:
    for work in (*WORKS, PAGES):
        if (work == "none" and size not in (4 << 10, 1 << 20)) or (work == PAGES and size != PAGES_SIZE):
            continue
        bench.say(f"access: {WORKS.get(work, 'a byte in every page')}, {size} bytes")
        race = bench.race("access", _contenders(bench, memory, size, work), size, work)
        ours = [way for way in WAYS if way.name in race and way.name != "copy of the words"]
        if work not in ("none", PAGES) and ours:
            winners.setdefault(work, []).append((size, min(ours, key=lambda way: race.time(way.name).median).words))


def _contenders(bench: Bench, memory: Memory, size: int, work: str) -> list[Contender]:
    """Each with its floor right before it."""

    def reach(where: str, how: str) -> Batch:
        me, buffer = memory[where]
        return lambda count: int(me.call("bench_reach", buffer, how, work, count))

    batches = {"mirror": reach("plain", "mirror"), "mirror kept": reach("kept", "mirror")}
    if work != "none":
        batches["mirror populated"] = reach("plain", "populate")
    if "huge" in memory:
        batches["mirror huge"] = reach("huge", "mirror")
    if work != PAGES:
        batches["copy"] = reach("plain", "copy")
        batches["process_vm_readv"] = bench.peer("vm_readv").batch("access", size, after=(work,))
        batches["pipe"] = bench.peer("pipe").batch("access", size, after=(work,))
    if work == "touch" and size > PAGE_SIZE:
        batches["copy of the words"] = reach("plain", "words")
    found: dict[str, Contender] = {}
    for name, _, floor in WAYS:
        if name in batches:
            operation, *how = floor.split()
            twin = Contender(f"C {floor}", bench.floor.batch(operation, size, after=(work, *how)))
            found.setdefault(twin.name, twin)
            found[name] = Contender(name, batches[name], twin.name)
    return list(found.values())


def sentence(winners: dict[str, list[tuple[int, str]]]) -> str:
    """The one sentence for the reader: which way, up to which size, on this machine."""
    parts = []
    for work, by_size in winners.items():
        runs = [(way, [size for size, _ in run]) for way, run in groupby(by_size, key=lambda item: item[1])]
        said = [
            f"{way}{f' up to {words.size(sizes[-1])}' if at < len(runs) - 1 else ' beyond' if at else ''}"
            for at, (way, sizes) in enumerate(runs)
        ]
        parts.append(f"to {WORKS[work]}, take {', '.join(said)}")
    return f"On this machine: {'; '.join(parts)}."
