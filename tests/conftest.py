"""What every test shares: small tools, and the check that nothing of a test remains."""

from __future__ import annotations

import fcntl
import gc
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import syscalls

import realmap
from realmap import KernelDied, SyscallTimeout, ambient
from realmap.host import procfs, runtime
from realmap.memory import KERNEL_LAND, USER_LAND, FrameAllocator, KernelMemory, Mapping
from realmap.observe.control import Control

# Hundreds of interpreters start here and import realmap: none compiles it anew, also where bytecode is not to be kept.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

#: Long tests do this share of their full counts (CI a twentieth; full counts once).
SCALE = float(os.environ.get("REALMAP_SCALE", "1"))
#: A bound on every wait, in seconds: far above what a loaded machine takes.
BOUND = 60.0
PAGE = realmap.PAGE_SIZE
ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"
#: Set where several workers share the tests.
WORKER = "PYTEST_XDIST_WORKER"
#: Every test of these starts a kernel, a user, or a program of ours.
ROOMS_OF_PROCESSES = [ROOT / "tests" / room for room in ("system", "commands", "hostile")]


def scaled(count: int) -> int:
    """The share of a long test's full count that this run does; at least 1."""
    return max(1, int(count * SCALE))


def long(*values: object) -> Any:
    """Parameters that take the way through the code that others take: for the long tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


@contextmanager
def tried_with(*values: object) -> Iterator[None]:
    """One value of several that a test tries: what fails there says which."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"tried with {', '.join(map(repr, values))}")
        raise


def wait_until(holds: Callable[[], object], what: str = "it") -> None:
    """Waits for an event, with a bound. A kernel that gets no CPU, and so does not answer, has not said no."""
    end = time.monotonic() + BOUND
    while True:
        with suppress(SyscallTimeout):
            if holds():
                return
        assert time.monotonic() < end, f"{what} did not happen within {BOUND} s"
        time.sleep(0.001)


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Does work(0), work(1), … in threads of their own; raises what one of them has raised."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


def land_maps(*, parked: bool = False) -> list[procfs.Map]:
    """What this process has mapped in the two lands, without anchors, and without what is `parked`: those stand as long
    as their land, or their connection, does.
    """
    return [
        entry
        for entry in procfs.maps("self", USER_LAND.start, KERNEL_LAND.end)
        if (entry.perms != "---p" or entry.end % (1 << 39)) and (entry.perms != "---s" or parked)
    ]


def own_names() -> list[str]:
    """Names in /dev/shm of this process."""
    return [name for name in os.listdir("/dev/shm") if name.startswith(f"{runtime.SEGMENT_PREFIX}{runtime.stamp()}.")]


def left_names() -> list[str]:
    """Those, and the names of somebody dead, of other workers and runs too; those of the living are theirs."""
    found = [name for name in os.listdir("/dev/shm") if name.startswith(runtime.SEGMENT_PREFIX)]
    return own_names() + [name for name in found if not runtime.maker_lives(name.removeprefix(runtime.SEGMENT_PREFIX))]


def children() -> set[int]:
    """The processes that this one started and has not reaped."""
    found: set[int] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            found |= {int(pid) for pid in task.read_text().split()}
    return found


def remains() -> dict[str, Any]:
    """What a test could leave behind."""
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "maps": land_maps(parked=True),
        "children": children(),
        "handlers": {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)},
        "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    }


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Of `-n auto`: one more than CPUs, as tests wait more than they compute. None for single files, which are over
    before workers have begun, nor for the long tests, which load a machine by themselves.
    """
    is_little = all(re.search(r"\.py(::|$)", name) for name in config.args)
    return 0 if is_little or "slow" in config.option.markexpr else min(len(os.sched_getaffinity(0)) + 1, 6)


@contextmanager
def a_turn(alone: bool) -> Iterator[None]:
    """For as long as the block lasts no other worker runs a test that is `alone`; where this one is, none at all."""
    with open(__file__) as following, open(ROOT / "pyproject.toml") as running:  # they are there, and for all workers
        fcntl.flock(following, fcntl.LOCK_EX)  # whoever waits for the others to end is not overtaken
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(following, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(running, fcntl.LOCK_UN)  # to close it would not do: the test may have forked


def is_alone(item: pytest.Item | None) -> bool:
    return item is not None and item.get_closest_marker("alone") is not None


#: The turn of a worker that goes on with its next test: of several that are `alone` in a row the others wait once.
kept: list[ExitStack] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Of several workers each keeps its turn, from the first fixture of a test to the last."""
    has_it = bool(kept)
    with kept.pop() if has_it else ExitStack() as turn:
        if WORKER in os.environ and not has_it:
            turn.enter_context(a_turn(is_alone(item)))
        outcome = yield
        if is_alone(item) and is_alone(nextitem):
            kept.append(turn.pop_all())
        return outcome


