"""Who is let in: a peer is identified without doubt, of this uid and version, or refused in words."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import msgspec

from realmap.errors import AccessDenied, KernelError, LimitReached, VersionMismatch
from realmap.host import files, liveness
from realmap.host.translate import shortage
from realmap.kernel import syscalls
from realmap.kernel.connection import Connection
from realmap.kernel.limits import half_of_the_descriptors
from realmap.kernel.logs import log
from realmap.memory.frames import FrameAllocator
from realmap.wire import channel, messages
from realmap.wire.messages import PROTOCOL, VERSION
from realmap.wire.ring import RingEnd

if TYPE_CHECKING:
    from realmap.kernel.kernel import Kernel


class Admission:
    """Greets connections for a kernel. Only on the kernel's thread."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._hello = msgspec.msgpack.Decoder(messages.Hello)

    def greet(self, connection: Connection, data: bytes) -> None:
        """Takes in who says Hello, or refuses in words. MsgspecError: it says something else."""
        kernel = self._kernel
        hello = self._hello.decode(data)
        try:
            if hello.protocol != PROTOCOL:
                ours, theirs = f"{VERSION} (protocol {PROTOCOL})", f"{hello.version} (protocol {hello.protocol})"
                raise VersionMismatch(ours, theirs, why="kernel and user are of different versions of realmap")
            peer = liveness.peer(connection.sock, hello.pid, hello.start)
        except KernelError as error:  # of another kind
            self._refuse(connection, error)
            return
        except OSError as error:  # dead by now, or no descriptor left for it
            self._refuse(connection, shortage(error, "the kernel cannot take this process in"))
            return
        limits = kernel.limits
        if not hello.control and len(kernel.processes) >= limits.processes:
            files.close(peer.pidfd)
            why = f"the kernel serves {limits.processes} processes already, its limit"
            self._refuse(connection, LimitReached("processes", limits.processes, why=why))
            return
        if peer.uid != os.geteuid():
            files.close(peer.pidfd)
            self._refuse(
                connection, AccessDenied(why=f"the kernel belongs to uid {os.geteuid()}, the peer is uid {peer.uid}")
            )
            return
        number, secret = 0, ""
        if hello.control:
            connection.control = True
            files.close(peer.pidfd)
        else:
            segments = half_of_the_descriptors() if limits.segments is None else limits.segments
            frames = FrameAllocator(kernel.process_limit, parent=kernel.frames, segments=segments)
            process = kernel.processes.add(peer, connection, frames, kernel.workers, limits.running)
            connection.process = process
            if kernel.tracing.events is not None:
                kernel.tracing.connected(process)
            # Asked again: the event may be of an earlier process whose pidfd had this number.
            try:
                kernel.watch(
                    process.pidfd, lambda fd: kernel.clients.drop(connection) if liveness.is_dead(fd) else None
                )
            except OSError as error:
                self._refuse(connection, shortage(error, "the kernel cannot take this process in"))
                return
            number, secret = process.number, process.secret
            log.info("%r has connected", process, extra=process.facts)
        self._welcome(connection, messages.Welcome(VERSION, number, os.getpid(), secret=secret))

    def _welcome(self, connection: Connection, welcome: messages.Welcome) -> None:
        """Takes it in; a process with a ring, where there is spinning, and a descriptor for it."""
        ring = None
        rights: list[int] = []
        if connection.process is not None and self._kernel.spin:
            with contextlib.suppress(OSError):  # without one everything takes the socket
                ring, descriptor = RingEnd.create()
                welcome.spin = self._kernel.spin
                rights.append(descriptor)
        try:
            connection.send(syscalls.encode(welcome), rights)
        except OSError:
            self._kernel.clients.drop(connection)
            return
        finally:
            channel.close_all(rights)
        connection.ring = ring
        self._kernel.clients.listen_to_ring(connection, True)
        self._kernel.clients.rearm(connection)

    def _refuse(self, connection: Connection, error: BaseException) -> None:
        with contextlib.suppress(OSError):
            connection.send(syscalls.encode(messages.Refused(PROTOCOL, VERSION, messages.error_of(error))))
        self._kernel.clients.drop(connection)
