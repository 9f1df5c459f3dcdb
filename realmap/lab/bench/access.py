"""Which way of reaching N bytes of another process is the fastest here: by size, and by what is done with them."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

from realmap.errors import PhysicalMemoryExhaustion
from realmap.lab.bench.measure import Contender
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
    floor: tuple[object, ...]


#: In this order in every table.
WAYS = [
    Way("mirror", "mirror()", ("map", "plain")),
    Way("mirror populated", "mirror(populate=True)", ("map", "populate")),
    Way("mirror kept", "a kept mirror", ("own",)),
    Way("mirror huge", "a mirror of huge frames", ("map", "huge")),
    Way("copy", "copy_in/copy_out", ("pread",)),
    Way("copy of the words", "copy_in of just the words", ("pread",)),
    Way("process_vm_readv", "process_vm_readv", ("readv",)),
    Way("pipe", "a pipe", ("pipe",)),
]


class Memory(NamedTuple):
    """The buffers of one size: of a kernel that unmaps, of one that keeps, and in huge pages, where there are any."""

    plain: tuple[Process, Buffer]
    kept: tuple[Process, Buffer]
    huge: tuple[Process, Buffer] | None


def measure(bench: Bench) -> None:
    winners: dict[str, list[tuple[int, str]]] = {}
    for size in QUICK_SIZES if bench.quick else SIZES:
        try:
            memory = _memory(bench, size)
        except PhysicalMemoryExhaustion as error:
            bench.missing(f"access to {size} bytes", str(error))
            continue
        for work in (*WORKS, PAGES):
            if (work == "none" and size not in (4 << 10, 1 << 20)) or (work == PAGES and size != PAGES_SIZE):
                continue
            bench.say(f"access: {WORKS.get(work, 'a byte in every page')}, {size} bytes")
            race = bench.race("access", _contenders(bench, memory, size, work), size, work)
            ours = [way for way in WAYS if way.name in race and way.name != "copy of the words"]
            if work not in ("none", PAGES) and ours:
                winners.setdefault(work, []).append((size, min(ours, key=lambda way: race.time(way.name).median).words))
        for _, buffer in (memory.plain, memory.kept, *([memory.huge] if memory.huge else [])):
            buffer.unmap()
    if winners:
        bench.report.sentences.append(sentence(winners))


def _memory(bench: Bench, size: int) -> Memory:
    _, plain = bench.kernel()
    _, kept = bench.kernel(lazy_unmap=KEPT)
    buffers: list[Buffer] = []
    try:
        buffers += [plain.map(size), kept.map(size)]
        huge = plain.map(size, huge=True)
        buffers.append(huge)
        if huge.huge < align_up(size, HUGE_SIZE):
            bench.missing("mirror huge", f"of {words.size(size)} Linux gave {words.size(huge.huge)} in huge pages")
            buffers.pop().unmap()
    except BaseException:
        for buffer in buffers:
            buffer.unmap()
        raise
    for buffer in buffers:
        with memoryview(buffer) as view:
            view[:] = bytes(len(view))
    return Memory((plain, buffers[0]), (kept, buffers[1]), (plain, buffers[2]) if len(buffers) > 2 else None)


def _contenders(bench: Bench, memory: Memory, size: int, work: str) -> list[Contender]:
    """Each with its floor right before it."""
    found: list[Contender] = []

    def add(way: Way, contender: Contender) -> None:
        twin = f"C {' '.join(map(str, way.floor))}"
        if not any(known.name == twin for known in found):
            operation, *how = way.floor
            found.append(Contender(twin, bench.floor.batch(str(operation), size, after=(work, *how))))
        found.append(contender)

    def ours(way: Way, where: tuple[Process, Buffer], how: str) -> None:
        me, buffer = where
        add(
            way,
            Contender(
                way.name,
                lambda count: int(me.call("bench_reach", buffer, how, work, count)),
                f"C {' '.join(map(str, way.floor))}",
            ),
        )

    mirror, populated, kept, huge, copy, words, readv, pipe = WAYS
    ours(mirror, memory.plain, "mirror")
    if work != "none":
        ours(populated, memory.plain, "populate")
    ours(kept, memory.kept, "mirror")
    if memory.huge is not None:
        ours(huge, memory.huge, "mirror")
    if work == PAGES:
        return found
    ours(copy, memory.plain, "copy")
    if work == "touch" and size > PAGE_SIZE:
        ours(words, memory.plain, "words")
    add(readv, Contender(readv.name, bench.peer("vm_readv").batch("access", size, after=(work,)), "C readv"))
    add(pipe, Contender(pipe.name, bench.peer("pipe").batch("access", size, after=(work,)), "C pipe"))
    return found


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
