"""Services from the caller's side: which server takes a call, where it goes when one dies, sessions, what is lent."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import pickle
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import placed
import pytest
from conftest import BOUND, PAGE, in_threads, land_maps, wait_until

import realmap
from realmap import Call, KernelHandle, Process, ProcessKilled, ServerDied, UnknownSyscall, UserBuffer
from realmap.host import forks, procfs
from realmap.system import SpawnedProcess

CARRIERS = ("ring", "socket")


def of_the_kernel(call: Call, *args: Any) -> list[Any]:
    """What the kernel has itself."""
    return [len(each) if isinstance(each, UserBuffer) else each for each in args]


@pytest.fixture(scope="module")
def kernel(request: pytest.FixtureRequest) -> Iterator[KernelHandle]:
    """One that leaves the rest to others."""
    with realmap.boot(syscalls=[of_the_kernel], spin=0 if request.param == "socket" else 100) as handle:
        handle.stats()
        yield handle


@pytest.fixture
def spawn(kernel: KernelHandle, me: Process) -> Iterator[Callable[..., list[SpawnedProcess]]]:
    """So many processes that serve `placed.HANDLERS`."""
    made: list[SpawnedProcess] = []

    def start(count: int, threads: int = 2) -> list[SpawnedProcess]:
        there = kernel.stats()["seats"]
        new = [kernel.spawn(placed.serve, threads) for _ in range(count)]
        made.extend(new)
        wait_until(lambda: kernel.stats()["seats"] == there + count, "their service")
        return new

    yield start
    placed.kill_all(made)


def in_thread(act: Callable[[], object]) -> tuple[threading.Thread, list[Any]]:
    """What comes of it, once it has ended."""
    came: list[Any] = []

    def run() -> None:
        try:
            came.append(act())
        except Exception as error:
            came.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, came


def test_what_cannot_travel_by_a_session_either(me: Process, spawn: Any) -> None:
    spawn(1)
    with me.session("echo") as session:
        for call in (me.call, session.call):
            with pytest.raises(TypeError, match="beyond 64 bits"):
                call("echo", 2**70)


def test_a_timeout_is_told_as_it_was_asked_for(me: Process, spawn: Any) -> None:
    spawn(1, 3)
    with me.session("wait") as session:
        with pytest.raises(realmap.SyscallTimeout, match=r"has not answered within 0\.07 s"):
            session.call("wait", "asked", timeout=0.07)
        with pytest.raises(realmap.SyscallTimeout, match=r"within 0\.07 s"):
            asyncio.run(session.acall("wait", "asked", timeout=0.07))
        for _ in range(2):
            session.call("go", "asked")


# ---- which server -------------------------------------------------------------------------


def test_the_one_that_is_idle_takes_the_call(me: Process, spawn: Any) -> None:
    """With one session it stays there; where that server is busy, another one is asked for."""
    servers = {each.pid for each in spawn(3, 1)}
    first = me.call("pid_here", timeout=BOUND)
    assert {me.call("pid_here", timeout=BOUND) for _ in range(20)} == {first}
    busy, came = in_thread(lambda: me.call("nap", 0.5, timeout=BOUND))
    wait_until(lambda: "nap" in me._known and me._known["nap"].servers[0].endpoint.pending)
    others = {me.call("nap", 0.0, timeout=BOUND) for _ in range(20)}
    busy.join()
    assert came[0] not in others
    assert others < servers


def test_many_calls_at_once_are_shared_out(me: Process, spawn: Any) -> None:
    servers = {each.pid for each in spawn(2, 1)}
    seen: set[int] = set()

    def work(_: int) -> None:
        for _ in range(30):
            seen.add(me.call("nap", 0.002, timeout=BOUND))

    in_threads(4, work)
    assert seen == servers


def test_a_server_that_comes_later_is_found(me: Process, spawn: Any) -> None:
    (first,) = spawn(1, 1)
    assert me.call("pid_here") == first.pid
    (second,) = spawn(1, 1)
    seen: set[int] = set()
    end = time.monotonic() + BOUND
    while seen != {first.pid, second.pid} and time.monotonic() < end:
        in_threads(3, lambda _: seen.add(me.call("nap", 0.01, timeout=BOUND)))
    assert seen == {first.pid, second.pid}


def test_a_server_that_died_while_it_was_idle_is_noticed_by_nobody(
    me: Process, kernel: KernelHandle, spawn: Any
) -> None:
    servers = spawn(3)
    for left in (2, 1):
        pid = me.call("pid_here", timeout=BOUND)
        next(each for each in servers if each.pid == pid).kill()
        next(each for each in servers if each.pid == pid).join()
        wait_until(lambda left=left: kernel.stats()["seats"] == left)
        assert me.call("pid_here", timeout=BOUND) != pid


def test_a_server_that_died_at_work(me: Process, spawn: Any) -> None:
    spawn(2)
    buffer = me.map(3 * PAGE)
    with pytest.raises(ServerDied, match="serve") as caught:
        me.call("die", buffer.slice(1, 2 * PAGE), timeout=BOUND)
    assert (caught.value.name, caught.value.began) == ("die", True)
    assert isinstance(caught.value, ConnectionError)
    assert me.call("pid_here", timeout=BOUND) != caught.value.pid
    assert pickle.loads(pickle.dumps(caught.value)).pid == caught.value.pid


def test_the_last_server_dies_and_another_one_comes(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    (only,) = spawn(1)
    assert me.call("pid_here") == only.pid
    only.kill()
    only.join()
    with pytest.raises((ServerDied, UnknownSyscall)):
        me.call("pid_here", timeout=BOUND)
    wait_until(lambda: not kernel.stats()["seats"])
    with pytest.raises(UnknownSyscall, match="pid_here"):
        me.call("pid_here", timeout=BOUND)
    (other,) = spawn(1)
    assert me.call("pid_here", timeout=BOUND) == other.pid


def test_everybody_who_waits_is_told(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    (only,) = spawn(1, 1)
    waiting = [in_thread(lambda: me.call("wait", "for ever", timeout=BOUND)) for _ in range(5)]
    wait_until(lambda: me._known.get("wait") and sum(each.endpoint.pending for each in me._known["wait"].servers) == 5)

    async def ask() -> None:
        with pytest.raises(ServerDied):
            await me.acall("wait", "for ever", timeout=BOUND)

    task = in_thread(lambda: asyncio.run(ask()))
    wait_until(lambda: sum(each.endpoint.pending for each in me._known["wait"].servers) == 6)
    began = time.monotonic()
    only.kill()
    for thread, came in waiting:
        thread.join(BOUND)
        assert isinstance(came[0], ServerDied)
    task[0].join(BOUND)
    assert task[1] == [None]
    assert time.monotonic() - began < BOUND / 2


# ---- sessions -----------------------------------------------------------------------------


def test_a_session_is_with_one_server(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    servers = {each.pid: each for each in spawn(2)}
    with me.session("peek") as session, me.session("digest") as other:
        assert {session.pid, other.pid} == set(servers)
        assert [session.call("pid_here") for _ in range(5)] == [session.pid] * 5
        assert asyncio.run(other.acall("pid_here")) == other.pid
        assert (session.name, str(session.pid) in repr(session)) == ("peek", True)
        buffer = me.map(10_000)
        buffer[:3] = b"abc"
        assert session.call("peek", data=buffer, length=3) == b"abc"
        assert asyncio.run(other.acall("peek", buffer.slice(1, 2))) == b"bc"
        with pytest.raises(UnknownSyscall, match="nobody"):
            session.call("nobody_has_this")
        with pytest.raises(TypeError):
            pickle.dumps(session)
        servers[session.pid].kill()
        servers[session.pid].join()
        for began in (None, False):
            with pytest.raises(ServerDied) as caught:
                session.call("peek", buffer, timeout=BOUND)
            assert caught.value.pid == session.pid
            assert began is None or caught.value.began is began
        assert "ended" in repr(session)
        assert other.call("pid_here") == other.pid
    session.close()
    with pytest.raises(ServerDied):
        session.call("pid_here")
    with pytest.raises(ProcessKilled, match="closed"):
        other.call("pid_here")


def test_sessions_that_cannot_be(me: Process, kernel: KernelHandle) -> None:
    for name in ("nobody_has_this", "of_the_kernel", ""):
        with pytest.raises(UnknownSyscall):
            me.session(name)
    for odd in (None, 5, b"nop"):
        with pytest.raises(TypeError, match="str"):
            me.session(odd)  # type: ignore[arg-type]


def test_a_session_that_is_let_go_ends(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    spawn(1)
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        me.session("peek").call("pid_here")
    gc.collect()
    wait_until(lambda: kernel.stats()["sessions"] == 0)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_closing_a_process_ends_its_sessions(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    spawn(1, 3)  # both that wait may have begun
    other = kernel.connect()
    session = other.session("peek")
    waiting = in_thread(lambda: session.call("wait", "closed", timeout=BOUND))
    routed = in_thread(lambda: other.call("wait", "closed", timeout=BOUND))
    wait_until(
        lambda: session._server.endpoint.pending and other._known and other._known["wait"].servers[0].endpoint.pending
    )
    other.close()
    for thread, came in (waiting, routed):
        thread.join(BOUND)
        assert isinstance(came[0], ProcessKilled)
    wait_until(lambda: kernel.stats()["sessions"] == 0)
    for _ in range(2):
        me.call("go", "closed")


def test_a_forked_child_has_no_session(me: Process, spawn: Any) -> None:
    (only,) = spawn(1)
    session = me.session("peek")
    assert me.call("pid_here") == only.pid
    child = forks.fork()
    if not child:
        status = 1
        try:
            with suppress(realmap.InvalidHandle):
                session.call("pid_here")
                os._exit(2)
            session.close()
            del session
            status = 0 if me.call("pid_here", timeout=BOUND) == only.pid else 3
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert session.call("pid_here", timeout=BOUND) == only.pid  # the child has closed nothing of ours
    assert me.call("pid_here", timeout=BOUND) == only.pid


def test_more_sessions_than_a_process_may_have() -> None:
    with realmap.boot(limits=realmap.Limits(sessions=2)) as kernel, kernel.connect() as me:
        servers = [kernel.spawn(placed.serve, 1) for _ in range(3)]
        wait_until(lambda: kernel.stats()["seats"] == 3)
        me.call("nap", 0.0)
        with me.session("peek"), pytest.raises(realmap.LimitReached, match="sessions"):
            me.session("peek")
        with me.session("peek"):
            in_threads(4, lambda _: me.call("nap", 0.01, timeout=BOUND))  # who is there has to do
        for server in servers:
            server.kill()
            server.join()


def test_a_descriptor_that_was_stolen_costs_one_call_at_most(me: Process, spawn: Any) -> None:
    spawn(1)
    me.call("pid_here")
    (server,) = me._known["pid_here"].servers
    os.close(server.endpoint.fileno())
    with suppress(ProcessKilled):
        me.call("long_text", 1, timeout=0.2)
        me.call("echo", "x" * 5_000, timeout=BOUND)
    wait_until(lambda: _answers(me), "an answer")


def _answers(me: Process) -> bool:
    try:
        return me.call("echo", "x" * 5_000, timeout=1) == [["x" * 5_000], {}]
    except realmap.KernelError:
        return False


# ---- services that call services ----------------------------------------------------------


def serve_chain(me: Process, name: str, calls: str, threads: int) -> None:
    """Each asks the next one, until the number is 0."""

    @realmap.syscall(name=name)
    def chain(call: Call, number: int, data: UserBuffer) -> list[Any]:
        with data.mirror(realmap.k_r) as mirror:
            mine = hashlib.sha256(mirror).hexdigest()
        if not number:
            return [name, mine]
        with me.map(len(data)) as copy:
            copy[:] = data.copy_in()
            return [name, mine, *me.call(calls, number - 1, copy)]

    with suppress(realmap.KernelDied, ProcessKilled), me.serve(chain, threads=threads) as service:
        service.wait()


@pytest.fixture
def chained(kernel: KernelHandle, me: Process) -> Iterator[Callable[..., None]]:
    """Services that call one another."""
    made: list[SpawnedProcess] = []

    def start(name: str, calls: str, threads: int) -> None:
        made.append(kernel.spawn(serve_chain, name, calls, threads))
        wait_until(lambda: placed.servers_of(me, name, 1))

    yield start
    for each in made:
        each.kill()
        each.join()
    made.clear()


def test_services_call_services_and_the_kernel(me: Process, chained: Any) -> None:
    chained("first", "second", 1)
    chained("second", "third", 1)
    chained("third", "of_the_kernel", 1)
    buffer = me.map(5_000)
    digest = hashlib.sha256(buffer).hexdigest()
    assert me.call("first", 2, buffer, timeout=BOUND) == ["first", digest, "second", digest, "third", digest]
    last = me.call("first", 3, buffer.slice(3, 100), timeout=BOUND)
    assert (last[4], last[-2:]) == ("third", [0, 100])


def test_a_circle_that_would_wait_for_itself_is_an_error(me: Process, chained: Any) -> None:
    chained("around", "about", 1)
    chained("about", "around", 1)
    buffer = me.map(100)
    assert me.call("around", 1, buffer, timeout=BOUND)[::2] == ["around", "about"]
    with pytest.raises(realmap.LimitReached, match="wait for itself"):
        me.call("around", 2, buffer, timeout=BOUND)
    assert me.call("about", 1, buffer, timeout=BOUND)[::2] == ["about", "around"]


def test_a_circle_with_threads_enough(me: Process, chained: Any) -> None:
    chained("wide", "side", 3)
    chained("side", "wide", 3)
    assert me.call("wide", 5, me.map(100), timeout=BOUND)[::2] == ["wide", "side"] * 3
    with pytest.raises(realmap.LimitReached):
        me.call("wide", 6, me.map(100), timeout=BOUND)


def test_a_process_serves_and_calls_itself(me: Process) -> None:
    def down(call: Call, number: int, data: UserBuffer) -> int:
        data.copy_out(bytes([number]), number)
        return 1 + (me.call("down", number - 1, mine) if number else 0)

    mine = me.map(PAGE + 10)
    with me.serve(down, threads=4):
        assert me.call("down", 3, mine, timeout=BOUND) == 4
        assert mine[:5] == b"\0\1\2\3\0"
        with pytest.raises(realmap.LimitReached, match="wait for itself"):
            me.call("down", 4, mine, timeout=BOUND)
    with me.serve(down), pytest.raises(realmap.LimitReached):
        me.call("down", 1, mine, timeout=BOUND)


# ---- what happens to either side meanwhile ------------------------------------------------


def serve_fork(me: Process) -> None:
    """Leaves a child that has a copy of everything."""

    def leave_child(call: Call) -> int:
        child = forks.fork()
        if not child:
            while os.getppid() == parent:
                time.sleep(0.01)
            time.sleep(1)  # longer than its parent
            os._exit(0)
        return child

    def stay(call: Call) -> None:
        time.sleep(BOUND)

    parent = os.getpid()
    with suppress(realmap.KernelDied), me.serve(leave_child, stay, threads=2) as service:
        service.wait()


def test_a_servers_child_keeps_no_dead_session_alive(me: Process, kernel: KernelHandle) -> None:
    server = kernel.spawn(serve_fork)
    wait_until(lambda: placed.servers_of(me, "stay", 1))
    assert me.call("leave_child", timeout=BOUND) > 0
    waiting, came = in_thread(lambda: me.call("stay", timeout=BOUND))
    wait_until(lambda: "stay" in me._known and me._known["stay"].servers[0].endpoint.pending)
    assert me.call("leave_child", timeout=BOUND) > 0  # it serves on
    server.kill()
    waiting.join(BOUND / 2)
    assert isinstance(came[0], ServerDied)
    server.join()


def serve_short(me: Process) -> None:
    """With no more descriptors than it is left."""
    held: list[int] = []

    def use_up(call: Call, left: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        with suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(left):
            os.close(held.pop())

    def give_back(call: Call) -> None:
        while held:
            os.close(held.pop())

    def total(call: Call, data: UserBuffer) -> int:
        return sum(data.copy_in())

    with suppress(realmap.KernelDied), me.serve(use_up, give_back, total) as service:
        service.wait()


@pytest.mark.parametrize("left", [0, 1, 2, 3, 10])
def test_a_server_without_descriptors(me: Process, kernel: KernelHandle, left: int) -> None:
    """For a session, or for all that is lent: its caller is told that nothing was done, and the next call has both."""
    server = kernel.spawn(serve_short)
    buffer = me.map(70 * PAGE, fragment=PAGE)
    buffer[:3] = b"\1\1\1"
    with me.session("use_up", timeout=BOUND) as session:
        session.call("use_up", left)
        with pytest.raises(ServerDied):
            me.call("total", buffer, timeout=BOUND)
        session.call("give_back", timeout=BOUND)
        assert me.call("total", buffer, timeout=BOUND) == 3
    server.kill()
    server.join()
    del server


def test_a_server_that_is_stopped(me: Process, spawn: Any) -> None:
    (only,) = spawn(1)
    assert me.call("pid_here") == only.pid
    os.kill(only.pid, signal.SIGSTOP)
    wait_until(lambda: procfs.is_stopped(only.pid))
    began = time.monotonic()
    for name, args in [("pid_here", ()), ("peek", (me.map(PAGE),)), ("never called before", ())]:
        with pytest.raises((realmap.SyscallTimeout, UnknownSyscall)) as caught:
            me.call(name, *args, timeout=0.2)
        if name != "never called before":
            assert "stopped" in str(caught.value)
    assert time.monotonic() - began < BOUND / 4
    os.kill(only.pid, signal.SIGCONT)
    assert me.call("pid_here", timeout=BOUND) == only.pid
    assert me.call("echo", 1, timeout=BOUND) == [[1], {}]


def test_a_kernel_that_is_stopped_does_not_stop_calls(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    """What is open and lent needs no kernel; what is new waits for it, and no longer than it may."""
    spawn(1)
    buffer = me.map(PAGE)
    assert me.call("peek", buffer, 1) == b"\0"
    os.kill(kernel.pid, signal.SIGSTOP)
    wait_until(lambda: procfs.is_stopped(kernel.pid))
    try:
        assert me.call("peek", buffer, 1, timeout=BOUND) == b"\0"
        began = time.monotonic()
        with pytest.raises(realmap.SyscallTimeout):
            me.session("peek", timeout=0.2)
        with pytest.raises(realmap.SyscallTimeout):
            me.call("nobody_has_called_this", timeout=0.2)
        assert time.monotonic() - began < BOUND / 4
        assert me.call("long_text", 5, timeout=BOUND) == "xxxxx"  # by the same session
    finally:
        os.kill(kernel.pid, signal.SIGCONT)


def test_a_caller_that_unmaps_what_is_lent(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    """The handler has it until it returns; then it is gone."""
    spawn(1)
    for length in (PAGE, 100_000):
        buffer = me.map(length)
        buffer[:] = content = os.urandom(length)
        with me.session("peek") as session:
            part = buffer.slice(1, length - 2)
            thread, came = in_thread(lambda part=part: session.call("digest_later", "unmapped", part))
            wait_until(lambda: session.call("has_mapped", "unmapped"))
            buffer.unmap()
            session.call("go", "unmapped")
            thread.join(BOUND)
            assert came == [hashlib.sha256(content[1:-1]).hexdigest()]
        wait_until(lambda: kernel.stats()["bytes"] == 0)


def test_a_caller_that_gives_up(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    spawn(1)
    buffer = me.map(100_000)
    with me.session("peek") as session:
        with pytest.raises(realmap.SyscallTimeout):
            session.call("digest_later", "given up", buffer.slice(1, 50_000), timeout=0.1)
        assert session._server.endpoint.pending == 1
        session.call("go", "given up")
        wait_until(lambda: session.call("nop") is None and not session._server.endpoint.pending)
    buffer.unmap()
    wait_until(lambda: kernel.stats()["bytes"] == 0)


def test_a_caller_that_forks_while_it_waits(me: Process, spawn: Any) -> None:
    """From a signal handler, in the middle of its call: the child gets an error there, and calls for itself."""
    spawn(1)
    buffer = me.map(50_000)
    children: list[int] = []

    def fork(*_: object) -> None:
        children.append(forks.fork())

    before = signal.signal(signal.SIGALRM, fork)
    pid = os.getpid()
    me.call("peek", buffer, 1)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            came: Any = me.call("nap", 0.3, timeout=BOUND)
        except realmap.KernelError as error:
            came = error
        if os.getpid() != pid:
            status = 2
            try:
                right = isinstance(came, realmap.InvalidHandle)
                status = 0 if right and me.call("peek", buffer, 1, timeout=BOUND) == b"\0" else 1
            finally:
                os._exit(status)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert isinstance(came, int)
    assert os.waitpid(children[0], 0)[1] == 0
    assert me.call("peek", buffer, 1, timeout=BOUND) == b"\0"


def test_a_call_within_a_call_from_a_signal_handler(me: Process, spawn: Any) -> None:
    spawn(1)
    buffer = me.map(PAGE)
    answers: list[Any] = []

    def ask(*_: object) -> None:
        with me.map(3 * PAGE) as other, me.session("peek") as session:
            answers.append(me.call("peek", buffer, 1) + session.call("peek", other, 2))

    before = signal.signal(signal.SIGALRM, ask)
    try:
        for turn in range(5):
            signal.setitimer(signal.ITIMER_REAL, 0.02 if turn else 0.0001)
            me.call("nap", 0.06, timeout=BOUND)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert answers == [bytes(3)] * 5


class Stop(Exception):
    """A signal handler's."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a destructor
