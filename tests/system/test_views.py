"""Arrays and other views of a buffer, a mirror and a pointer: no copies, and nothing is unmapped under them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import PAGE

import realmap
from realmap import InvalidSize, Process

numpy = pytest.importorskip("numpy")


@pytest.fixture
def buffer(me: Process) -> Iterator[realmap.Buffer]:
    """Two pages."""
    with me.map(2 * PAGE) as found:
        yield found


def test_an_array_is_the_memory(me: Process, buffer: realmap.Buffer) -> None:
    array = buffer.array("float64")
    assert array.shape == (2 * PAGE // 8,)
    array[3] = 1.5
    assert struct.unpack_from("=d", buffer[:], 24) == (1.5,)
    with pytest.raises(BufferError, match="view"):
        buffer.unmap()
    assert me.call("peek", buffer, 8, 24) == struct.pack("=d", 1.5)
    matrix = buffer.array("<i4", (4, 5), offset=2)
    matrix[3, 4] = 77
    assert struct.unpack_from("<i", buffer[:], 2 + 19 * 4) == (77,)
    assert buffer.array(shape=7).tolist() == list(buffer[:7])
    assert buffer.slice(10, 8).array("u8").shape == (1,)


@pytest.mark.parametrize(
    ("dtype", "shape", "order"),
    [
        ("<f4", numpy.int64(7), "C"),
        (">c16", [2, 3], "C"),
        ("u2", numpy.array([4, 5]), "F"),
        ("i8", (), "C"),
        ("f8", (2, 3, 4), "F"),
        (("f4", (2, 2)), 3, "C"),
        (("f4", (2, 3)), (4, 5), "F"),
        ([("id", "<u4"), ("at", "<f8", (3,)), ("tag", "S5"), ("when", "M8[ns]")], 9, "C"),
    ],
)
def test_arrays_are_as_numpy_makes_them(buffer: realmap.Buffer, dtype: Any, shape: Any, order: Any) -> None:
    model = numpy.ndarray(shape, dtype, numpy.zeros(len(buffer), "u1"), order=order)
    array = buffer.array(dtype, shape, order=order)
    assert (array.shape, array.strides, array.dtype) == (model.shape, model.strides, model.dtype)
    assert array.ctypes.data == buffer.address


def test_items_that_are_arrays_fill_it_by_themselves(buffer: realmap.Buffer) -> None:
    assert buffer.array(("f4", (2, 2))).shape == (2 * PAGE // 16, 2, 2)


def test_what_is_read_only_stays_so(me: Process) -> None:
    with me.map(PAGE, rights=realmap.u_r) as buffer:
        array = buffer.array("i4")
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        assert buffer.cast("i").readonly
        del array


def test_casts(buffer: realmap.Buffer) -> None:
    with buffer.cast("I") as words, buffer.cast("B", [2, PAGE]) as rows:
        words[0] = 0x01020304
        assert rows[0, 0] in (1, 4)
        assert rows.shape == (2, PAGE)
    with pytest.raises(ValueError):
        buffer.cast("nonsense")


def test_arrow(me: Process) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    with me.map(PAGE) as buffer, me.map(PAGE, rights=realmap.u_r) as read_only:
        arrow = pyarrow.py_buffer(buffer)
        assert (arrow.size, arrow.address, arrow.is_mutable) == (PAGE, buffer.address, True)
        column = pyarrow.Array.from_buffers(pyarrow.int32(), 8, [None, arrow])
        buffer.cast("i")[3] = 5
        assert column.to_pylist() == [0, 0, 0, 5, 0, 0, 0, 0]
        with pytest.raises(BufferError):
            buffer.unmap()
        assert not pyarrow.py_buffer(read_only).is_mutable
        del column, arrow


def test_torch(me: Process) -> None:
    torch = pytest.importorskip("torch", reason="torch is large: only where it is installed")
    with me.map(PAGE) as buffer:
        tensor = torch.from_dlpack(buffer)
        tensor[5] = 7
        assert buffer[5] == 7 and tensor.data_ptr() == buffer.address
        del tensor


def test_dlpack(buffer: realmap.Buffer) -> None:
    array = numpy.from_dlpack(buffer)
    array[5] = 9
    assert buffer[5] == 9
    with pytest.raises(BufferError):
        buffer.unmap()
    del array


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        (("no such type",), {}, TypeError),
        (("O",), {}, TypeError),
        (("f8", 2 * PAGE), {}, InvalidSize),
        (("f8", -1), {}, InvalidSize),
        (("f8", (2, -3)), {}, InvalidSize),
        (("f8",), {"offset": 1}, InvalidSize),
        (("f8",), {"offset": 2 * PAGE + 8}, InvalidSize),
        (("f8", 1), {"offset": 2 * PAGE - 7}, InvalidSize),
        (("f8", 1), {"offset": -8}, InvalidSize),
        (("f8", 1), {"offset": "x"}, TypeError),
        (("f8", 2.5), {}, TypeError),
        (("f8", ("a",)), {}, TypeError),
        (("f8", (2, 3)), {"order": "X"}, ValueError),
    ],
)
def test_arrays_that_cannot_be(
    buffer: realmap.Buffer, arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        buffer.array(*arguments, **options)


def test_of_an_attached_part(me: Process, buffer: realmap.Buffer) -> None:
    numbers = buffer.array("u2")
    numbers[:] = range(len(numbers))
    del numbers
    part = me.attach(me.share(buffer.slice(100, 200)))
    assert part.array("u2").tolist() == list(range(50, 150))
    part.unmap()


def test_gone_bytes_are_told(me: Process, buffer: realmap.Buffer) -> None:
    array = buffer.array()
    me.call("resize", buffer, 0)
    assert not array.any()
    assert buffer.fault == buffer.address
    with pytest.raises(realmap.MemoryFault):
        buffer.array()
    del array
