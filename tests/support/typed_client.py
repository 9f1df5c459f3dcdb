"""A client, as a strict type checker sees it: run by test_docs.py, and checked from outside of the package."""

from __future__ import annotations

import asyncio
from typing import Any, assert_type

import realmap
from realmap.shared_memory import ShareableList, SharedMemory


@realmap.syscall
def count(call: realmap.Call, data: realmap.UserBuffer) -> int:
    assert_type(data.copy_in(5), bytes)
    with data.mirror(realmap.k_r) as mirror:
        assert_type(mirror, realmap.CrossProcessMapping)
        assert_type(mirror[3], int)
        assert_type(mirror[1:3], bytes)
        return len(mirror)


@realmap.syscall(name="slow", blocking=True)
def slow_count(call: realmap.Call, data: realmap.UserBuffer) -> int:
    return len(data)


async def ask(path: str) -> int:
    async with realmap.aconnect(path) as me:
        assert_type(me, realmap.Process)
        answer: int = await me.acall("slow", me.map(7), timeout=10)
        return answer


def main() -> None:
    with realmap.boot(syscalls=[count, slow_count], limits=realmap.Limits(handles=10)) as kernel:
        assert_type(kernel, realmap.KernelHandle)
        with kernel.connect() as me, me.map(5000) as buffer:
            assert_type(buffer, realmap.Buffer)
            assert_type(buffer.slice(1, 2), realmap.Buffer)
            assert_type(buffer.address, int)
            assert_type(buffer[0], int)
            buffer[:5] = b"hello"
            buffer[1] = 2
            assert_type(memoryview(buffer), "memoryview[int]")
            assert_type(me.call("count", buffer), Any)
            handle = me.share(buffer, realmap.u_r, uses=1)
            assert_type(handle, realmap.Handle)
            assert_type(me.attach(handle), realmap.Buffer)
            assert_type(me.query(buffer.address), realmap.MemoryInfo)
            assert_type(kernel.stats(), dict[str, int])
            assert kernel.audit()
        assert asyncio.run(ask(kernel.path)) == 7
    block = SharedMemory(create=True, size=10)
    assert_type(block.size, int)
    block.buf[0] = 1
    block.close()
    block.unlink()
    numbers = ShareableList([1, 2])
    numbers.shm.close()
    numbers.shm.unlink()


if __name__ == "__main__":
    main()
