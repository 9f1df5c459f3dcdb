"""An audit of very many windows takes time in proportion to them."""

from __future__ import annotations

import time

from conftest import PAGE

from realmap.memory import USER_LAND
from realmap.observe.audit import Range, _compare, mapping_ranges
from realmap.wire.records import FramesInfo, MappingInfo, SegmentInfo

COUNT = 60_000


def test_very_many_windows() -> None:
    places = [USER_LAND.start + 2 * index * PAGE for index in range(COUNT)]
    segment = SegmentInfo(7, 1, COUNT * PAGE, 0, None)
    frames = {1: FramesInfo(1, COUNT * PAGE, 1, [], [segment])}
    linux: list[Range] = [(at, at + PAGE, "rw-", 7, 0) for at in places]
    linux[COUNT // 2] = (places[COUNT // 2], places[COUNT // 2] + PAGE, "rw-", 0, 0)  # its segment was truncated
    linux[COUNT // 3] = (places[COUNT // 3], places[COUNT // 3] + PAGE, "rw-", 8, 0)  # something else is there
    began = time.process_time()
    found = [mapping_ranges(MappingInfo(at, PAGE, "HEAP", 3, 0, 1), frames, linux) for at in places]
    books = [entry for ranges, _ in found for entry in ranges]
    differences = _compare("somewhere", 0, books, linux)
    assert [zeros for _, zeros in found if zeros] == [places[COUNT // 2]]
    assert {each.address for each in differences} == {places[COUNT // 3]}
    assert len(differences) == 2
    assert time.process_time() - began < 10  # of minutes, were each held against every other
