"""A producer is killed while the kernel reads what it produced: the bytes stay until the reader drops them."""

import signal
import time

import realmap

held = []


@realmap.syscall
def publish(call, data):
    held.append(data.mirror(realmap.k_r))  # kept in use beyond this call


@realmap.syscall
def published(call):
    return len(held)


@realmap.syscall
def read_back(call):
    with held.pop() as mirror:
        return bytes(mirror[:24])


def producer(me):
    buffer = me.map(3333)
    buffer[:24] = b"last words of a producer"
    me.call("publish", buffer)
    signal.pause()


with realmap.boot(syscalls=[publish, published, read_back]) as kernel, kernel.connect() as me:
    child = kernel.spawn(producer)
    while not me.call("published"):
        time.sleep(0.001)
    child.kill()
    print("the producer ended with", child.join())
    while kernel.stats()["processes"] > 1:  # until the kernel has reaped it
        time.sleep(0.001)
    words = me.call("read_back")
    assert words == b"last words of a producer"
    print("read afterwards:", words.decode())
    assert kernel.stats()["segments"] == 0
    print("and then nothing of it is left")
