"""`Elsewhere`: what `call.kernel` is in a handler that does not run in the kernel."""

from __future__ import annotations

import os
from typing import NoReturn

from realmap.errors import KernelError
from realmap.memory.kernel_memory import KernelMemory


class Elsewhere:
    """Who asks it for anything of the kernel's is told where it is. `memory`, `ending`: for who runs the handler."""

    def __init__(self, memory: KernelMemory) -> None:
        self.memory = memory
        self.ending = False

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        why = f"call.kernel.{name} is for handlers that run in the kernel; this one runs in process {os.getpid()}"
        raise KernelError(why=f"{why}, which serves: pass what it needs as an argument")
