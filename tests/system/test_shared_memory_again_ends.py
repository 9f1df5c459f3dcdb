"""Blocks that are made again and again: after forks, and after their maker, or its kernel, has ended."""

from __future__ import annotations

import ctypes
import os
import signal

import pytest
from blocks import end, exists, start
from conftest import BOUND, wait_until
from forked import in_a_child
from outside import LOOP, address_of, gone, limits, made, outside, say, sums
from parked import inode, parked

from realmap import KernelHandle, ambient
from realmap.shared_memory import SharedMemory

__all__ = ["limits", "outside"]


def test_a_fork_takes_its_name_along_and_no_window(outside: KernelHandle) -> None:
    address = gone(made())
    block = made(b"abcd")
    block.close()

    def work() -> None:
        found = SharedMemory(block.name)
        assert parked() == [] and bytes(found.buf[:4]) == b"abcd"
        found.close()

    in_a_child(work)
    assert parked() == []
    block.unlink()
    assert not exists(block.name)
    later = made()
    assert address_of(later) != address
    gone(later)


@pytest.mark.parametrize("closed", [False, True])
def test_after_a_fork_in_c_it_is_not_used_again(outside: KernelHandle, closed: bool) -> None:
    address = gone(made())
    block = made(b"abcd")
    segment = inode(address)
    if closed:
        block.close()
    pid = ctypes.CDLL(None).fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    gone(block) if not closed else block.unlink()
    later = made()
    assert inode(address_of(later)) != segment
    gone(later)


@pytest.mark.parametrize("held", [False, True])
def test_a_killed_maker_takes_it_along_unless_somebody_has_it(outside: KernelHandle, held: bool) -> None:
    maker = start(LOOP, "realmap", env=dict(os.environ))
    name = say(maker, "again", "it")
    block = SharedMemory(name) if held else None
    maker.kill()
    maker.communicate(timeout=BOUND)
    wait_until(lambda: outside.stats()["processes"] == 1)
    assert exists(name) is held
    if block is not None:
        assert bytes(block.buf[:4]) == b"here"
        gone(block)
    assert sums(outside)[0] == 0


def test_a_maker_that_ends_in_good_order_leaves_it(outside: KernelHandle) -> None:
    maker = start(LOOP, "realmap", env=dict(os.environ))
    name = say(maker, "again", "it")
    assert end(maker, "") == ("", "")
    wait_until(lambda: outside.stats()["processes"] == 1)
    block = SharedMemory(name)
    assert bytes(block.buf[:4]) == b"here"
    gone(block)


def test_in_its_tree_it_outlives_a_killed_maker(tree: None) -> None:
    ambient.process()
    maker = start(LOOP, "realmap", env=dict(os.environ))
    name = say(maker, "again", "it")
    maker.kill()
    maker.communicate(timeout=BOUND)
    block = SharedMemory(name)
    assert bytes(block.buf[:4]) == b"here"
    gone(block)


def test_where_the_kernel_has_been_killed_the_next_one_is_asked(tree: None) -> None:
    gone(made()), gone(made())
    kernel = ambient.process()._own_client.kernel_pid
    death = os.pidfd_open(kernel)
    signal.pidfd_send_signal(death, signal.SIGKILL)
    os.waitid(os.P_PIDFD, death, os.WEXITED | os.WNOWAIT)
    os.close(death)
    block = made(b"abcd")
    assert exists(block.name)
    assert ambient.process()._own_client.kernel_pid != kernel
    gone(block)