def test_signal_handlers_that_raise_at_any_moment(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    """Opening, lending, calling: what is half done is undone, and the next call is answered."""
    spawn(1)
    turns = 0

    def stop(*_: object) -> None:
        raise Stop

    def use() -> None:  # what it leaves half done goes with its variables
        with me.map(2 * PAGE) as buffer, me.session("peek") as session:
            session.call("peek", buffer.slice(1, PAGE), 2)
            me.call("digest", buffer.slice(5, PAGE))

    before = signal.signal(signal.SIGALRM, stop)
    try:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            turns += 1
            with suppress(Stop):
                signal.setitimer(signal.ITIMER_REAL, (turns % 40 + 1) * 5e-5)
                try:
                    use()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert me.call("echo", turns, timeout=BOUND) == [[turns], {}]
    gc.collect()
    me._routes.close()
    wait_until(lambda: me.call("of_the_kernel") or kernel.stats()["sessions"] == 0, "the end of all sessions")


def test_tasks_that_are_cancelled_at_any_moment(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    spawn(2)

    async def work(number: int) -> None:
        with me.map(PAGE + number) as buffer:
            await me.acall("digest", buffer.slice(1, PAGE - 2))
            await me.acall("nap", 0.001)

    async def main() -> None:
        for turn in range(60):
            tasks = [asyncio.create_task(work(number)) for number in range(5)]
            await asyncio.sleep(turn * 5e-5)
            for task in tasks[::2]:
                task.cancel()
            done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), BOUND)
            assert all(each is None or isinstance(each, asyncio.CancelledError) for each in done)
        assert await me.acall("echo", 1) == [[1], {}]

    asyncio.run(main())
    assert land_maps() == []


