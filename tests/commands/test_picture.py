"""The drawing of the address space: as data, as SVG, and as a command."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import msgspec
import pytest
import syscalls
from command_line import command_line
from conftest import BOUND, PAGE, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import realmap
from realmap.memory import KERNEL_LAND, LENT_LAND, USER_LAND
from realmap.observe import words
from realmap.observe.picture import KEPT, LENT, MIRROR, WINDOW, Numbers, draw, room, weight
from realmap.observe.snapshot import FORM, Snapshot
from realmap.observe.svg import svg
from realmap.wire.records import (
    KeptInfo,
    LentInfo,
    LimitsInfo,
    MappingInfo,
    MirrorInfo,
    PartInfo,
    ProcessInfo,
    SeatInfo,
)

STATS = {"mappings": 0, "segments": 0, "bytes": 0, "calls": 0, "running": 0, "kept_windows": 0, "mirrors": 0}


def books(
    processes: list[list[MappingInfo]], mirrors: tuple[MirrorInfo, ...] = (), kept: tuple[KeptInfo, ...] = ()
) -> Snapshot:
    """A snapshot with these mappings and mirrors."""
    found = [ProcessInfo(at + 1, 1000 + at, 0, 0, 0, None, mappings, []) for at, mappings in enumerate(processes)]
    land = (KERNEL_LAND.start, KERNEL_LAND.length)
    limits = LimitsInfo(1, 1, 1, 1, 1, 1, None, None, None, KERNEL_LAND.length, 0)
    return Snapshot(
        FORM, 1, "/k.sock", True, 0.0, land, [], limits, dict(STATS), [], [],
        found, [], [], [], list(mirrors), list(kept), [],
    )  # fmt: skip


def mapping(
    page: int, pages: int = 1, frames: int | None = None, phys_offset: int = 0, type: str = "HEAP"
) -> MappingInfo:
    return MappingInfo(USER_LAND.start + page * PAGE, pages * PAGE, type, 11, phys_offset, frames)


def mirror(page: int, *parts: tuple[int, int, int]) -> MirrorInfo:
    """Of (frames, offset, length) in pages."""
    span = sum(part[2] for part in parts) * PAGE
    base = KERNEL_LAND.start + page * PAGE
    found = [PartInfo(frames, offset * PAGE, length * PAGE) for frames, offset, length in parts]
    return MirrorInfo(base, span, base, span, 0, 1, found)


def test_lengths_are_logarithmic_and_order_is_kept() -> None:
    assert weight(1) == weight(PAGE) == 3
    assert weight(2 * PAGE) == 4
    assert weight(1024 * PAGE) == 13
    blocks = draw(books([[mapping(0), mapping(5, 16), mapping(1 << 30)]]), 60).users[0].blocks
    assert [(block.left, block.width) for block in blocks] == [(0, 3), (4, 7), (12, 3)]
    assert [block.count for block in blocks] == [1, 1, 1]


def test_neighbours_touch_and_gaps_are_one_cell() -> None:
    blocks = draw(books([[mapping(0), mapping(1), mapping(3)]]), 60).users[0].blocks
    assert [(block.left, block.width) for block in blocks] == [(0, 3), (3, 3), (7, 3)]


def test_what_falls_into_one_cell_is_one_block_with_a_count() -> None:
    lane = draw(books([[mapping(2 * at) for at in range(10_000)]]), 50).users[0]
    assert len(lane.blocks) == 50
    assert sum(block.count for block in lane.blocks) == lane.ranges == 10_000
    assert sum(block.bytes for block in lane.blocks) == lane.bytes == 10_000 * PAGE
    assert all(block.width == 1 for block in lane.blocks)


def test_a_mirror_is_lit_on_both_ends_by_one_number() -> None:
    """A mirror of pages 4 to 6 of frames that two processes map, one of them from page 2 on."""
    first = [mapping(0), mapping(10, 8, frames=7)]
    second = [mapping(3, 4, frames=7, phys_offset=2 * PAGE), mapping(20, 8, frames=8)]
    picture = draw(books([first, second], (mirror(1, (7, 4, 2)), mirror(9, (9, 0, 1)))), 80)
    assert [block.kind for block in picture.kernel.blocks] == [MIRROR, MIRROR]
    assert [light.number for light in picture.kernel.lights] == [1, 2]
    (one,), (two,) = (lane.lights for lane in picture.users)
    assert (one.number, one.address, one.bytes) == (1, USER_LAND.start + 14 * PAGE, 2 * PAGE)
    assert (two.number, two.address, two.bytes) == (1, USER_LAND.start + 5 * PAGE, 2 * PAGE)
    block = picture.users[0].blocks[1]
    assert (one.left, one.width) == (block.left + 3, 2)  # [4, 6) of 8 pages, of 6 cells


def test_a_mirror_across_mappings_is_lit_on_each() -> None:
    both = [mapping(0, 4, frames=1), mapping(4, 4, frames=2)]
    picture = draw(books([both], (mirror(0, (1, 3, 1), (2, 0, 2)),)), 80)
    assert [(light.number, light.bytes) for light in picture.users[0].lights] == [(1, PAGE), (1, 2 * PAGE)]


def test_kept_windows_are_blocks_without_light() -> None:
    kept = KeptInfo(KERNEL_LAND.start + 8 * PAGE, PAGE, 1, PartInfo(7, 0, PAGE))
    picture = draw(books([[mapping(0, 1, frames=7)]], (mirror(0, (7, 0, 1)),), (kept,)), 80)
    assert [block.kind for block in picture.kernel.blocks] == [MIRROR, KEPT]
    assert len(picture.kernel.lights) == len(picture.users[0].lights) == 1


def test_what_is_lent_is_lit_on_both_ends_by_one_number() -> None:
    """Two windows and a kept one in a server, of what a caller has in two mappings; and one whose call has ended."""
    caller = [mapping(0, 4, frames=1), mapping(4, 4, frames=2), mapping(10, 1, frames=3)]
    server = [mapping(0, 2, frames=4)]
    at = LENT_LAND.start
    start = USER_LAND.start + 3 * PAGE + 100
    lent = [
        LentInfo(5, 1, start, 2 * PAGE, at + 20 * PAGE + 100, 3),
        LentInfo(5, 1, USER_LAND.start + 10 * PAGE, PAGE, at, 1),
        LentInfo(5, None, 0, PAGE, at + 40 * PAGE, 1),
        LentInfo(5, None, 0, PAGE, at + 50 * PAGE, 0, True),
    ]
    seat = SeatInfo(5, 2, ["x"], 1, 0, False, 0, 0)
    taken = msgspec.structs.replace(books([caller, server], (mirror(0, (4, 0, 1)),)), seats=[seat], lent=lent)
    picture = draw(taken, 120)
    first, second = picture.users
    assert [(light.number, light.address, light.bytes, light.kind) for light in first.lights] == [
        (2, start, PAGE - 100, LENT),
        (2, USER_LAND.start + 4 * PAGE, PAGE + 100, LENT),
        (3, USER_LAND.start + 10 * PAGE, PAGE, LENT),
    ]
    assert [(light.number, light.address, light.kind) for light in second.lights] == [
        (1, USER_LAND.start, MIRROR),
        (2, at + 20 * PAGE + 100, WINDOW),
        (3, at, WINDOW),
        (4, at + 40 * PAGE, WINDOW),
    ]
    assert [block.kind for block in second.blocks] == ["HEAP", MIRROR, MIRROR, MIRROR, KEPT]
    assert (second.ranges, second.bytes) == (1, 2 * PAGE)
    drawn = svg(taken)
    assert drawn.count('class="tie"') == 4  # of the mirror, and of three parts
    assert "window of lent pages 2: 8 KiB at" in drawn and "lent pages 3: 4 KiB at" in drawn
    assert "; or a window of a service, and the pages that it was lent" in drawn
    alone = msgspec.structs.replace(taken, processes=taken.processes[:1])  # of who is not drawn nothing is lit
    assert {light.kind for light in draw(alone, 120).users[0].lights} == {LENT}
    assert svg(alone).count('class="tie"') == 0
    assert draw(taken, 120, lights=2).unlit == 2


def test_numbers_stay_with_their_mirrors() -> None:
    numbers = Numbers()
    first, second, third = mirror(0, (1, 0, 1)), mirror(5, (1, 0, 1)), mirror(2, (2, 0, 1))
    assert numbers.assign([first, second]) == [1, 2]
    assert numbers.assign([third, second]) == [1, 2]
    assert numbers.assign([first, third, second]) == [3, 1, 2]


def test_lights_are_bounded() -> None:
    shared = [mapping(2 * at, 1, frames=1) for at in range(100)]
    picture = draw(books([shared], tuple(mirror(2 * at, (1, 0, 1)) for at in range(100))), 80, lights=250)
    assert len(picture.users[0].lights) == 250
    assert picture.unlit
    assert len(picture.kernel.lights) == 100


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 1 << 20)), max_size=60),
    st.integers(1, 90),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.lists(st.tuples(st.integers(0, 59), st.integers(0, 1 << 20), st.integers(1, 1 << 20)), max_size=8),
)
def test_any_lane_is_in_order_and_inside(
    ranges: list[tuple[int, int]], cells: int, unit: float, mirrored: list[tuple[int, int, int]]
) -> None:
    ends = itertools.accumulate(gap + length for gap, length in ranges)
    mappings = [
        mapping(end - length, length, frames=at) for at, (end, (_, length)) in enumerate(zip(ends, ranges, strict=True))
    ]
    mirrors = tuple(mirror(at << 22, part) for at, part in enumerate(mirrored))
    picture = draw(books([mappings], mirrors), cells, unit=unit)
    lane = picture.users[0]
    assert sum(block.count for block in lane.blocks) == len(mappings)
    assert sum(block.bytes for block in lane.blocks) == sum(each.length for each in mappings)
    edge = 0
    for block in lane.blocks:
        assert edge <= block.left < block.left + block.width <= cells
        edge = block.left + block.width
    for light in lane.lights:
        assert any(
            block.left <= light.left < light.left + light.width <= block.left + block.width for block in lane.blocks
        )
        assert light.bytes > 0
    for block in lane.blocks:
        left, width = room(block, lane.lights)
        assert block.left <= left
        assert left + width <= block.left + block.width
        assert not any(light.left < left + width and left < light.left + light.width for light in lane.lights if width)


def test_ten_thousand_mappings_are_drawn_quickly() -> None:
    """The bound is far above what it takes (some 50 ms), and far below what would be felt."""
    many = [[mapping(2 * at, 1 + at % 9, frames=at % 50) for at in range(0, 20_000, 2)] for _ in range(1)]
    taken = books(many, tuple(mirror(2 * at, (at % 50, 0, 1)) for at in range(1000)))
    start = time.process_time()
    picture = draw(taken, 120)
    assert time.process_time() - start < 1.0
    assert picture.users[0].ranges == 10_000
    assert len(svg(taken)) < 200_000


# ---- SVG ----------------------------------------------------------------------------------


def parsed(text: str) -> ElementTree.Element:
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return root


def test_svg_is_well_formed_and_the_same_each_time() -> None:
    taken = books([[mapping(0, 4, frames=1)], []], (mirror(0, (1, 1, 2)),))
    text = svg(taken)
    assert svg(taken) == text
    root = parsed(text)
    assert root.get("role") == "img"
    title, desc = list(root)[:2]  # what it is called, and says, where it is read aloud
    assert [title.tag.split("}")[1], desc.tag.split("}")[1]] == ["title", "desc"]
    assert title.text
    assert "1 live mirror" in str(desc.text)
    paths = [element for element in root.iter() if element.tag.endswith("path")]
    assert len(paths) == 1
    assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")


@pytest.mark.parametrize("path", ["/tmp/<&>\"'.sock", "/tmp/\x1b[31m\x00\x07\udcff\u202e.sock", "/tmp/" + "x" * 500])
def test_odd_names_are_harmless_in_svg(path: str) -> None:
    text = svg(msgspec.structs.replace(books([]), path=path))
    parsed(text)
    text.encode()
    assert not any(ord(each) < 32 and each != "\n" for each in text)
    assert "\u202e" not in text


def test_svg_of_many_processes_says_what_it_left_out() -> None:
    text = svg(books([[mapping(0, 2, frames=at)] for at in range(60)], (mirror(0, (55, 0, 1)),)), lanes=10)
    assert "50 processes more" in text
    assert "pid 1055" in text  # the one that is mirrored is not left out


def test_words() -> None:
    assert [words.size(each) for each in (0, 333, 12.6, 4096, 5000, 150 << 10, 1 << 20, 3 << 39, 16 << 40)] == [
        "0 B", "333 B", "13 B", "4 KiB", "4.9 KiB", "150 KiB", "1 MiB", "1.5 TiB", "16 TiB",
    ]  # fmt: skip
    assert [words.short_size(each) for each in (333, 4096, 5000)] == ["333", "4K", "4.9K"]
    assert [words.count(each) for each in (0, 0.5, 7, 950, 12_345, 4_500_000)] == [
        "0", "0.5", "7", "950", "12.3k", "4.5M",
    ]  # fmt: skip
    assert words.harmless("a\x1b[2Jb\udc80\n") == "a\\x1b[2Jb\\udc80\\n"


# ---- the command --------------------------------------------------------------------------


def test_the_command_on_a_running_kernel(tmp_path: Path) -> None:
    with realmap.boot(syscalls=syscalls.ALL) as kernel, kernel.connect() as me, me.map(5 * PAGE) as buffer:
        me.call("keep", "held", buffer.slice(PAGE, 3333))
        done = command_line("snapshot", "--kernel", kernel.path)
        assert (done.returncode, done.stderr) == (0, "")
        totals, calls, processes = done.stdout.split("\n\n")
        for name in ("processes", "mappings", "segments", "mirrors"):
            assert re.search(rf"^{name} +1 ", totals, re.M)
        assert re.search(r"^ *1 .* keep$", calls, re.M)
        assert re.search(rf"^ *{os.getpid()} .* 1 +{5 * PAGE} ", processes, re.M)
        file = tmp_path / "now.svg"
        done = command_line("snapshot", "--kernel", kernel.path, "--json", "--svg", str(file))
        assert (done.returncode, done.stderr) == (0, "")
        assert msgspec.json.decode(done.stdout, type=Snapshot).mirrors[0].length == 3333
        assert json.loads(done.stdout)["processes"][0]["pid"] == os.getpid()
        assert "mirror 1: 4 KiB" in file.read_text()
        parsed(command_line("snapshot", "--kernel", kernel.path, "--svg", "-").stdout)
        for wrong in (["--svg", str(tmp_path / "none" / "x.svg")], ["--json", "--svg", "-"]):
            done = command_line("snapshot", "--kernel", kernel.path, *wrong)
            assert done.returncode != 0
            assert "Traceback" not in done.stderr
        me.call("read_kept", "held")


@pytest.mark.slow
def test_the_pictures_of_the_readme_can_be_made(tmp_path: Path) -> None:
    """From real runs; and those that lie there load nothing from elsewhere."""
    images = ROOT / "tools" / "images"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(images / "make.py"), "demo", "top", "lands"],
        capture_output=True, text=True, timeout=BOUND, env={**os.environ, "REALMAP_PICTURES": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    for name, word in (("demo", "RAM"), ("top", "UserLand"), ("lands", "mirror 1")):
        text = (tmp_path / f"{name}.svg").read_text()
        parsed(text)
        assert word in text
        assert len(text) < 200_000
        assert not re.search(r"url\(['\"]?http|href=['\"]http|@import", text)
        assert (images / f"{name}.svg").exists()
