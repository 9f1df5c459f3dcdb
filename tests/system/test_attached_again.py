"""What was attached and closed, by name or by handle, is parked for its next use: when it is, and when not."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from blocks import run
from conftest import in_threads
from forked import in_a_child
from parked import parked

import realmap
from realmap import ambient
from realmap.memory.stock import PLACES
from realmap.observe.audit import audit
from realmap.observe.control import Control
from realmap.pages import PAGE_SIZE as PAGE
from realmap.shared_memory import SharedMemory
from realmap.user import travel
from realmap.wire.messages import RECYCLED

SIZE = 3333


@pytest.fixture
def block(tree: None) -> Iterator[SharedMemory]:
    made = SharedMemory(create=True, size=SIZE)
    made.buf[:4] = b"here"
    yield made
    made.close()
    made.unlink()


def messages() -> int:
    """How many numbers the connection has given to messages, this question's own included."""
    return ambient.process()._own_client.next_id()


def mappings() -> int:
    """How many mappings there are in the kernel's books, which agree with Linux."""
    ambient.process().query(realmap.memory.USER_LAND.start)  # what was only told before has been heard
    with Control(ambient.process().path) as control:
        assert audit(control.snapshot)
        return control.stats()["mappings"]


def kept() -> int:
    """How many windows the kernel keeps for this process."""
    with Control(ambient.process().path) as control:
        (process,) = [each for each in control.snapshot().processes if each.pid == os.getpid()]
        return sum(each.frames is not None for each in process.stock)


def attach(name: str, **options: bool) -> int:
    """Attaches and closes it; where it was."""
    same = SharedMemory(name, **options)
    assert bytes(same.buf[:4]) == b"here" and same.size == SIZE
    address = same._buffer.address if same._buffer is not None else 0
    same.close()
    return address


def elsewhere(text: str, name: str) -> None:
    """What another process of the tree does with the block of that name."""
    done = run(f"name = sys.argv[1]\n{text}", "realmap", name, env=dict(os.environ))
    assert done.stderr == ""


def test_one_with_a_name_of_its_own_is_a_question_and_so_is_its_end(tree: None) -> None:
    before = messages()
    made = SharedMemory(f"kept_{os.getpid()}", create=True, size=SIZE)
    assert messages() == before + 2
    made.close()
    made.unlink()
    assert messages() == before + 4  # that it was closed the kernel is told, and nobody waits
    assert mappings() == 0


def test_who_is_connected_does_not_look_for_the_root(block: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ambient, "_tree", lambda: pytest.fail("it is looked for"))
    attach(block.name)
    assert ambient.find() == ambient.running() == ambient.process().path


def test_again_it_costs_no_message(block: SharedMemory) -> None:
    address = attach(block.name)
    assert kept() == 1
    before = messages()
    assert [attach(block.name) for _ in range(5)] == [address] * 5
    assert messages() == before + 1


def test_what_is_written_meanwhile_is_seen(block: SharedMemory) -> None:
    attach(block.name)
    block.buf[4:7] = b"now"
    with_it = SharedMemory(block.name)
    assert bytes(with_it.buf[:7]) == b"herenow"
    with_it.close()


def test_a_closed_one_is_closed(block: SharedMemory) -> None:
    attach(block.name)
    same = SharedMemory(block.name)
    buffer = same._buffer
    same.close()
    assert same.buf is None
    assert buffer is not None and not buffer.alive
    with pytest.raises(BufferError):
        buffer[0]


def test_a_view_keeps_it_from_being_closed(block: SharedMemory) -> None:
    same = SharedMemory(block.name)
    view = same.buf[1:3]
    with pytest.raises(BufferError, match="view"):
        same.close()
    assert bytes(view) == b"er"
    view.release()
    same.close()


def test_two_at_a_time_are_two(block: SharedMemory) -> None:
    attach(block.name)
    one, two = SharedMemory(block.name), SharedMemory(block.name)
    one.buf[:3] = b"one"
    one.close()
    assert bytes(two.buf[:4]) == b"onee"
    two.close()


def test_what_may_only_be_read_stays_so(block: SharedMemory) -> None:
    attach(block.name)
    attach(block.name, readonly=True)
    for readonly in (True, False, True):
        same = SharedMemory(block.name, readonly=readonly)
        assert same.buf.readonly is readonly
        same.close()


@pytest.mark.parametrize("text", ["SharedMemory(name).unlink()", "b = SharedMemory(name); b.unlink(); b.close()"])
def test_a_name_that_another_process_has_ended_is_nobodys(tree: None, text: str) -> None:
    made = SharedMemory(create=True, size=SIZE)
    made.buf[:4] = b"here"
    attach(made.name)
    assert len(parked()) == 1
    elsewhere(text, made.name)
    with pytest.raises(FileNotFoundError):
        SharedMemory(made.name)
    made.close()
    assert parked() == []