def test_bystanders_go_on_while_servers_are_killed(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    """A pool of which one is killed again and again: each call is answered, or ServerDied, and the bytes are right."""
    servers = spawn(2)
    stop = threading.Event()
    done: list[int] = []

    def call(number: int) -> None:
        with kernel.connect() as mine, mine.map(3 * PAGE) as buffer:
            buffer[:] = os.urandom(len(buffer))
            count = 0
            while not stop.is_set():
                with suppress(ServerDied, UnknownSyscall):
                    part = buffer.slice(number, 2 * PAGE)
                    assert mine.call("digest", part, timeout=BOUND) == hashlib.sha256(part).hexdigest()
                    count += 1
            done.append(count)

    threads = [in_thread(lambda number=number: call(number)) for number in range(3)]
    try:
        for turn in range(6):
            victim = servers[turn % 2]
            victim.kill()
            victim.join()
            wait_until(lambda: kernel.stats()["seats"] == 1)
            servers[turn % 2] = spawn(1)[0]
    finally:
        stop.set()
        for thread, came in threads:
            thread.join(BOUND)
            assert came == [None]
        for server in servers:
            server.kill()
            server.join()
    assert all(count > 10 for count in done)


def test_one_session_for_all_that_a_server_serves(me: Process, kernel: KernelHandle, spawn: Any) -> None:
    spawn(1)
    buffer = me.map(PAGE)
    assert me.call("peek", buffer, 1) == b"\0"
    assert me.call("echo", 1) == [[1], {}]
    assert len(kernel.snapshot().sessions) == 1
    assert len(kernel.snapshot().grants) == 1
    buffer.unmap()
