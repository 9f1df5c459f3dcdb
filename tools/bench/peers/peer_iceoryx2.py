"""iceoryx2: request-response over shared memory without copies, by its Python binding.

As its examples and its own request-response benchmark have it: services of one client and one server, payloads of
ctypes types, a request loaned from the client's own segment, and both sides asking for the next message until it is
there (its fastest way; it can also sleep on events). What is small goes by send_copy() and is read at payload_ptr: both
are faster here than a loan written and read through payload(), which makes a new typed pointer each time.

    call COUNT PIN                   32 bytes there, 16 back
    handover LENGTH COUNT            a loan of LENGTH, the payload copied into it once (from a numpy array), sent; the
                                     partner sums it where it lies, answers the sum
    handover_in_place LENGTH COUNT   the same without that copy, as if the payload had been produced in the loan (a loan
                                     that comes up for the first time is filled, within the time)

Whatever it makes has a prefix of its own, under which all is removed at the end.
"""

import ctypes
import functools
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from _protocol import PREFIX, Partner, Refused, numpy, partner, pinned, require, serve, timed, total

LOOKS = 100  # in vain (some 0.1 ms), before it is asked whether the other side runs at all
WARM_CALLS = 100
WARM_LOANS = 8  # more than a client has: every loan has held the payload then


class Request(ctypes.Structure):
    """32 bytes"""

    _fields_ = (("number", ctypes.c_uint64), ("rest", ctypes.c_uint64 * 3))


class Answer(ctypes.Structure):
    """16 bytes"""

    _fields_ = (("number", ctypes.c_uint64), ("rest", ctypes.c_uint64))


@functools.cache
def node(root: str) -> Any:
    # Imported as late as this because it starts a thread, and the partner has to be forked before.
    import iceoryx2

    iceoryx2.set_log_level(iceoryx2.LogLevel.Fatal)
    config = iceoryx2.config.default()
    config.global_cfg.prefix = iceoryx2.FileName.new(f"{os.path.basename(root)}-")
    config.global_cfg.root_path = iceoryx2.Path.new(f"{root}/")
    builder = iceoryx2.NodeBuilder.new().config(config)
    # Signals are ours: it would catch them, and tell only those who wait by its means.
    builder = builder.signal_handling_mode(iceoryx2.SignalHandlingMode.Disabled)
    return builder.create(iceoryx2.ServiceType.Ipc)


@functools.cache
def service(root: str, length: int) -> Any:
    """Of slices of `length` bytes that are answered with their sum; of Request and Answer where that is 0."""
    import iceoryx2

    types = (iceoryx2.Slice[ctypes.c_uint8], ctypes.c_uint64) if length else (Request, Answer)
    builder = node(root).service_builder(iceoryx2.ServiceName.new(f"bench/{length}")).request_response(*types)
    builder = builder.max_clients(1).max_servers(1).max_nodes(2)
    builder = builder.max_active_requests_per_client(1).max_loaned_requests(1).max_response_buffer_size(1)
    return builder.open_or_create()


@functools.cache
def client(root: str, length: int) -> Any:
    try:
        builder = service(root, length).client_builder()
        return (builder.initial_max_slice_len(length) if length else builder).create()
    except Exception as error:  # the partner is not concerned yet
        raise Refused(f"{type(error).__name__}: {error}") from error


def soon(receive: Callable[[], Any], partner: Partner | None = None) -> Any:
    """What receive() has, once it has something."""
    while True:
        for _ in range(LOOKS):
            if (received := receive()) is not None:
                return received
        if partner and os.waitid(os.P_PID, partner.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            raise EOFError("the partner ended")
        os.sched_yield()  # the other side may be waiting for this very CPU


def answer(channel: Connection, root: str) -> None:
    """Sleeps between rounds: the channel says which service has how many requests next."""
    servers: dict[int, Any] = {}
    while True:
        length, count = channel.recv()
        if length not in servers:
            servers[length] = service(root, length).server_builder().create()
        receive = servers[length].receive
        channel.send(None)
        for _ in range(count):
            request = soon(receive)
            if length:
                reply = ctypes.c_uint64(total(request.payload().as_memory_view(), length))
            else:
                reply = Answer(Request.from_address(request.payload_ptr).number)
            request.send_copy(reply)
            del request  # ends the connection before the next one is looked for


@functools.cache
def prepared() -> tuple[str, Partner]:
    require("iceoryx2")
    root = tempfile.mkdtemp(prefix=PREFIX)
    return root, partner(answer, root)


def ready() -> tuple[str, Partner]:
    root, other = prepared()
    if other.channel.closed:  # a new one cannot be forked any more: see node()
        raise Refused("the partner has ended: this peer must be started anew")
    return root, other


def call(count: int, pin: bool) -> int:
    root, other = ready()
    send_copy = client(root, 0).send_copy
    request = Request(7)

    def operation() -> None:
        response = soon(send_copy(request).receive, other)
        if Answer.from_address(response.payload_ptr).number != 7:
            raise ValueError("a wrong answer")

    with pinned(other, pin):
        other.channel.send((0, WARM_CALLS + count))
        other.channel.recv()
        return timed(operation, count, WARM_CALLS)


def hand_over(length: int, count: int, in_place: bool) -> int:
    require("numpy")
    root, other = ready()
    loan = client(root, length).loan_slice_uninit
    data = numpy.full(length, 3, numpy.uint8)
    expected = total(data, length)

    def operation(copy: bool) -> None:
        request = loan(length)
        payload = numpy.frombuffer(request.payload().as_memory_view(), numpy.uint8)
        if copy or payload[-1] != data[-1]:
            numpy.copyto(payload, data)
        response = soon(request.assume_init().send().receive, other)
        if ctypes.c_uint64.from_address(response.payload_ptr).value != expected:
            raise ValueError("a wrong sum")

    other.channel.send((length, WARM_LOANS + count))
    other.channel.recv()
    for _ in range(WARM_LOANS):
        operation(copy=True)
    return timed(functools.partial(operation, copy=not in_place), count, warm=0)


def handover(length: int, count: int) -> int:
    return hand_over(length, count, in_place=False)


def handover_in_place(length: int, count: int) -> int:
    return hand_over(length, count, in_place=True)


if __name__ == "__main__":
    serve({"call": call, "handover": handover, "handover_in_place": handover_in_place}, watched=True)
