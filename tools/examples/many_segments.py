"""A buffer in many segments is one contiguous window all the same, for its user and for the kernel."""

import realmap


@realmap.syscall
def count_sevens(call, data):
    with data.mirror(realmap.k_r) as mirror, memoryview(mirror) as view:
        return bytes(view).count(7)


with realmap.boot(syscalls=[count_sevens]) as kernel, kernel.connect() as me:
    page = realmap.PAGE_SIZE
    buffer = me.map(10 * page, fragment=page)
    buffer[:] = bytes(10 * page)
    across = buffer.slice(page - 3, 5 * page)  # starts and ends within a page, over six segments
    across[:] = b"\x07" * len(across)
    print(len(kernel.snapshot().frames[0].segments), "segments;", me.call("count_sevens", across), "sevens")
    assert me.call("count_sevens", buffer) == len(across)
    assert buffer[page - 4] == 0 == buffer[6 * page - 3]