@pytest.fixture(autouse=True)
def nothing_remains() -> Iterator[None]:
    """Segments, descriptors, maps and processes after a test are those before it."""
    gc.collect()
    before, names = remains(), set(left_names())
    yield
    gc.collect()
    end = time.monotonic() + BOUND / 2
    # Another run of the tests may have swept names that were there before.
    while (after := (remains(), set(left_names()) - names)) != (before, set()) and time.monotonic() < end:
        time.sleep(0.01)  # a daemon thread may be closing what it holds
        gc.collect()
    assert after == (before, set())


@pytest.fixture(scope="session", autouse=True)
def private_runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Sockets of the tests lie in a directory of their own; and Ctrl-C is not ignored, as a shell's `&` has it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = tmp_path_factory.mktemp("run")
    gc.collect()
    gc.freeze()  # what the imports left is not looked through after every test
    before = os.environ.get("REALMAP_DIR")
    os.environ["REALMAP_DIR"] = str(folder)
    yield
    if before is None:
        del os.environ["REALMAP_DIR"]
    else:
        os.environ["REALMAP_DIR"] = before


@pytest.fixture
def frames() -> FrameAllocator:
    """An allocator without a limit."""
    return FrameAllocator()


@pytest.fixture
def kernel_memory() -> KernelMemory:
    """All of KernelLand, in this process."""
    return KernelMemory()


@pytest.fixture
def make_mapping(frames: FrameAllocator) -> Iterator[Callable[..., Mapping]]:
    """Mappings of fresh shared frames: length, fragment=None, phys_offset=0, extra frames in bytes behind it."""
    made: list[Mapping] = []

    def make(
        length: int, fragment: int | None = None, phys_offset: int = 0, extra: int = 0, rights: int = realmap.u_rw
    ) -> Mapping:
        shared = frames.allocate(phys_offset + length + extra, fragment)
        address = USER_LAND.start + (len(made) << 36)
        made.append(Mapping(address, shared, phys_offset, length, realmap.MemoryType.HEAP, rights))
        return made[-1]

    yield make
    for mapping in made:
        mapping.release()
    assert frames.used == 0
    assert frames.segments == 0


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks by room and fixture what starts a process of ours. The long tests run only where -m names them.

    Those that are `alone` come last: the other workers have less to wait with.
    """
    for item in items:
        if any(item.path.is_relative_to(room) for room in ROOMS_OF_PROCESSES) or "kernel" in item.fixturenames:
            item.add_marker("process")
    if not re.search(r"\bslow\b", config.option.markexpr):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if WORKER in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of a module that names CARRIERS run over each of them: a call must not know what carried it."""
    if "kernel" in metafunc.fixturenames:
        carriers = getattr(metafunc.module, "CARRIERS", ("ring",))
        metafunc.parametrize("kernel", carriers, indirect=True, scope="module")


@pytest.fixture(scope="module")
def kernel(request: pytest.FixtureRequest) -> Iterator[realmap.KernelHandle]:
    """A kernel in a process of its own with the handlers of syscalls.py, shared by a module's tests."""
    with realmap.boot(syscalls=syscalls.ALL, spin=0 if request.param == "socket" else 100) as handle:
        handle.stats()
        yield handle


@pytest.fixture
def me(kernel: realmap.KernelHandle) -> Iterator[realmap.Process]:
    """This process as a user; what it mapped is gone from the books afterwards, and the books are right."""
    with kernel.connect() as process:
        yield process
        report = kernel.audit()
        assert report, str(report)
    wait_until(lambda: not kernel.stats()["processes"], "the end of the test's processes")
    # Where a test has forked, it is looked whether a child still has what it had.
    left = ("mappings", "mirrors", "segments", "bytes", "handles")
    wait_until(lambda: not any(kernel.stats()[name] for name in left), "the end of everything that the test had")


def pytest_collection_finish(session: pytest.Session) -> None:
    """To import realmap.shared_memory makes a process the root of a tree: not for what the tests start.

    And what is to run elsewhere goes there by value: who imports its module imports pytest as well.
    """
    os.environ.pop(ambient.TREE, None)
    for module in {item.module for item in session.items if isinstance(item, pytest.Function)}:
        cloudpickle.register_pickle_by_value(module)


@pytest.fixture
def tree(monkeypatch: pytest.MonkeyPatch) -> object:
    """This process as the root of a tree whose kernel ends with the test."""
    monkeypatch.delenv(ambient.VARIABLE, raising=False)
    monkeypatch.delenv(ambient.TREE, raising=False)
    ambient.plant()
    yield
    gc.collect()
    for process in [each for each in realmap.user.inheritance.living() if each.path == os.environ[ambient.TREE]]:
        process.close()
    if ambient._booted is not None:
        ambient._booted.shutdown()
        ambient._booted = None
    path = os.environ.pop(ambient.TREE)
    with suppress(KernelDied), Control(path) as control:  # a child booted it
        control._ask("shutdown")
    wait_until(lambda: not os.path.exists(path), "the end of the tree's kernel")
