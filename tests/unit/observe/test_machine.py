"""Processes that share memory, as a snapshot: drawn as a kernel and its users are."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree

from conftest import PAGE

from realmap import u_r, u_rw
from realmap.host.shared_segments import ANONYMOUS, MEMFD, POSIX, Machine, Segment, Shown
from realmap.observe.machine import snapshot
from realmap.observe.picture import Numbers, draw
from realmap.observe.svg import svg

ME, OTHER, THIRD = os.getpid(), 400_000_001, 400_000_002


def segment(kind: str, inode: int, *maps: Shown, device: int = 5, opened: dict[int, int] | None = None) -> Segment:
    return Segment(kind, f"name{inode}", device, inode, 4 * PAGE, PAGE, True, maps=list(maps), opened=opened or {})


def at(pid: int, page: int, pages: int = 4, offset: int = 0, perms: str = "rw-s") -> Shown:
    return Shown(pid, page * PAGE, (page + pages) * PAGE, offset * PAGE, perms)


def machine() -> Machine:
    return Machine(
        1.5, [], [
            segment(POSIX, 7, at(ME, 10), at(OTHER, 20, 1, 3, "r--s"), opened={ME: 2}),
            segment(MEMFD, 7, at(ME, 30), device=1),  # the same inode as above, of another file system
            segment(ANONYMOUS, 9, at(THIRD, 10), at(THIRD, 20), device=1),  # one process alone has it
            segment(POSIX, 8, opened={ME: 1, OTHER: 1}),  # nobody maps it
        ], 3, 0,
    )  # fmt: skip


def test_who_shares_is_shown_with_all_that_it_maps() -> None:
    found = snapshot(machine())
    assert [process.pid for process in found.processes] == [ME, OTHER]
    mine, other = ([(each.address, each.type, each.rights) for each in process.mappings] for process in found.processes)
    assert mine == [(10 * PAGE, "POSIX", u_rw), (30 * PAGE, "MEMFD", u_rw)]
    assert other == [(20 * PAGE, "POSIX", u_r)]
    assert len({frames.serial for frames in found.frames}) == len(found.frames) == 2
    shared = next(frames for frames in found.frames if frames.refcount == 4)
    assert shared.segments[0].name == "posix name7"
    assert [holder.split()[0] for holder in shared.holders] == [str(ME), str(OTHER)]
    assert (found.stats["mappings"], found.stats["segments"], found.stats["descriptors"]) == (3, 2, 2)


def test_a_segment_is_lit_above_and_in_everybody_who_maps_it() -> None:
    found = draw(snapshot(machine()), 60)
    (above,) = found.kernel.lights
    lit = [[(light.number, light.address, light.bytes) for light in lane.lights] for lane in found.users]
    assert lit == [[(above.number, 10 * PAGE, 4 * PAGE)], [(above.number, 20 * PAGE, PAGE)]]


def test_it_keeps_its_number_whoever_comes_and_goes() -> None:
    numbers, before = Numbers(), machine()
    (light,) = draw(snapshot(before), 60, numbers=numbers).kernel.lights
    before.segments.insert(0, segment(POSIX, 3, at(OTHER, 50), at(THIRD, 50)))
    after = draw(snapshot(before), 60, numbers=numbers)
    assert [found.number for found in after.kernel.lights if found.address == light.address] == [light.number]
    assert len(after.kernel.lights) == 2


def test_as_svg() -> None:
    text = svg(snapshot(machine()), programs={ME: "me"})
    texts = [each.text or "" for each in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    for said in ("realmap: this machine", "Shared by several", f"me {ME}", "a segment, and who maps it", "MEMFD"):
        assert said in texts
    assert not any("mirror" in said or "Kernel" in said for said in texts)
    nobody = svg(snapshot(Machine(1.5, [], [], 1, 0)))
    assert "no two share memory" in nobody
