"""Calls everything that the C core offers with odd arguments, at random: a program of its own, as it looks for crashes.

`odd_arguments.py SEED COUNT LOG` ends with 0 after COUNT steps, none of which raised SystemError. The step that is
being taken is in the file LOG.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import random
import resource
import sys
from collections.abc import Callable
from typing import Any

from realmap import _core
from realmap.memory import KERNEL_LAND, CrossProcessMapping, FrameAllocator, KernelMemory, Mapping, UserspacePtr
from realmap.memory.userspace_ptr import register_window
from realmap.pages import PAGE_SIZE
from realmap.rights import MappingAccessRights, MemoryType, k_rw, u_rw

PAGES = 16
#: These wait for others, and have tests of their own.
WAITS = {"Ring", "gather", "fall_asleep", "wake_up"} | {name for name in vars(_core) if name.startswith("Shared")}


class Window(_core.Window):
    __slots__ = ("__weakref__",)


class Plain(_core.Land):
    pass


class Evil:
    """Whatever asks it for a number, an answer or its bytes has the world changed meanwhile."""

    def __init__(self, fuzz: Fuzz) -> None:
        self.fuzz = fuzz

    def __index__(self) -> int:
        self.fuzz.disturb()
        number = self.fuzz.odd()
        return number if type(number) is int else 1

    def _note_fault(self, *_: object) -> None:
        self.fuzz.disturb()

    def __iter__(self) -> Any:
        while self.fuzz.random.random() < 0.8:
            self.fuzz.disturb()
            yield (self.fuzz.odd(), 0, PAGE_SIZE)

    def __repr__(self) -> str:
        return "Evil()"


class Fuzz:
    def __init__(self, seed: int, log: str) -> None:
        self.random = random.Random(seed)
        self.log = os.open(log, os.O_RDWR | os.O_CREAT, 0o600)
        self.fd = os.memfd_create("odd")
        os.truncate(self.fd, PAGES * PAGE_SIZE)
        self.depth = 0
        self.evil = Evil(self)
        self.views: list[Any] = []
        self.objects: list[Any] = []
        self.types = [kind for name, kind in vars(_core).items() if isinstance(kind, type) and name not in WAITS]
        self.types += [Window, Plain, CrossProcessMapping, UserspacePtr, Mapping, KernelMemory]
        self.functions = [
            each for name, each in vars(_core).items() if callable(each) and not isinstance(each, type)
            and name not in WAITS and not name.startswith("_")
        ]  # fmt: skip
        self.numbers = [
            -1 << 70, -1 << 63, -PAGE_SIZE, -2, -1, 0, 1, 2, 3, 4, 5, 255, 256, PAGE_SIZE - 1, PAGE_SIZE, 2 * PAGE_SIZE,
            1 << 21, 1 << 31, (1 << 32) - 1, 1 << 39, 1 << 47, (1 << 63) - 1, 1 << 63, (1 << 64) - PAGE_SIZE,
            (1 << 64) - 1, 1 << 64, self.fd,
        ]  # fmt: skip

    def address(self) -> int:
        return KERNEL_LAND.start + self.random.randrange(1 << 12) * PAGE_SIZE

    def odd(self) -> Any:
        """Something to hand over."""
        kind = self.random.randrange(12)
        if kind < 5:
            return self.random.choice(self.numbers)
        if kind < 7:
            return self.address()
        if kind < 9 and self.objects:
            return self.random.choice(self.objects)
        pieces = [(self.fd, 0, PAGE_SIZE), (-1, 0, PAGE_SIZE)]
        return self.random.choice([
            None, True, 1.5, "x", b"", b"abc", bytearray(PAGE_SIZE), memoryview(b"abcdef")[::2], [], (), pieces, {},
            tuple(pieces), [pieces], slice(None), slice(1, 1 << 70, -3), slice(5, 2), slice(None, None, 0), self.evil,
            slice(self.evil, None), (self.evil, self.evil), [(self.evil, self.evil, self.evil)], k_rw, u_rw, object,
            self.random.choice(self.types), MappingAccessRights(8), tuple(self.some() for _ in range(2)), self.views,
        ])  # fmt: skip

    def some(self) -> Any:
        return self.random.choice(self.objects) if self.objects else None

    # ---- things that work, so that there is something to disturb ----------------------------

    def make(self) -> Any:
        pages = self.random.randrange(1, PAGES)
        span, at = pages * PAGE_SIZE, self.address()
        lands = [each for each in self.objects if isinstance(each, KernelMemory)]
        mappings = [each for each in self.objects if isinstance(each, Mapping)]
        windows = [each for each in self.objects if isinstance(each, Window)]
        kind = self.random.randrange(9)
        if kind == 0 or not lands:
            return KernelMemory(KERNEL_LAND.start, 1 << 30, lazy_unmap=self.random.choice([0, 1 << 16]))
        if kind == 1 or not mappings:
            frames = FrameAllocator().allocate(span, self.random.choice([None, PAGE_SIZE]))
            self.keep(frames)
            start = self.random.choice([0, span - PAGE_SIZE])
            return Mapping(at, frames, start, span - start, MemoryType.HEAP, u_rw, owner="odd")
        if kind == 2 or not windows:
            window = Window._map(at, self.random.choice([1, 2, 3]), [(self.fd, 0, span)], 5, span - 5, 1)
            register_window(window)
            return window
        if kind == 3:
            window = self.random.choice(windows)
            return UserspacePtr._over((window,), window.address, len(window), 1)
        if kind == 4:
            return _core.Events(self.random.choice([1, 2, 100]))
        if kind == 5:  # never begun
            kind_ = self.random.choice(self.types)
            return self.random.choice([kind_.__new__, object.__new__])(kind_)
        mapping, land = self.random.choice(mappings), self.random.choice(lands)
        return CrossProcessMapping.mirror_mapping(mapping, 3, self.random.randrange(1, mapping.length), kernel=land)

    def keep(self, thing: Any) -> None:
        if len(self.objects) > 60:
            self.objects.pop(self.random.randrange(len(self.objects)))
        self.objects.append(thing)

    # ---- steps ------------------------------------------------------------------------------

    def disturb(self) -> None:
        """From within a call: something else happens."""
        if self.depth < 3:
            self.depth += 1
            with contextlib.suppress(Exception):
                self.random.choice([self.end, self.end, self.act, self.collect, self.release, self.drop_reference])()
            self.depth -= 1

    def end(self) -> None:
        thing = self.some()
        for name in ("drop", "_drop", "_unmap", "_end", "release", "unpin", "_clear_kept"):
            if hasattr(type(thing), name):
                getattr(thing, name)()
                return

    def drop_reference(self) -> None:
        if self.objects:
            self.objects.pop(self.random.randrange(len(self.objects)))

    def release(self) -> None:
        self.views.clear()

    def collect(self) -> None:
        gc.collect()

    def truncate(self) -> None:
        os.truncate(self.fd, self.random.choice([0, 1, PAGES]) * PAGE_SIZE)

    def view(self) -> None:
        self.views.append(memoryview(self.some()))

    def index(self) -> None:
        thing, key = self.some(), self.odd()
        self.random.choice([
            lambda: thing[key], lambda: thing.__setitem__(key, self.odd()), lambda: thing.__delitem__(key),
            lambda: key in thing, lambda: bytes(thing), lambda: next(iter(thing)), lambda: next(reversed(thing)),
            lambda: thing.__setitem__(slice(key, self.odd()), self.some()), lambda: len(thing), lambda: repr(thing),
        ])()  # fmt: skip

    def act(self) -> None:
        """Any attribute of anything: read, set, deleted, or called with odd arguments."""
        target = self.some() if self.random.random() < 0.8 else self.random.choice(self.types)
        if self.random.random() < 0.1:
            target = _core
        kind = target if isinstance(target, type) else type(target)
        names = [each.__name__ for each in self.functions] if target is _core else [
            name for name in dir(kind) if not name.startswith("__") or name in ("__init__", "__new__", "__reduce_ex__")
        ]  # fmt: skip
        name = self.random.choice(names)
        arguments = [self.odd() for _ in range(self.random.choice([0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]))]
        if self.random.random() < 0.5:
            arguments = self.nearly(name) or arguments
        self.note(f"{kind.__name__}.{name}{arguments!r:.300}")
        if not isinstance(target, type) and target is not _core and self.random.random() < 0.2:
            if self.random.random() < 0.8:
                setattr(target, name, self.odd())
            else:
                delattr(target, name)
            return
        found = getattr(target, name)
        if callable(found):
            made = found(*arguments)
            if type(made) in self.types:
                self.keep(made)

    def nearly(self, name: str) -> list[Any] | None:
        """Arguments that would do, but for one of them."""
        at, span = self.address(), PAGE_SIZE * self.random.randrange(1, PAGES)
        pieces = [(self.fd, 0, PAGE_SIZE)] * (span // PAGE_SIZE)
        right: dict[str, list[Any]] = {
            "_map": [at, 3, pieces, 0, span, 1],
            "_extend": [pieces],
            "_over": [tuple(each for each in self.objects if isinstance(each, Window))[:1], at, 5, 1],
            "_open": [self.of(KernelMemory), self.of(Mapping), 0, PAGE_SIZE, k_rw, self.evil],
            "_open_at": [
                self.of(KernelMemory), at, (self.of(Mapping),), (self.of(_core.Frames),), pieces, 0, 0, span, 3,
            ],
            "_prepare": [KERNEL_LAND.start, KERNEL_LAND.start + (1 << 30), 1 << 16],
            "_search": [at, at + (1 << 20)],
            "_reserve": [span, 0],
            "_mirror_at": [at],
            "_listen": [self.of(_core.Events)],
            "_set": self.random.choice([[self.fd, 0], [at, self.of(_core.Frames), 0, span, 11, "odd"]]),
            "_tell": [self.evil],
            "hold": [self.evil, "odd"],
            "let_go": [self.evil],
            "note": [1, 2, 3, 4, 5],
            "take": [10],
            "collapse": [self.fd, span],
            "read_file": [b"/proc/self/stat", 100],
            "device_maps": [b"/proc/self/maps", bytes(24)],
            "open_files": [b"/proc/self/fd", b"/dev/\0/memfd:\0"],
            "copy_in": [self.of(Mapping), 0, PAGE_SIZE],
        }  # fmt: skip
        if name not in right:
            return None
        arguments = right[name]
        if self.random.random() < 0.7:
            arguments[self.random.randrange(len(arguments))] = self.odd()
        return arguments

    def of(self, kind: type) -> Any:
        return self.random.choice([each for each in self.objects if isinstance(each, kind)] or [None])

    def note(self, step: str) -> None:
        os.pwrite(self.log, f"{self.depth}: {step}\n".encode().ljust(400)[:400], self.depth * 400)

    def run(self, count: int) -> int:
        """How many steps did something that was allowed."""
        worked = 0
        steps: list[tuple[int, Callable[[], Any]]] = [
            (3, lambda: self.keep(self.make())), (10, self.act), (4, self.index), (1, self.view), (1, self.release),
            (1, self.end), (1, self.drop_reference), (1, self.truncate),
        ]  # fmt: skip
        weights = [weight for weight, _ in steps]
        for at in range(count):
            (chosen,) = self.random.choices(steps, weights)
            self.note(f"step {at}")
            try:
                chosen[1]()
                worked += 1
            except SystemError:
                raise
            except Exception:
                pass
            if at % 500 == 0:
                gc.collect()
        return worked


def main() -> None:
    seed, count, log = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

    def unraisable(what: Any) -> None:
        if isinstance(what.exc_value, SystemError):
            os._exit(3)

    sys.unraisablehook = unraisable
    # No step may take the machine's memory, whatever length it asks for.
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * mmap.PAGESIZE
    if "LD_PRELOAD" not in os.environ:  # a sanitizer has terabytes of addresses
        resource.setrlimit(resource.RLIMIT_AS, (size + (512 << 20), resource.RLIM_INFINITY))
    worked = Fuzz(seed, log).run(count)
    gc.collect()
    print(worked, flush=True)


if __name__ == "__main__":
    main()
