"""One suite over everything that shows bytes: Buffer, CrossProcessMapping, UserspacePtr."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import PAGE

import realmap
from realmap import AccessDenied, InvalidSize
from realmap.memory import USER_LAND, CrossProcessMapping, KernelMemory, ProcessMemory
from realmap.memory.userspace_ptr import UserspacePtr
from realmap.rights import MemoryType, k_r, k_rw, u_rw

SIZE = 3333
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def local() -> Iterator[realmap.Kernel]:
    with realmap.Kernel() as kernel:
        yield kernel


@pytest.fixture(params=["buffer", "slice", "mirror", "mirror across", "pointer"])
def make(request: pytest.FixtureRequest, local: realmap.Kernel) -> Iterator[Make]:
    """Makes SIZE bytes 0, 1, 2 … 250, 0, 1 … of each kind; and, with rights, a read-only one."""
    content = bytes(at % 251 for at in range(SIZE))
    if request.param in ("mirror", "mirror across"):
        memory, kernel = ProcessMemory(), KernelMemory()
        split = request.param == "mirror across"
        for at in range(0, 2 * PAGE, PAGE if split else 2 * PAGE):
            memory.create_regular_mapping(USER_LAND.start + at, PAGE if split else 2 * PAGE, MemoryType.HEAP, u_rw)

        def mirror(read_only: bool = False) -> CrossProcessMapping:
            with memory.mirror_mapping(USER_LAND.start + PAGE - 5, SIZE, kernel=kernel) as writable:
                memoryview(writable)[:] = content
                gc.collect()
            rights = k_r if read_only else k_rw
            return memory.mirror_mapping(USER_LAND.start + PAGE - 5, SIZE, kernel=kernel, rights=rights)

        yield mirror
        memory.release_all()
        return
    with realmap.connect(local.path) as me:

        def other(read_only: bool = False) -> Any:
            if request.param == "buffer" and read_only:
                return me.map(SIZE, rights=realmap.u_r)
            whole = me.map(SIZE + 10 if request.param == "slice" else SIZE)
            buffer = whole.slice(7, SIZE) if request.param == "slice" else whole
            buffer[:] = content
            if request.param == "slice" and read_only:
                return me.map(SIZE + 10, rights=realmap.u_r).slice(7, SIZE)
            if request.param == "pointer":
                (process,) = local.processes
                mapping = process.memory.query_memory(buffer.address)
                return UserspacePtr.over([mapping], buffer.address, SIZE, rights=k_r if read_only else k_rw)
            return buffer

        yield other


CONTENT = bytes(at % 251 for at in range(SIZE))


def test_length_address_and_bytes(make: Make) -> None:
    some = make()
    assert len(some) == SIZE
    assert bytes(some) == bytearray(some) == CONTENT
    assert np.asarray(some).ctypes.data == some.address
    assert (memoryview(some).format, memoryview(some).ndim, memoryview(some).contiguous) == ("B", 1, True)


@pytest.mark.parametrize("index", [0, 1, -1, SIZE - 1, -SIZE, np.int64(5)])
def test_an_index(make: Make, index: int) -> None:
    some = make()
    assert some[index] == CONTENT[index]
    some[index] = 200
    assert some[index] == 200
    assert sum(left != right for left, right in zip(bytes(some), CONTENT, strict=True)) <= 1


@pytest.mark.parametrize("index", [SIZE, -SIZE - 1, 1 << 62])
def test_an_index_beyond(make: Make, index: int) -> None:
    some = make()
    with pytest.raises(IndexError):
        some[index]
    with pytest.raises(IndexError):
        some[index] = 1


@pytest.mark.parametrize(
    "part",
    [
        slice(None),
        slice(3, 9),
        slice(-5, None),
        slice(None, None, 2),
        slice(9, 3, -1),
        slice(SIZE, None),
        slice(5, 1 << 70),
    ],
)
def test_a_slice_is_a_copy(make: Make, part: slice) -> None:
    some = make()
    copy = some[part]
    assert type(copy) is bytes
    assert copy == CONTENT[part]
    model = bytearray(CONTENT)
    model[part] = some[part] = bytes(len(copy))
    assert bytes(some) == model
    assert copy == CONTENT[part]


@pytest.mark.parametrize(
    "content", [b"abcdef", bytearray(b"abcdef"), memoryview(b"abcdef"), np.frombuffer(b"abcdef", "<u2")]
)
def test_a_slice_takes_what_has_bytes(make: Make, content: Any) -> None:
    some = make()
    some[10:16] = content
    assert some[9:17] == CONTENT[9:10] + b"abcdef" + CONTENT[16:17]


def test_a_slice_takes_its_own_length_only(make: Make) -> None:
    some = make()
    for content in (b"", b"ab", b"abcd", bytes(SIZE)):
        with pytest.raises(InvalidSize, match="3 bytes"):
            some[4:7] = content
    assert bytes(some) == CONTENT


def test_nonsense(make: Make) -> None:
    some = make()
    for index in ("1", None, 1.5):
        with pytest.raises(TypeError):
            some[index]
    for value in ("abc", 5, None):
        with pytest.raises(TypeError):
            some[0:3] = value
    with pytest.raises((ValueError, TypeError)):
        some[0] = 256
    assert bytes(some) == CONTENT


def test_read_only(make: Make) -> None:
    some = make(read_only=True)
    assert memoryview(some).readonly
    assert not np.asarray(some).flags.writeable
    with pytest.raises(AccessDenied, match="read-only"):
        some[0] = 1
    with pytest.raises(AccessDenied):
        some[0:2] = b"ab"


def test_end(make: Make) -> None:
    """Dead for good after its end, and no end while a view lives."""
    some = make()
    end = some.unmap if isinstance(some, realmap.Buffer) else some.drop
    view = np.asarray(some)[5:]
    with pytest.raises(BufferError, match="still live"):
        end()
    view[0] = 99
    assert some[5] == 99
    del view
    gc.collect()
    end()
    end()
    assert not some.alive
    for use in (lambda: some[0], lambda: some[0:1], lambda: memoryview(some), lambda: bytes(some)):
        with pytest.raises(BufferError):
            use()
    with pytest.raises(BufferError):
        some[0] = 1
    assert len(some) == SIZE


def test_with(make: Make) -> None:
    with make() as some:
        some[0] = 5
    assert not some.alive
    with pytest.raises(BufferError), make() as some:
        view = memoryview(some)
    view.release()


def test_what_it_says_of_itself(make: Make) -> None:
    some = make()
    assert f"{some.address:#x}, {SIZE} bytes" in repr(some)
    assert str(some.rights).endswith("rw")
