"""`Mapping`: always valid once it exists."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
from conftest import PAGE

import realmap
from realmap.errors import InvalidAddress, InvalidHandle, InvalidRights, InvalidSize, WrongMappingFramesForType
from realmap.memory import FrameAllocator, Mapping, MemoryType, OwnedFrames
from realmap.rights import k_rw, u_rw

AT = 0x2000_0000_0000
HEAP = MemoryType.HEAP


def make(address: Any = AT, length: Any = PAGE, offset: Any = 0, type: Any = HEAP, rights: Any = u_rw) -> Mapping:
    return Mapping(address, FrameAllocator().allocate(4 * PAGE), offset, length, type, rights)


def test_a_mapping_holds_one_reference_until_it_is_released(frames: FrameAllocator) -> None:
    shared = frames.allocate(4 * PAGE)
    one = Mapping(AT, shared, 0, PAGE, HEAP, u_rw, owner="of somebody")
    two = Mapping(AT, shared, 3 * PAGE, PAGE, HEAP, u_rw)
    assert shared.refcount == 2
    assert f"mapping {AT:#x} of somebody" in shared.holders()
    one.release()
    one.release()
    assert (shared.refcount, one.released, two.released) == (1, True, False)
    del two
    gc.collect()
    assert shared.freed
    with pytest.raises(InvalidHandle):
        Mapping(AT, shared, 0, PAGE, HEAP, u_rw)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_of_several_any_may_give_up_its_reference_first(frames: FrameAllocator, order: tuple[int, ...]) -> None:
    shared = frames.allocate(PAGE)
    mappings = [Mapping(AT + each * PAGE, shared, 0, PAGE, HEAP, u_rw, owner="x") for each in order]
    shared.hold(order, "somebody else")
    left = {f"mapping {AT + each * PAGE:#x} x" for each in order}
    for mapping in sorted(mappings, key=lambda each: each.address):
        assert set(shared.holders()) == left | {"somebody else"}
        assert shared.refcount == len(left) + 1
        mapping.release()
        left.remove(f"mapping {mapping.address:#x} x")
    assert (shared.holders(), shared.freed) == (["somebody else"], False)
    shared.let_go(order)
    assert shared.freed


def test_a_pinned_mapping_is_released_at_the_last_unpin(frames: FrameAllocator) -> None:
    shared = frames.allocate(PAGE)
    mapping = Mapping(AT, shared, 0, PAGE, HEAP, u_rw)
    mapping.pin()
    mapping.pin()
    mapping.release()
    mapping.unpin()
    assert shared.refcount == 1
    mapping.unpin()
    assert shared.freed


@pytest.mark.parametrize("address", [1, PAGE - 1, AT + 8, -PAGE, 1 << 64])
def test_address_unaligned_or_no_address(address: int) -> None:
    with pytest.raises(InvalidAddress) as caught:
        make(address=address)
    assert caught.value.address == address


@pytest.mark.parametrize("offset", [1, PAGE + 1, -PAGE, 1 << 64])
def test_offset_unaligned_or_no_offset(offset: int) -> None:
    with pytest.raises(InvalidAddress):
        make(offset=offset)


@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE + 1, -PAGE, 1 << 64, 0])
def test_length_unaligned_zero_or_no_length(length: int) -> None:
    with pytest.raises(InvalidSize) as caught:
        make(length=length)
    assert caught.value.size == length


def test_address_and_length_overflow() -> None:
    make(address=(1 << 64) - PAGE).release()  # its last byte is the last of the address space
    with pytest.raises(InvalidAddress, match="overflows"):
        make(address=(1 << 64) - PAGE, length=2 * PAGE)


def test_offset_and_length_within_the_frames_threshold() -> None:
    assert make(offset=3 * PAGE).phys_offset == 3 * PAGE
    with pytest.raises(InvalidSize, match=str(PAGE)):
        make(offset=3 * PAGE, length=2 * PAGE)
    with pytest.raises(InvalidSize):
        make(offset=4 * PAGE)
    with pytest.raises(InvalidAddress, match="beyond"):
        make(offset=5 * PAGE)


@pytest.mark.parametrize("kind", list(MemoryType))
def test_frames_are_those_of_the_type(kind: MemoryType, frames: FrameAllocator) -> None:
    shared, owned = frames.allocate(PAGE), OwnedFrames(PAGE)
    right = shared if kind.is_counted else owned if kind.has_frames else None
    mapping = Mapping(AT, right, 0, PAGE, kind, u_rw)
    assert mapping.state.type is kind
    for wrong in (shared, owned, None):
        if wrong is not right:
            with pytest.raises(WrongMappingFramesForType, match=kind.name) as caught:
                Mapping(AT, wrong, 0, PAGE, kind, u_rw)
            assert caught.value.type is kind
    assert shared.refcount == (1 if right is shared else 0)
    mapping.release()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"address": 1.0}, TypeError),
        ({"length": "4096"}, TypeError),
        ({"offset": None}, TypeError),
        ({"type": 22}, TypeError),
        ({"type": "HEAP"}, TypeError),
        ({"rights": 64}, InvalidRights),
        ({"rights": "rw"}, TypeError),
    ],
)
def test_what_is_no_number_type_or_right(change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        make(**change)


def test_what_is_no_frames() -> None:
    with pytest.raises(TypeError, match="frames"):
        Mapping(AT, b"frames", 0, PAGE, HEAP, u_rw)  # type: ignore[arg-type]


def test_what_it_says_of_itself() -> None:
    mapping = make(offset=PAGE, length=2 * PAGE, rights=k_rw)
    assert (mapping.end, mapping.offset) == (AT + 2 * PAGE, PAGE)
    assert "HEAP k_rw" in repr(mapping)
    mapping.release()
    assert "released" in repr(mapping)
    assert realmap.MemoryType is MemoryType
