"""What a call to a service costs, what lending does, and many callers of several servers: beside pyzmq."""

from __future__ import annotations

from contextlib import closing

from realmap.lab.bench import handlers, programs
from realmap.lab.bench.many import FULL, QUICK, QUICK_WINDOW, WINDOW
from realmap.lab.bench.measure import Contender, timed
from realmap.lab.bench.run import KEPT, Bench
from realmap.system import KernelHandle, boot
from realmap.user.process import Process

LONG, UNALIGNED, LEAD = 64 << 20, 1 << 20, 100
CALLERS, SERVERS = 8, 2


def serve_bench(me: Process, lazy_unmap: int) -> None:
    """One server, until it is killed."""
    with me.serve(handlers.bench_nop, handlers.bench_sum, lazy_unmap=lazy_unmap) as service:
        service.wait()


def _served(bench: Bench, servers: int, lazy_unmap: int = 0) -> tuple[KernelHandle, Process]:
    kernel = bench.enter_context(boot())
    for _ in range(servers):
        kernel.spawn(serve_bench, lazy_unmap)
    me = bench.enter_context(kernel.connect())
    sessions = [me.session("bench_nop", timeout=30) for _ in range(servers)]  # all of them serve by now
    for session in sessions:
        session.close()
    return kernel, me


def measure(bench: Bench) -> None:
    bench.say("serve: calls")
    _, direct = bench.kernel()
    _, me = _served(bench, 1)
    zeromq = bench.peer("pyzmq")
    contenders = [
        Contender("pyzmq REQ-REP", zeromq.batch("call")),
        Contender("call to the kernel", timed(lambda: direct.call("bench_nop")), "pyzmq REQ-REP"),
        Contender("call to a service", timed(lambda: me.call("bench_nop")), "call to the kernel"),
        Contender("a service, to pyzmq", timed(lambda: me.call("bench_nop")), "pyzmq REQ-REP"),
    ]
    bench.race("serve", contenders, work="calls")

    bench.say("serve: lending")
    _, keeping = _served(bench, 1, KEPT)
    with keeping.map(LONG) as kept, me.map(UNALIGNED + LEAD) as odd:
        for buffer in (kept, odd):
            with memoryview(buffer) as view:
                view[:] = bytes(len(view))
        part = odd.slice(LEAD, UNALIGNED)
        own = "sum in the caller's own memory"
        contenders = [
            Contender(own, timed(lambda: handlers.read(kept))),
            Contender("lent, kept", timed(lambda: keeping.call("bench_sum", kept)), own),
            Contender("pyzmq, sent", zeromq.batch("handover", LONG), own),
        ]
        bench.race("serve", contenders, LONG, "read")
        contenders = [
            Contender("pyzmq, sent", zeromq.batch("handover", UNALIGNED)),
            Contender("lent unaligned, mapped each time", timed(lambda: me.call("bench_sum", part)), "pyzmq, sent"),
        ]
        bench.race("serve", contenders, UNALIGNED, "read")

    bench.say(f"serve: {CALLERS} callers, {SERVERS} servers")
    kernel, _ = _served(bench, SERVERS)
    ours = bench.enter_context(closing(programs.crowd(CALLERS, kernel.path)))
    router = bench.enter_context(closing(programs.crowd(CALLERS, "", "router")))
    window = QUICK_WINDOW if bench.quick else WINDOW
    theirs = "pyzmq ROUTER-DEALER"
    contenders = [
        Contender(theirs, router.batch("all"), fixed=window),
        Contender("services", ours.batch("all"), theirs, window),
    ]
    bench.race("serve", contenders, work="callers", plan=QUICK if bench.quick else FULL)
