"""System calls about pages, on memory of this process."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

import pytest
from conftest import PAGE

from realmap.host import paging, procfs

LENGTH = 8 * PAGE
DATA = bytes(range(251)) * (LENGTH // 251 + 1)


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("realmap-test")
    os.write(made, DATA[:LENGTH])
    yield made
    os.close(made)


@pytest.fixture
def address(fd: int) -> Iterator[int]:
    mapped = paging.map_file(fd, LENGTH, mmap.PROT_READ | mmap.PROT_WRITE)
    yield mapped
    paging.unmap(mapped, LENGTH)


def rights(address: int) -> str:
    return next(entry.perms for entry in procfs.maps("self", address, address + 1))


def locked() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmLck"))


def test_a_file_at_another_place(fd: int) -> None:
    address = paging.map_file(fd, LENGTH, offset=0)
    assert ctypes.string_at(address, LENGTH) == DATA[:LENGTH]
    moved = paging.move(address, LENGTH, 2 * PAGE)
    assert ctypes.string_at(moved, 2 * PAGE) == DATA[: 2 * PAGE]
    paging.unmap(moved, 2 * PAGE)
    assert procfs.maps("self", moved, moved + 1) == []


def test_rights_and_locks(address: int) -> None:
    paging.protect(address + PAGE, PAGE, paging.PROT_NONE)
    assert (rights(address), rights(address + PAGE)) == ("rw-s", "---s")
    paging.protect(address + PAGE, PAGE, mmap.PROT_READ)
    assert rights(address + PAGE) == "r--s"
    before = locked()
    paging.lock(address, PAGE)
    assert locked() == before + PAGE
    paging.unlock(address, PAGE)
    assert locked() == before


def test_advice(address: int) -> None:
    paging.advise(address, PAGE, paging.MADV_PAGEOUT)
    assert ctypes.string_at(address, LENGTH) == DATA[:LENGTH]
    paging.advise(address + PAGE, PAGE, mmap.MADV_REMOVE)
    assert ctypes.string_at(address, 3 * PAGE) == DATA[:PAGE] + bytes(PAGE) + DATA[2 * PAGE : 3 * PAGE]
    with pytest.raises(OSError, match="madvise") as caught:
        paging.advise(address, PAGE, 9999)
    assert caught.value.errno == errno.EINVAL


def test_advice_to_a_process(address: int) -> None:
    pidfd = os.pidfd_open(os.getpid())
    try:
        assert paging.advise_process(pidfd, address, LENGTH, paging.MADV_COLD) == LENGTH
        with pytest.raises(OSError) as caught:
            paging.advise_process(-1, address, LENGTH, paging.MADV_COLD)
        assert caught.value.errno == errno.EBADF
    finally:
        os.close(pidfd)


def test_pages_to_a_node(address: int) -> None:
    ctypes.string_at(address, PAGE)
    try:
        assert paging.move_pages(0, [address, PAGE], 0) == [0, -errno.EFAULT]
    except OSError as error:
        pytest.skip(f"needs move_pages: {error}")
