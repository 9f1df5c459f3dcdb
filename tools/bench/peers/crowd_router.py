"""pyzmq with a broker, as its guide has it: ROUTER-DEALER between REQ clients and two REP workers."""

import ctypes
import os
import signal
from collections.abc import Callable

import zmq

REQUEST = bytes(32)
ANSWER = bytes(16)
WORKERS = 2
PR_SET_PDEATHSIG = 1


def server(address: str) -> Callable[[], None]:
    def work() -> None:
        socket = zmq.Context().socket(zmq.REP)
        socket.connect(f"ipc://@{address}-workers")
        while socket.recv():
            socket.send(ANSWER)

    def serve() -> None:
        parent = os.getpid()
        for _ in range(WORKERS):
            if not os.fork():
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() == parent:
                    work()
                os._exit(1)
        context = zmq.Context()
        front, back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        front.bind(f"ipc://@{address}")
        back.bind(f"ipc://@{address}-workers")
        zmq.proxy(front, back)

    return serve


def client(address: str) -> Callable[[], object]:
    socket = zmq.Context().socket(zmq.REQ)
    socket.connect(f"ipc://@{address}")

    def call() -> None:
        socket.send(REQUEST)
        if socket.recv() != ANSWER:
            raise ValueError("a wrong answer")

    return call
