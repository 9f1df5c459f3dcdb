"""Handlers that come and go while a kernel runs; and what they find, print, log and say of themselves."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import syscalls
from conftest import BOUND, wait_until

import realmap
from realmap import Call, Kernel, KernelHandle, Process
from realmap.observe.control import Control


def handler(name: str, answer: Any) -> Any:
    """One of that name."""

    @realmap.syscall(name=name)
    def give(call: Call) -> Any:
        return answer

    return give


def test_handlers_come_and_go_while_a_kernel_runs() -> None:
    with realmap.boot(syscalls=[handler("one", 1)]) as kernel, kernel.connect() as me:
        kernel.register(handler("two", 2), handler("three", 3))
        assert [me.call(name) for name in ("one", "two", "three")] == [1, 2, 3]
        with pytest.raises(realmap.KernelError, match="'two' already"):
            kernel.register(handler("four", 4), handler("two", 5))
        with pytest.raises(realmap.UnknownSyscall):
            me.call("four")
        kernel.register(handler("two", 5), replace=True)
        assert me.call("two") == 5
        calls = {each.name: each.count for each in kernel.snapshot().calls}
        assert calls == {"one": 1, "two": 2, "three": 1}
        kernel.unregister("two")
        for way in (lambda: me.call("two"), lambda: kernel.unregister("two")):
            with pytest.raises(realmap.UnknownSyscall, match="two"):
                way()


def test_a_call_that_is_at_work_goes_on_when_its_handler_is_taken_away() -> None:
    with realmap.boot(syscalls=syscalls.ALL) as kernel, kernel.connect() as me:
        found: list[Any] = []
        buffer = me.map(100)
        thread = threading.Thread(target=lambda: found.append(me.call("hold", "x", buffer)))
        thread.start()
        wait_until(lambda: me.call("state", "x") == "waiting", "the handler")
        kernel.unregister("hold")
        me.call("go")
        thread.join(BOUND)
        assert len(found[0]) == 64
        assert kernel.audit()


def test_handlers_of_a_kernel_in_this_process() -> None:
    kernel = Kernel()
    kernel.register(handler("one", 1))

    @realmap.syscall
    def add(call: Call) -> None:
        kernel.register(handler("late", 3))

    with kernel:
        kernel.register(add)
        with realmap.connect(kernel.path) as me:
            me.call("add")
            assert [me.call("one"), me.call("late")] == [1, 3]
            kernel.unregister("one")
            with pytest.raises(realmap.UnknownSyscall):
                me.call("one")
            with Control(kernel.path) as control, pytest.raises(realmap.AccessDenied):
                control.register(b"")


def test_only_the_booter_changes_handlers(kernel: KernelHandle) -> None:
    def try_it(me: Process) -> list[str]:
        from realmap.observe.control import Control

        found = []
        with Control(me.path) as control:
            for way in (lambda: control.register(b""), lambda: control.unregister("nop")):
                try:
                    way()
                except realmap.AccessDenied as error:
                    found.append(str(error))
        return found

    assert kernel.spawn(try_it).result(BOUND) == ["only who booted the kernel changes its handlers"] * 2


def test_what_cannot_be_registered(kernel: KernelHandle) -> None:
    lock = threading.Lock()
    for bad, says in [(5, "function"), (lambda call: lock, "'lock' holds a lock"), (lambda: 0, "Call")]:
        with pytest.raises(TypeError, match=says):
            kernel.register(bad)
    with pytest.raises(ValueError, match="two syscalls"):
        kernel.register(handler("x", 1), handler("x", 2))

    class Exits:
        def __reduce__(self) -> tuple[Any, ...]:
            return sys.exit, (3,)

    with Control(kernel.path) as control, pytest.raises(realmap.KernelError, match="cannot be read there: SystemExit"):
        control.register(pickle.dumps(Exits()))


# ---- state, prints, logs, tracebacks ------------------------------------------------------


def test_what_an_initializer_makes_handlers_find_and_what_they_say_comes_out_at_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import logging, os, sys
import realmap

model = None

def load():
    global model
    model = [os.getpid()]
    logging.basicConfig(format="LOG %(message)s", stream=sys.stdout)

@realmap.syscall
def learn(call, word):
    print("printed", word)
    logging.warning("logged")
    model.append(word)
    return model[1:], model[0] == os.getpid()

def unlucky():
    raise ValueError("no model")

with realmap.boot(syscalls=[learn], initializer=load) as kernel, kernel.connect() as me:
    me.call("learn", "a")
    print(me.call("learn", "b"), model, flush=True)
try:
    realmap.boot(initializer=unlucky)
except ValueError as error:
    print(error, 'raise ValueError("no model")' in str(error.__cause__))
"""
    )
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=BOUND)
    learnt = "printed {}\nLOG logged\n"
    assert said.stdout == learnt.format("a") + learnt.format("b") + "[['a', 'b'], True] None\nno model True\n"


def test_an_initializer_of_a_kernel_in_this_process() -> None:
    found: list[int] = []
    kernel = Kernel(initializer=lambda: found.append(1))
    assert not found
    with kernel:
        assert found == [1]
    with pytest.raises(ZeroDivisionError):
        Kernel(initializer=lambda: 1 // 0).start()
    with pytest.raises(TypeError, match="initializer"):
        Kernel(initializer=5)  # type: ignore[arg-type]


def test_a_traceback_names_the_file_of_a_script_or_what_was_typed(tmp_path: Path) -> None:
    """A notebook, and a shell since Python 3.13, keep what was typed in linecache."""
    script = tmp_path / "script.py"
    script.write_text(
        """
import linecache
import realmap

def helper(x):
    return 1 / x

@realmap.syscall
def from_file(call):
    return helper(0)

cell = "import realmap\\n@realmap.syscall\\ndef typed(call):\\n    return helper(0)  # in a cell\\n"
linecache.cache["<cell 5>"] = (len(cell), None, cell.splitlines(True), "<cell 5>")
exec(compile(cell, "<cell 5>", "exec"))

with realmap.boot(syscalls=[from_file]) as kernel, kernel.connect() as me:
    kernel.register(typed)
    for name in ("from_file", "typed"):
        try:
            me.call(name)
        except realmap.SyscallFailed as error:
            print(error)
            assert error.pid == kernel.pid
            assert f"In process {kernel.pid}:" in str(error)
"""
    )
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=BOUND)
    assert said.stdout.count(f'File "{script}", line 6, in helper\n    return 1 / x') == 2, said
    assert f'File "{script}", line 10, in from_file\n    return helper(0)' in said.stdout
    assert 'File "<cell 5>", line 4, in typed\n    return helper(0)  # in a cell' in said.stdout
    assert "syscalls.py" not in said.stdout
