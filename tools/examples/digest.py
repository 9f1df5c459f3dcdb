"""A digest syscall: the kernel hashes a user's bytes where they are, without copying them."""

import hashlib

import realmap


@realmap.syscall
def sha256(call: realmap.Call, data: realmap.UserBuffer) -> str:
    with data.mirror(realmap.k_r) as mirror:  # mmap in the kernel process …
        return hashlib.sha256(mirror).hexdigest()  # … the user's own pages, no copy
        # … munmap here


with realmap.boot(syscalls=[sha256]) as kernel, kernel.connect() as me:
    buffer = me.map(1 << 20)
    buffer[100:105] = b"hello"
    digest = me.call("sha256", buffer.slice(100, 5))
    assert digest == hashlib.sha256(b"hello").hexdigest()
    print("the kernel says:", digest)