def test_a_later_block_of_the_same_name_is_another(tree: None) -> None:
    name = f"kept_{os.getpid()}"
    for text, size in (b"first", SIZE), (b"other", SIZE), (b"short", SIZE - 1), (b"large", SIZE + PAGE):
        made = SharedMemory(name, create=True, size=size)
        made.buf[:5] = text
        for _ in range(3):
            same = SharedMemory(name)
            assert (bytes(same.buf[:5]), same.size) == (text, size)
            same.close()
        assert kept() > 0
        made.close()
        elsewhere("SharedMemory(name).unlink()", name)


def test_a_later_block_of_the_same_name_has_its_own_length(tree: None) -> None:
    name = f"kept_{os.getpid()}"
    for size in (100, SIZE, 50):  # one page, each of them
        made = SharedMemory(name, create=True, size=size)
        for _ in range(3):
            same = SharedMemory(name)
            assert same.size == len(same.buf) == size
            same.close()
        made.close()
        made.unlink()


def test_whose_name_ended_before_it_was_closed_is_not_kept(tree: None) -> None:
    made = SharedMemory(create=True, size=SIZE)
    same = SharedMemory(made.name)
    elsewhere("SharedMemory(name).unlink()", made.name)
    same.close()
    assert mappings() == 1
    made.close()
    assert kept() == 0


def test_the_end_of_a_name_ends_no_other(tree: None) -> None:
    one, two = SharedMemory(create=True, size=SIZE), SharedMemory(create=True, size=SIZE)
    one.buf[:4] = two.buf[:4] = b"here"
    address = attach(one.name)
    attach(two.name)
    assert kept() == 2
    two.close()
    two.unlink()
    before = messages()
    assert attach(one.name) == address
    assert messages() == before + 1
    one.close()
    one.unlink()


def test_a_large_one_is_not_kept(tree: None) -> None:
    made = SharedMemory(create=True, size=RECYCLED + 1)
    SharedMemory(made.name).close()
    assert (mappings(), kept()) == (1, 0)
    made.close()
    made.unlink()


def test_many_threads(block: SharedMemory) -> None:
    names = [block.name, SharedMemory(create=True, size=SIZE).name]

    def use(number: int) -> None:
        for turn in range(200):
            same = SharedMemory(names[(number + turn) % 2], readonly=turn % 3 == 0)
            assert same.size == SIZE
            same.close()

    in_threads(4, use)
    attach(block.name)
    SharedMemory(names[1]).unlink()
    assert mappings() == 1


def test_no_more_than_so_many(tree: None) -> None:
    blocks = [SharedMemory(f"many_{os.getpid()}_{number}", create=True, size=SIZE) for number in range(PLACES + 3)]
    for made in blocks:
        SharedMemory(made.name).close()
    assert mappings() == len(blocks)
    assert kept() in (PLACES - 1, PLACES)  # where the last one took another's place, that is free from now on
    for made in blocks:
        made.close()
        made.unlink()
    assert (mappings(), kept()) == (0, 0)


def test_none_is_kept_over_a_fork(block: SharedMemory) -> None:
    attach(block.name)

    def work() -> None:
        assert not parked() and attach(block.name) and attach(block.name)

    in_a_child(work)
    assert (parked(), kept()) == ([], 0)
    attach(block.name)


def test_forks_before_the_kernel_has_said_whether_it_keeps_one(block: SharedMemory) -> None:
    assert ambient._booted is not None
    for _ in range(PLACES + 1):
        same = SharedMemory(block.name)
        os.kill(ambient._booted.pid, signal.SIGSTOP)
        try:
            same.close()
            pid = os.fork()
            if not pid:
                os._exit(0)
            os.waitpid(pid, 0)
        finally:
            os.kill(ambient._booted.pid, signal.SIGCONT)
        assert (parked(), kept()) == ([], 0)
    attach(block.name)
    assert kept() == 1


def test_one_that_was_cut_short_is_not_kept(tree: None) -> None:
    made = SharedMemory(create=True, size=SIZE)
    same = SharedMemory(made.name)
    os.ftruncate(same._fd, 0)
    assert same.buf[0] == 0
    same.close()
    assert (mappings(), kept()) == (1, 0)
    made.close()
    made.unlink()


def test_a_killed_kernel_has_no_names() -> None:
    text = """
    import select
    from realmap import ambient
    made = SharedMemory(create=True, size=10)
    for _ in range(2):
        SharedMemory(made.name).close()
    client = ambient.process()._own_client
    death = select.poll()
    death.register(os.pidfd_open(client.kernel_pid), select.POLLIN)
    os.kill(client.kernel_pid, 9)
    death.poll()
    try:
        SharedMemory(made.name)
    except FileNotFoundError:
        print("gone")
    """
    done = run(text, "realmap")
    assert (done.stdout, done.stderr) == ("gone\n", "")


def test_a_connection_that_ends_takes_them_along(monkeypatch: pytest.MonkeyPatch) -> None:
    with realmap.boot() as kernel:
        monkeypatch.setenv(ambient.VARIABLE, kernel.path)
        made = SharedMemory(create=True, size=PAGE)
        SharedMemory(made.name).close()
        process = travel.made(kernel.path)
        assert process is not None
        process.close()
        assert len(process._windows()) == 1  # that of the view which `made` has
        made.close()
        assert not process._windows()
        monkeypatch.delenv(ambient.VARIABLE)
