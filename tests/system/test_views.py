"""Arrays and other views of a buffer, a mirror and a pointer: no copies, and nothing is unmapped under them."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import BOUND, PAGE

import realmap
from realmap import Call, InvalidSize, Kernel, Process, UserBuffer

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


# ---- in a handler -------------------------------------------------------------------------


class Header(ctypes.Structure):
    """A layout."""

    _fields_ = (("count", ctypes.c_int32), ("total", ctypes.c_double))


@realmap.syscall
def add_one(call: Call, data: UserBuffer) -> list[int]:
    """How many mirrors there are in the block, after it, and once its array is gone."""
    with data.array("float64", (4, 5)) as values:
        values += 1
        found = [call.kernel.memory.live]
    found.append(call.kernel.memory.live)
    del values
    return [*found, call.kernel.memory.live]


@realmap.syscall
def let_go(call: Call, data: UserBuffer) -> int:
    """One whose array is gone before the block ends, by an exception."""
    try:
        with data.array("u1", rights=realmap.k_r) as values:
            assert not values.flags.writeable
            del values
            raise LookupError
    except LookupError:
        return call.kernel.memory.live


kept: Any = None


@realmap.syscall
def keep(call: Call, data: UserBuffer, how: str) -> float:
    """What lives on, or does not."""
    global kept
    kept = None
    with data.array("float64") as values:
        half = values[::2]
        if how == "a slice":
            kept = half
        elif how == "in a list":
            kept = [half]
        elif how == "a memoryview":
            kept = memoryview(values)
        elif how == "a copy":
            kept = values.copy()
        elif how == "raises":
            kept = half
            raise LookupError
        return float(values.sum())


@realmap.syscall
def keep_views(call: Call, data: UserBuffer) -> list[Any]:
    """What is said of views of a mirror, and whether it goes once they are gone."""
    said = []
    mirror = data.mirror()
    values, view = mirror.array("u1")[2:5], memoryview(mirror)[1:]
    layout = Header.from_buffer(mirror, 8)
    layout.count += 1
    try:
        mirror.drop()
    except BufferError as error:
        said.append(str(error))
    del values, view
    try:
        mirror.drop()
    except BufferError as error:
        said.append(str(error))
    del layout
    mirror.drop()
    return [*said, call.kernel.memory.live]


@pytest.fixture
def handlers() -> Iterator[Process]:
    """A user of a kernel in this process."""
    with Kernel(syscalls=[add_one, let_go, keep, keep_views]) as kernel, realmap.connect(kernel.path) as me:
        yield me


def test_an_array_in_a_handler_is_unmapped_with_the_last_that_shows_it(handlers: Process) -> None:
    with handlers.map(160) as buffer:
        assert handlers.call("add_one", buffer) == [1, 1, 0]
        assert buffer.array("float64").tolist() == [1.0] * 20
        assert handlers.call("let_go", buffer) == 0
        with pytest.raises(InvalidSize):
            handlers.call("add_one", buffer.slice(0, 100))
    with handlers.map(160, rights=realmap.u_r) as buffer, pytest.raises(realmap.AccessDenied):
        handlers.call("add_one", buffer)


def test_an_array_that_outlives_its_handler_is_told(handlers: Process) -> None:
    global kept
    with handlers.map(80) as buffer:
        for how in "nothing", "a copy":
            assert handlers.call("keep", buffer, how) == 0.0
        for how, where in (
            ("a slice", " as the global kept"),
            ("a memoryview", " as the global kept"),
            ("in a list", ""),
        ):
            with pytest.raises(realmap.SyscallFailed) as failed:
                handlers.call("keep", buffer, how)
            assert failed.value.type == "BufferError"
            assert f"lives on{where} when its handler has returned: keep a copy" in str(failed.value)
        with pytest.raises(realmap.SyscallFailed, match="LookupError"):
            handlers.call("keep", buffer, "raises")
        kept = None
        assert handlers.call("keep", buffer, "nothing") == 0.0


def test_what_keeps_memory_from_being_unmapped_is_named(handlers: Process) -> None:
    with handlers.map(100) as buffer:
        first, second, live = handlers.call("keep_views", buffer)
        assert "the ndarray values in keep_views, and the memoryview view in keep_views" in first
        assert "`del values`" in first
        assert "keep_views" not in second  # a layout of ctypes does not say what it shows
        assert live == 0
        assert Header.from_buffer(buffer, 8).count == 1
        mine = numpy.asarray(buffer.slice(5, 10))[1:]
        with pytest.raises(BufferError, match=r"the ndarray mine in test_what_keeps.*`del mine`"):
            buffer.unmap()
        del mine


def test_layouts_of_a_script_go_along_with_its_handlers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import ctypes, struct
import realmap

class Point(ctypes.LittleEndianStructure):
    _pack_ = 1
    _fields_ = [("x", ctypes.c_int16), ("y", ctypes.c_double)]

class Line(ctypes.Structure):
    _fields_ = [("a", Point), ("b", Point * 2)]
    unit = "mm"

    def text(self):
        return f"{Line.unit} {self.a.x} {self.b[1].y}"

@realmap.syscall
def move(call, data: realmap.UserBuffer):
    with data.mirror() as mirror:
        line = Line.from_buffer(mirror, 10)
        line.a.x += 1
        said = line.text()
        del line
        struct.pack_into("<h", mirror, 0, 77)
        return said, struct.unpack_from("<h", mirror, 10)[0]

with realmap.boot(syscalls=[move]) as kernel, kernel.connect() as me:
    buffer = me.map(100)
    line = Line.from_buffer(buffer, 10)
    line.a.x, line.b[1].y = 5, 2.5
    print(me.call("move", buffer), line.a.x, struct.unpack_from("<h", buffer, 0)[0], ctypes.sizeof(Line))
"""
    )
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=BOUND)
    assert said.stdout == "['mm 6 2.5', 6] 6 77 30\n", said.stderr
