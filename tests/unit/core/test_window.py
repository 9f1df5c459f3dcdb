"""The C core: windows at chosen addresses, and views of them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import numpy as np
import pytest
from forked import in_a_child

from realmap import _core
from realmap.host import procfs
from realmap.memory import KERNEL_LAND
from realmap.pages import PAGE_SIZE

BASE = KERNEL_LAND.start
RW = 3


class Window(_core.Window):
    __slots__ = ("__weakref__", "note")


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("test")
    os.truncate(fd, 8 * PAGE_SIZE)
    for page in range(8):
        os.pwrite(fd, bytes([page]) * PAGE_SIZE, page * PAGE_SIZE)
    yield fd
    os.close(fd)


def make(fd: int, at: int = BASE, pages: int = 1, first: int = 0, lead: int = 0, length: int | None = None) -> Window:
    span = pages * PAGE_SIZE
    return Window._map(at, RW, [(fd, first * PAGE_SIZE, span)], lead, span - lead if length is None else length, 1)


def mapped() -> list[tuple[int, int, int]]:
    return [(m.start, m.length, m.offset) for m in procfs.maps("self", BASE, KERNEL_LAND.end)]


def test_one_byte(fd: int) -> None:
    window = make(fd, first=3, lead=PAGE_SIZE - 1, length=1)
    assert (len(window), window.address, bytes(window)) == (1, BASE + PAGE_SIZE - 1, b"\x03")
    assert mapped() == [(BASE, PAGE_SIZE, 3 * PAGE_SIZE)]
    assert window._unmap() is True
    assert mapped() == []


def test_the_last_page_of_a_land(fd: int) -> None:
    window = make(fd, at=KERNEL_LAND.end - PAGE_SIZE)
    assert window.address + len(window) == KERNEL_LAND.end
    memoryview(window)[PAGE_SIZE - 1] = 9
    assert os.pread(fd, 1, PAGE_SIZE - 1) == b"\x09"


def test_unmapped_when_collected(fd: int) -> None:
    window = make(fd)
    view = memoryview(window)[3:]
    del window
    gc.collect()
    assert len(mapped()) == 1, "a view keeps it"
    view.release()
    del view
    gc.collect()
    assert mapped() == []


def test_nothing_is_ever_replaced(fd: int) -> None:
    window = make(fd, pages=2)
    for at in (BASE, BASE + PAGE_SIZE):
        with pytest.raises(FileExistsError):
            make(fd, at=at, pages=4, first=4)
    assert mapped() == [(BASE, 2 * PAGE_SIZE, 0)]
    assert bytes(window)[-1] == 1


def test_pieces_are_side_by_side_or_not_at_all(fd: int) -> None:
    size = PAGE_SIZE
    window = Window._map(BASE, RW, [(fd, 5 * size, size), (fd, 0, 2 * size), (-1, 0, size)], 7, 4 * size - 7, 1)
    assert bytes(window) == b"\x05" * (size - 7) + b"\x00" * size + b"\x01" * size + bytes(size)
    window._unmap()
    for bad in [(fd, 1, size), (9999, 0, size), (fd, 0, size + 1), (fd, 0, 0), (fd, 0)]:
        with pytest.raises((OSError, ValueError, TypeError)):
            Window._map(BASE, RW, [(fd, 0, size), bad], 0, size, 1)
        assert mapped() == []


def test_a_hole_that_is_too_small_rolls_back(fd: int) -> None:
    other = make(fd, at=BASE + 2 * PAGE_SIZE)
    with pytest.raises(FileExistsError):
        Window._map(BASE, RW, [(fd, 0, PAGE_SIZE)] * 3, 0, PAGE_SIZE, 1)
    assert mapped() == [(other.address, PAGE_SIZE, 0)]


def test_extend_goes_on_at_the_end(fd: int) -> None:
    window = make(fd, length=PAGE_SIZE)
    window._extend([(fd, 4 * PAGE_SIZE, PAGE_SIZE), (fd, 2 * PAGE_SIZE, PAGE_SIZE)])
    assert [bytes(window)[at] for at in (0, PAGE_SIZE, 2 * PAGE_SIZE)] == [0, 4, 2]
    with memoryview(window), pytest.raises(BufferError):
        window._extend([(fd, 0, PAGE_SIZE)])
    with pytest.raises(OSError, match="Bad file descriptor"):
        window._extend([(fd, 0, PAGE_SIZE), (9999, 0, PAGE_SIZE)])
    assert len(window) == 3 * PAGE_SIZE


@pytest.mark.parametrize(
    "take", [memoryview, np.asarray, lambda w: memoryview(w)[5:9], lambda w: np.asarray(w)[3:][1:]]
)
def test_an_export_keeps_it_mapped(fd: int, take: object) -> None:
    window = make(fd)
    view = take(window)  # type: ignore[operator]
    with pytest.raises(BufferError, match="still live"):
        window._unmap()
    view[0] = 77
    assert 77 in bytes(window), "it still works"
    del view
    gc.collect()
    assert window.exports == 0
    assert window._unmap() is True
    assert window._unmap() is False


def test_a_dead_window_says_so(fd: int) -> None:
    window = make(fd)
    window._unmap()
    assert not window.alive
    with pytest.raises(BufferError, match="unmapped"):
        memoryview(window)
    with pytest.raises(BufferError):
        window._extend([(fd, 0, PAGE_SIZE)])


def test_read_only_exports_are_read_only(fd: int) -> None:
    window = Window._map(BASE, 1, [(fd, 0, PAGE_SIZE)], 0, PAGE_SIZE, 1)
    assert memoryview(window).readonly
    assert not np.asarray(window).flags.writeable


@pytest.mark.parametrize(
    "numbers",
    [
        (BASE + 1, PAGE_SIZE, 0, 0, 1),
        (BASE, PAGE_SIZE + 1, 0, 0, 1),
        (BASE, 0, 0, 0, 0),
        (BASE, PAGE_SIZE, 0, 1, PAGE_SIZE),
        (BASE, PAGE_SIZE, 0, PAGE_SIZE + 1, 0),
        ((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE, 0, 0, 1),
        (BASE, PAGE_SIZE, 1 << 63, 0, 1),
    ],
)
def test_nonsense_is_refused(fd: int, numbers: tuple[int, int, int, int, int]) -> None:
    at, span, offset, lead, length = numbers
    with pytest.raises((ValueError, OSError)):
        Window._map(at, RW, [(fd, offset, span)], lead, length, 1)
    for values in ((-1,) * 6, (1 << 65,) * 6, (0.5,) * 6, ("",) * 6, ()):
        with pytest.raises((OverflowError, TypeError, ValueError)):
            Window._map(*values)  # type: ignore[arg-type]
    assert mapped() == []


def test_windows_are_only_made_by_mapping() -> None:
    for kind in (_core.Window, Window, _core.View):
        with pytest.raises(TypeError):
            kind()


def test_a_view_counts_for_every_window_it_covers(fd: int) -> None:
    first, second = make(fd, first=1), make(fd, at=BASE + PAGE_SIZE, first=5)
    view = _core.View._over((first, second), BASE + PAGE_SIZE - 2, 4, 1)
    assert bytes(view) == b"\x01\x01\x05\x05"
    with memoryview(view) as export:
        export[1:3] = b"xy"
        assert (first.exports, second.exports, view.exports) == (1, 1, 1)
        for window in (first, second):
            with pytest.raises(BufferError):
                window._unmap()
        with pytest.raises(BufferError):
            view._drop()
    second._unmap()
    assert not view.alive
    with pytest.raises(BufferError):
        memoryview(view)


def test_a_view_lies_inside_its_windows(fd: int) -> None:
    first, apart = make(fd), make(fd, at=BASE + 2 * PAGE_SIZE)
    for windows, start, length in [
        ((first,), BASE - 1, 1),
        ((first,), BASE, PAGE_SIZE + 1),
        ((first,), BASE + PAGE_SIZE + 1, 0),
        ((first, apart), BASE, 1),
        ((apart, first), BASE, 1),
    ]:
        with pytest.raises(ValueError, match=r"view|windows"):
            _core.View._over(windows, start, length, 1)
    for nothing in ((), (3,), [first]):
        with pytest.raises(TypeError):
            _core.View._over(nothing, BASE, 1, 1)  # type: ignore[arg-type]


def test_a_forked_child_has_lost_a_window_it_does_not_inherit(fd: int) -> None:
    kept = make(fd)
    lost = Window._map(BASE + 4 * PAGE_SIZE, RW, [(fd, 0, PAGE_SIZE)], 0, PAGE_SIZE, 0)

    def work() -> None:
        assert kept.alive
        assert bytes(kept)[0] == 0
        assert not lost.alive
        assert lost._unmap() is False
        with pytest.raises(BufferError):
            memoryview(lost)

    in_a_child(work)
    assert lost.alive
