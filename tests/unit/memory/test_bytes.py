"""One suite over everything that shows bytes: Buffer, CrossProcessMapping, UserspacePtr."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import PAGE

import realmap
from realmap import AccessDenied, InvalidSize
from realmap.memory import USER_LAND, CrossProcessMapping, KernelMemory, ProcessMemory, byte_access
from realmap.memory.userspace_ptr import point_at
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
                (process,) = local.books.processes
                mapping = process.memory.query_memory(buffer.address)
                return point_at([mapping], buffer.address, SIZE, rights=k_r if read_only else k_rw)
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
    for index in ("1", None, 1.5, ..., (), (1,), slice("1", None)):
        with pytest.raises(TypeError):
            some[index]
        with pytest.raises(TypeError):
            some[index] = 1
        with pytest.raises(TypeError):
            del some[index]
    for each in (slice(None, None, 0), slice(5, 6, 0)):
        with pytest.raises(ValueError):
            some[each]
    for index in (1 << 70, -1 << 70):
        with pytest.raises(IndexError):
            some[index]
    for value in ("abc", 5, None):
        with pytest.raises(TypeError):
            some[0:3] = value
    for value in (256, -1, 1 << 70, Asked(lambda: 256)):
        with pytest.raises(ValueError):
            some[0] = value
    for value in ("a", b"a", 1.5, None):
        with pytest.raises(TypeError):
            some[0] = value
    assert bytes(some) == CONTENT


class Asked:
    """A number that does something when it is asked for."""

    def __init__(self, answer: Callable[[], int]) -> None:
        self.answer = answer

    def __index__(self) -> int:
        return self.answer()


def test_iteration(make: Make) -> None:
    some = make()
    assert list(some) == list(CONTENT)
    assert list(reversed(some)) == list(reversed(CONTENT))
    first, *_, last = some
    assert (first, last) == (CONTENT[0], CONTENT[-1])


def test_containment(make: Make) -> None:
    some = make()
    assert 250 in some and 251 not in some and np.int64(250) in some
    assert b"\x01\x02" in some and b"\x02\x01" not in some and b"" in some
    assert CONTENT in some and CONTENT + b"\0" not in some and bytearray(CONTENT[-9:]) in some
    assert np.frombuffer(CONTENT[5:8], "u1") in some
    for value, error in (("a", TypeError), (None, TypeError), (1.5, TypeError), (256, ValueError), (-1, ValueError)):
        with pytest.raises(error):
            value in some  # noqa: B015


def test_containment_over_the_parts_that_are_searched(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_access, "STEP", 64)
    some = make()
    some[:] = bytes(SIZE)
    for at in (0, 61, 62, 63, 64, SIZE - 3):
        some[at : at + 3] = b"abc"
        assert b"abc" in some and 99 in some and b"abcd" not in some
        some[at : at + 3] = bytes(3)
    assert b"c" not in some


def test_comparison(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    some, other = make(), make()
    for same in (CONTENT, bytearray(CONTENT), memoryview(CONTENT), other):
        assert some == same and same == some and not some != same
    assert some == np.frombuffer(CONTENT, "u1")
    for another in (CONTENT[:-1], CONTENT + b"a", b"", "text", None, 5, memoryview(CONTENT)[::-1]):
        assert some != another and another != some
    monkeypatch.setattr(byte_access, "STEP", 64)
    for at in (0, 63, 64, SIZE - 1):
        some[at] ^= 1
        assert some != CONTENT and some != bytes(CONTENT[:at])
        some[at] ^= 1
    assert some == CONTENT
    with pytest.raises(TypeError, match="unhashable"):
        hash(some)


def test_comparison_of_what_is_unmapped(make: Make) -> None:
    some, other = make(), make()
    some.unmap() if isinstance(some, realmap.Buffer) else some.drop()
    assert some == some and some in [other, some]
    assert some != other and other != some and some != CONTENT


def test_as_a_bytearray(make: Make) -> None:
    """Any index and any slice, read and written: as a bytearray of the same bytes whose length never changes."""
    some, model = make(), bytearray(CONTENT)
    chance = random.Random(SIZE)
    for _ in range(2000):
        first, stop = (chance.choice([None, chance.randint(-SIZE - 3, SIZE + 3)]) for _ in range(2))
        part = slice(first, stop, chance.choice([None, 1, 2, 5, -1, -3, 1 << 70]))
        assert some[part] == model[part]
        count = len(model[part])
        source = memoryview(chance.randbytes(count * 2))
        some[part] = model[part] = chance.choice([source[:count], source[::2], source[::-2], bytes(source[count:])])
        index = chance.randrange(-SIZE, SIZE)
        some[index] = model[index] = chance.randrange(256)
        assert some[index] == model[index]
        assert bytes(some) == model


def test_bytes_of_its_own_that_overlap(make: Make) -> None:
    for target, source in [
        (slice(3, 103), slice(0, 100)), (slice(0, 100), slice(3, 103)), (slice(0, 100), slice(200, 0, -2)),
        (slice(0, 300, 3), slice(50, 150)), (slice(None), slice(None)), (slice(None), slice(None, None, -1)),
    ]:  # fmt: skip
        some, model = make(), bytearray(CONTENT)
        some[target] = memoryview(some)[source]
        model[target] = bytes(model)[source]
        assert bytes(some) == model


def test_what_lies_apart_is_taken_byte_by_byte(make: Make) -> None:
    some = make()
    some[:2] = np.frombuffer(b"aXbX", "u1")[::2]
    assert some[:3] == b"ab" + CONTENT[2:3]
    some[:4] = np.frombuffer(b"abcd", "u1").reshape(2, 2)
    with pytest.raises(TypeError, match="row"):
        some[:4] = np.frombuffer(b"aaXXbbXX", "u2")[::2]
    with pytest.raises(InvalidSize):
        some[:4] = np.frombuffer(b"aaXX", "u2")[::2]
    assert some[:5] == b"abcd" + CONTENT[4:5]


def test_what_an_index_does_meanwhile(make: Make) -> None:
    """Python code that runs within an access cannot take the memory away under it."""
    some = make()
    end = some.unmap if isinstance(some, realmap.Buffer) else some.drop
    tried: list[str] = []

    def index() -> int:
        with pytest.raises(BufferError, match="still live") as refused:
            end()
        tried.append(str(refused.value))
        return 1

    asked = Asked(index)
    assert (some[asked], some[asked:], some[:asked]) == (1, CONTENT[1:], CONTENT[:1])
    some[asked] = asked
    some[asked:3] = b"ab"
    assert some[:4] == b"\x00ab\x03"
    assert len(tried) == 6 and some.exports == 0
    for use in (lambda: some[Asked(lambda: 1 // 0)], lambda: some.__setitem__(0, Asked(lambda: 1 // 0))):
        with pytest.raises(ZeroDivisionError):
            use()
    assert some.exports == 0
    end()


def test_a_fork_within_an_index(make: Make) -> None:
    """What the child has not inherited it is not shown, nor does it touch it."""
    some, pid = make(), -1

    def fork() -> int:
        nonlocal pid
        pid = os.fork()
        return 1

    try:
        found: Any = some[Asked(fork)]
    except BufferError as error:
        found = str(error)
    if not pid:
        inherited = found == 1 and some.alive
        os._exit(0 if inherited or (not some.alive and "unmapped" in str(found)) else 1)
    assert found == 1
    assert os.waitpid(pid, 0)[1] == 0


def test_read_only(make: Make) -> None:
    some = make(read_only=True)
    assert memoryview(some).readonly
    assert not np.asarray(some).flags.writeable
    with pytest.raises(AccessDenied, match="read-only"):
        some[0] = 1
    with pytest.raises(AccessDenied):
        some[0:2] = b"ab"
    with pytest.raises(AccessDenied):
        some["nonsense"] = object()
    assert some.exports == 0


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


def test_much(local: realmap.Kernel) -> None:
    """Copies that are made without the GIL."""
    size = (3 << 20) + 5
    content = os.urandom(size)
    with realmap.connect(local.path) as me, me.map(size) as some:
        some[:] = content
        assert some[:] == content
        assert some[::-1] == content[::-1]
        some[1:] = memoryview(some)[:-1]
        assert some[:] == content[:1] + content[:-1]
        stop = threading.Event()
        refused = []

        def unmap() -> None:
            while not stop.is_set():
                try:
                    some.unmap()
                except BufferError:
                    refused.append(1)

        with memoryview(some):  # it stays; the copies' own exports are counted beside it
            thread = threading.Thread(target=unmap)
            thread.start()
            try:
                for _ in range(20):
                    assert some[:] == content[:1] + content[:-1]
            finally:
                stop.set()
                thread.join()
            assert some.exports == 1
        assert refused


def test_rights_that_allow_neither(local: realmap.Kernel) -> None:
    with realmap.connect(local.path) as me, me.map(PAGE, rights=realmap.memory.MappingAccessRights(12)) as some:
        for use in (lambda: some[0], lambda: memoryview(some), lambda: some[:]):
            with pytest.raises(BufferError, match="rights"):
                use()
