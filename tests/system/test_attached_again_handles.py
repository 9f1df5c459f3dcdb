"""What was attached by a handle is parked when it is unmapped, and attached again without a word, until that ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from conftest import PAGE, wait_until
from parked import parked, stock

import realmap
from realmap import Buffer, Handle, InvalidAddress, InvalidHandle, KernelDied, KernelHandle, Limits, Process

LENGTH = 3 * PAGE


@pytest.fixture
def maker(kernel: KernelHandle) -> Iterator[Process]:
    with kernel.connect() as made:
        yield made


@pytest.fixture
def buffer(maker: Process) -> Buffer:
    made = maker.map(LENGTH)
    made[:4] = b"here"
    return made


@pytest.fixture
def handle(maker: Process, buffer: Buffer) -> Handle:
    return maker.share(buffer)


def attach(me: Process, handle: Handle | str, **options: int) -> int:
    """Attaches and unmaps it; where it was."""
    with me.attach(handle, **options) as found:
        return found.address


def count(kernel: KernelHandle) -> int:
    """Mappings in the books, which agree with Linux."""
    assert kernel.audit()
    return kernel.stats()["mappings"]


def test_again_it_costs_no_message(me: Process, kernel: KernelHandle, buffer: Buffer, handle: Handle) -> None:
    address = attach(me, handle)
    assert (parked(), count(kernel)) == ([address], 1)
    os.kill(kernel.pid, signal.SIGSTOP)
    try:
        for number in range(50):
            buffer[3] = number
            with me.attach(handle) as found:
                assert (found.address, len(found), found[:4]) == (address, LENGTH, b"her" + bytes([number]))
                found[4] = number
            assert buffer[4] == number
    finally:
        os.kill(kernel.pid, signal.SIGCONT)
    assert stock(kernel) == (0, 0)  # they are its maker's


def test_it_is_a_mapping_as_any_other_once_somebody_looks(me: Process, kernel: KernelHandle, handle: Handle) -> None:
    attach(me, handle)
    found = me.attach(handle)
    assert count(kernel) == 2
    assert me.call("peek", found, 4, 0) == b"here"
    found.unmap()
    assert (count(kernel), len(parked())) == (1, 1)
    with pytest.raises(InvalidAddress):
        me.call("peek", found, 4, 0)


def test_what_is_parked_is_no_reference_that_anybody_sees(me: Process, buffer: Buffer, handle: Handle) -> None:
    attach(me, handle)
    assert buffer.refcount == 2
    found = me.attach(handle)
    assert buffer.refcount == 3
    found.unmap()
    assert buffer.refcount == 2


def test_several_at_a_time(me: Process, kernel: KernelHandle, handle: Handle) -> None:
    one, two = me.attach(handle), me.attach(handle)
    one.unmap(), two.unmap()
    again = [me.attach(handle) for _ in range(3)]
    assert sorted(each.address for each in again)[:2] == sorted([one.address, two.address])
    assert count(kernel) == 4


def test_a_part_is_that_part(me: Process, handle: Handle) -> None:
    for _ in range(3):
        with me.attach(handle, 1, 2) as part, me.attach(handle, PAGE + 1) as rest:
            assert (part[:], len(rest), rest.address % PAGE) == (b"er", 2 * PAGE - 1, 1)


def test_rights_stay_what_they_are(me: Process, handle: Handle) -> None:
    for _ in range(3):
        with me.attach(handle, rights=realmap.u_r) as found:
            assert found.rights == realmap.u_r and memoryview(found).readonly and found[:4] == b"here"
        with me.attach(handle) as found:
            found[0] = found[0]


def test_of_what_may_only_be_read(me: Process, maker: Process, buffer: Buffer) -> None:
    handle = maker.share(buffer, realmap.u_r)
    address = attach(me, handle)
    with me.attach(handle) as found:
        assert (found.address, found[:4]) == (address, b"here")
        assert memoryview(found).readonly


# ---- ends -------------------------------------------------------------------------------------


def test_a_revoked_one_is_not_attached_again(me: Process, maker: Process, kernel: KernelHandle, handle: Handle) -> None:
    attach(me, handle)
    maker.revoke(handle)
    with pytest.raises(InvalidHandle, match="revoked"):
        me.attach(handle)
    assert count(kernel) == 1


def test_what_is_attached_when_it_is_revoked_stays(
    me: Process, maker: Process, kernel: KernelHandle, buffer: Buffer, handle: Handle
) -> None:
    attach(me, handle)
    found = me.attach(handle)
    maker.revoke(handle)
    buffer.unmap()
    assert found[:4] == b"here"
    assert count(kernel) == 1
    found.unmap()
    with pytest.raises(InvalidHandle, match="revoked"):
        me.attach(handle)
    assert (count(kernel), kernel.stats()["bytes"]) == (0, 0)


def test_each_use_counts(me: Process, maker: Process, kernel: KernelHandle, buffer: Buffer) -> None:
    handle = maker.share(buffer, uses=3)
    for _ in range(3):
        attach(me, handle)
    assert parked() == []
    with pytest.raises(InvalidHandle, match="spent"):
        me.attach(handle)


def test_one_for_a_time_is_asked_for_each_time(me: Process, maker: Process, buffer: Buffer) -> None:
    handle = maker.share(buffer, seconds=1000)
    attach(me, handle), attach(me, handle)
    assert parked() == []


def test_its_maker_ends(me: Process, maker: Process, kernel: KernelHandle, handle: Handle) -> None:
    attach(me, handle)
    maker.close()
    wait_until(lambda: kernel.stats()["processes"] == 1)
    with pytest.raises(InvalidHandle, match="ended"):
        me.attach(handle)
    assert (count(kernel), kernel.stats()["bytes"]) == (0, 0)


def test_one_that_outlives_its_maker_for_a_time_is_asked_for_from_then_on(
    me: Process, maker: Process, kernel: KernelHandle, buffer: Buffer
) -> None:
    handle = maker.share(buffer, keep=1000)
    attach(me, handle)
    maker.close()
    wait_until(lambda: kernel.stats()["processes"] == 1)
    attach(me, handle), attach(me, handle)
    assert parked() == []
    me.revoke(handle)


def test_its_maker_attaches_it_itself(maker: Process, kernel: KernelHandle, buffer: Buffer) -> None:
    handle = maker.share(buffer, keep=1000)
    assert attach(maker, handle) == attach(maker, handle)
    buffer.unmap()  # the last of it that is mapped, so its time begins
    assert kernel.snapshot().handles[0].seconds is not None
    attach(maker, handle)
    assert (count(kernel), parked()) == (0, [])
    maker.revoke(handle)
    assert kernel.stats()["bytes"] == 0


def test_no_kernel(kernel: KernelHandle, me: Process) -> None:
    with realmap.boot() as other, other.connect() as mine:
        handle = mine.share(mine.map(PAGE))
        attach(mine, handle)
        death = os.pidfd_open(other.pid)
        signal.pidfd_send_signal(death, signal.SIGKILL)
        os.waitid(os.P_PIDFD, death, os.WEXITED | os.WNOWAIT)
        os.close(death)
        with pytest.raises(KernelDied):
            mine.attach(handle)


def test_a_limit_of_mappings_counts_what_is_parked() -> None:
    with realmap.boot(limits=Limits(mappings=2)) as kernel, kernel.connect() as maker, kernel.connect() as me:
        handle = maker.share(maker.map(PAGE))
        attach(me, handle)
        one, two = me.map(PAGE), me.map(PAGE)
        with pytest.raises(realmap.VirtualMemoryExhaustion):
            me.attach(handle)
        assert (len(one), len(two)) == (PAGE, PAGE)


@pytest.mark.parametrize("stock_bytes", [0, PAGE])
def test_what_is_longer_than_the_stock_is_not_parked(stock_bytes: int) -> None:
    with realmap.boot(limits=Limits(stock=stock_bytes)) as kernel:
        with kernel.connect() as maker, kernel.connect() as me:
            handle = maker.share(maker.map(2 * PAGE))
            attach(me, handle), attach(me, handle)
            assert parked() == []


def test_no_more_than_so_many_are_known(me: Process, handle: Handle) -> None:
    for offset in range(200):
        attach(me, handle, offset=offset, length=1)
    assert len(me._attached) <= realmap.user.attached.KNOWN
    with me.attach(handle, 3, 1) as found:
        assert found[:] == b"e"
