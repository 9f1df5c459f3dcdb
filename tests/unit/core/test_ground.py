"""Floor 0: errors, pages, rights."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import realmap
from realmap import errors, pages, rights
from realmap.errors import BY_CODE, InvalidAddress, InvalidRights, InvalidSize, KernelError, KernelPanic
from realmap.rights import MappingAccessRights, MemoryState, MemoryType
from realmap.wire import messages

ALL_ERRORS = sorted(BY_CODE.values(), key=lambda kind: kind.code)
PAGE = pages.PAGE_SIZE


def example(kind: type[KernelError]) -> KernelError:
    facts = {
        "address": 0x2000_0000_1000,
        "size": 4097,
        "type": MemoryType.RESERVED,
        "asked": realmap.k_rw,
        "allowed": realmap.u_r,
        "timeout": 0.5,
        "pid": 7,
        "began": True,
    }
    if kind is errors.SyscallFailed:
        return kind("sha256", "ValueError", "text", "traceback")
    return kind(*(facts.get(name, name) for name in kind.fields), why="because of a test")


def test_codes_are_stable() -> None:
    names = [kind.__name__ for kind in ALL_ERRORS]
    assert names == [
        "KernelError",
        "InvalidAddress",
        "InvalidSize",
        "InvalidMemState",
        "WrongMappingFramesForType",
        "PhysicalMemoryExhaustion",
        "VirtualMemoryExhaustion",
        "AccessDenied",
        "InvalidRights",
        "InvalidHandle",
        "UnknownSyscall",
        "SyscallFailed",
        "SyscallTimeout",
        "MemoryFault",
        "ProcessKilled",
        "KernelDied",
        "VersionMismatch",
        "LimitReached",
        "WrongArguments",
        "OwnerDied",
        "ServerDied",
    ]
    assert [kind.code for kind in ALL_ERRORS] == list(range(21))


def test_every_error_is_exported_and_in_the_tree() -> None:
    for kind in ALL_ERRORS:
        assert getattr(realmap, kind.__name__) is kind
        assert kind.__name__ in realmap.__all__
        assert kind.__name__ in (errors.__doc__ or "")
        assert kind.__doc__
    assert not issubclass(KernelPanic, KernelError)


def test_every_exported_name_is_there() -> None:
    for module in (realmap, realmap.memory):
        for name in module.__all__:
            assert getattr(module, name) is not None


@pytest.mark.parametrize(
    ("kind", "also"),
    [
        (errors.InvalidAddress, ValueError),
        (errors.InvalidSize, ValueError),
        (errors.PhysicalMemoryExhaustion, MemoryError),
        (errors.VirtualMemoryExhaustion, MemoryError),
        (errors.AccessDenied, PermissionError),
        (errors.UnknownSyscall, LookupError),
        (errors.SyscallTimeout, TimeoutError),
        (errors.KernelDied, ConnectionError),
        (errors.ServerDied, ConnectionError),
    ],
)
def test_errors_are_also_what_python_calls_them(kind: type[KernelError], also: type[Exception]) -> None:
    with pytest.raises(also):
        raise example(kind)


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_errors_travel_and_pickle_with_their_facts(kind: type[KernelError]) -> None:
    error = example(kind)
    for other in (pickle.loads(pickle.dumps(error)), messages.exception_of(messages.error_of(error))):
        assert type(other) is kind
        assert other.facts() == error.facts()
        assert str(other) == str(error)
    assert "because of a test" in str(error) or kind is errors.SyscallFailed


def test_too_many_facts_are_refused() -> None:
    with pytest.raises(TypeError):
        InvalidSize(1, 2)


# ---- pages --------------------------------------------------------------------------------


@given(st.integers(0, pages.USIZE_MAX), st.sampled_from([1, 2, PAGE, pages.HUGE_SIZE]))
def test_alignment(number: int, alignment: int) -> None:
    down, up = pages.align_down(number, alignment), pages.align_up(number, alignment)
    assert down <= number <= up
    assert down % alignment == up % alignment == 0
    assert up - down in (0, alignment)


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_numbers_beyond_64_bits(value: int) -> None:
    with pytest.raises(InvalidSize) as size:
        pages.usize(value, "length")
    assert size.value.size == value
    with pytest.raises(InvalidAddress) as address:
        pages.address_of(value)
    assert address.value.address == value


@pytest.mark.parametrize("value", [1.0, "1", None, b"1", 1j])
def test_what_is_no_integer(value: object) -> None:
    for check in (lambda v: pages.usize(v, "length"), pages.address_of):
        with pytest.raises(TypeError, match=type(value).__name__):
            check(value)


def test_integers_of_numpy_are_integers() -> None:
    assert pages.usize(np.uint64(1 << 63), "length") == 1 << 63
    assert type(pages.usize(np.int8(3), "length")) is int


def test_page_range_that_ends_at_the_last_byte() -> None:
    assert pages.page_range((1 << 64) - PAGE, PAGE) == ((1 << 64) - PAGE, PAGE)
    with pytest.raises(InvalidAddress, match="overflows"):
        pages.page_range((1 << 64) - PAGE, 2 * PAGE)


# ---- rights -------------------------------------------------------------------------------


def test_rights_and_their_shorthands() -> None:
    assert [int(right) for right in (realmap.k_r, realmap.k_w, realmap.k_rw, realmap.k_rx)] == [1, 2, 3, 5]
    assert [int(right) for right in (realmap.u_r, realmap.u_w, realmap.u_rw, realmap.u_rx)] == [9, 10, 11, 13]
    assert [str(right) for right in (realmap.u_rw, realmap.k_rx, MappingAccessRights(0))] == ["u_rw", "k_rx", "k_none"]


@pytest.mark.parametrize("value", [16, -1, 0x40, 1 << 70])
def test_rights_that_are_no_combination(value: int) -> None:
    with pytest.raises(InvalidRights, match="u_rw"):
        rights.rights_of(value)
    with pytest.raises(TypeError):
        rights.rights_of("u_rw")


def test_memory_types_are_those_of_the_seed() -> None:
    expected = """UNMAPPED no IO no NORMAL no CODE_STATIC yes CODE_MUTABLE yes HEAP yes SHARED_MEMORY yes ALIAS yes
        MODULE_CODE_STATIC yes MODULE_CODE_MUTABLE yes IPC yes STACK yes THREAD_LOCAL yes TRANSFER_MEMORY_ISOLATED yes
        TRANSFER_MEMORY yes PROCESS_MEMORY yes RESERVED no NON_SECURE_IPC yes NON_DEVICE_IPC yes KERNEL_STACK no
        CODE_READ_ONLY yes CODE_WRITABLE yes""".split()
    assert [kind.name for kind in MemoryType] == expected[::2]
    assert [kind.is_counted for kind in MemoryType] == [word == "yes" for word in expected[1::2]]
    assert [int(kind) for kind in MemoryType] == list(range(22))
    without = {kind.name for kind in MemoryType if not kind.has_frames}
    assert without == {"UNMAPPED", "RESERVED", "KERNEL_STACK"}
    for kind in MemoryType:
        assert kind.state.type is kind
        assert bool(kind.state & MemoryState.REFERENCE_COUNTED) == kind.is_counted
